"""Measure the demo model on held-out examples: ``python -m lch_plugin.demo.evaluate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo.corpus import stories
from lch_plugin.demo.tasks import BEHAVIOURS, Example, examples, margin


@dataclass(frozen=True)
class Score:
    """How well the examples of one behaviour are answered.

    Attributes:
        n: How many examples there are.
        accuracy: The fraction with a positive logit difference.
        margin: Its mean.
        top1: The fraction whose most likely token of the whole vocabulary is an answer.
        flipped: The fraction whose corrupt prompt has a negative logit difference.
        bigram: The accuracy of a bigram model of the training text; a tie counts as half.
    """

    n: int
    accuracy: float
    margin: float
    top1: float
    flipped: float
    bigram: float


def evaluate(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    n: int = 300,
    split: str = "test",
    seed: int = 0,
) -> dict[str, Score]:
    """Score ``model`` on ``n`` examples of every behaviour."""
    bigram = bigram_logits(tokenizer)
    return {
        behaviour: _score(model, tokenizer, bigram, examples(behaviour, n, split=split, seed=seed))
        for behaviour in BEHAVIOURS
    }


def next_token_logits(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> Float[Tensor, "prompt d_vocab"]:
    """The logits after each prompt, which is given a beginning-of-sequence token."""
    encoded = [[tokenizer.bos_token_id, *tokenizer.encode(prompt)] for prompt in prompts]
    longest = max(map(len, encoded))
    # Padding on the right does not reach the positions before it: attention is causal.
    padded = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in encoded]
    with torch.no_grad():
        logits: Tensor = model(torch.tensor(padded, device=model.device)).logits
    return logits[torch.arange(len(encoded)), [len(ids) - 1 for ids in encoded]].cpu()


def bigram_logits(
    tokenizer: PreTrainedTokenizerFast, n_stories: int = 20_000
) -> Float[Tensor, "d_vocab d_vocab"]:
    """Add-one smoothed log probabilities of the next token (columns) given one token (rows)."""
    d_vocab = len(tokenizer)
    counts = torch.ones(d_vocab, d_vocab)
    documents = tokenizer(list(stories(n_stories)))["input_ids"]
    tokens = torch.tensor([i for ids in documents for i in [tokenizer.bos_token_id, *ids]])
    pairs = (tokens[:-1], tokens[1:])
    counts.index_put_(pairs, torch.ones(()), accumulate=True)
    return (counts / counts.sum(-1, keepdim=True)).log()


def token_ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> list[int]:
    """The token of each word; every word must be a single one."""
    return [single for (single,) in tokenizer(list(words))["input_ids"]]


def _score(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    bigram: Float[Tensor, "d_vocab d_vocab"],
    asked: Sequence[Example],
) -> Score:
    prompts = [example.prompt for example in asked]
    clean = next_token_logits(model, tokenizer, prompts)
    corrupt = next_token_logits(model, tokenizer, [example.corrupt for example in asked])
    baseline = bigram[[tokenizer.encode(prompt)[-1] for prompt in prompts]]
    answers = [token_ids(tokenizer, example.answers) for example in asked]
    foils = [token_ids(tokenizer, example.foils) for example in asked]
    on_clean, on_corrupt, on_baseline = (
        torch.stack(list(map(margin, logits, answers, foils)))
        for logits in (clean, corrupt, baseline)
    )
    is_top = [int(logits.argmax()) in right for logits, right in zip(clean, answers, strict=True)]
    return Score(
        n=len(asked),
        accuracy=_mean(on_clean > 0),
        margin=_mean(on_clean),
        top1=sum(is_top) / len(asked),
        flipped=_mean(on_corrupt < 0),
        bigram=_mean(on_baseline > 0) + _mean(on_baseline == 0) / 2,
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def main() -> None:
    """Print the scores of a model directory as a table."""
    parser = argparse.ArgumentParser(description="Measure the demo model on held-out examples.")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_DIR)
    parser.add_argument("-n", type=int, default=300, help="examples of each behaviour")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    arguments = parser.parse_args()
    model = GPT2LMHeadModel.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    scores = evaluate(model, tokenizer, n=arguments.n)
    columns = [field.name for field in fields(Score)]
    table = Table("behaviour", *columns)
    for behaviour, score in scores.items():
        n, *rest = astuple(score)
        table.add_row(behaviour, str(n), *(f"{value:.3f}" for value in rest))
    Console().print(table)
    if arguments.json:
        written = {behaviour: asdict(score) for behaviour, score in scores.items()}
        arguments.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
