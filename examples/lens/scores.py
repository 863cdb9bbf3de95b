"""How good predictions are, when answers are read, and whether two lenses name the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from measure import SHUFFLED, Reader, Run
from scipy.stats import rankdata

TARGETS = ("measured", "measured difference")
# A cell at the last position is one whose own next token a lens claims to read; of an earlier one
# the averaged lenses claim the sum over later positions, the others nothing.
PLACES = {"last": True, "earlier": False}
_HALF = 0.5  # Of the logit difference: from there on the answer goes with the replaced cell.
_K = 5


def lens_names(cells: pd.DataFrame) -> list[str]:
    start = list(cells.columns).index(TARGETS[1]) + 1
    names = [c for c in cells.columns[start:] if not c.endswith(" difference")]
    return [name for name in names if not name.startswith(SHUFFLED)]


def predictions(cells: pd.DataFrame, n_resamples: int, seed: int) -> list[dict[str, Any]]:
    """Spearman's correlation and R² of every lens by layer, place and replacement.

    R² is of the prediction as it is, with no factor fitted: below zero is worse than the mean of
    what was measured. Intervals are of resampled prompts, 95 %.
    """
    found = []
    for (layer, is_last, replaced), some in cells.groupby(["layer", "is_last", "replaced"]):
        prompts = [rows.index.to_numpy() for _, rows in some.groupby("prompt")]
        rng = np.random.default_rng(seed)
        draws = [rng.integers(len(prompts), size=len(prompts)) for _ in range(n_resamples)]
        samples = [np.concatenate([prompts[i] for i in draw]) for draw in draws]
        for target in TARGETS:
            suffix = target.removeprefix("measured")
            for lens in lens_names(cells):
                y, x = cells[target].to_numpy(), cells[lens + suffix].to_numpy()
                control = cells[SHUFFLED + lens + suffix].to_numpy()
                at = some.index.to_numpy()
                row = {"layer": int(layer), "place": "last" if is_last else "earlier"}
                row |= {"replaced": replaced, "target": target, "lens": lens, "n": len(at)}
                row |= {"spearman": spearman(x[at], y[at]), "r2": r2(x[at], y[at])}
                row |= {"pearson2": float(np.corrcoef(x[at], y[at])[0, 1] ** 2)}
                row |= {"shuffled": spearman(control[at], y[at])}
                if target == TARGETS[0]:
                    drawn = [(spearman(x[i], y[i]), r2(x[i], y[i])) for i in samples]
                    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
                    row |= {
                        "spearman_interval": [low[0], high[0]],
                        "r2_interval": [low[1], high[1]],
                    }
                found.append(row)
    return found


def by_kind(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Spearman's correlation for each kind of prompt, layers together."""
    return [
        {"kind": kind, "place": "last" if is_last else "earlier", "n": len(some)}
        | {lens: spearman(some[lens], some[TARGETS[0]]) for lens in lens_names(cells)}
        for (kind, is_last), some in cells.groupby(["kind", "is_last"])
    ]


def spearman(x: Any, y: Any) -> float:
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def r2(x: Any, y: Any) -> float:
    return float(1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def reads(first: list[dict[str, Any]], layers: list[int]) -> dict[str, Any]:
    """Of prompts that the model solves: the first of the layers where a lens has the answer on top.

    And what goes with the last position there, and at the layer before.
    """
    solved = [one for one in first if one["is_solved"]]
    kinds = sorted({one["kind"] for one in first})
    found: dict[str, Any] = {
        "solved": {
            k: [sum(o["kind"] == k for o in some) for some in (solved, first)] for k in kinds
        },
        "moves": np.mean([one["moves"] for one in solved], 0).tolist(),
        "layers": layers,
        "lenses": {},
    }
    for lens in solved[0]["read"]:
        at, before, gaps, starts = [], [], [], []
        for one in solved:
            start = next((i for i, is_read in enumerate(one["read"][lens]) if is_read), None)
            cause = next((i for i, moves in enumerate(one["moves"]) if moves >= _HALF), None)
            if start is None:
                continue
            starts.append(layers[start])
            at.append(one["moves"][start])
            before.append(one["moves"][start - 1] if start else 0.0)
            gaps.append(start - (len(layers) if cause is None else cause))
        found["lenses"][lens] = {"read": len(starts), "of": len(solved)} | (
            {
                "first_layer": float(np.mean(starts)),
                "moves": float(np.mean(at)),
                "moves_before": float(np.mean(before)),
                "same_layer": float(np.mean(np.equal(gaps, 0))),
                "earlier": float(np.mean(np.less(gaps, 0))),
                "later": float(np.mean(np.greater(gaps, 0))),
            }
            if starts
            else {}
        )
    return found


@torch.no_grad()
def same_tokens(runs: list[Run], one: Reader, other: Reader) -> list[dict[str, float]]:
    """By layer, the share of cells with the same first token, and of their first five in common."""
    found = []
    for layer in runs[0].streams:
        x = torch.cat([run.streams[layer][1:] for run in runs])
        tops = [
            torch.cat([r(some, layer).topk(_K).indices for some in x.split(64)])
            for r in (one, other)
        ]
        common = (tops[0][:, :, None] == tops[1][:, None]).any(-1).float().mean()
        first = (tops[0][:, 0] == tops[1][:, 0]).float().mean()
        found.append({"layer": layer, "first": float(first), "five": float(common), "n": len(x)})
    return found
