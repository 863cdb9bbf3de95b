"""Feature activations of an SAE along a text, in rows put together as for its training."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict
from sae_lens import SAE
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, get_special_token_ids
from torch import Tensor, nn

from lch_plugin.adapters.hooked import real_tokens
from lch_plugin.adapters.transformer_lens import LensModel, check_token_ids
from lch_plugin.errors import InputError
from lch_plugin.files import check_contents
from lch_plugin.records import check_record
from lch_plugin.saes.caching.cache import Cache
from lch_plugin.saes.evaluation.sae_inputs import check_dictionary, check_width, heads_joined
from lch_plugin.saes.sources.hook_points import d_vocab, n_ctx, provenance, width
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.saes.sources.texts import check_dataset, load_text

_COLUMNS = ("tokens", "input_ids", "text", "problem")
# Of a centroid's record, what an SAE does not carry over to another value of: where both records
# say, and where to say nothing is to say that there is none.
_PLACE = ("site", "layer", "first_layer", "index", "stack")
_SAME = ("cotangent", "linearization", "weight_processing")
_OPTIONS = (
    *("cotangent_position", "output_positions"),
    *("radius", "sigma", "n_samples", "neighbourhood", "centre"),
)


class FeatureActs:
    """An SAE's feature activations along a text: iterate as often as you like, from the beginning.

    Yields for each batch tokens, activations, and how many of the tokens count. Those of the
    others are zero: of special tokens and positions that the SAE was trained without.

    Attributes:
        model: with the hook point attached while it is iterated.
        sae: on that hook point.
        hook_name: what it reads.
        text: tokens ``(row, pos)``, a `lch_plugin.saes.Cache`, or a dataset.
        context_size: tokens in a row.
        positions: of each row, those that the SAE was trained on.
        excluded: ids of tokens that it was trained without.
        batch_size: rows in a batch; the last may have fewer.

    Raises:
        InputError: nothing that can be read, no SAE on all of one hook point, a cache of another
            model, a model without a tokenizer, or ``n_tokens`` or ``batch_size`` below 1.
    """

    def __init__(
        self,
        model: LensModel | HookedModel,
        sae: SAE[Any],
        text: Any,
        *,
        hook_name: str | None = None,
        n_tokens: int | None = None,
        batch_size: int = 16,
    ) -> None:
        """Choose what to read; nothing runs yet. `lch_plugin.saes.features` says what is what."""
        self.model, self.sae, self.hook_name = model, sae, _hook_name(sae, hook_name)
        self.batch_size = batch_size
        if min(batch_size, 1 if n_tokens is None else n_tokens) < 1:
            raise InputError(
                f"n_tokens={n_tokens} and batch_size={batch_size} have to be at least 1."
            )
        if model.tokenizer is None:
            raise InputError(
                "the model has no tokenizer, without which there is no text to show. Load it with "
                "one, or set model.set_tokenizer(...)."
            )
        if self.hook_name in getattr(model, "acts_to_saes", {}):
            raise InputError(
                f"an SAE stands at {self.hook_name}, so its value is not to be had. Call "
                "reset_saes() first, and add it again afterwards."
            )
        metadata = sae.cfg.metadata
        self.text: Any
        if isinstance(text, Cache):
            text.check(model)
            self.text, self.context_size = text, text.context_size
        elif isinstance(text, Tensor):
            if text.ndim != 2 or text.is_floating_point() or not text.numel():
                raise InputError(
                    f"text is a tensor of shape {tuple(text.shape)} and dtype {text.dtype}: tokens "
                    "are integers of shape (row, pos)."
                )
            self.text, self.context_size = text, text.shape[1]
        else:
            self.context_size = int(metadata.context_size or n_ctx(model) or 128)
            self.text = check_dataset(model, load_text(text, streaming=True), self.context_size)
        self.n_rows = None if n_tokens is None else max(1, n_tokens // self.context_size)
        self.positions = slice(*(metadata.seqpos_slice or (None,)))
        excluded = metadata.exclude_special_tokens or []
        if excluded is True:
            excluded = get_special_token_ids(model.tokenizer)
        self.excluded = torch.tensor(excluded, dtype=torch.long)

    @property
    def root(self) -> nn.Module:
        """The model, out of SAELens' wrapper."""
        root: nn.Module = self.model.model if isinstance(self.model, HookedModel) else self.model
        return root

    @property
    def n_batches(self) -> int | None:
        """How many batches there are at most; None of a text that does not say."""
        n_rows = self.n_rows
        if isinstance(self.text, Cache | Tensor):
            own = self.text.n_sequences if isinstance(self.text, Cache) else len(self.text)
            n_rows = min(own, n_rows or own)
        return None if n_rows is None else -(-n_rows // self.batch_size)

    def check(self) -> None:
        """Refuse an SAE that was trained on other values than the hook point has now.

        Raises:
            InputError: it was.
        """
        sae, hook_name = self.sae, self.hook_name
        found = width(self.model, hook_name, self.context_size)
        check_width(hook_name, sae.cfg.d_in, found)
        then, now = sae.cfg.metadata.lch_centroid, provenance(self.model, hook_name)
        if not then:
            return
        kind = then.get("of", "centroid")  # `Rows` are of inputs and outputs too.
        if (kind == "centroid") != (now is not None):
            raise InputError(
                f"the SAE was trained on the {kind} of {then['site']}, and {hook_name} has "
                f"{'activations' if now is None else 'centroids'}. Pass the hook_name of the same."
            )
        if now is None:
            return
        # HuggingFace has other names for a place, and none for its layer.
        keys = _SAME if ("layer" in then) != ("layer" in now) else (*_PLACE, *_SAME)
        said = [key for key in keys if key in then and key in now]
        differing = [key for key in (*said, *_OPTIONS) if then.get(key) != now.get(key)]
        if differing:
            raise InputError(
                f"the SAE was trained on other centroids than {hook_name} gives now: "
                + "; ".join(f"{k} was {then.get(k)} and is {now.get(k)}" for k in differing)
                + ". Attach the same with lch.attach(model, ...) first, to the same model."
            )

    def tokens(self, ids: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Which ids are tokens and not padding."""
        found = real_tokens(self.model, ids, packed=True)
        return torch.ones_like(ids, dtype=torch.bool) if found is None else found

    def counts(self, tokens: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Which tokens count: not those that the SAE was trained without, and no padding."""
        counts = torch.zeros_like(tokens, dtype=torch.bool)
        counts[:, self.positions] = ~torch.isin(tokens[:, self.positions], self.excluded)
        return counts & self.tokens(tokens)

    def __iter__(
        self,
    ) -> Iterator[tuple[Int[Tensor, "row pos"], Float[Tensor, "row pos d_sae"], int]]:
        for tokens, values in self.batches():
            yield tokens, *self.firing(tokens, values)

    def firing(
        self, tokens: Int[Tensor, "row pos"], values: Float[Tensor, "row pos ..."]
    ) -> tuple[Float[Tensor, "row pos d_sae"], int]:
        """Feature activations of values of the hook point, and how many of the tokens count."""
        counts, feature_acts = self.counts(tokens), self.encode(values)
        feature_acts[~counts.to(feature_acts.device)] = 0
        return feature_acts, int(counts.sum())

    def batches(
        self,
    ) -> Iterator[tuple[Int[Tensor, "row pos"], Float[Tensor, "row pos ..."]]]:
        """Tokens, and what the hook point has on them."""
        if isinstance(self.text, Cache):
            n_rows = min(self.text.n_sequences, self.n_rows or self.text.n_sequences)
            for first in range(0, n_rows, self.batch_size):
                chunk = slice(first, min(first + self.batch_size, n_rows))
                yield self.text.token_ids(chunk), self.text.values(self.hook_name, chunk)
            return
        rows = itertools.islice(self._rows(), self.n_rows)
        while batch := list(itertools.islice(rows, self.batch_size)):
            tokens = torch.stack(batch)
            yield tokens, self.values(tokens)

    def values(self, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos ..."]:
        """What the hook point has on tokens."""
        check_token_ids(d_vocab(self.model), int(tokens.min()), int(tokens.max()))
        _, cache = self.model.run_with_cache(
            tokens.to(next(self.model.parameters()).device),
            names_filter=[self.hook_name],
            stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(self.hook_name),
        )
        found: Tensor = cache[self.hook_name]
        return found

    def encode(self, values: Float[Tensor, "row pos ..."]) -> Float[Tensor, "row pos d_sae"]:
        """Feature activations, not sparse, of values of the hook point, with heads joined."""
        with heads_joined(self.sae):
            feature_acts: Tensor = self.sae.encode(
                values.flatten(2).to(self.sae.device, self.sae.dtype)
            )
        return feature_acts.to_dense()  # SAELens' TopK can give them sparse in training.

    def _rows(self) -> Iterator[Int[Tensor, " pos"]]:
        if isinstance(self.text, Tensor):
            yield from self.text.cpu()
            return
        texts = iter(self.text)
        first: Any = next(texts)
        column = next(c for c in _COLUMNS if c in first)
        values = (row[column] for row in itertools.chain([first], texts))
        if isinstance(first[column], str):
            yield from self._tokenised(values)
            return
        for ids in values:
            yield torch.as_tensor(ids[: self.context_size], dtype=torch.long)

    def _tokenised(self, texts: Iterator[str]) -> Iterator[Int[Tensor, " pos"]]:
        """Rows as SAELens puts them together for training."""
        metadata, tokenizer = self.sae.cfg.metadata, self.model.tokenizer
        ids = (
            torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
            for text in texts
        )
        separator = metadata.get("sequence_separator_token", "bos")
        yield from concat_and_batch_sequences(
            (row for row in ids if len(row)),
            self.context_size,
            tokenizer.bos_token_id if metadata.get("prepend_bos", True) else None,
            sequence_separator_token_id=get_special_token_from_cfg(separator, tokenizer),
            disable_concat_sequences=bool(metadata.disable_concat_sequences),
        )


def _hook_name(sae: Any, hook_name: str | None) -> str:
    check_dictionary(sae)
    if sae.cfg.metadata.hook_head_index is not None:
        raise InputError(
            f"the SAE reads head {sae.cfg.metadata.hook_head_index} alone; pass one that reads "
            "all heads together."
        )
    hook_name = hook_name or sae.cfg.metadata.hook_name
    if not hook_name:
        raise InputError(
            "the SAE's metadata say nothing of the hook it reads. Pass hook_name (--hook), such as "
            "'blocks.2.mlp.hook_centroid'."
        )
    return str(hook_name)


def load_sae(path: str | Path, device: str = "cpu") -> SAE[Any]:
    """An SAE from a directory that SAELens wrote.

    Raises:
        InputError: there is none, or its files are not what they were when it was written.
    """
    check_contents(path, "Give another SAE, or train it again.")
    try:
        with warnings.catch_warnings():
            # How SAELens would load the model, which is none of its business here.
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty")
            sae = SAE.load_from_disk(str(path), device=device)
    except Exception as error:  # Of any type, and all of them about the files.
        raise InputError(
            f"{path} holds no SAE that SAELens {version('sae-lens')} can load: {error}. Give a "
            "directory with cfg.json and sae_weights.safetensors."
        ) from error
    record = sae.cfg.metadata.lch_centroid
    if record:
        check_record(record, _Centroid, f"lch_centroid of {path}", "Give another SAE.")
    for name, weight in sae.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise InputError(f"{path}: {name} has NaN or infinite values. Train it again.")
    return sae


class _Centroid(BaseModel):
    """Of what an SAE's metadata say of centroids, what is read here; of `Rows` it is less."""

    model_config = ConfigDict(strict=True)

    site: str
    cotangent: str | list[Any] = "ones"
    layer: int | None = None
    of: Literal["centroid", "input", "output"] = "centroid"


def describe_text(text: Any) -> str:
    """Where a text is from, as far as it says."""
    if isinstance(text, Cache):
        return str(text.path)
    if isinstance(text, str | Path):
        return str(text)
    # As `load_text` has it of what it reads.
    kind = getattr(getattr(text, "info", None), "description", "") or type(text).__name__
    return f"{kind}: {len(text):,} rows" if hasattr(text, "__len__") else kind
