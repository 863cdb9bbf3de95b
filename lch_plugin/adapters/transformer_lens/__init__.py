"""Centroids as ordinary TransformerLens hook points.

`attach` adds a `HookPoint`, ``hook_centroid``, to each component that a `lch_plugin.Site` names, on
a TransformerBridge or HookedTransformer (SAELens' subclasses of both included). It is a read-out
that nothing downstream consumes: ``run_with_cache``, ``run_with_hooks`` and SAELens see a centroid
under a hook name like any other, editing it never changes the logits, and it is computed only when
something listens.

Three ideas. A *gate* is where a tensor passes (`gates`). A *reader* is what is computed from that
(`readers`: `closed_forms`, `vjps`). A *run* is one forward pass (`runs`).

Modules, each knowing those before it: `toolkit`, the classes of TransformerLens; `gates`;
`architecture` and `mlps`, where a model keeps its parts; `hook_points` of ours; `stand_ins`, for
methods of the model; `runs`; `readers`; `model_end`, cotangents known only from the logits;
`closed_forms` and `vjps`; `tracker`, who meets where; `self_check`, the proof on three tokens;
`attaching`. For circuits: `inputs`, token ids and what MLPs read on them; `nodes`, the heads,
neurons and MLPs that make them up; and `residual`, where these read and write the residual stream.
For loading: `unprocessed`, a HookedTransformer with a HuggingFace model's own weights.

Private attributes used, for want of a public way:
    ``TransformerBridge._hook_registry``, ``GeneralizedComponent._hook_registry`` and
    ``._register_hook`` (transformer-lens 3.9): hook points added after boot are in no registry.
    ``TransformerBridge._weights_processed``: whether weights were processed, for the record.
    ``Module._forward_hooks`` and ``._backward_hooks`` (torch): whether a hook point has listeners
    of any kind, and silencing them. ``Module._modules``: what stands at a hook point now.
"""

from lch_plugin.adapters.transformer_lens.attaching import Handle, attach
from lch_plugin.adapters.transformer_lens.inputs import (
    as_tokens,
    check_token_ids,
    mlp_inputs,
    near_token,
    recorded_mlp_inputs,
)
from lch_plugin.adapters.transformer_lens.mlps import (
    MLPParts,
    locate_mlps,
    weight_processing,
)
from lch_plugin.adapters.transformer_lens.nodes import (
    NodeKind,
    NodePoint,
    node_points,
    pattern_names,
    run_edited,
)
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.self_check import disagreements
from lch_plugin.adapters.transformer_lens.toolkit import (
    HookedTransformer,
    HookPoint,
    LensModel,
    TransformerBridge,
)
from lch_plugin.adapters.transformer_lens.tracker import attached_readers
from lch_plugin.adapters.transformer_lens.unprocessed import hooked_transformer

__all__ = [
    "Handle",
    "HookPoint",
    "HookedTransformer",
    "LensModel",
    "MLPParts",
    "NodeKind",
    "NodePoint",
    "Reader",
    "TransformerBridge",
    "as_tokens",
    "attach",
    "attached_readers",
    "check_token_ids",
    "disagreements",
    "hooked_transformer",
    "locate_mlps",
    "mlp_inputs",
    "near_token",
    "node_points",
    "pattern_names",
    "recorded_mlp_inputs",
    "run_edited",
    "weight_processing",
]
