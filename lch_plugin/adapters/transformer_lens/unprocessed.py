"""A loaded model as a HookedTransformer whose weights are as they were."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lch_plugin.adapters.checks import AFFINE_TOLERANCE
from lch_plugin.adapters.transformer_lens.toolkit import (
    HookedTransformer,
    loading_from_pretrained,
)
from lch_plugin.errors import InputError, ToolkitError
from lch_plugin.records import reason

_N_TOKENS = 8


def hooked_transformer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> HookedTransformer:
    """A HookedTransformer with the weights of a HuggingFace model, which stays as it is.

    Nothing is folded or centered, so centroids are those of the model itself. Its logits for a few
    tokens are held to the model's: TransformerLens' conversions are written out for each family.

    Args:
        model: a language model.
        tokenizer: its own.
        name: of the model, for the record and for messages.

    Raises:
        ToolkitError: this version of TransformerLens has no HookedTransformer.
        InputError: TransformerLens has no conversion for the model, or one that computes something
            else.
    """
    if loading_from_pretrained is None:
        raise ToolkitError(
            "TransformerLens 4 has no HookedTransformer: use .bridge(), or pip install "
            "'transformer-lens<4'."
        )
    settings = {"device": str(model.device), "dtype": model.dtype}
    try:
        # TransformerLens takes a path or a name it knows, and reads the family from its letters:
        # a directory with nothing but the config says neither too much nor too little.
        with tempfile.TemporaryDirectory(prefix="lch-") as directory:
            config = model.config.to_dict()
            # Of GPT-2 it reads a name that transformers no longer writes.
            config.setdefault("n_ctx", config.get("n_positions"))
            (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            cfg = loading_from_pretrained.get_pretrained_model_config(
                directory, hf_cfg=config, **settings
            )
            weights = loading_from_pretrained.get_pretrained_state_dict(
                directory, cfg, model, dtype=model.dtype
            )
        cfg.model_name = name
        if tokenizer is None:  # Or one would be looked for in the directory, which is gone.
            cfg.tokenizer_name = None
        hooked = HookedTransformer(cfg, tokenizer)
        hooked.load_and_process_state_dict(
            weights,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    except Exception as error:  # Of any type, for a family it does not know.
        raise InputError(
            f"TransformerLens cannot make a HookedTransformer of {name}, a "
            f"{type(model).__name__}; .bridge() and lch.huggingface.attach may take it. It says: "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    hooked = hooked.to(model.dtype).eval()
    _check_logits(hooked, model, name)
    return hooked


@torch.no_grad()
def _check_logits(hooked: HookedTransformer, model: PreTrainedModel, name: str) -> None:
    ids = torch.arange(1, _N_TOKENS + 1, device=model.device)[None] % model.config.vocab_size
    want: Tensor = model(ids).logits.log_softmax(-1)
    found = hooked(ids).to(want).log_softmax(-1)[..., : want.shape[-1]]
    off = float((found - want).norm() / (want - want.mean(-1, keepdim=True)).norm())
    if not off <= AFFINE_TOLERANCE[model.dtype]:
        raise InputError(
            f"the HookedTransformer that TransformerLens makes of {name}, a "
            f"{type(model).__name__}, computes something else: its logits differ by {off:.2g} of "
            "their norm. Use .bridge()."
        )
