"""Everything there is to say of one SAE, on held-out text, as a page.

1. Reconstruction and sparsity over the text (`lch_plugin.saes.evaluate`).
2. How well reconstructed centroids predict what the component does
   (`lch_plugin.saes.evaluation.functional`).
3. What the strongest features do to the predictions, beside random directions
   (`lch_plugin.steering`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from rich.console import Console
from sae_lens import SAE
from torch import Tensor

from lch_plugin.adapters.hooked import readers
from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.cotangents import Cotangent, Ones
from lch_plugin.errors import InputError
from lch_plugin.files import check_new_directory, write_directory
from lch_plugin.padding import mark_tokens
from lch_plugin.progress import track
from lch_plugin.report import write_report
from lch_plugin.saes.caching.records import record
from lch_plugin.saes.evaluation import plots
from lch_plugin.saes.evaluation.evaluate import DENSE, Evaluation, evaluate
from lch_plugin.saes.evaluation.feature_acts import FeatureActs, describe_text
from lch_plugin.saes.evaluation.functional import (
    CapturedComponent,
    ResponseFit,
    predicted_responses,
    reconstructed_centroids,
)
from lch_plugin.saes.sources.hook_points import attached, check_model
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.steering.effects import (
    SteeringEffects,
    check_steering,
    steering_effects,
)

_PACKAGES = ("lch-plugin", "torch", "transformer-lens", "sae-lens", "transformers")
_CENTROID, _INPUT = ".hook_centroid", ".hook_in"
_N_NAMED = 6


def evaluation_report(
    model: LensModel | HookedModel,
    sae: SAE[Any],
    text: Any,
    out: str | Path,
    *,
    hook_name: str | None = None,
    n_tokens: int | None = None,
    n_features: int = 12,
    strengths: Sequence[float] = (0.1, 0.3, 1.0),
    n_random: int = 40,
    n_sequences: int = 16,
    skip: int = 1,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate an SAE and write ``report.html``, ``results.json`` and the plots as PNG.

    Features to steer along are those that carry most of the code's energy on the first
    ``n_sequences`` rows among those that fire on no more than `DENSE` of all tokens.

    Args:
        model: TransformerBridge, HookedTransformer or `lch_plugin.saes.HookedModel`.
        sae: on a hook of that model, a centroid's or any other.
        text: held out; as `lch_plugin.saes.features`.
        out: directory to make.
        hook_name: what the SAE reads; by default what its metadata say.
        n_tokens: how much of the text to read at most; all of it if None.
        n_features: features to steer along; 0 for no steering, which takes most of the time.
        strengths, n_random: as `steering_effects`.
        n_sequences: rows of text on which responses and steering are measured.
        skip: first tokens of each row that do not count, beside those that the SAE was trained
            without. BOS is unlike any other token, and many models keep something of huge norm
            there.
        batch_size: rows of text that run together.
        seed: of everything random.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: model, SAE, text, hook and numbers do not fit each other.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
        OutputError: ``out`` holds other content or cannot be written.
    """
    check_new_directory(out)
    check_model(model)
    if min(skip, n_features) < 0 or n_sequences < 1:
        raise InputError(
            f"skip={skip} and n_features={n_features} must be zero or more, and "
            f"n_sequences={n_sequences} at least 1."
        )
    check_steering(strengths, n_random)
    feature_acts = FeatureActs(
        model, sae, text, hook_name=hook_name, n_tokens=n_tokens, batch_size=batch_size
    )
    positions = _positions(feature_acts, skip)
    console = Console()
    with (
        torch.no_grad(),
        evaluating(model),
        attached(model, [feature_acts.hook_name]),
    ):
        feature_acts.check()
        seen = _Seen(feature_acts, positions, n_sequences)
        evaluation = evaluate(sae, track(seen, "reconstruction", feature_acts.n_batches, "batches"))
        tokens = torch.cat(seen.tokens)
        # Whatever they begin and end with is text.
        batches = [mark_tokens(ids, feature_acts.tokens(ids)) for ids in tokens.split(batch_size)]
        console.print(
            f"variance explained {evaluation.explained_variance:.3f}, L0 {evaluation.l0:.2f}, "
            f"{evaluation.n_fired} of {sae.cfg.d_sae} features fire"
        )
        fits = _responses(feature_acts, batches, positions, seed)
        figures = {"density": plots.density_histogram(evaluation)}
        if fits is not None:
            figures["responses"] = plots.response_fits(fits)
        steering = None
        if n_features:
            features = _strongest(feature_acts, seen.rows, evaluation, n_features)
            effects = steering_effects(
                model,
                batches,
                feature_acts.hook_name,
                sae.W_dec[features],
                strengths=strengths,
                positions=positions,
                n_random=n_random,
                generator=torch.Generator().manual_seed(seed),
            )
            steering = _describe(model, effects, features, evaluation)
            figures["steering"] = plots.steering(effects)
        results = {
            "run": {
                **record(model, {feature_acts.hook_name: sae.cfg.d_in}),
                "hook_name": feature_acts.hook_name,
                "sae": {"architecture": sae.cfg.architecture(), "d_sae": sae.cfg.d_sae},
                "trained_on": sae.cfg.metadata.lch_centroid,
                "text": describe_text(text),
                "context_size": feature_acts.context_size,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "skip": skip,
                "positions": [positions.start, positions.stop, positions.step],
                "excluded_tokens": feature_acts.excluded.tolist(),
                "n_sequences": len(tokens),
                "seed": seed,
                "versions": {name: version(name) for name in _PACKAGES},
            },
            "evaluation": evaluation.to_dict(),
            "responses": None if fits is None else [dataclasses.asdict(fit) for fit in fits],
            "steering": steering,
        }
    write_directory(out, lambda it: write_report(it, "evaluate.html", results, figures))
    return results


def _positions(feature_acts: FeatureActs, skip: int) -> slice:
    """Those that count, of each row: without the first, as the SAE was trained.

    Raises:
        InputError: there are none.
    """
    trained = range(feature_acts.context_size)[feature_acts.positions]
    counting = [position for position in trained if position >= skip]
    if not counting:
        raise InputError(
            f"skip={skip} leaves none of the {len(trained)} positions that count, in rows of "
            f"{feature_acts.context_size} tokens. Lower it."
        )
    return slice(counting[0], counting[-1] + 1, trained.step)


class _Seen:
    """Rows of a hook point along a text; the first of them are kept, with their tokens."""

    def __init__(self, feature_acts: FeatureActs, positions: slice, n_sequences: int) -> None:
        self._feature_acts, self._positions, self._n = feature_acts, positions, n_sequences
        self.tokens: list[Int[Tensor, "row pos"]] = []
        self.rows: list[Float[Tensor, "_ d_in"]] = []

    def __iter__(self) -> Iterator[Float[Tensor, "_ d_in"]]:
        n = 0
        for tokens, values in self._feature_acts.batches():
            values = values[:, self._positions].flatten(2)
            counts = self._feature_acts.counts(tokens)[:, self._positions].to(values.device)
            if n < self._n:
                first = slice(self._n - n)
                self.tokens.append(tokens[first])
                self.rows.append(values[first][counts[first]])
            n += len(tokens)
            yield values[counts]
        if not n:
            raise InputError(
                f"the text makes no row of {self._feature_acts.context_size} tokens. Pass more "
                "of it."
            )


def _responses(
    feature_acts: FeatureActs, batches: Sequence[Tensor], positions: slice, seed: int
) -> list[ResponseFit] | None:
    """Fits of the SAE's centroids, if what it reads belongs to a component that can be called."""
    found = _component(feature_acts)
    if found is None:
        return None
    module, of, cotangent = found
    component = CapturedComponent(feature_acts.root, batches, module, positions=positions)
    mu_hat = reconstructed_centroids(feature_acts.sae, component, of, cotangent=cotangent)
    return predicted_responses(
        component,
        component.x,
        {"SAE": mu_hat},
        cotangent=cotangent,
        # Of one that mixes positions, a perturbation gives one response a sequence, not a token.
        n_perturbations=32 if component.mixes_positions else 8,
        mixes_positions=component.mixes_positions,
        generator=torch.Generator(component.x.device).manual_seed(seed),
    )


def _component(
    feature_acts: FeatureActs,
) -> tuple[str, Literal["centroid", "input"], Cotangent] | None:
    """The component that an SAE's hook belongs to, what of it, and the cotangent."""
    name, model = feature_acts.hook_name, feature_acts.model
    of: Literal["centroid", "input"] = "input" if name.endswith(_INPUT) else "centroid"
    module = name.removesuffix(_INPUT if of == "input" else _CENTROID)
    reader: Any = readers(model).get(name)
    try:
        feature_acts.root.get_submodule(module)
    except AttributeError:
        return None
    if of == "input":
        return module, of, Ones()
    if reader is None or module == name:
        return None  # No centroid, or one of heads, neurons, or several modules.
    if isinstance(model, HookedModel):
        return module, of, reader.settings.v
    site = reader.site
    if site.linearization != "jacobian" or site.is_local or site.output_positions is not None:
        return None  # Another centroid than that of the module as it is.
    cotangent = site.v
    return (module, of, cotangent) if isinstance(cotangent, Cotangent) else None


def _strongest(
    feature_acts: FeatureActs,
    rows: Sequence[Float[Tensor, "_ d_in"]],
    evaluation: Evaluation,
    n: int,
) -> list[int]:
    """Features that carry most of the code's energy, among the sparse ones that fire."""
    energy = torch.zeros(feature_acts.sae.cfg.d_sae)
    for x in rows:
        energy += feature_acts.encode(x[None])[0].square().sum(0).float().cpu()
    energy = energy * (evaluation.density <= DENSE)
    strongest = energy.topk(min(n, len(energy)))
    chosen = strongest.indices[strongest.values > 0].tolist()
    if not chosen:
        raise InputError(
            f"no feature fires on some and at most {DENSE:.0%} of these tokens, so there is none "
            "to steer along. Pass more text, or an SAE that was trained for longer."
        )
    return list(chosen)


def _describe(
    model: LensModel | HookedModel,
    effects: SteeringEffects,
    features: Sequence[int],
    evaluation: Evaluation,
) -> dict[str, Any]:
    """In terms of JSON, features with the largest effects first."""
    tokenizer: Any = model.tokenizer

    def named(ids: Tensor) -> list[str]:
        return [tokenizer.decode([i]) for i in ids.tolist()]

    kl, random_kl = effects.kl.mean(-1), effects.random_kl.mean(-1)
    described = [
        {
            "index": index,
            "density": float(evaluation.density[index]),
            "kl": kl[i].tolist(),
            "ratio": _finite(effects.ratios[i]),
            "p_value": effects.p_values[i].tolist(),
            "p_corrected": effects.corrected_p_values[i].tolist(),
            "logit_change": effects.logit_change[i].tolist(),
            "promoted": named(effects.promoted(i, k=_N_NAMED)),
            "suppressed": named(effects.suppressed(i, k=_N_NAMED)),
        }
        for i, index in enumerate(features)
    ]
    return {
        "strengths": list(effects.strengths),
        "input_norm": effects.input_norm,
        "n_random": len(random_kl),
        "n_tests": kl.numel(),
        "median_ratio": _finite(effects.ratios.quantile(0.5, dim=0)),
        "random_kl": {
            "median": random_kl.quantile(0.5, dim=0).tolist(),
            "largest": random_kl.amax(0).tolist(),
        },
        "random_logit_change": effects.random_logit_change.mean(0).tolist(),
        "features": sorted(described, key=lambda f: -f["kl"][-1]),
    }


def _finite(values: Tensor) -> list[float | None]:
    """In terms of JSON; None where there is no number, as of a ratio at strength 0."""
    return [x if math.isfinite(x) else None for x in values.tolist()]
