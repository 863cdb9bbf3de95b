"""Concepts as directions among centroids or activations: found, tested, and taken out.

Rows ``x`` ``(n, d_in)`` are centroids, or inputs, of one component at one position each; labels say
which of them have the concept. A direction lies in the component's input space either way, so that
`lch_plugin.steering` adds it to what the component reads.

Three ways to a direction: `difference_of_means`, `cav` (a linear classifier's normal) and
`boundary` (normals between near pairs of opposite classes). `tcav` asks whether a class's logit
rises along it, beside directions of no concept. `leace` and `inlp` take a concept out of rows, and
`refit` says whether a new probe finds it again.
"""

from lch_plugin.concepts.directions import (
    Boundary,
    Concept,
    boundary,
    cav,
    difference_of_means,
)
from lch_plugin.concepts.erasure import Erasure, Refit, inlp, leace, refit
from lch_plugin.concepts.sensitivity import TCAV, tcav, tcav_score

__all__ = [
    "TCAV",
    "Boundary",
    "Concept",
    "Erasure",
    "Refit",
    "boundary",
    "cav",
    "difference_of_means",
    "inlp",
    "leace",
    "refit",
    "tcav",
    "tcav_score",
]
