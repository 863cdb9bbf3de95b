"""Delayed generalisation of a one-layer transformer on modular addition (GrokAlign, 2506.12284).

Published: a + b mod 113, 30 % of all pairs to train on, d_model 128, four heads, 512 neurons, no
norms, AdamW (lr 1e-3, betas 0.9 and 0.98, weight decay 1), all pairs in one batch, 48,000 steps.
GrokAlign adds 1e-3 times the Frobenius norm of the Jacobian from the embeddings to the logits of
the last position, from one random projection.
Here: the same of a GPT-2 (so with norms) in a TransformerBridge, from the input of its block, each
method alone. The weight of the alignment loss was chosen on seed 0 of the small setting.
--small: mod 23, 60 % of pairs, d_model 32, 128 neurons, lr 3e-3, 1,200 steps.

    python examples/paper/grokking_modular.py --small --out modular   # minutes on one core
    python examples/paper/grokking_modular.py --out modular           # for a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from grokking import Task, arguments, experiment, methods, report
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lch_plugin.demo import DEMO_MODEL_DIR

PUBLISHED = {"modulus": 113, "share": 0.3, "d_model": 128, "d_mlp": 512, "lr": 1e-3}
SMALL = {"modulus": 23, "share": 0.6, "d_model": 32, "d_mlp": 128, "lr": 3e-3}


def last(logits: Tensor) -> Tensor:
    return logits[:, -1]


def bridge(modulus: int, d_model: int, d_mlp: int) -> TransformerBridge:
    config = GPT2Config(
        vocab_size=modulus + 1,
        n_positions=3,
        n_embd=d_model,
        n_layer=1,
        n_head=4,
        n_inner=d_mlp,
        activation_function="relu",
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    model.config.architectures = ["GPT2LMHeadModel"]
    # The bridge asks for a tokenizer, which numbers do not need.
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    return TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer)


def maker(settings: dict[str, Any]) -> Callable[[int], Task]:
    p = settings["modulus"]

    def make(seed: int) -> Task:
        torch.manual_seed(seed)
        pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
        pairs = pairs[torch.randperm(len(pairs))]
        ids = torch.cat([pairs, torch.full((len(pairs), 1), p)], dim=1)  # a, b, "="
        answers, n = pairs.sum(1) % p, int(settings["share"] * len(pairs))
        model = bridge(p, settings["d_model"], settings["d_mlp"])

        @torch.no_grad()
        def accuracies() -> dict[str, float]:
            right = last(model(ids)).argmax(1) == answers
            return {
                "train": float(right[:n].float().mean()),
                "test": float(right[n:].float().mean()),
            }

        return Task(
            model,
            repeat((ids[:n], answers[:n])),
            nn.functional.cross_entropy,
            accuracies,
            probe=ids[:64],
            site="blocks.0:",
            output=last,
            lr=settings["lr"],
            betas=(0.9, 0.98),
        )

    return make


def main() -> None:
    args = arguments(__doc__, steps=48_000)
    settings = SMALL if args.small else PUBLISHED
    steps, every = (min(args.steps, 1200), 50) if args.small else (args.steps, 500)
    chosen = methods(1.0, 1e-3, 0.3)
    seeds = range(args.seed, args.seed + args.seeds)
    found = experiment(maker(settings), chosen, seeds, steps, every)
    about = settings | {"steps": steps, "model": "GPT-2 with ReLUs, trained here"}
    report(args, found, chosen, **about)


if __name__ == "__main__":
    main()
