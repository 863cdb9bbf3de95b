"""Neurons of a circuit, by how far removing each moves its MLP's local centroid (arXiv 2604.11962).

Published: GPT-2 Large, layer 31, last token, 256 samples of a ball of radius .25 around the MLP's
input (255 and the centre). Neuron 892, known to write " an", is about rank 12 of 5,120 (99.8th
percentile).

    python examples/paper/circuit_discovery.py --out circuit_discovery            # published
    python examples/paper/circuit_discovery.py --small --out circuit_discovery

`--small` takes the embedded model. Its " an" neuron is the one whose removal costs the logit
difference between " an" and " a" most, which is another method. `--model DIR` takes any other
model; without `--layer` all layers are scored.
"""

from __future__ import annotations

import torch
from common import EMBEDDED, parse, parser, save

import lch_plugin as lch
from lch_plugin import circuits, metrics
from lch_plugin.figures import ACTIVATIONS, CENTROIDS, new_figure

PROMPT = "I climbed up the pear tree and picked a pear. I climbed up the apple tree and picked"


def main() -> None:
    options = parser(__doc__, "gpt2-large")
    options.add_argument("--layer", type=int)
    options.add_argument(
        "--neuron", type=int, help="the known one; found by its effect if left out"
    )
    args = parse(options)
    if args.model == "gpt2-large":
        args.layer, args.neuron = args.layer or 31, args.neuron or 892
    model = (
        lch.load_demo_model(device=args.device)
        if args.model == EMBEDDED
        else lch.load(args.model, dtype="float32", device=args.device).bridge()
    )
    ids = model.to_tokens(PROMPT, prepend_bos=False)
    an, a = (model.to_single_token(word) for word in (" an", " a"))

    def scored(**settings: object) -> circuits.NeuronAttribution:
        generator = torch.Generator(args.device).manual_seed(args.seed)
        return circuits.neuron_attribution(model, ids, args.layer, generator=generator, **settings)

    paper = scored(centre=True)  # Radius .25, 256 samples and the last token are the defaults.
    with torch.no_grad():
        logits = model(ids)[0, -1]
    if args.neuron is None:
        targeted = scored(metric=metrics.logit_difference(an, a))
        known = targeted.top(1)[0]
    else:
        known = paper.neuron(args.layer, args.neuron)
    found = paper.neuron(known.layer, known.index)
    scores = paper.scores[found.layer].cpu()
    percentile = 100 * float((scores <= found.score).double().mean())  # As the paper counts.
    difference = float(logits[an] - logits[a])
    print(f'logit difference " an" - " a": {difference:+.3f}')
    print(f"layer {found.layer}, neuron {found.index}: rank {found.rank} of {len(scores)},")
    print(f"percentile {percentile:.2f} (those that score as high or lower)")
    print("highest:", ", ".join(str(n.index) for n in paper.top(10, found.layer)))

    figure, (axis,) = new_figure(6, 3.6)
    axis.plot(range(1, len(scores) + 1), scores.sort(descending=True).values, color=ACTIVATIONS)
    axis.scatter([found.rank], [found.score], color=CENTROIDS, zorder=3)
    axis.annotate(
        f"neuron {found.index}, rank {found.rank}",
        (found.rank, found.score),
        (10, 8),
        textcoords="offset points",
        color=CENTROIDS,
    )
    axis.set(xscale="log", xlabel=f"rank in layer {found.layer}", ylabel="score")
    save(
        args,
        {
            "logit_difference": difference,
            "layer": found.layer,
            "neuron": found.index,
            "rank": found.rank,
            "n_neurons": len(scores),
            "percentile": percentile,
            "top": [n.index for n in paper.top(10, found.layer)],
        },
        figure,
        radius=paper.radius,
        n_samples=paper.n_samples,
        centre=True,
        site="mlp",
        cotangent="ones",
    )


if __name__ == "__main__":
    main()
