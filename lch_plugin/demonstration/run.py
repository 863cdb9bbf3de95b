"""What ``lch demo`` does: centroids, two SAEs and a circuit of the demo model, as one report.

1. Centroids at every layer over held-out stories, no passage of which is in the training text.
2. A TopK SAE on the centroids of one MLP and one, with the same settings, on that MLP's input,
   both trained by SAELens.
3. The neurons behind "a" or "an" in the paper's pear/apple prompt, and whether removing them
   matters, on that prompt and on others.
4. ``report.html``, ``results.json``, the plots as PNG and both SAEs, in one new directory.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import false_discovery_control
from torch import Tensor

from lch_plugin import circuits, saes
from lch_plugin.adapters.transformer_lens import TransformerBridge, attach, locate_mlps
from lch_plugin.circuits.reports import plots as circuit_plots
from lch_plugin.circuits.reports.direct import promoted_tokens
from lch_plugin.demo import load_demo_model
from lch_plugin.demo.corpus import stories
from lch_plugin.demo.tasks import Example, examples, pear_apple
from lch_plugin.demonstration import plots
from lch_plugin.devices import check_device
from lch_plugin.figures import ACTIVATIONS, CENTROIDS
from lch_plugin.files import claimed, write_directory
from lch_plugin.max_activating import max_activating_examples
from lch_plugin.padding import mark_tokens
from lch_plugin.progress import track
from lch_plugin.report import write_report
from lch_plugin.saes.evaluation.evaluate import DENSE
from lch_plugin.saes.training.configs import sae_config

SAE_LAYER = 2
N_TRAINING_STORIES, N_TEST_STORIES = 6000, 400
TRAINING_TOKENS = 300_000
D_SAE, K = 512, 8
N_PROMPTS, N_ABLATED, N_RANDOM = 200, 10, 100
N_FEATURES, N_NEURONS, N_CONTEXTS = 12, 8, 4


def run(out: str | Path, *, seed: int = 0, device: str = "cpu") -> None:
    """Run the demonstration and write its report into a new directory.

    The same seed gives the same numbers on the same machine.

    Args:
        out: directory to make.
        seed: of everything random.
        device: where the model and the SAEs live.

    Raises:
        InputError: there is no such device.
        OutputError: ``out`` holds other content or cannot be written.
    """
    check_device(device)
    console = Console()
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    with claimed(out) as out, torch.no_grad():
        model = load_demo_model(device)
        tokens = pack(model, stories(N_TEST_STORIES, split="test", seed=seed))
        console.rule("[bold]1/4  Centroids at all layers")
        layers, figure = centroids_over_text(model, tokens)
        figures = {"centroids": figure}

        console.rule("[bold]2/4  Two sparse autoencoders, trained by SAELens")
        training = pack(model, stories(N_TRAINING_STORIES, seed=seed))
        dictionaries, trained, figure = compare_saes(model, training, tokens, seed)
        figures["firing"] = figure

        console.rule("[bold]3/4  The a/an circuit")
        circuit, more = a_an_circuit(model, tokens, seed)
        figures |= more

        console.rule("[bold]4/4  Report")
        results = {
            "run": describe(model, seed, device, tokens, training),
            "layers": layers,
            "saes": trained,
            "circuit": circuit,
        }

        def write(directory: Path) -> None:
            for name, sae in dictionaries.items():
                sae.save_inference_model(str(directory / f"sae-{name}"))
            write_report(directory, "demo.html", results, figures)

        write_directory(out, write)
    console.print(f"Open [bold]{Path(out) / 'report.html'}[/bold]")


def describe(
    model: TransformerBridge, seed: int, device: str, tokens: Tensor, training: Tensor
) -> dict[str, Any]:
    """What was run, on what, with which versions."""
    packages = ("lch-plugin", "torch", "transformer-lens", "sae-lens", "transformers")
    return {
        "model": "the embedded demo model (GPT-2 architecture)",
        "n_layers": model.cfg.n_layers,
        "d_model": model.cfg.d_model,
        "d_vocab": model.cfg.d_vocab,
        "cotangent": "ones",
        "seed": seed,
        "device": device,
        "training_tokens": training.numel(),
        "test_tokens": tokens.numel(),
        "versions": {name: version(name) for name in packages},
    }


def pack(model: TransformerBridge, texts: Any) -> Int[Tensor, "row n_ctx"]:
    """Stories one after the other, each begun by BOS, cut into rows of the model's context."""
    bos = [model.tokenizer.bos_token_id]
    encoded = model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for story in encoded for i in bos + story])
    n_ctx = model.cfg.n_ctx
    return ids[: len(ids) // n_ctx * n_ctx].view(-1, n_ctx)


def values_at(
    model: TransformerBridge, tokens: Int[Tensor, "row pos"], hook_names: list[str]
) -> dict[str, Float[Tensor, "row pos d"]]:
    """Values at some hook points over a text, in batches, on the CPU; the tokens are packed."""
    batches = []
    for rows in track(tokens.split(16), "running the text"):
        batch = rows.to(model.cfg.device)
        mark_tokens(batch)
        batches.append(model.run_with_cache(batch, names_filter=hook_names)[1])
    return {name: torch.cat([batch[name].cpu() for batch in batches]) for name in hook_names}


def centroids_over_text(
    model: TransformerBridge, tokens: Tensor
) -> tuple[list[dict[str, Any]], Figure]:
    """Norm of the centroids and their alignment with the MLP's input, by layer."""
    with attach(model) as handle:
        inputs = [f"blocks.{layer}.mlp.hook_in" for layer in range(model.cfg.n_layers)]
        values = values_at(model, tokens, handle.hook_names + inputs)
    rows: list[dict[str, Any]] = []
    for layer, (name, entry) in enumerate(zip(handle.hook_names, inputs, strict=True)):
        mu, x = values[name][:, 1:], values[entry][:, 1:]  # BOS is unlike any other token.
        cosine = torch.nn.functional.cosine_similarity(mu, x, dim=-1)
        rows.append(
            {
                "layer": layer,
                "hook": name,
                "centroid_norm": float(mu.norm(dim=-1).mean()),
                "input_norm": float(x.norm(dim=-1).mean()),
                "alignment": float(cosine.mean()),
            }
        )
    return rows, plots.centroids_by_layer(
        [row["centroid_norm"] for row in rows], [row["alignment"] for row in rows]
    )


def compare_saes(
    model: TransformerBridge, training: Tensor, tokens: Tensor, seed: int
) -> tuple[dict[str, Any], dict[str, Any], Figure]:
    """Train both SAEs, evaluate them on held-out stories and look at their features."""
    sites = {
        "centroids": f"blocks.{SAE_LAYER}.mlp.hook_centroid",
        "activations": f"blocks.{SAE_LAYER}.mlp.hook_in",
    }
    dictionaries, trained, densities = {}, {}, {}
    with attach(model, layers=SAE_LAYER):
        values = values_at(model, tokens, list(sites.values()))
        for name, hook in sites.items():
            torch.manual_seed(seed)
            config = run_config(hook, model, seed)
            sae = dictionaries[name] = saes.train(
                model, Dataset.from_dict({"tokens": training.tolist()}), config
            )
            x = values[hook].to(sae.device)
            evaluation = saes.evaluate(sae, [x[:, 1:].flatten(0, 1)])
            densities[name] = evaluation.density
            trained[name] = {
                "hook": hook,
                **evaluation.to_dict(),
                "features": describe_features(model, sae.encode(x), tokens, evaluation.density),
            }
    settings = {"architecture": "TopK", "layer": SAE_LAYER, "d_sae": D_SAE, "k": K}
    colours = {"centroids": CENTROIDS, "activations": ACTIVATIONS}
    figure = plots.firing_frequencies(densities, colours)
    return dictionaries, {"settings": settings, "trained": trained}, figure


def run_config(hook: str, model: TransformerBridge, seed: int) -> Any:
    """One configuration for both sides; SAELens scales each to the same mean norm."""
    return saes.runner_config(
        sae_config("topk", d_in=model.cfg.d_model, d_sae=D_SAE, k=K),
        hook,
        training_tokens=TRAINING_TOKENS,
        model_name="lch-demo",
        dataset_path="generated stories",
        context_size=model.cfg.n_ctx,
        train_batch_size_tokens=1024,
        n_batches_in_buffer=64,
        n_batches_for_norm_estimate=10,
        store_batch_size_prompts=16,
        lr=2e-3,
        lr_warm_up_steps=20,
        lr_decay_steps=60,
        device=str(model.cfg.device),
        seed=seed,
    )


def describe_features(
    model: TransformerBridge,
    feature_acts: Float[Tensor, "row pos d_sae"],
    tokens: Int[Tensor, "row pos"],
    density: Float[Tensor, " d_sae"],
) -> list[dict[str, Any]]:
    """The sparse features that carry most of the code, with the text that excites them."""
    share = feature_acts.square().sum((0, 1)).cpu()
    share = share / share.sum() * (density <= DENSE)
    text = to_text(model, tokens)
    return [
        {
            "index": i,
            "density": float(density[i]),
            "share": float(share[i]),
            "contexts": contexts(feature_acts[..., i].cpu(), text),
        }
        for i in share.topk(N_FEATURES).indices.tolist()
    ]


def a_an_circuit(
    model: TransformerBridge, tokens: Tensor, seed: int
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Score all neurons by two cotangents, on two sets of prompts, and remove the top ones."""
    example = pear_apple()
    prompt = model.to_tokens(example.prompt)
    answer, foil = (model.to_single_token(t) for t in (example.answers[0], example.foils[0]))
    logits = model(prompt)[0, -1]
    probabilities = logits.softmax(-1)
    rankings = {
        "ones": None,
        f"{example.answers[0]} -{example.foils[0]}": model.W_U[:, answer] - model.W_U[:, foil],
    }
    others = prompts_of_one_length(model, examples("a_an", N_PROMPTS, seed=seed))
    prompt_sets = {"pear/apple": [example], f"{len(others)} others": others}
    settings = list(itertools.product(rankings.items(), prompt_sets.items()))
    attributions: dict[tuple[str, str], circuits.NeuronAttribution] = {}
    checks: dict[tuple[str, str, int], circuits.AblationCheck] = {}
    for (ranking, cotangent), (prompts, chosen) in settings:
        attribution, by_layer = rank_and_remove(model, chosen, cotangent, seed)
        attributions[ranking, prompts] = attribution
        checks |= {(ranking, prompts, layer): check for layer, check in by_layer.items()}
    scored = attributions["ones", "pear/apple"]
    corrected = false_discovery_control([check.p_value for check in checks.values()])
    results = {
        "prompt": example.prompt,
        "answer": example.answers[0],
        "foil": example.foils[0],
        "logit_difference": float(logits[answer] - logits[foil]),
        "predictions": [
            {"token": model.to_string(i), "probability": float(probabilities[i])}
            for i in probabilities.topk(5).indices
        ],
        "radius": scored.radius,
        "n_samples": scored.n_samples,
        "n_removed": N_ABLATED,
        "n_random": N_RANDOM,
        "top_neurons": [
            {"cotangent": ranking, "neurons": describe_neurons(model, attribution, tokens)}
            for (ranking, prompts), attribution in attributions.items()
            if prompts == "pear/apple"
        ],
        "ablations": [
            {
                "cotangent": ranking,
                "prompts": prompts,
                "layer": layer,
                "neurons": list(check.neurons[layer]),
                "clean": check.clean,
                "ablated": check.ablated,
                "effect": check.effect,
                "random_mean": float(check.random_effects.mean()),
                "random_std": float(check.random_effects.std()),
                "p_value": check.p_value,
                "p_corrected": float(p),
            }
            for ((ranking, prompts, layer), check), p in zip(checks.items(), corrected, strict=True)
        ],
    }
    named = {f"{r}, {p}, layer {layer}": check for (r, p, layer), check in checks.items()}
    return results, {
        "neurons": circuit_plots.neuron_scores(scored),
        "ablations": circuit_plots.ablation_effects(named),
    }


def prompts_of_one_length(model: TransformerBridge, found: list[Example]) -> list[Example]:
    """The largest group of examples with as many tokens each, which can share a batch."""
    by_length: dict[int, list[Example]] = defaultdict(list)
    for example in found:
        by_length[model.to_tokens(example.prompt).shape[-1]].append(example)
    return max(by_length.values(), key=len)


def rank_and_remove(
    model: TransformerBridge, chosen: list[Example], cotangent: Tensor | None, seed: int
) -> tuple[circuits.NeuronAttribution, dict[int, circuits.AblationCheck]]:
    """Neuron scores on some prompts, and what removing each layer's top neurons does to them."""
    prompts = torch.cat([model.to_tokens(e.prompt) for e in chosen])
    attribution = circuits.neuron_attribution(
        model,
        prompts,
        cotangent=cotangent,
        generator=torch.Generator(model.cfg.device).manual_seed(seed),
    )
    return attribution, {
        layer: circuits.ablation_check(
            model,
            prompts,
            [model.to_single_token(e.answers[0]) for e in chosen],
            [model.to_single_token(e.foils[0]) for e in chosen],
            {layer: [n.index for n in attribution.top(N_ABLATED, layer=layer)]},
            n_random=N_RANDOM,
            generator=torch.Generator().manual_seed(seed),
        )
        for layer in track(attribution.scores, "removing neurons")
    }


def describe_neurons(
    model: TransformerBridge, attribution: circuits.NeuronAttribution, tokens: Tensor
) -> list[dict[str, Any]]:
    """The top neurons, the tokens each writes towards, and the text that excites it."""
    mlps = {parts.layer: parts for parts in locate_mlps(model)}
    top = attribution.top(N_NEURONS)
    hooks = {n.layer: mlps[n.layer].post_activation_name for n in top}
    values = values_at(model, tokens, list(hooks.values()))
    text = to_text(model, tokens)
    return [
        {
            **dataclasses.asdict(neuron),
            "promotes": promoted_tokens(model, neuron.layer, [neuron.index])[0],
            "contexts": contexts(values[hooks[neuron.layer]][..., neuron.index], text),
        }
        for neuron in top
    ]


def to_text(model: TransformerBridge, tokens: Int[Tensor, "row pos"]) -> list[list[str]]:
    """Each token as the text it stands for."""
    vocabulary = [model.tokenizer.decode([i]) for i in range(model.cfg.d_vocab)]
    return [[vocabulary[i] for i in row] for row in tokens.tolist()]


def contexts(values: Float[Tensor, "row pos"], text: list[list[str]]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(c) for c in max_activating_examples(values, text, N_CONTEXTS)]
