"""What ``lch circuit --layer`` does: the paper's experiment on one prompt and one layer.

1. Scores of all neurons of the layer at the last token (arXiv 2604.11962), and with an answer and a
   foil the scores targeted at their logit difference.
2. How stable the rankings are over radii and seeds.
3. With a corrupt twin of the prompt: each top neuron patched alone, its activation put into the run
   of the twin, and the share of the logit difference that comes back.
4. ``report.html``, ``results.json`` and the plots as PNG, in one new directory.

On GPT-2 Large at layer 31 the published facts stand beside what was measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import (
    MLPParts,
    TransformerBridge,
    as_tokens,
    locate_mlps,
    run_edited,
    weight_processing,
)
from lch_plugin.circuits.prompt_batches import Prompts, prompts
from lch_plugin.circuits.reports import plots
from lch_plugin.circuits.reports.direct import promoted_tokens
from lch_plugin.circuits.scores.attribution import activations
from lch_plugin.circuits.scores.neurons import NeuronAttribution, neuron_attribution
from lch_plugin.circuits.scores.stability import stability
from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError
from lch_plugin.files import claimed, portable, write_directory
from lch_plugin.report import write_report

N_TOP, N_NAMED, N_NAMED_OF_MODEL = 20, 5, 8
# Copies of the prompt that run together, one a neuron.
_BATCH = 16


@dataclass(frozen=True)
class Published:
    """What is known of a neuron from papers.

    Attributes:
        prompt: what it was measured on.
        neuron: its index.
        rank, percentile: by the paper's score on the paper's prompt.
        recovered: share of the logit difference that patching it alone brings back.
        source: where it is written.
    """

    prompt: str
    neuron: int
    rank: int
    percentile: float
    recovered: float
    source: str


#: By model, without its owner on the hub, and layer.
PUBLISHED = {
    ("gpt2-large", 31): Published(
        prompt="I climbed up the pear tree and picked a pear. I climbed up the apple tree and "
        "picked",
        neuron=892,
        rank=12,
        percentile=99.8,
        recovered=0.5,
        source="Walker et al., arXiv 2604.11962; the neuron is that of Miller and Neo, "
        "We Found An Neuron in GPT-2 (2023). Rank and share are approximate.",
    )
}


def run(
    model: TransformerBridge,
    prompt: str,
    layer: int,
    out: str | Path,
    *,
    answer: str | None = None,
    foil: str | None = None,
    corrupt: str | None = None,
    radius: float = 0.25,
    n_samples: int = 256,
    seed: int = 0,
) -> None:
    """Score, describe and patch the neurons of one layer, and write a report.

    Args:
        model: to look at.
        prompt: what it reads; the last token is where neurons are scored.
        layer: block, negative counting from the end.
        out: directory to make.
        answer, foil: single tokens; with them scores are targeted at their logit difference.
        corrupt: twin of the prompt with as many tokens, to patch neurons into.
        radius, n_samples: of the neighbourhood, as `neuron_attribution`.
        seed: of the points drawn.

    Raises:
        InputError: an answer without foil or a twin without both, texts that are not what
            `lch_plugin.circuits.prompts` takes, a twin on which the logit difference is the same,
            or as `neuron_attribution`.
        SiteError, VanishingCentroidError: as `neuron_attribution`.
        OutputError: ``out`` holds other content or cannot be written.
    """
    (parts,) = locate_mlps(model, layer)
    batch = _batch(model, prompt, answer, foil, corrupt)
    tokens = as_tokens(model, prompt)
    with claimed(out) as out:
        ends = _logit_differences(model, batch)
        metrics: dict[str, Metric | None] = {"untargeted": None}
        if batch is not None:
            metrics["targeted"] = batch.metric
        score = partial(neuron_attribution, model, tokens, radius=radius, n_samples=n_samples)
        draw = torch.Generator(model.cfg.device)
        scored = {
            name: score(layers=parts.layer, metric=metric, generator=draw.manual_seed(seed))
            for name, metric in metrics.items()
        }
        of_model = score(metric=list(metrics.values())[-1], generator=draw.manual_seed(seed))
        published = PUBLISHED.get((Path(model.cfg.model_name).name, parts.layer))
        top = {name: [n.index for n in a.top(N_TOP, by="magnitude")] for name, a in scored.items()}
        shown = {i for ranking in top.values() for i in ranking}
        shown |= set() if published is None else {published.neuron}
        results: dict[str, Any] = {
            "run": {
                **_provenance(model, parts),
                "radius": radius,
                "n_samples": n_samples,
                "seed": seed,
            },
            "prompt": prompt,
            "answer": answer,
            "foil": foil,
            "corrupt": corrupt,
            "predictions": _predictions(model, tokens),
            "logit_differences": ends,
            "rankings": top,
            "neurons": _described(model, parts, scored, shown, batch, ends),
            "stability": {
                name: stability(
                    model, tokens, parts.layer, n_samples=n_samples, metric=metric
                ).to_dict()
                for name, metric in metrics.items()
            },
            "published": None if published is None else asdict(published),
        }
        figures = {
            f"{name}_layer": plots.neuron_scores(a, named=_named(model, a, N_NAMED))
            for name, a in scored.items()
        }
        figures["model"] = plots.neuron_scores(
            of_model, named=_named(model, of_model, N_NAMED_OF_MODEL)
        )
        write_directory(out, lambda it: write_report(it, "neurons.html", results, figures))


def patched_alone(
    model: TransformerBridge,
    batch: Prompts,
    hook_name: str,
    neurons: list[int],
    position: int | None = None,
) -> Float[Tensor, " neuron"]:
    """The metric on the corrupt twin with one neuron's clean activation put in, for each neuron.

    Args:
        model: to run.
        batch: one prompt and its twin.
        hook_name: of the hook point that holds the neurons' activations.
        neurons: indices.
        position: where to put it; everywhere if None.
    """
    assert batch.corrupt is not None
    clean = activations(model, batch.clean, [hook_name])[hook_name].flatten(0, -2)
    where = slice(None) if position is None else [position]
    found = []
    for chosen in torch.tensor(neurons).split(_BATCH):

        def put(value: Tensor, chosen: Tensor = chosen) -> Tensor:
            edited = value.clone().view(len(chosen), len(clean), -1)
            for row, neuron in zip(edited, chosen.tolist(), strict=True):
                row[where, neuron] = clean[where, neuron].to(row)
            return edited.view_as(value)

        twins = batch.corrupt.expand(len(chosen), -1)
        with torch.no_grad():
            logits = run_edited(model, twins, {hook_name: put})
        found += [batch.measure(row[None]) for row in logits]
    return torch.cat(found)


def _provenance(model: TransformerBridge, parts: MLPParts) -> dict[str, Any]:
    packages = ("lch-plugin", "torch", "transformer-lens", "transformers")
    return {
        "model": portable(model.cfg.model_name),
        "n_layers": model.cfg.n_layers,
        "layer": parts.layer,
        "hook": parts.post_activation_name,
        "n_neurons": parts.weights.W_out.shape[0],
        "dtype": str(model.cfg.dtype),
        "weights": weight_processing(model, parts.layer),
        "versions": {name: version(name) for name in packages},
    }


def _batch(
    model: TransformerBridge,
    prompt: str,
    answer: str | None,
    foil: str | None,
    corrupt: str | None,
) -> Prompts | None:
    """The prompt with its logit difference, if an answer and a foil say which."""
    if (answer is None) != (foil is None):
        raise InputError(
            f"answer={answer!r}, foil={foil!r}: a logit difference needs both, or leave both out."
        )
    if answer is None or foil is None:
        if corrupt is not None:
            raise InputError(
                "a corrupt twin is given, but no answer and foil, whose logit difference says what "
                "a patched neuron recovers."
            )
        return None
    (batch,) = prompts(model, prompt, answer, foil, corrupt)
    return batch


def _logit_differences(model: TransformerBridge, batch: Prompts | None) -> dict[str, float]:
    """Of the prompt and its twin, as far as there are any."""
    if batch is None:
        return {}
    runs = {"clean": batch.clean} | ({} if batch.corrupt is None else {"corrupt": batch.corrupt})
    with torch.no_grad():
        found = {name: float(batch.measure(model(tokens))) for name, tokens in runs.items()}
    if len(set(found.values())) < len(found):
        raise InputError(
            f"the logit difference is {found['clean']:.4g} on the prompt and on its corrupt twin: "
            "there is nothing to recover. Change in the twin what decides the answer."
        )
    return found


def _predictions(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"]
) -> list[dict[str, Any]]:
    with torch.no_grad():
        probabilities = model(tokens)[0, -1].float().softmax(-1)
    top = probabilities.topk(5)
    return [
        {"token": model.to_string([i]), "probability": p}
        for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _described(
    model: TransformerBridge,
    parts: MLPParts,
    scored: dict[str, NeuronAttribution],
    shown: set[int],
    batch: Prompts | None,
    ends: dict[str, float],
) -> dict[str, dict[str, Any]]:
    """By index: scores with ranks, the tokens written towards, and what patching recovers."""
    neurons = sorted(shown)
    promoted = promoted_tokens(model, parts.layer, neurons)
    described: dict[str, dict[str, Any]] = {
        str(i): {
            "scores": {
                name: {"score": n.score, "rank": n.rank, "percentile": n.percentile}
                for name, n in ((name, a.neuron(parts.layer, i)) for name, a in scored.items())
            },
            "promotes": tokens,
            "recovered": {},
        }
        for i, tokens in zip(neurons, promoted, strict=True)
    }
    if batch is not None and "corrupt" in ends:
        for place, position in (("last", -1), ("everywhere", None)):
            patched = patched_alone(model, batch, parts.post_activation_name, neurons, position)
            shares = (patched - ends["corrupt"]) / (ends["clean"] - ends["corrupt"])
            for i, share in zip(neurons, shares.tolist(), strict=True):
                described[str(i)]["recovered"][place] = share
    return described


def _named(
    model: TransformerBridge, attribution: NeuronAttribution, n: int
) -> dict[tuple[int, int], str]:
    """The neurons of largest magnitude, by index and the token each writes towards most."""
    return {
        (top.layer, top.index): f"{top.index} {token.strip() or repr(token)}"
        for top in attribution.top(n, by="magnitude")
        for ((token,),) in [promoted_tokens(model, top.layer, [top.index], 1)]
    }
