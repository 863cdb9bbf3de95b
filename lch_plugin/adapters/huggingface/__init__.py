"""Centroids of any module of any model, HuggingFace's above all.

Modules, each knowing those before it: `names`, which components are meant; `calls`, what happens
around a module's calls; `readers`, how a centroid comes about; `attaching`.

Private attributes used, for want of a public way:
    ``Module._forward_hooks`` and ``._forward_pre_hooks`` (torch), silenced while
    `lch_plugin.adapters.structure` tries a module out.
"""

from lch_plugin.adapters.huggingface.attaching import (
    CentroidCache,
    Handle,
    attach,
    context_length,
    make_readers,
    model_name,
    resolve_modules,
)
from lch_plugin.adapters.huggingface.names import Target, mlp_names, resolve
from lch_plugin.adapters.huggingface.readers import Reader

__all__ = [
    "CentroidCache",
    "Handle",
    "Reader",
    "Target",
    "attach",
    "context_length",
    "make_readers",
    "mlp_names",
    "model_name",
    "resolve",
    "resolve_modules",
]
