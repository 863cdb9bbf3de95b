"""What a hook point has on the tokens of texts, as rows for an SAE: no padding among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor

from lch_plugin.adapters.hooked import real_tokens
from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel, as_tokens
from lch_plugin.errors import InputError
from lch_plugin.padding import mark_tokens
from lch_plugin.saes.evaluation.feature_acts import FeatureActs
from lch_plugin.saes.sources.hook_points import attached, check_model
from lch_plugin.saes.sources.hooked_model import HookedModel


class TokenRows:
    """Rows of a hook point on texts, each a prompt of its own.

    Prompts of one length run together, so that nothing is padded whatever the model makes of it.
    """

    def __init__(
        self,
        model: LensModel | HookedModel,
        sae: SAE[Any],
        texts: str | Sequence[str] | Int[Tensor, "row pos"],
        hook_name: str | None,
        *,
        special_tokens: bool,
        batch_size: int,
    ) -> None:
        """Choose what to read; nothing runs yet. Arguments as `lch_plugin.saes.evaluate`."""
        check_model(model)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r} must be an integer, at least 1.")
        self._model, self._batch_size = model, batch_size
        self._prompts = _prompts(model, texts)
        # What it checks of an SAE and a hook point, this needs as well.
        self._feature_acts = FeatureActs(model, sae, self._prompts[0][None], hook_name=hook_name)
        special = [] if special_tokens else get_special_token_ids(model.tokenizer)
        self._excluded = torch.tensor(special, dtype=torch.long)

    def __iter__(self) -> Iterator[Float[Tensor, "_ d_in"]]:
        by_length: dict[int, list[Tensor]] = defaultdict(list)
        for ids in self._prompts:
            by_length[len(ids)].append(ids)
        with attached(self._model, [self._feature_acts.hook_name]), evaluating(self._model):
            self._feature_acts.check()
            for prompts in by_length.values():
                for start in range(0, len(prompts), self._batch_size):
                    ids = torch.stack(prompts[start : start + self._batch_size])
                    mark_tokens(ids)
                    counts = self._feature_acts.counts(ids) & ~torch.isin(ids, self._excluded)
                    values = self._feature_acts.values(ids).flatten(2)
                    yield values[counts.to(values.device)]


def _prompts(
    model: LensModel | HookedModel, texts: str | Sequence[str] | Int[Tensor, "row pos"]
) -> list[Int[Tensor, " own"]]:
    """Token ids of each prompt, without padding, on the CPU."""
    if isinstance(texts, Tensor):
        if texts.ndim != 2 or texts.is_floating_point() or not texts.numel():
            raise InputError(
                f"texts is a tensor of shape {tuple(texts.shape)} and dtype {texts.dtype}: tokens "
                "are integers of shape (row, pos)."
            )
        tokens = real_tokens(model, texts)
        tokens = torch.ones_like(texts, dtype=torch.bool) if tokens is None else tokens
        found = [ids[own].cpu() for ids, own in zip(texts, tokens, strict=True)]
    else:
        listed = [texts] if isinstance(texts, str) else list(texts)
        wrong = [type(text).__name__ for text in listed if not isinstance(text, str)]
        if wrong:
            raise InputError(f"texts hold {wrong[:3]}: pass strings, or a tensor of token ids.")
        if model.tokenizer is None:
            raise InputError(
                "the model has no tokenizer, so that it reads no text. Pass token ids."
            )
        if isinstance(model, HookedModel):
            found = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in listed]
        else:
            found = [as_tokens(model, text)[0].cpu() for text in listed]
    found = [ids for ids in found if len(ids)]
    if not found:
        raise InputError("there is no text: pass at least one prompt with a token in it.")
    return found
