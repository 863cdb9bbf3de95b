"""Lenses side by side: is the exact lens better than averaged ones, the logit lens, a tuned lens?

    python examples/lens/comparison.py DIR --out lenses           # a model directory, as lch.load
    python examples/lens/comparison.py --small --out lenses       # the embedded model, minutes

1. Predicted against measured change of the answer's logit when one cell (the residual stream that
   a layer reads at one position) is replaced by its twin's or by the mean: `measure.py`.
2. At which layer the answer is the first token of the last position, and whether that layer
   matters: what goes when the twin's residual stream is put there.
3. Whether averages over two corpora name the same tokens, beside two halves of one corpus.

Prompts are `prompts.py`'s, none of them a text that a lens was fitted on. Averages are fitted here
(`fits.py`), which takes nearly all of the time, and are kept in ``OUT/fits``; measured cells are
kept in ``OUT/cells.csv``. What was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from drawing import figure, tables
from fits import CORPORA, LINEARIZATIONS, SKIP_FIRST, fit, texts
from measure import Reader, Run, cells, first_reads, means, run
from prompts import pairs
from scores import by_kind, lens_names, predictions, reads, same_tokens
from torch import Tensor
from tuned import tuned_lens

import lch_plugin as lch

VERSIONS = ("lch-plugin", "torch", "transformers", "transformer-lens", "scikit-learn")


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    loaded = lch.load(args.model, dtype="float32") if args.model else None
    model = lch.load_demo_model() if loaded is None else loaded.bridge()
    layers = args.layers or default_layers(model.cfg.n_layers)
    args.out.mkdir(parents=True, exist_ok=True)
    readers, corpora = fitted(model, args, layers)
    whole = texts(CORPORA[0], args.tuned_texts, args.seed) if args.tuned_texts else []
    tuned, why = tuned_lens(model, loaded, whole, layers, args.seed, args.out / "fits")
    if args.fit_only:
        return
    readers = {"logit lens": lambda x, _: unembed(model, x)} | readers
    if tuned is not None:
        readers[f"tuned lens, {len(whole)} {CORPORA[0]}"] = tuned
    held_out = pairs(model, args.prompts, args.seed, embedded=loaded is None)
    runs = [run(model, pair, layers) for pair in held_out]
    table_of_cells, first = measured(model, runs, readers, args.out)
    results = {
        "cells": predictions(table_of_cells, args.resamples, args.seed),
        "kinds": by_kind(table_of_cells),
        "reads": reads(first, layers),
        "corpora": {
            kind: {name: same_tokens(runs, *two) for name, two in pairs_of_one.items()}
            for kind, pairs_of_one in corpora.items()
        },
        "not run": {"tuned lens": why} if why else {},
    }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings |= {"layers": layers, "skip_first": SKIP_FIRST, "dtype": "float32"}
    settings |= {
        "model": Path(args.model).name if args.model else "embedded",
        "n_prompts": len(runs),
    }
    record = {
        "settings": settings,
        "versions": {name: version(name) for name in VERSIONS},
        "results": results,
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    (args.out / "results.json").write_text(text + "\n", encoding="utf-8")
    figure(results["cells"]).savefig(args.out / "figure.png")
    (args.out / "tables.md").write_text(tables(results, layers), encoding="utf-8")
    print(tables(results, layers))
    print(f"wrote {args.out}/results.json, figure.png and tables.md")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a directory; the embedded model if --small")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="the embedded model, small fits")
    parser.add_argument(
        "--fits",
        default="detached:20,jacobian:20,detached:100,jacobian:100",
        help="averages over so many texts of the first corpus",
    )
    parser.add_argument("--other-texts", type=int, default=8, help="of the second corpus")
    parser.add_argument("--fit-tokens", type=int, default=24, help="of each text")
    parser.add_argument("--tuned-texts", type=int, default=100, help="whole texts; 0 for none")
    parser.add_argument("--layers", help="that blocks read, from 1; about five if not given")
    parser.add_argument("--prompts", type=int, default=10, help="of each kind")
    parser.add_argument("--resamples", type=int, default=300, help="of prompts, for intervals")
    parser.add_argument("--fit-only", action="store_true", help="fit, and measure nothing")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.small == bool(args.model):
        parser.error("give a model directory, or --small for the embedded model")
    if args.small:
        args.fits, args.other_texts, args.tuned_texts = "detached:8,jacobian:8", 4, 0
        args.prompts, args.resamples = 4, 50
    args.fits = [(kind, int(n)) for kind, n in (one.split(":") for one in args.fits.split(","))]
    args.layers = args.layers and [int(layer) for layer in args.layers.split(",")]
    return args


def default_layers(n_layers: int) -> list[int]:
    """A fifth, two fifths and so on of the way, and two before the end."""
    return sorted({max(1, n_layers * i // 5) for i in range(1, 5)} | {max(1, n_layers - 2)})


def fitted(
    model: Any, args: argparse.Namespace, layers: list[int]
) -> tuple[dict[str, Reader], dict[str, dict[str, tuple[Reader, Reader]]]]:
    """Averaged lenses to read with, and pairs of them of which it is asked whether they agree."""

    def averaged(linearization: str, corpus: str, n: int, start: int = 0) -> Reader:
        how = {"layers": layers, "n_tokens": args.fit_tokens, "seed": args.seed}
        lens = fit(model, corpus, linearization, n, start, out=args.out / "fits", **how)
        return lambda x, layer: unembed(model, lens.transport(x, layer - 1))

    readers, corpora = {}, {}
    first, second = CORPORA
    for kind, n in args.fits:
        readers[f"{kind}, {n} {first}"] = averaged(kind, first, n)
    n = args.other_texts
    for kind in LINEARIZATIONS if n else ():
        one, same = (averaged(kind, first, n, start) for start in (0, n))
        other = averaged(kind, second, n)
        names = f"{n} {first}, {n} others", f"{n} {first}, {n} {second}"
        corpora[kind] = dict(zip(names, ((one, same), (one, other)), strict=True))
    return readers, corpora


def unembed(model: Any, x: Tensor) -> Tensor:
    return model.unembed(model.ln_final(x[None]))[0]


def measured(
    model: Any, runs: list[Run], readers: dict[str, Reader], out: Path
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Every cell, and where answers are read; prompts that are in the files already are kept."""
    paths = out / "cells.csv", out / "reads.jsonl"
    known = set()
    if paths[0].is_file():
        kept = pd.read_csv(paths[0])
        if not set(lens_names(kept)) >= set(readers):
            raise SystemExit(f"{paths[0]} has other lenses: delete it and {paths[1].name}.")
        known = set(kept["prompt"])
    mean = means(runs)
    for i, one in enumerate(runs):
        if one.pair.prompt in known:
            continue
        print(f"[{i + 1}/{len(runs)}] {one.pair.prompt}", flush=True)
        rows = list(cells(model, one, mean, readers))
        with paths[1].open("a", encoding="utf-8") as file:
            file.write(json.dumps(first_reads(model, one, readers, rows)) + "\n")
        pd.DataFrame(rows).to_csv(paths[0], mode="a", header=not paths[0].exists(), index=False)
    lines = paths[1].read_text(encoding="utf-8").splitlines()
    by_prompt = {found["prompt"]: found for found in map(json.loads, lines)}
    return pd.read_csv(paths[0]), list(by_prompt.values())


if __name__ == "__main__":
    main()
