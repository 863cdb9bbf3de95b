"""Nearest neighbours among the codes of CLS tokens, judged by another model (arXiv 2604.11962).

Published: DINOv2-B, 10 breeds of dogs of ImageNet, CLS token, k = 32, 3 seeds, 1,000 queries,
judged by the patches of DINOv3, Wilcoxon's signed-rank test: about .545 (centroids) and .541
(activations) at one neighbour. Probes of the breed at k = 64: about 72.3 and 69.1 %.

    python examples/paper/dino_dogs.py --device cuda --out dogs    # published, with Imagewoof
    python examples/paper/dino_dogs.py --small --out dogs          # digits, judged by raw pixels

For each query, a test image, the nearest training image by the cosine of their codes is found; the
judge says by a cosine of its own how alike the two are. The judge's vectors are centred first.
"""

from __future__ import annotations

from typing import Any

import torch
from common import EMBEDDED, load_vision, parse, parser, save
from scipy.stats import wilcoxon
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from torch import Tensor

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, new_figure

KINDS = {"centroid": CENTROIDS, "output": ACTIVATIONS}
CLS = slice(0, 1)
NEIGHBOURS = (1, 5, 10)


def judged_vectors(args: Any, vision: Any) -> tuple[Tensor, Tensor]:
    """What the judge sees of training and test images, centred and of norm one."""
    if args.model == EMBEDDED:
        seen = [images.flatten(1) for images in (vision.train, vision.test)]
    else:
        judge = load_vision(args.judge, None, args.images, args.device)
        # Register tokens stand between the CLS token and the patches.
        patches = slice(1 + getattr(judge.model.config, "num_register_tokens", 0), None)
        per_image = judge.shape("output", patches)[1]
        seen = [
            torch.cat([r.unflatten(0, (-1, per_image)).mean(1).cpu() for r in rows])
            for rows in (judge.rows(split, "output", patches) for split in ("train", "test"))
        ]
    mean = seen[0].mean(0)
    return tuple(torch.nn.functional.normalize(x - mean, dim=1) for x in seen)


def main() -> None:
    options = parser(__doc__, "facebook/dinov2-base")
    options.add_argument("--judge", default="facebook/dinov3-vitb16-pretrain-lvd1689m")
    options.add_argument("--images", default="frgfm/imagewoof:320px")
    options.add_argument("--queries", type=int, default=1000)
    options.add_argument("--epochs", type=int)
    options.add_argument("--k", type=int)
    args = parse(options)
    args.epochs = args.epochs or (20 if args.small else 40)
    args.k = args.k or (8 if args.small else 32)
    args.judge = "raw pixels" if args.model == EMBEDDED else args.judge
    vision = load_vision(args.model, None, args.images, args.device)
    train_seen, test_seen = judged_vectors(args, vision)
    generator = torch.Generator().manual_seed(args.seed)
    queries = torch.randperm(len(test_seen), generator=generator)[: args.queries]
    seeds = range(args.seed, args.seed + 3)
    found: dict[str, dict[int, Tensor]] = {of: {} for of in KINDS}
    results: dict[str, Any] = {}
    for of in KINDS:
        alike, same, accuracies = [], [], []
        for seed in seeds:

            def codes(k: int, of: str = of, seed: int = seed) -> list[Tensor]:
                sae = vision.sae(of, k, CLS, epochs=args.epochs, lr=5e-4, seed=seed)
                return [vision.codes(sae, split, of, CLS) for split in ("train", "test")]

            train, test = (torch.nn.functional.normalize(c, dim=1) for c in codes(args.k))
            nearest = (test[queries] @ train.T).topk(max(NEIGHBOURS)).indices
            alike.append((test_seen[queries][:, None] * train_seen[nearest]).sum(-1))
            same.append((vision.train_labels[nearest] == vision.test_labels[queries, None]).float())
            train, test = codes(2 * args.k)
            probe = make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=1000))
            accuracies.append(probe.fit(train, vision.train_labels).score(test, vision.test_labels))
        judged, agrees = torch.stack(alike), torch.stack(same)  # (seed, query, neighbour)
        found[of] = {n: judged[..., :n].mean(-1).mean(0) for n in NEIGHBOURS}
        results[of] = {
            "similarity": {str(n): float(found[of][n].mean()) for n in NEIGHBOURS},
            "same_label": {str(n): float(agrees[..., :n].mean()) for n in NEIGHBOURS},
            "probe_accuracy": [float(a) for a in accuracies],
        }
        print(
            f"{of:9} judged {results[of]['similarity']['1']:.3f} at one neighbour, same label "
            f"{results[of]['same_label']['1']:.1%}; probes at k = {2 * args.k} "
            f"{sum(accuracies) / 3:.1%}"
        )
    results["wilcoxon_p"] = {
        str(n): float(wilcoxon(found["centroid"][n], found["output"][n]).pvalue) for n in NEIGHBOURS
    }
    print("Wilcoxon, two-sided, queries averaged over seeds:", results["wilcoxon_p"])

    figure, (axis,) = new_figure(5, 3.4)
    for of, colour in KINDS.items():
        values = [results[of]["similarity"][str(n)] for n in NEIGHBOURS]
        axis.plot(NEIGHBOURS, values, "o-", color=colour, label=of)
    axis.set(xlabel="neighbours", ylabel=f"similarity ({args.judge.rpartition('/')[2]})")
    axis.legend(frameon=False)
    settings = {"seeds": list(seeds), "lr": 5e-4, "factor": 10, "n_queries": len(queries)}
    save(args, results, figure, **settings, module=vision.module, positions="CLS")


if __name__ == "__main__":
    main()
