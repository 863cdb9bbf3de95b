"""The metric of an answer, as a plain function of a prompt's token embeddings.

The answer is given to the model (teacher forcing): one pass reads the probability of each of its
tokens. Only the prompt's embeddings are the input: those of the answer stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lch_plugin.adapters import huggingface
from lch_plugin.errors import InputError
from lch_plugin.loading import LoadedModel
from lch_plugin.mlp import at_least_float32
from lch_plugin.saliency.checks import check_evaluation

Quantity = Literal["log_probability", "logit"]


class AnswerMetric:
    """How strongly a model expects an answer after a prompt, from the prompt's token embeddings.

    With ``log_probability`` it is the sum over the answer's tokens of their log-probabilities, in
    nats, less that of the foil if there is one. With ``logit`` it is the sum of their logits, which
    is linear in the last residual stream. Of single tokens both differences are the same number.
    Logits are taken to float32 first if the model has them in half precision.

    Attributes:
        embeddings: of the prompt, ``(pos, d_model)``, as the model has them.
        baseline: the mean of all token embeddings, ``(d_model,)``: what a removed token becomes.
        tokens: texts of the prompt's tokens.
        answer, foil: token ids; an empty foil if there is none.

    Args:
        model: from `lch_plugin.load`, a HuggingFace language model, or a TransformerBridge. A
            HuggingFace model reads what its tokenizer makes of the text, a TransformerBridge what
            ``to_tokens`` makes of it, which may begin with one token more.
        prompt: text, or its token ids.
        answer, foil: texts that follow the prompt at once, with their leading space; or token ids.
        quantity: what is summed over tokens.
        tokenizer: of a HuggingFace model that does not come from `lch_plugin.load`.

    Raises:
        InputError: an empty prompt or answer, tokens of an answer that merge with those of the
            prompt, an answer equal to the foil, a text longer than the context, no tokenizer, or a
            model that predicts no next token or would drop units at random.

    Example:
        >>> model = lch.load_demo_model()
        >>> metric = lch.saliency.AnswerMetric(model, "Tom saw an apple and picked an", " apple")
        >>> metric(metric.embeddings[None]).shape
        torch.Size([1])
    """

    def __init__(
        self,
        model: Any,
        prompt: str | Sequence[int],
        answer: str | Sequence[int],
        foil: str | Sequence[int] | None = None,
        *,
        quantity: Quantity = "log_probability",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if quantity not in get_args(Quantity):
            raise InputError(f"quantity={quantity!r}: give one of {get_args(Quantity)}.")
        self._model = model.model if isinstance(model, LoadedModel) else model
        self._is_bridge = hasattr(self._model, "to_tokens")
        _check_predicts_next_token(self._model)
        check_evaluation(self._model)
        self._tokenizer = tokenizer or getattr(
            model, "processor" if isinstance(model, LoadedModel) else "tokenizer", None
        )
        self.quantity = quantity
        prompt_ids = self._ids(prompt)
        if not prompt_ids or (isinstance(prompt, str) and not prompt.strip()):
            raise InputError("the prompt is empty: there is no token to score.")
        self.answer = self._continuation(prompt, prompt_ids, answer, "answer")
        self.foil = [] if foil is None else self._continuation(prompt, prompt_ids, foil, "foil")
        if self.answer == self.foil:
            raise InputError(f"answer and foil are both {answer!r}: give two that differ.")
        self._check_length(len(prompt_ids) + max(len(self.answer), len(self.foil)) - 1)
        table = self._model.W_E if self._is_bridge else self._model.get_input_embeddings().weight
        self._device = table.device
        if unknown := {*prompt_ids, *self.answer, *self.foil} - set(range(len(table))):
            raise InputError(
                f"token ids {sorted(unknown)} are not in the vocabulary, 0 to {len(table) - 1}: "
                "give those of this model's tokenizer."
            )
        self._keeps_last = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self.ids = torch.tensor(prompt_ids, device=self._device)
        self.tokens = self._texts(prompt_ids)
        self.embeddings = self._embed(self.ids)
        self.baseline = self._mean_embedding(table)

    def __call__(self, x: Float[Tensor, "n pos d_model"]) -> Float[Tensor, " n"]:
        """The metric at prompts given as embeddings."""
        x = x.to(self.embeddings)  # Captum's noise is float32, whatever the model is.
        value = self._of(x, self.answer)
        return value - self._of(x, self.foil) if self.foil else value

    def _of(self, x: Tensor, answer: list[int]) -> Tensor:
        ids = torch.tensor(answer, device=self._device)
        if len(answer) > 1:  # What the last token of the answer leads to is not asked.
            x = torch.cat([x, self._embed(ids[:-1]).to(x).expand(len(x), -1, -1)], 1)
        logits = self._logits(x, ids)[:, -len(answer) :]
        logits = logits.to(at_least_float32(logits))
        if self.quantity == "log_probability":
            logits = logits.log_softmax(-1)
        return logits.gather(-1, ids.expand(len(x), -1)[..., None]).sum((1, 2))

    def _logits(self, x: Tensor, answer: Tensor) -> Tensor:
        if not self._is_bridge:
            # Of the last positions alone, where the model can: a vocabulary is wide.
            last = {"logits_to_keep": len(answer)} if self._keeps_last else {}
            logits: Tensor = self._model(inputs_embeds=x, use_cache=False, **last).logits
            return logits
        from lch_plugin.adapters.transformer_lens import HookedTransformer, run_edited

        text = torch.cat([self.ids, answer[:-1]]).expand(len(x), -1)
        # A bridge has its hook points within its modules.
        is_hooked = isinstance(self._model, HookedTransformer)
        point = "hook_embed" if is_hooked else "embed.hook_out"
        return run_edited(self._model, text, {point: lambda _: x})

    def _embed(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            embed = self._model.embed if self._is_bridge else self._model.get_input_embeddings()
            found: Tensor = embed(ids[None])[0]
            return found.detach()

    def _mean_embedding(self, table: Tensor) -> Tensor:
        # Of some models the embedding is more than its table (a scale): so by way of the model.
        ids = torch.arange(len(table), device=self._device)
        total = sum(self._embed(part).double().sum(0) for part in ids.split(8192))
        return (total / len(table)).to(self.embeddings)  # type: ignore[union-attr]

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        if not isinstance(text, str):
            return [int(i) for i in text]
        if self._tokenizer is None:
            raise InputError("the model has no tokenizer: pass tokenizer=, or token ids.")
        if self._is_bridge:
            ids: list[int] = self._model.to_tokens(text, truncate=False)[0].tolist()
            return ids
        return list(self._tokenizer(text)["input_ids"])

    def _continuation(
        self, prompt: str | Sequence[int], ids: list[int], text: str | Sequence[int], role: str
    ) -> list[int]:
        if not isinstance(text, str):
            after = [int(i) for i in text]
        elif not isinstance(prompt, str):
            raise InputError(
                f"the {role} {text!r} is text and the prompt token ids: give both in one form."
            )
        else:
            whole = self._ids(prompt + text)
            if whole[: len(ids)] != ids:
                raise InputError(
                    f"the {role} {text!r} merges with the prompt's last token: begin it with a "
                    "space and let the prompt end without one, or give token ids."
                )
            after = whole[len(ids) :]
        if not after:
            raise InputError(f"the {role} {text!r} has no token: give one, such as ' Paris'.")
        return after

    def _check_length(self, n_pos: int) -> None:
        n_ctx = (
            self._model.cfg.n_ctx if self._is_bridge else huggingface.context_length(self._model)
        )
        if n_ctx is not None and n_pos > n_ctx:
            raise InputError(
                f"prompt and answer have {n_pos} tokens, more than the model's context of {n_ctx}: "
                "shorten the prompt."
            )

    def _texts(self, ids: list[int]) -> list[str]:
        if self._tokenizer is None:
            return [str(i) for i in ids]
        return [self._tokenizer.decode([i]) for i in ids]


def _check_predicts_next_token(model: Any) -> None:
    """Refuse a model of transformers whose logits are of something else, or that has none."""
    if not isinstance(model, PreTrainedModel):
        return
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(
            f"a {type(model).__name__} predicts no next token, so no answer after a prompt: give a "
            "causal language model."
        )
