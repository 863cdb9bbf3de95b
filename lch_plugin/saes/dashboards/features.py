"""What the features of an SAE are about: text that excites them, logits, neurons, neighbours.

Two passes over a text, in memory that does not grow with it: how often and how strongly each
feature fires, and then histograms and max-activating examples of those that were chosen. Of a text
that is short enough, the second is a look at what the first has kept. On these examples alone, what
each feature's direction does (`effects`), of all features in one pass over each row (`pushing`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.errors import InputError
from lch_plugin.files import write_directory
from lch_plugin.max_activating import ActivatingExample, activating_example
from lch_plugin.progress import progress, track
from lch_plugin.report import write_report
from lch_plugin.saes.caching.records import record
from lch_plugin.saes.dashboards.effects import closed_form, neuron_terms, push
from lch_plugin.saes.dashboards.firing import Histogram, MaxActivatingExamples, Survey
from lch_plugin.saes.dashboards.pushing import Pusher
from lch_plugin.saes.evaluation.evaluate import DENSE
from lch_plugin.saes.evaluation.feature_acts import FeatureActs, describe_text
from lch_plugin.saes.sources.hook_points import attached, check_model, d_vocab
from lch_plugin.saes.sources.hooked_model import HookedModel

# What a report has of each feature.
N_BINS, N_BANDS, N_IN_BAND = 40, 4, 3
N_TOKENS, N_NEURONS, N_NEIGHBOURS = 8, 6, 5
# Numbers in memory at most: of the hook point along a text, and of logits' derivatives.
_MAX_KEPT, _MAX_LOGITS = 2**26, 2**27
_PACKAGES = ("lch-plugin", "torch", "sae-lens")


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
    contexts: list[ActivatingExample]


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
        maximum: its highest activation. Where activations have signs (AbsTopK), this, the histogram
            and the order of contexts are by magnitude.
        histogram: tokens by activation, in equal bins from 0 to ``maximum``.
        contexts: where it is most active, one a row of the text.
        bands: the lower quarters of its range, highest first.
        promoted, suppressed: next tokens whose logits rise and fall most to first order when what
            the component reads (or the value of an ordinary hook point) moves along ``d`` at the
            token that excites the feature: the mean over ``contexts``, less the mean over the
            vocabulary. See `lch_plugin.saes.dashboards.effects.push`.
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
    contexts: list[ActivatingExample]
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
        content = self.to_dict()
        write_directory(path, lambda it: write_report(it, "features.html", content, {}))

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
    indices: Sequence[int] | Int[Tensor, " n"] | None = None,
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
            the model over the text; or what `lch_plugin.saes.load_text` takes: a dataset, a
            list of texts, files, a name on the hub.
        hook_name: what the SAE reads; by default what its metadata say.
        indices: features to describe, in this order. By default the ``n_features`` that carry most
            of the code's energy among those that fire on no more than ``max_density`` of tokens.
        n_features, max_density: see ``indices``.
        n_contexts: max-activating examples of each; logits and neurons are means over them.
        n_tokens: how much of the text to read at most; all of it if None.
        batch_size: rows of text that run together.
        seed: of the examples drawn from lower activations.

    Returns:
        The features in the order of ``indices``, and how often each of the SAE's fires.

    Raises:
        InputError: model, SAE, text, hook and numbers do not fit each other.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
        NotDifferentiableError: the logits do not depend on what the SAE reads.

    Example:
        >>> report = lch.saes.features(model, SAE.load_from_disk("sae"), "stories.txt")
        >>> report.save("features")
    """
    check_model(model)
    feature_acts = FeatureActs(
        model, sae, text, hook_name=hook_name, n_tokens=n_tokens, batch_size=batch_size
    )
    if indices is not None:
        indices = [int(i) for i in indices]
    _check_numbers(sae, indices, n_features, max_density, n_contexts)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(attached(model, [feature_acts.hook_name]))
        feature_acts.check()
        effects = _Effects(feature_acts)
        survey = Survey(sae.cfg.d_sae, sae.device)
        text_values = _Kept(feature_acts)
        n = feature_acts.n_batches
        for tokens, values in track(text_values, "how often features fire", n, "batches"):
            if not survey.n_tokens:  # What cannot be answered is better known now than at the end.
                effects.try_out(tokens[:1])
            survey.add(*feature_acts.firing(tokens, values))
        if not survey.n_tokens:
            raise InputError(
                f"the text makes no row of {feature_acts.context_size} tokens. Pass more of it."
            )
        if indices is None:
            indices = _sparse_and_strong(survey, n_features, max_density)
        chosen = torch.tensor(indices, device=sae.device, dtype=torch.long)
        found = _Found(survey.maximum[chosen], n_contexts, seed)
        n = text_values.n_batches
        for tokens, values in track(text_values, "where they fire", n, "batches"):
            batch, _ = feature_acts.firing(tokens, values)
            found.add(batch[..., chosen], tokens.to(sae.device))
        done = effects.describe(found.top, indices)
        described = [
            _describe(effects, survey, found, i, index, own)
            for i, (index, own) in enumerate(zip(indices, done, strict=True))
        ]
        return FeatureReport(
            hook_name=feature_acts.hook_name,
            record={
                **record(model, {feature_acts.hook_name: sae.cfg.d_in}),
                "sae": {"architecture": sae.cfg.architecture(), "d_sae": sae.cfg.d_sae},
                "text": describe_text(text),
                "context_size": feature_acts.context_size,
                "n_contexts": n_contexts,
                "seed": seed,
                "versions": {name: version(name) for name in _PACKAGES},
            },
            n_tokens=survey.n_tokens,
            density=survey.density.cpu(),
            energy=survey.energy.cpu(),
            features=described,
        )


class _Found:
    """What a pass over the text has found of the chosen features."""

    def __init__(self, maximum: Float[Tensor, " feature"], n_contexts: int, seed: int) -> None:
        self.histogram = Histogram(maximum, N_BINS)
        self.top = MaxActivatingExamples(n_contexts)
        # The highest band has the contexts with the highest activations.
        self.bands = [MaxActivatingExamples(N_IN_BAND) for _ in range(N_BANDS - 1)]
        self._generator = torch.Generator().manual_seed(seed)

    def add(
        self, feature_acts: Float[Tensor, "row pos feature"], tokens: Int[Tensor, "row pos"]
    ) -> None:
        bins = self.histogram.bins(feature_acts)
        self.histogram.add(bins)
        self.top.add(feature_acts.abs(), feature_acts, tokens)
        # Tokens drawn at random are those of the highest random number.
        draw = torch.rand(tokens.shape, generator=self._generator).to(feature_acts)[..., None]
        for i, band in enumerate(self.bands):
            in_band = (bins >= 0) & (bins // (N_BINS // N_BANDS) == i)
            band.add(draw * in_band, feature_acts, tokens)


class _Kept:
    """What a hook point has on a text: kept the first time, if it is little enough.

    Attributes:
        n_batches: how many there were, the first time.
    """

    def __init__(self, feature_acts: FeatureActs) -> None:
        self._feature_acts = feature_acts
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._is_whole = False
        self.n_batches = 0

    def __iter__(self) -> Iterator[tuple[Int[Tensor, "row pos"], Float[Tensor, "row pos ..."]]]:
        if self._is_whole:
            yield from self._batches
            return
        n = self.n_batches = 0
        for tokens, values in self._feature_acts.batches():
            self.n_batches += 1
            n += values.numel()
            if n <= _MAX_KEPT:
                self._batches.append((tokens, values))
            else:
                self._batches.clear()
            yield tokens, values
        self._is_whole = n <= _MAX_KEPT


class _Effects:
    """What the features of an SAE do to the model, and through which neurons.

    Attributes:
        directions: decoder rows at unit length, on the model's device.
    """

    def __init__(self, feature_acts: FeatureActs) -> None:
        self._model, self._hook_name = feature_acts.model, feature_acts.hook_name
        self._device = next(feature_acts.model.parameters()).device
        self._push = Pusher(self._model, self._hook_name, feature_acts.batch_size)
        self._names: dict[int, str] = {}
        self.directions = normalize(feature_acts.sae.W_dec.detach(), dim=-1).to(self._device)
        self._closed_form = closed_form(feature_acts.model, feature_acts.hook_name)

    def try_out(self, tokens: Int[Tensor, "row pos"]) -> None:
        """Raise what a push raises."""
        tokens = tokens.to(self._device)
        first = self.directions[:1].expand(len(tokens), -1)
        push(self._model, self._hook_name, tokens, tokens.new_zeros(len(tokens)), first)

    def describe(
        self, examples: MaxActivatingExamples, indices: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What features do where they are most active: some attributes of each `Feature`."""
        counts = [examples.count(i) for i in range(len(indices))]
        # As many features at a time as have room for their logits.
        size = max(1, _MAX_LOGITS // (d_vocab(self._model) * max(1, *counts)))
        described = []
        with progress("what they do", sum(counts), "examples") as advance:
            for start in range(0, len(indices), size):
                group = range(start, min(start + size, len(indices)))
                own = [indices[i] for i in group for _ in range(counts[i])]
                if not own:
                    described += [self._describe_one(None, None, 0) for _ in group]
                    continue
                tokens, positions = (
                    torch.cat([t[: counts[i], i] for i in group]).to(self._device)
                    for t in (examples.tokens, examples.positions)
                )
                points, logits = self._push(tokens, positions, self.directions[own], advance)
                sizes = [counts[i] for i in group]
                parts = zip(points.split(sizes), logits.split(sizes), group, strict=True)
                described += [self._describe_one(x, of_x, indices[i]) for x, of_x, i in parts]
        return described

    def _describe_one(
        self,
        points: Float[Tensor, "n d_in"] | None,
        logits: Float[Tensor, "n d_vocab"] | None,
        index: int,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"promoted": [], "suppressed": [], "agreement": None}
        found |= {"along": None, "neurons": []}
        if points is None or logits is None or not len(points):
            return found
        logits = logits.float() - logits.float().mean(-1, keepdim=True)
        mean = logits.mean(0)
        found["promoted"] = self._named(mean.topk(min(N_TOKENS, len(mean))))
        found["suppressed"] = self._named(mean.topk(min(N_TOKENS, len(mean)), largest=False))
        found["agreement"] = float(cosine_similarity(logits, mean[None], dim=-1).mean())
        if self._closed_form is not None:
            mlp, cotangent = self._closed_form
            terms = neuron_terms(mlp, points, self.directions[index], cotangent).mean(0)
            largest = terms.abs().topk(min(N_NEURONS, len(terms))).indices.tolist()
            found["along"] = float(terms.sum())
            found["neurons"] = [NeuronTerm(j, float(terms[j])) for j in largest]
        return found

    def _named(self, top: Any) -> list[TokenLogit]:
        names = self.texts(top.indices.tolist())
        return [TokenLogit(*pair) for pair in zip(names, top.values.tolist(), strict=True)]

    def texts(self, ids: list[int]) -> list[str]:
        """Each token as the text it stands for."""
        new = [i for i in dict.fromkeys(ids) if i not in self._names]
        if new:
            found = self._model.tokenizer.batch_decode(
                [[i] for i in new], clean_up_tokenization_spaces=False
            )
            self._names |= dict(zip(new, found, strict=True))
        return [self._names[i] for i in ids]


def _describe(
    effects: _Effects,
    survey: Survey,
    found: _Found,
    i: int,
    index: int,
    does: dict[str, Any],
) -> Feature:
    """One feature, the ``i``-th of the chosen, with what it does."""
    maximum, counts = float(survey.maximum[index]), found.histogram.counts[i]
    in_bands = counts.view(N_BANDS, -1).sum(1).tolist()
    cosines = effects.directions @ effects.directions[index]
    cosines[index] = -1
    nearest = cosines.topk(min(N_NEIGHBOURS, len(cosines) - 1))
    return Feature(
        index=index,
        density=float(survey.density[index]),
        energy=float(survey.energy[index]),
        maximum=maximum,
        histogram=counts.tolist(),
        contexts=_examples(effects, found.top, i),
        bands=[
            Band(
                low=maximum * b / N_BANDS,
                high=maximum * (b + 1) / N_BANDS,
                n_tokens=in_bands[b],
                contexts=_examples(effects, found.bands[b], i),
            )
            for b in reversed(range(N_BANDS - 1))
        ],
        neighbours=[
            Neighbour(int(j), float(cosine))
            for j, cosine in zip(nearest.indices, nearest.values, strict=True)
        ],
        **does,
    )


def _examples(
    effects: _Effects, examples: MaxActivatingExamples, i: int
) -> list[ActivatingExample]:
    return [
        activating_example(
            examples.values[row, i].cpu(),
            effects.texts(examples.tokens[row, i].tolist()),
            int(examples.positions[row, i]),
        )
        for row in range(examples.count(i))
    ]


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


def _check_numbers(
    sae: SAE[Any],
    indices: Sequence[int] | None,
    n_features: int,
    max_density: float,
    n_contexts: int,
) -> None:
    d_sae = sae.cfg.d_sae
    if indices is not None:
        wrong = [i for i in indices if not 0 <= i < d_sae]
        if wrong or not len(indices):
            raise InputError(f"indices={list(indices)}: the SAE has features 0 to {d_sae - 1}.")
    if min(n_features, n_contexts) < 1:
        raise InputError(
            f"n_features={n_features} and n_contexts={n_contexts} have to be at least 1."
        )
    if not 0 < max_density <= 1:
        raise InputError(f"max_density={max_density} is a share of tokens, between 0 and 1.")
