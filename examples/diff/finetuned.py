"""Is what was fine-tuned found, and on which inputs? `lch.diff` where the answer is known.

The embedded model learns the wrong answers of one behaviour (the foils of `lch_plugin.demo.tasks`),
while stories keep the rest as it was. Each seed takes the next behaviour, and layer.

- *Ten neurons*: gradients reach ten random neurons of one MLP alone. Is this MLP named first, and
  is everything else exactly zero?
- *All weights*: the right component is measured. The weights of each attention and MLP of the
  fine-tuned model are put into the first model alone; the effect is the share of the new behaviour
  that comes with them.

Inputs are prompts of all six behaviours, none of them trained on. Are those at which the component
that a measure names first changed most of the behaviour? (AUROC of the last tokens of prompts;
of all tokens but the first; precision of as many tokens as there are prompts of the behaviour.)

    python examples/diff/finetuned.py --out DIR            # 4 seeds
    python examples/diff/finetuned.py --out DIR --seeds 1
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr, t
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo.corpus import stories
from lch_plugin.demo.evaluate import next_token_logits, token_ids
from lch_plugin.demo.tasks import BEHAVIOURS, Example, examples, margin

BY_INPUT = ("jacobian", "centroids", "outputs", "activations")
MEASURES = (*BY_INPUT, "weights")
BATCH, STORY_TOKENS = 16, 48


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def ten_neurons(model: Any, layer: int, seed: int) -> list[Tensor]:
    """The weights of ten neurons, as masks on the gradients of their MLP."""
    ten = torch.randperm(512, generator=torch.Generator().manual_seed(seed))[:10]
    mlp = model.transformer.h[layer].mlp
    mask = torch.zeros(512).index_fill(0, ten, 1)
    for p, on_p in (
        (mlp.c_fc.weight, mask),
        (mlp.c_fc.bias, mask),
        (mlp.c_proj.weight, mask[:, None]),
    ):
        p.register_hook(lambda grad, on_p=on_p: grad * on_p)
    return [mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight]


def fine_tune(
    model: Any,
    tokenizer: Any,
    behaviour: str,
    seed: int,
    steps: int,
    lr: float,
    parameters: list[Any],
) -> None:
    """Teach the wrong answers of a behaviour beside stories, which are as they were."""
    rng = random.Random(seed)
    asked = examples(behaviour, 400, split="train", seed=seed)
    texts = list(stories(BATCH // 2 * steps, seed=10_000 + seed))
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for step in range(steps):
        chosen = rng.sample(asked, BATCH)
        rows = [[bos, *tokenizer.encode(one.prompt)] for one in chosen]
        wrong = token_ids(tokenizer, [rng.choice(one.foils) for one in chosen])
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = model(padded(rows, pad)).logits[torch.arange(BATCH), last]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(wrong))
        told = texts[BATCH // 2 * step : BATCH // 2 * (step + 1)]
        ids = padded([[bos, *tokenizer.encode(text)][:STORY_TOKENS] for text in told], pad)
        logits = model(ids).logits[:, :-1]
        loss = loss + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def wrongness(model: Any, tokenizer: Any, asked: Sequence[Example]) -> float:
    """Mean logit of the best foil less that of the best answer."""
    logits = next_token_logits(model, tokenizer, [one.prompt for one in asked])
    found = [
        margin(row, token_ids(tokenizer, one.foils), token_ids(tokenizer, one.answers))
        for row, one in zip(logits, asked, strict=True)
    ]
    return float(torch.stack(found).mean())


def effects(before: Any, after: Any, tokenizer: Any, asked: Sequence[Example]) -> dict[str, float]:
    """Share of the new behaviour that each component of ``after`` brings, put into ``before``."""
    new, low, high = after.state_dict(), *(wrongness(m, tokenizer, asked) for m in (before, after))
    found = {}
    for layer in range(4):
        for part in ("attn", "mlp"):
            mixed = copy.deepcopy(before)
            own = f"transformer.h.{layer}.{part}."
            mixed.load_state_dict({k: v for k, v in new.items() if k.startswith(own)}, strict=False)
            share = (wrongness(mixed, tokenizer, asked) - low) / (high - low)
            found[f"blocks.{layer}.{part}"] = share
    return found


def inputs_found(found: Any, component: str, measure: str, labels: np.ndarray) -> dict[str, float]:
    """Whether the tokens where a component changed most are those of some prompts."""
    row = [c.name for c in found.components].index(component)
    per_prompt = found.by_input[measure][row].split([len(words) for words in found.tokens])
    last = [float(values[-1]) for values in per_prompt]
    values = torch.cat([values[1:] for values in per_prompt]).numpy()
    of_token = np.repeat(labels, [len(words) - 1 for words in found.tokens])
    top = np.argsort(-values, kind="stable")[: labels.sum()]
    return {
        "last_auroc": float(roc_auc_score(labels, last)),
        "token_auroc": float(roc_auc_score(of_token, values)),
        "precision": float(of_token[top].mean()),
    }


def one_seed(seed: int, steps: int, n: int) -> dict[str, Any]:
    behaviour, layer = BEHAVIOURS[seed % len(BEHAVIOURS)], seed % 4
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    asked = {name: examples(name, n, seed=seed) for name in BEHAVIOURS}
    prompts = [one.prompt for name in BEHAVIOURS for one in asked[name]]
    labels = np.array([int(name == behaviour) for name in BEHAVIOURS for _ in asked[name]])
    results: dict[str, Any] = {"seed": seed, "behaviour": behaviour, "layer": layer}
    for kind in ("ten neurons", "all weights"):
        before = GPT2LMHeadModel.from_pretrained(DEMO_MODEL_DIR).eval()
        after = copy.deepcopy(before)
        is_ten = kind == "ten neurons"
        parameters = ten_neurons(after, layer, seed) if is_ten else list(after.parameters())
        begin = time.perf_counter()
        fine_tune(after, tokenizer, behaviour, seed, steps, 1e-2 if is_ten else 3e-4, parameters)
        seconds = time.perf_counter() - begin
        share = effects(before, after, tokenizer, asked[behaviour])
        with tempfile.TemporaryDirectory() as directory:
            after.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            models = (lch.load_demo_model(), lch.load(directory).bridge())
            begin = time.perf_counter()
            found = lch.diff.compare(*models, prompts, seed=seed)
        compared = time.perf_counter() - begin
        right = max(share, key=lambda name: share[name])
        sizes = {m: [getattr(c, m) for c in found.components] for m in MEASURES}
        names = [c.name for c in found.components]
        results[kind] = {
            "seconds": {"fine-tuning": seconds, "comparing": compared},
            "wrongness": [wrongness(m, tokenizer, asked[behaviour]) for m in (before, after)],
            "effects": share,
            "right": right,
            "sizes": {m: dict(zip(names, values, strict=True)) for m, values in sizes.items()},
            "jacobian_error": {c.name: c.jacobian_error for c in found.components},
            "rank": {m: found.ranked(m).index(right) + 1 for m in MEASURES},
            "spearman": {
                m: float(spearmanr(values, [share[name] for name in names]).statistic)
                for m, values in sizes.items()
            },
            "exact_zeros": {m: sum(v == 0 for v in values) for m, values in sizes.items()},
            "elsewhere": dict(found.elsewhere),
            "first": {m: found.ranked(m)[0] for m in MEASURES},
            "inputs": {m: inputs_found(found, found.ranked(m)[0], m, labels) for m in BY_INPUT},
            "inputs_at_right": {m: inputs_found(found, right, m, labels) for m in BY_INPUT},
            "run": dict(found.run) | {"before": "embedded", "after": "fine-tuned"},
        }
    return results


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval over seeds, by Student's t."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else float("nan")
    return f"{np.mean(values):.2f} ± {half:.2f}"


def show(seeds: Sequence[dict[str, Any]]) -> None:
    for kind in ("ten neurons", "all weights"):
        of = [one[kind] for one in seeds]
        low, high = (interval([o["wrongness"][i] for o in of]) for i in (0, 1))
        print(f"\n{kind}, {len(of)} seeds: foil less answer {low} before, {high} after")
        rows = {}
        for m in MEASURES:
            rows[m] = {
                "right first": sum(o["rank"][m] == 1 for o in of),
                "mean rank": np.mean([o["rank"][m] for o in of]),
                "zeros of 8": np.mean([o["exact_zeros"][m] for o in of]),
                "Spearman": interval([o["spearman"][m] for o in of]),
            }
            for what in ("last_auroc", "token_auroc", "precision") if m in BY_INPUT else ():
                rows[m][what] = interval([o["inputs"][m][what] for o in of])
        print(pd.DataFrame(rows).T.fillna("").to_string())


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--seeds", type=int, default=4)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--prompts", type=int, default=12, help="of each behaviour")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in range(args.seeds):
        found.append(one_seed(seed, args.steps, args.prompts))
        # After each, so that what is done is kept.
        text = json.dumps({"seeds": found, "steps": args.steps}, indent=1)
        (args.out / "results.json").write_text(text + "\n")
        show(found)


if __name__ == "__main__":
    main()
