"""The exact lens: what the residual stream at each layer and position adds to the logits.

`read` is the lens, and a `Reading` what it shows. `flow` says which prompt tokens a logit comes
from, and through which layers. `jvp` and `spectrum`, which `lch_plugin` has
under its own name too, are the other side of a centroid: products with a Jacobian from the right,
and its leading singular triples. `average` makes TransformerLens' `JacobianLens`, and `load` reads
one.
"""

from lch_plugin.lens.averages import average, load
from lch_plugin.lens.components import component_map, jvp
from lch_plugin.lens.flows import Flow, flow
from lch_plugin.lens.reading import Reading, TopTokens, read
from lch_plugin.lens.singular import Spectrum, spectrum

__all__ = [
    "Flow",
    "Reading",
    "Spectrum",
    "TopTokens",
    "average",
    "component_map",
    "flow",
    "jvp",
    "load",
    "read",
    "spectrum",
]
