"""Centroids as ordinary TransformerLens hook points.

`attach` adds a `HookPoint` called ``hook_centroid`` to each MLP of a TransformerBridge or
HookedTransformer (SAELens' subclasses of both included). It is a read-out that nothing
downstream consumes: ``run_with_cache``, ``run_with_hooks`` and SAELens see a centroid under a
hook name like any other, editing it never changes the logits, and it is computed only when
something listens.

Modules: `sites`, where each MLP keeps its parts, and the hooks that compute its centroid;
`attaching`, making these part of a model and undoing it; `self_check`, the proof on three tokens;
`inputs`, token ids and what the MLPs read on them.

Private attributes used, for want of a public way:
    ``TransformerBridge._hook_registry``, ``GeneralizedComponent._hook_registry`` and
    ``._register_hook`` (transformer-lens 3.9): hook points added after boot are in no registry.
    ``TransformerBridge._weights_processed``: whether weights were processed, for the record.
    ``Module._forward_hooks`` (torch): whether a hook point has listeners of any kind.
"""

from lch_plugin.adapters.transformer_lens.attaching import Handle, attach, attached_sites
from lch_plugin.adapters.transformer_lens.inputs import as_tokens, check_token_ids, mlp_inputs
from lch_plugin.adapters.transformer_lens.self_check import self_check
from lch_plugin.adapters.transformer_lens.sites import (
    CentroidSite,
    LensModel,
    integers,
    locate_mlps,
    weight_processing,
)

__all__ = [
    "CentroidSite",
    "Handle",
    "LensModel",
    "as_tokens",
    "attach",
    "attached_sites",
    "check_token_ids",
    "integers",
    "locate_mlps",
    "mlp_inputs",
    "self_check",
    "weight_processing",
]
