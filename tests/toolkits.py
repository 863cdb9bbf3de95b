"""What the toolkits that are installed have: the one place that skips a test for want of one.

TransformerLens 4 has no HookedTransformer, and SAELens asks for a TransformerLens before 4. A test
that needs one of them has a mark; what builds a model for a parameter of a test says so itself.
"""

from __future__ import annotations

from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement

LENS = version("transformer-lens")
HAS_HOOKED = int(LENS.partition(".")[0]) < 4
#: As SAELens says itself. Whether it can be imported is no question: where it should, it must.
HAS_SAES = all(
    asked.specifier.contains(LENS)
    for asked in map(Requirement, requires("sae-lens") or ())
    if asked.name == "transformer-lens"
)

_NO_HOOKED = f"TransformerLens {LENS} has no HookedTransformer"
_NO_SAES = f"SAELens does not support TransformerLens {LENS}"

needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason=_NO_HOOKED)
needs_saes = pytest.mark.skipif(not HAS_SAES, reason=_NO_SAES)


def require_hooked() -> None:
    """Skip the test that builds a HookedTransformer, where there is none."""
    if not HAS_HOOKED:
        pytest.skip(_NO_HOOKED)


def require_saes() -> None:
    """Skip the test that builds a model of SAELens, where there is none."""
    if not HAS_SAES:
        pytest.skip(_NO_SAES)
