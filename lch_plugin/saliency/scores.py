"""Scores of tokens: the centroid of an answer's metric, and what Captum has beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.checks import check_finite
from lch_plugin.centroids import centroid, local_centroid
from lch_plugin.errors import InputError
from lch_plugin.linearization import DetachedMode, detached
from lch_plugin.names import did_you_mean
from lch_plugin.saliency.answers import AnswerMetric
from lch_plugin.saliency.checks import captum_attr

Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenScores:
    """The local centroid of a metric at each token, and the two scores read off it.

    Attributes:
        tokens: texts of the prompt's tokens.
        centroid: ``(pos, d_model)``.
        norm: length of the centroid, the paper's score; never negative.
        input_times_centroid: inner product with the token's embedding, in units of the metric.
    """

    tokens: list[str]
    centroid: Float[Tensor, "pos d_model"]
    norm: Float[Tensor, " pos"]
    input_times_centroid: Float[Tensor, " pos"]

    def _repr_html_(self) -> str:
        """Tokens coloured by the norm, for a notebook."""
        from lch_plugin.saliency.drawing import coloured

        return coloured(self.tokens, self.norm.tolist())


def text(
    metric: AnswerMetric, *, n_samples: int = 24, sigma: float = 0.05, seed: int = 0
) -> TokenScores:
    """Local centroid of an answer's metric at the token embeddings of a prompt.

    The paper's setting is the default: 24 samples, the embeddings themselves first, then with
    Gaussian noise of .05 of their standard deviation (Walker et al., arXiv 2604.11962).

    Args:
        metric: of the answer.
        n_samples: points of the neighbourhood; the first is the prompt.
        sigma: of the noise, in standard deviations of the prompt's embeddings; 0 for the centroid
            at the prompt alone.
        seed: of the noise.

    Raises:
        InputError: ``sigma`` negative or not finite, or ``n_samples`` below 1.
        NonFiniteError: the model overflows.

    Example:
        >>> model = lch.load_demo_model()
        >>> metric = lch.saliency.AnswerMetric(model, "Tom saw an apple and picked an", " apple")
        >>> scores = lch.saliency.text(metric)
        >>> len(scores.tokens) == len(scores.norm)
        True
    """
    x = metric.embeddings
    if not (math.isfinite(sigma) and sigma >= 0):
        raise InputError(f"sigma={sigma} has to be a number from 0: give one, such as 0.05.")
    mu = local_centroid(
        metric,
        x,
        neighbourhood="gaussian",
        sigma=sigma * float(x.std()),
        n_samples=n_samples,
        centre=True,
        generator=torch.Generator(x.device).manual_seed(seed),
    )
    check_finite("the local centroid of the answer", mu)
    return TokenScores(metric.tokens, mu, mu.norm(dim=-1), (mu * x).sum(-1))


@dataclass(frozen=True)
class Completeness:
    """Input times detached centroid, and whether it adds up to the metric.

    Attributes:
        scores: one a token, in units of the metric.
        value: the metric.
        offset: the frozen affine map at zero input: what biases and positions add.
        error: of ``scores.sum() + offset`` against ``value``, relative to the larger of the two's
            magnitudes and of the offset's.
    """

    scores: Float[Tensor, " pos"]
    value: float
    offset: float
    error: float


def completeness(metric: Metric, x: Float[Tensor, "pos d_model"]) -> Completeness:
    """Input times the centroid of the detached linearisation, checked by the frozen map itself.

    Attention patterns, norm scales and gates are held at their values, and the metric is affine:
    ``metric(x) = scores.sum() + offset``. The offset is not what is left over: it is what the
    frozen map gives at zero embeddings.

    Args:
        metric: linear in the logits (``quantity="logit"``); a log-probability is not affine.
        x: embeddings of a prompt.

    Raises:
        InputError: ``metric`` is of log-probabilities.

    Example:
        >>> model = lch.load_demo_model()
        >>> prompt = "Tom saw an apple and picked an"
        >>> logit = lch.saliency.AnswerMetric(model, prompt, " apple", quantity="logit")
        >>> lch.saliency.completeness(logit, logit.embeddings).error < 1e-4
        True
    """
    if isinstance(metric, AnswerMetric) and metric.quantity != "logit":
        raise InputError("a log-probability is not affine: make the metric with quantity='logit'.")
    scores = (centroid(detached(metric), x[None])[0] * x).sum(-1)
    with torch.enable_grad(), DetachedMode() as mode:
        value = float(metric(mode.follow(x[None].clone().requires_grad_())).detach())
    with torch.enable_grad(), DetachedMode(replay=mode.recorded) as frozen:
        offset = float(metric(frozen.follow(torch.zeros_like(x[None]).requires_grad_())).detach())
    total = float(scores.sum()) + offset
    size = max(abs(value), abs(offset), abs(total - offset), torch.finfo(x.dtype).tiny)
    return Completeness(scores, value, offset, abs(total - value) / size)


#: Every method by name. A larger score is a token that matters more; of those with a sign, one that
#: speaks more for the answer.
METHODS = (
    "local centroid, norm",
    "local centroid x input",
    "detached centroid x input",
    "Saliency",
    "InputXGradient",
    "IntegratedGradients",
    "SmoothGrad",
)


def by_method(
    metric: AnswerMetric,
    *,
    methods: Sequence[str] = METHODS,
    n_samples: int = 24,
    sigma: float = 0.05,
    seed: int = 0,
) -> dict[str, Float[Tensor, " pos"]]:
    """Scores of the tokens by each of `METHODS`: ours, and Captum's beside them.

    IntegratedGradients goes from the mean embedding to the prompt in 50 steps. SmoothGrad is
    Captum's NoiseTunnel over Saliency, at as many samples and the same noise as the local centroid;
    it averages magnitudes, where the local centroid averages with signs.
    The detached centroid is that of the same metric: log-probabilities count to first order.

    Args:
        metric: of the answer.
        methods: some of `METHODS`.
        n_samples, sigma, seed: as `text`.

    Raises:
        InputError: as `text`, or a method is none of `METHODS`.
        ToolkitError: Captum is not installed.
    """
    if unknown := set(methods) - set(METHODS):
        raise InputError(
            f"methods {sorted(unknown)} are unknown. {did_you_mean(min(unknown), METHODS)}"
        )
    attr = captum_attr()
    x = metric.embeddings
    inputs = x[None].clone().requires_grad_()

    @cache
    def local() -> TokenScores:
        return text(metric, n_samples=n_samples, sigma=sigma, seed=seed)

    def integrated() -> Tensor:
        found: Tensor = attr.IntegratedGradients(metric).attribute(
            inputs,
            baselines=metric.baseline.expand_as(x)[None],
            n_steps=50,
            internal_batch_size=25,
        )
        return found[0].sum(-1)

    def smooth() -> Tensor:
        with torch.random.fork_rng():  # Captum draws from the global generator.
            torch.manual_seed(seed)
            found: Tensor = attr.NoiseTunnel(attr.Saliency(metric)).attribute(
                inputs, nt_type="smoothgrad", nt_samples=n_samples, stdevs=sigma * float(x.std())
            )
        return found[0].sum(-1)

    scores: tuple[Callable[[], Tensor], ...] = (
        lambda: local().norm,
        lambda: local().input_times_centroid,
        lambda: (centroid(detached(metric), x[None])[0] * x).sum(-1),
        lambda: attr.Saliency(metric).attribute(inputs)[0].sum(-1),
        lambda: attr.InputXGradient(metric).attribute(inputs)[0].sum(-1),
        integrated,
        smooth,
    )
    known = dict(zip(METHODS, scores, strict=True))
    return {name: known[name]().detach() for name in methods}
