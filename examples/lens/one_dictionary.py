"""One dictionary for all depths, beside one a depth and a crosscoder of activations.

The centroids of the spans from block 0 to each depth lie in one space, that of the embeddings, so
one SAE can be trained on all of them. It stands beside SAEs of one depth each, and beside a
crosscoder (Lindsey et al. 2024: one set of codes that writes the activations of several layers at
once; with TopK it is a TopK SAE of these layers' residual streams laid end to end). All have as
many parameters and take as many steps on the same text. SAELens trains them all.

    python examples/lens/one_dictionary.py --out one_dictionary            # the embedded model
    python examples/lens/one_dictionary.py --small --out one_dictionary    # in a minute; no result
    python examples/lens/one_dictionary.py --model DIR --text train.jsonl --held-out test.jsonl \
        --depths 1 3 5 7 --out one_dictionary

docs/results/one_dictionary.md says how things are measured, and what was seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from span_dictionaries import N_POS, EarlyExit, centroid_saes, collect, crosscoders, scaled
from torch import Tensor

import lch_plugin as lch
from lch_plugin.cotangents import Ones, Random
from lch_plugin.demo.corpus import stories
from lch_plugin.saes import predicted_responses

SEEN = 6  # of the cotangents; SAEs are not trained on those after
# The columns of a table, one for each list of what was noted.
TABLES = (
    ("parameters", "explained", "explained, new v", "explained at input"),
    ("live", "fires at two", "at once at two", "firings at once", "energy at two", "counterparts"),
    ("R2 data 0.1", "R2 data 0.1, new v", "R2 data 0.3", "R2 isotropic 0.1", "rank data 0.1"),
)


def load(args: argparse.Namespace) -> tuple[Any, list[Tensor]]:
    """The model, and the beginnings of texts: to train on, and held out."""
    if args.model:
        model = lch.load(args.model, dtype="float32").bridge()
        files = [p.read_text(encoding="utf-8").splitlines() for p in (args.text, args.held_out)]
        splits: Any = [(json.loads(line)["text"] for line in lines) for lines in files]
    else:
        model = lch.load_demo_model()
        splits = [stories(4 * args.texts, split=split) for split in ("train", "test")]
    cut = [[model.to_tokens(text)[:, :N_POS] for text in split] for split in splits]
    return model, [
        torch.cat([row for row in rows if row.shape[1] == N_POS][:n])
        for rows, n in zip(cut, (args.texts, args.texts // 8), strict=True)
    ]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--model", help="a directory; with --text and --held-out, lines of JSON")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", help="last blocks of the spans; all")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=800)
    parser.add_argument("--rows", type=int, default=200_000, help="that each SAE is trained on")
    args = parser.parse_args()
    if args.small:
        args.texts, args.rows, args.seeds, args.depths = 80, 16_384, 2, args.depths or [0, 3]
    return args


def tables(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Means over seeds and their standard errors, as Markdown."""
    own = found["one dictionary"]
    by_depth = [
        [key for key in own if key.startswith(f"{of} at depth") and "new" not in key]
        for of in ("explained", "R2 data 0.1")
    ]
    lines = []
    for columns in (*TABLES, *by_depth):
        lines += [f"| | {' | '.join(columns)} |", "|" + " --- |" * (1 + len(columns))]
        for name, of in found.items():
            if any(key in of for key in columns):
                cells = (shown(of[key]) if key in of else "–" for key in columns)
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def shown(values: list[float]) -> str:
    if mean(values) > 1:
        return f"{mean(values):,.0f}"
    return f"{mean(values):.3f}" + (f" ± {error(values):.3f}" if len(values) > 1 else "")


def error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def save(args: argparse.Namespace, found: Mapping[str, Mapping[str, list[float]]]) -> None:
    record = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "versions": {name: version(name) for name in ("lch-plugin", "torch", "sae-lens")},
        "results": {
            name: {key: {"mean": mean(v), "error": error(v), "n": len(v)} for key, v in of.items()}
            for name, of in found.items()
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.out / "tables.md").write_text(tables(found), encoding="utf-8")


def main() -> None:
    args = options()
    model, (train_tokens, test_tokens) = load(args)
    depths = args.depths or list(range(model.cfg.n_layers))
    # Five logit differences between tokens of the text, common ones more often.
    counts = torch.bincount(train_tokens[:, 1:].flatten()).float()
    drawn = counts.multinomial(10, generator=torch.Generator().manual_seed(0)).view(5, 2).tolist()
    exits = [EarlyExit(model, *pair) for pair in drawn]
    vs = [Ones(), Random(0), Random(1), *exits[:3], Random(2), *exits[3:]]
    mu, x = collect(model, train_tokens, depths, vs)
    mu_test, x_test = collect(model, test_tokens, depths, vs)
    (z, _), (z_test, back) = scaled(mu, mu), scaled(mu_test, mu)
    (y, _), (y_test, y_back) = (scaled(t[:, :, 1:], x[:, :, 1:]) for t in (x, x_test))

    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def note(name: str, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            found[name][key].append(value)

    few = slice(0, max(8, args.texts // 32))  # Of the held-out texts, for responses.
    for seed in range(args.seeds):
        settings = (args.k, args.rows, seed, note)
        made = centroid_saes(z[:SEEN], z_test, *settings)
        centroids = {name: back(z_hat)[:, :, few] for name, z_hat in made.items()}
        made = crosscoders(y, y_test, *settings)
        inputs = {name: y_back(y_hat)[0, few] for name, y_hat in made.items()}
        scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (j, depth), (i, v) in itertools.product(enumerate(depths), enumerate(vs)):
            if not isinstance(v, EarlyExit):
                continue
            logits = v.after(test_tokens[few], x_test[0, few, :1], depth)
            fits = predicted_responses(
                logits,
                x_test[0, few, 1:],
                {name: mu_hat[i, j] for name, mu_hat in centroids.items()}
                | {name: lch.centroid(logits, x_hat) for name, x_hat in inputs.items()}
                | {"span site": mu_test[i, j, few]},  # The exact centroid once more.
                sizes=(0.1, 0.3),
                n_perturbations=8,
                mixes_positions=True,
                generator=torch.Generator().manual_seed(0),
            )
            new = "" if i < SEEN else ", new v"
            for fit in fits:
                of = f"{fit.perturbation} {fit.size}"
                for kind, values in (("R2", fit.r_squared), ("rank", fit.rank_correlation)):
                    for name, value in values.items():
                        scores[name][f"{kind} {of} at depth {j}{new}"].append(value)
                        scores[name][f"{kind} {of}{new}"].append(value)
        for name, of_name in scores.items():
            note(name, {key: mean(values) for key, values in of_name.items()})
        save(args, found)
    print(tables(found))


if __name__ == "__main__":
    main()
