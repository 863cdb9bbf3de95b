"""Centroids instead of activations, for the interpretability toolkits you already use.

>>> import lch_plugin as lch
>>> model = lch.load_demo_model()
>>> handle = lch.attach(model)
>>> _, cache = model.run_with_cache("I climbed up the pear tree", names_filter=handle.hook_names)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lch_plugin.errors import (
    AttachError,
    ClusterError,
    InputError,
    LCHError,
    NonFiniteError,
    NotDifferentiableError,
    OutputError,
    PaddingWarning,
    SiteError,
    ToolkitError,
    VanishingCentroidError,
)

if TYPE_CHECKING:
    from lch_plugin import (
        alignment,
        circuits,
        cluster,
        concepts,
        cotangents,
        diagnostics,
        diff,
        lens,
        probes,
        saes,
        saliency,
        steering,
    )
    from lch_plugin.adapters import huggingface, nnsight
    from lch_plugin.adapters.transformer_lens import attach
    from lch_plugin.centroids import (
        AffineExpert,
        LocalCentroid,
        affine_expert,
        centroid,
        local_centroid,
        sample_neighbourhood,
    )
    from lch_plugin.demo import load_demo_model
    from lch_plugin.demo.vision import load_demo_vision_model
    from lch_plugin.lens import jvp, spectrum
    from lch_plugin.linearization import detached
    from lch_plugin.loading import LoadedModel, load
    from lch_plugin.sites import Site

__version__ = version("lch-plugin")

__all__ = [
    "AffineExpert",
    "AttachError",
    "ClusterError",
    "InputError",
    "LCHError",
    "LoadedModel",
    "LocalCentroid",
    "NonFiniteError",
    "NotDifferentiableError",
    "OutputError",
    "PaddingWarning",
    "Site",
    "SiteError",
    "ToolkitError",
    "VanishingCentroidError",
    "affine_expert",
    "alignment",
    "attach",
    "centroid",
    "circuits",
    "cluster",
    "concepts",
    "cotangents",
    "detached",
    "diagnostics",
    "diff",
    "huggingface",
    "jvp",
    "lens",
    "load",
    "load_demo_model",
    "load_demo_vision_model",
    "local_centroid",
    "nnsight",
    "probes",
    "saes",
    "saliency",
    "sample_neighbourhood",
    "spectrum",
    "steering",
]

# torch takes two seconds to import and a toolkit some more: each is waited for where it is used, so
# that `lch --help` and an error in arguments come at once.
_LAZY_FUNCTIONS = {
    **dict.fromkeys(
        (
            "AffineExpert",
            "LocalCentroid",
            "affine_expert",
            "centroid",
            "local_centroid",
            "sample_neighbourhood",
        ),
        "lch_plugin.centroids",
    ),
    "Site": "lch_plugin.sites",
    "detached": "lch_plugin.linearization",
    "attach": "lch_plugin.adapters.transformer_lens",
    "LoadedModel": "lch_plugin.loading",
    "jvp": "lch_plugin.lens",
    "load": "lch_plugin.loading",
    "load_demo_model": "lch_plugin.demo",
    "load_demo_vision_model": "lch_plugin.demo.vision",
    "spectrum": "lch_plugin.lens",
}
_LAZY_MODULES = {
    "alignment": "lch_plugin.alignment",
    "circuits": "lch_plugin.circuits",
    "cluster": "lch_plugin.cluster",
    "concepts": "lch_plugin.concepts",
    "cotangents": "lch_plugin.cotangents",
    "diagnostics": "lch_plugin.diagnostics",
    "diff": "lch_plugin.diff",
    "huggingface": "lch_plugin.adapters.huggingface",
    "lens": "lch_plugin.lens",
    "nnsight": "lch_plugin.adapters.nnsight",
    "probes": "lch_plugin.probes",
    "saes": "lch_plugin.saes",
    "saliency": "lch_plugin.saliency",
    "steering": "lch_plugin.steering",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return import_module(_LAZY_MODULES[name])
    if name in _LAZY_FUNCTIONS:
        return getattr(import_module(_LAZY_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'lch_plugin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
