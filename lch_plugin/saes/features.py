"""What the features of an SAE are about: text that excites them, logits, neurons, neighbours.

Two passes over a text, in memory that does not grow with it: how often and how strongly each
feature fires, and then histograms and excerpts of those that were chosen. On the excerpts alone,
what each feature's direction does (`lch_plugin.saes.effects`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.progress import track
from sae_lens import SAE, Transcoder
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, get_special_token_ids
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel, check_token_ids
from lch_plugin.contexts import Context, context
from lch_plugin.errors import InputError
from lch_plugin.files import new_directory
from lch_plugin.report import write_report
from lch_plugin.saes.cache import Cache
from lch_plugin.saes.checks import check_width
from lch_plugin.saes.effects import closed_form, neuron_terms, push
from lch_plugin.saes.evaluate import DENSE
from lch_plugin.saes.excerpts import Excerpts, Histogram, Survey
from lch_plugin.saes.hooked import HookedModel
from lch_plugin.saes.hooks import attached, check_model, d_vocab, provenance, width
from lch_plugin.saes.records import record
from lch_plugin.saes.texts import load_text

N_BINS, N_BANDS, N_IN_BAND = 40, 4, 3
N_TOKENS, N_NEURONS, N_NEIGHBOURS = 8, 6, 5
_TOKEN_COLUMNS = ("tokens", "input_ids")


@dataclass(frozen=True)
class Band:
    """A quarter of a feature's range of activations.

    Attributes:
        low, high: activations in it are above ``low`` and at most ``high``.
        n_tokens: how many there are.
        contexts: some of them, drawn at random, at most one a row of the text.
    """

    low: float
    high: float
    n_tokens: int
    contexts: list[Context]


@dataclass(frozen=True)
class TokenLogit:
    """A token, and by how much its logit moves for each unit of length along a direction."""

    token: str
    logit: float


@dataclass(frozen=True)
class NeuronTerm:
    """A neuron of the component, and what it adds to ``mu . d``."""

    index: int
    term: float


@dataclass(frozen=True)
class Neighbour:
    """Another feature, and the cosine of the two decoder rows."""

    index: int
    cosine: float


@dataclass(frozen=True)
class Feature:
    """One feature of an SAE. ``d`` is its decoder row at unit length.

    Attributes:
        index: which of the ``d_sae``.
        density: share of tokens on which it fires.
        energy: its share of the sum of the squared activations of all features.
        maximum: its highest activation.
        histogram: tokens by activation, in equal bins from 0 to ``maximum``.
        contexts: where it is most active, one a row of the text.
        bands: the lower quarters of its range, highest first.
        promoted, suppressed: next tokens whose logits rise and fall most to first order when what
            the component reads (or the value of an ordinary hook point) moves along ``d`` at the
            token that excites the feature: the mean over ``contexts``, less the mean over the
            vocabulary. See `lch_plugin.saes.effects.push`.
        agreement: mean cosine between that of each context and the mean; None if it never fires.
        along: mean of ``mu . d`` over ``contexts``; None unless the SAE is on the centroids of an
            MLP in closed form.
        neurons: neurons with the largest terms in that sum, by magnitude.
        neighbours: features with the nearest decoder rows.
    """

    index: int
    density: float
    energy: float
    maximum: float
    histogram: list[int]
    contexts: list[Context]
    bands: list[Band]
    promoted: list[TokenLogit]
    suppressed: list[TokenLogit]
    agreement: float | None
    along: float | None
    neurons: list[NeuronTerm]
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class FeatureReport:
    """Some features of an SAE.

    Attributes:
        hook_name: what the SAE reads.
        record: model, centroid, SAE, text, settings and versions, in terms of JSON.
        n_tokens: of text.
        density: of every feature of the SAE.
        energy: of every feature of the SAE.
        features: those that were chosen.
    """

    hook_name: str
    record: dict[str, Any]
    n_tokens: int
    density: Float[Tensor, " d_sae"]
    energy: Float[Tensor, " d_sae"]
    features: list[Feature]

    def save(self, path: str | Path) -> None:
        """Write a page to look at, ``report.html``, and the same as ``results.json``.

        Args:
            path: directory to make.

        Raises:
            OutputError: it holds other content or cannot be written.
        """
        with new_directory(path) as directory:
            write_report(directory, "features.html", self.to_dict(), {})

    def to_dict(self) -> dict[str, Any]:
        """In terms of JSON; of the features that were not chosen only how many fire."""
        return {
            "hook_name": self.hook_name,
            "record": self.record,
            "n_tokens": self.n_tokens,
            "d_sae": len(self.density),
            "n_fired": int((self.density > 0).sum()),
            "n_dense": int((self.density > DENSE).sum()),
            "dense_above": DENSE,
            "features": [dataclasses.asdict(feature) for feature in self.features],
        }


def features(
    model: LensModel | HookedModel,
    sae: SAE[Any],
    text: Any,
    *,
    hook_name: str | None = None,
    indices: Sequence[int] | None = None,
    n_features: int = 24,
    max_density: float = DENSE,
    n_contexts: int = 10,
    n_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> FeatureReport:
    """Describe features of an SAE by text, logits, neurons and neighbours.

    Of the text, and of each of its tokens, what the SAE was trained on counts: rows are as long and
    are put together as in training, and special tokens or positions left out there are left out
    here. Centroid hooks of mlp, attn and block that are not attached are attached with the
    all-ones cotangent for as long as it takes. Hooks that the user has on the model act.

    Args:
        model: TransformerBridge, HookedTransformer or `lch_plugin.saes.HookedModel`.
        sae: on a hook of that model, a centroid's or any other.
        text: tokens ``(row, pos)``; a `lch_plugin.saes.Cache` of the hook, which saves running
            the model over the text; or what `lch_plugin.saes.texts.load_text` takes: a dataset, a
            list of texts, files, a name on the hub.
        hook_name: what the SAE reads; by default what its metadata say.
        indices: features to describe, in this order. By default the ``n_features`` that carry most
            of the code's energy among those that fire on no more than ``max_density`` of tokens.
        n_features, max_density: see ``indices``.
        n_contexts: excerpts with the highest activations; logits and neurons are means over them.
        n_tokens: how much of the text to read at most; all of it if None.
        batch_size: rows of text that run together.
        seed: of the excerpts drawn from lower activations.

    Raises:
        InputError: model, SAE, text, hook and numbers do not fit each other.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
        NotDifferentiableError: the logits do not depend on what the SAE reads.

    Example:
        >>> report = lch.saes.features(model, SAE.load_from_disk("sae"), "stories.txt")
        >>> report.save("features")
    """
    check_model(model)
    hook_name = _check_sae(sae, hook_name)
    _check_numbers(sae, indices, n_features, max_density, n_contexts, n_tokens, batch_size)
    codes = _Codes(model, sae, hook_name, text, n_tokens, batch_size)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(attached(model, [hook_name]))
        _check_fit(model, sae, hook_name, codes.context_size)
        directions = normalize(sae.W_dec.detach(), dim=-1)
        survey = Survey(sae.cfg.d_sae, sae.device)
        for tokens, batch, counts in track(codes, "how often features fire", transient=True):
            if not survey.n_tokens:  # What cannot be answered is better known now than at the end.
                _push(model, hook_name, tokens[:1], tokens.new_zeros(1), directions[:1])
            survey.add(batch, counts)
        if not survey.n_tokens:
            raise InputError(
                f"the text makes no row of {codes.context_size} tokens. Pass more of it."
            )
        if indices is None:
            indices = _sparse_and_strong(survey, n_features, max_density)
        chosen = torch.tensor(indices, device=sae.device, dtype=torch.long)
        found = _Found(survey.maximum[chosen], n_contexts, seed)
        for tokens, batch, _ in track(codes, "where they fire", transient=True):
            found.add(batch[..., chosen], tokens.to(sae.device))
        described = [
            _describe(model, hook_name, survey, found, directions, i, index, batch_size)
            for i, index in enumerate(track(indices, "what they do", transient=True))
        ]
        return FeatureReport(
            hook_name=hook_name,
            record={
                **record(model, {hook_name: sae.cfg.d_in}),
                "sae": {"architecture": sae.cfg.architecture(), "d_sae": sae.cfg.d_sae},
                "text": _describe_text(text),
                "context_size": codes.context_size,
                "n_contexts": n_contexts,
                "seed": seed,
                "versions": {name: version(name) for name in ("lch-plugin", "torch", "sae-lens")},
            },
            n_tokens=survey.n_tokens,
            density=survey.density.cpu(),
            energy=survey.energy.cpu(),
            features=described,
        )


class _Codes:
    """An SAE's codes along a text, in batches, from the beginning each time."""

    def __init__(
        self,
        model: LensModel | HookedModel,
        sae: SAE[Any],
        hook_name: str,
        text: Any,
        n_tokens: int | None,
        batch_size: int,
    ) -> None:
        self.model, self.sae, self.hook_name = model, sae, hook_name
        self.batch_size = batch_size
        metadata = sae.cfg.metadata
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
            n_ctx = model.n_ctx if isinstance(model, HookedModel) else model.cfg.n_ctx
            self.context_size = int(metadata.context_size or n_ctx or 128)
            self.text = load_text(text, streaming=True)
        self.n_rows = None if n_tokens is None else max(1, n_tokens // self.context_size)
        excluded = metadata.exclude_special_tokens or []
        if excluded is True:
            excluded = get_special_token_ids(model.tokenizer)
        self._excluded = torch.tensor(excluded, dtype=torch.long)

    def __iter__(
        self,
    ) -> Iterator[
        tuple[Int[Tensor, "row pos"], Float[Tensor, "row pos d_sae"], Bool[Tensor, "row pos"]]
    ]:
        """Tokens, codes, and which tokens count; codes of those that do not are zero."""
        positions = slice(*(self.sae.cfg.metadata.seqpos_slice or (None,)))
        for tokens, values in self._batches():
            counts = torch.zeros_like(tokens, dtype=torch.bool)
            counts[:, positions] = ~torch.isin(tokens[:, positions], self._excluded)
            counts = counts.to(self.sae.device)
            yield tokens, self._encode(values) * counts[..., None], counts

    def _batches(
        self,
    ) -> Iterator[tuple[Int[Tensor, "row pos"], Float[Tensor, "row pos ..."]]]:
        """Tokens, and what the hook point has on them."""
        if isinstance(self.text, Cache):
            n_rows = min(self.text.n_sequences, self.n_rows or self.text.n_sequences)
            for first in range(0, n_rows, self.batch_size):
                chunk = slice(first, min(first + self.batch_size, n_rows))
                yield self.text.token_ids(chunk), self.text.values(self.hook_name, chunk)
            return
        device = next(self.model.parameters()).device
        rows = itertools.islice(self._rows(), self.n_rows)
        while batch := list(itertools.islice(rows, self.batch_size)):
            tokens = torch.stack(batch)
            check_token_ids(d_vocab(self.model), int(tokens.min()), int(tokens.max()))
            _, cache = self.model.run_with_cache(
                tokens.to(device),
                names_filter=[self.hook_name],
                stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(self.hook_name),
            )
            yield tokens, cache[self.hook_name]

    def _encode(self, values: Float[Tensor, "row pos ..."]) -> Float[Tensor, "row pos d_sae"]:
        # Heads are joined, by the SAE if it wants to do it itself.
        if self.sae.cfg.reshape_activations != "hook_z":
            values = values.flatten(2)
        codes: Tensor = self.sae.encode(values.to(self.sae.device, self.sae.dtype))
        return codes.to_dense()  # SAELens' TopK can give them sparse in training.

    def _rows(self) -> Iterator[Int[Tensor, " pos"]]:
        if isinstance(self.text, Tensor):
            yield from self.text.cpu()
            return
        texts = iter(self.text)
        first = next(texts, {})
        column = next((c for c in (*_TOKEN_COLUMNS, "text") if c in first), None)
        if column is None:
            raise InputError(
                f"the text has columns {list(first)}: one of {(*_TOKEN_COLUMNS, 'text')} is needed."
            )
        values = (row[column] for row in itertools.chain([first], texts))
        if column == "text":
            yield from self._tokenised(values)
            return
        for ids in values:
            if len(ids) < self.context_size:
                raise InputError(
                    f"a row of the text has {len(ids)} tokens, fewer than the {self.context_size} "
                    "that the SAE was trained on. Tokenise into longer rows, or pass text."
                )
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


class _Found:
    """What a pass over the text has found of the chosen features."""

    def __init__(self, maximum: Float[Tensor, " feature"], n_contexts: int, seed: int) -> None:
        self.histogram = Histogram(maximum, N_BINS)
        self.top = Excerpts(n_contexts)
        # The highest band has the contexts with the highest activations.
        self.bands = [Excerpts(N_IN_BAND) for _ in range(N_BANDS - 1)]
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, codes: Float[Tensor, "row pos feature"], tokens: Int[Tensor, "row pos"]) -> None:
        bins = self.histogram.bins(codes)
        self.histogram.add(bins)
        self.top.add(codes, codes, tokens)
        # Tokens drawn at random are those of the highest random number.
        draw = torch.rand(tokens.shape, generator=self._generator).to(codes)[..., None]
        for i, band in enumerate(self.bands):
            in_band = (bins >= 0) & (bins // (N_BINS // N_BANDS) == i)
            band.add(draw * in_band, codes, tokens)


def _describe(
    model: LensModel | HookedModel,
    hook_name: str,
    survey: Survey,
    found: _Found,
    directions: Float[Tensor, "d_sae d_in"],
    i: int,
    index: int,
    batch_size: int,
) -> Feature:
    """One feature, the ``i``-th of the chosen."""
    maximum, counts = float(survey.maximum[index]), found.histogram.counts[i]
    in_bands = counts.view(N_BANDS, -1).sum(1).tolist()
    effects = _effects(model, hook_name, found.top, i, directions[index], batch_size)
    cosines = directions @ directions[index]
    cosines[index] = -1
    nearest = cosines.topk(min(N_NEIGHBOURS, len(cosines) - 1))
    return Feature(
        index=index,
        density=float(survey.density[index]),
        energy=float(survey.energy[index]),
        maximum=maximum,
        histogram=counts.tolist(),
        contexts=_contexts(model, found.top, i),
        bands=[
            Band(
                low=maximum * b / N_BANDS,
                high=maximum * (b + 1) / N_BANDS,
                n_tokens=in_bands[b],
                contexts=_contexts(model, found.bands[b], i),
            )
            for b in reversed(range(N_BANDS - 1))
        ],
        neighbours=[
            Neighbour(int(j), float(cosine))
            for j, cosine in zip(nearest.indices, nearest.values, strict=True)
        ],
        **effects,
    )


def _effects(
    model: LensModel | HookedModel,
    hook_name: str,
    excerpts: Excerpts,
    i: int,
    direction: Float[Tensor, " d_in"],
    batch_size: int,
) -> dict[str, Any]:
    """What a direction does where its feature is most active, and through which neurons."""
    n = excerpts.count(i)
    if not n:
        silent: dict[str, Any] = {"promoted": [], "suppressed": [], "neurons": []}
        return {**silent, "agreement": None, "along": None}
    tokens, positions = excerpts.tokens[:n, i], excerpts.positions[:n, i]
    pushed = [
        _push(model, hook_name, t, p, direction.expand(len(t), -1))
        for t, p in zip(tokens.split(batch_size), positions.split(batch_size), strict=True)
    ]
    points, logits = (torch.cat(parts) for parts in zip(*pushed, strict=True))
    logits = logits.float() - logits.float().mean(-1, keepdim=True)
    mean = logits.mean(0)
    effects: dict[str, Any] = {
        "promoted": _named(model, mean.topk(N_TOKENS)),
        "suppressed": _named(model, mean.topk(N_TOKENS, largest=False)),
        "agreement": float(cosine_similarity(logits, mean[None], dim=-1).mean()),
        "along": None,
        "neurons": [],
    }
    form = closed_form(model, hook_name)
    if form is not None:
        terms = neuron_terms(form[0], points, direction.to(points), form[1]).mean(0)
        largest = terms.abs().topk(min(N_NEURONS, len(terms))).indices.tolist()
        effects["along"] = float(terms.sum())
        effects["neurons"] = [NeuronTerm(j, float(terms[j])) for j in largest]
    return effects


def _push(
    model: LensModel | HookedModel, hook_name: str, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """`push` with tensors that may be on the SAE's device."""
    device = next(model.parameters()).device
    return push(model, hook_name, *(tensor.to(device) for tensor in tensors))


def _contexts(model: LensModel | HookedModel, excerpts: Excerpts, i: int) -> list[Context]:
    return [
        context(
            excerpts.values[row, i].cpu(),
            _texts(model, excerpts.tokens[row, i].tolist()),
            int(excerpts.positions[row, i]),
        )
        for row in range(excerpts.count(i))
    ]


def _describe_text(text: Any) -> str:
    if isinstance(text, Cache):
        return str(text.path)
    if isinstance(text, str | Path):
        return str(text)
    kind = type(text).__name__
    return f"{kind} of {len(text):,}" if hasattr(text, "__len__") else kind


def _named(model: LensModel | HookedModel, found: Any) -> list[TokenLogit]:
    names = _texts(model, found.indices.tolist())
    return [TokenLogit(*pair) for pair in zip(names, found.values.tolist(), strict=True)]


def _texts(model: LensModel | HookedModel, ids: list[int]) -> list[str]:
    """Each token as the text it stands for."""
    texts: list[str] = model.tokenizer.batch_decode(
        [[i] for i in ids], clean_up_tokenization_spaces=False
    )
    return texts


def _sparse_and_strong(survey: Survey, n_features: int, max_density: float) -> list[int]:
    """Features that carry most of the energy among those that are not dense."""
    candidates = (survey.n_fired > 0) & (survey.density <= max_density)
    order = (survey.energy * candidates).argsort(descending=True, stable=True)
    indices: list[int] = order[: min(n_features, int(candidates.sum()))].tolist()
    if not indices:
        raise InputError(
            f"of {len(candidates)} features {int((survey.n_fired > 0).sum())} fire on this text, "
            f"all of them on more than max_density={max_density} of its tokens. Raise max_density, "
            "or pass indices."
        )
    return indices


def _check_sae(sae: Any, hook_name: str | None) -> str:
    if not isinstance(sae, SAE) or isinstance(sae, Transcoder):
        raise InputError(
            f"sae is a {type(sae).__name__}. What features do is asked in the space that an SAE "
            "both reads and writes: pass one of SAELens', such as SAE.load_from_disk(...)."
        )
    if sae.cfg.metadata.hook_head_index is not None:
        raise InputError(
            f"the SAE reads head {sae.cfg.metadata.hook_head_index} alone; pass one that reads "
            "all heads together."
        )
    hook_name = hook_name or sae.cfg.metadata.hook_name
    if not hook_name:
        raise InputError(
            "the SAE's metadata say nothing of the hook it reads. Pass hook_name, such as "
            "'blocks.2.mlp.hook_centroid'."
        )
    return str(hook_name)


def _check_numbers(
    sae: SAE[Any],
    indices: Sequence[int] | None,
    n_features: int,
    max_density: float,
    n_contexts: int,
    n_tokens: int | None,
    batch_size: int,
) -> None:
    d_sae = sae.cfg.d_sae
    if indices is not None:
        wrong = [i for i in indices if not 0 <= i < d_sae]
        if wrong or not len(indices):
            raise InputError(f"indices={list(indices)}: the SAE has features 0 to {d_sae - 1}.")
    if min(n_features, n_contexts, batch_size, 1 if n_tokens is None else n_tokens) < 1:
        raise InputError(
            f"n_features={n_features}, n_contexts={n_contexts}, n_tokens={n_tokens}, "
            f"batch_size={batch_size}: each has to be at least 1."
        )
    if not 0 < max_density <= 1:
        raise InputError(f"max_density={max_density} is a share of tokens, between 0 and 1.")


def _check_fit(
    model: LensModel | HookedModel, sae: SAE[Any], hook_name: str, context_size: int
) -> None:
    """Refuse an SAE that was trained on other values than the hook has now."""
    check_width(hook_name, sae.cfg.d_in, width(model, hook_name, context_size))
    then, now = sae.cfg.metadata.lch_centroid, provenance(model, hook_name)
    if not then or now is None:
        return
    keys = ("site", "layer", "cotangent", "linearization", "weight_processing")
    differing = [key for key in keys if key in then and key in now and then[key] != now[key]]
    if differing:
        raise InputError(
            f"the SAE was trained on other centroids than {hook_name} gives now: "
            + "; ".join(f"{key} was {then[key]} and is {now[key]}" for key in differing)
            + ". Attach the same with lch.attach(model, ...) first, to the same model."
        )
