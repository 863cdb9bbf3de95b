"""Train the demo model from a seed: ``python -m lch_plugin.demo.train --out DIR --seed 0``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lch_plugin.demo.corpus import stories, word_lists
from lch_plugin.demo.tokenizer import build_tokenizer
from lch_plugin.files import check_new_directory, write_directory

_LOG_EVERY = 20
#: The same function as "gelu_new", computed in one step.
_FUSED_GELU_NEW = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Recipe:
    """What the model is and how it is trained."""

    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    context_length: int = 128
    n_lists: int = 13_000
    n_stories: int = 200_000
    initializer_range: float = 0.1
    n_vocabulary_stories: int = 40_000
    batch_size: int = 16
    learning_rate: float = 2.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    n_threads: int = 2


@dataclass(frozen=True)
class TrainingLog:
    """What a training run took and where it ended."""

    seed: int
    n_steps: int
    n_tokens: int
    seconds: float
    final_loss: float


def train(
    recipe: Recipe, seed: int
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingLog]:
    """Train a model on stories of the training split; the same seed gives the same weights."""
    torch.manual_seed(seed)
    torch.set_num_threads(recipe.n_threads)
    tokenizer = build_tokenizer(
        stories(recipe.n_vocabulary_stories, seed=seed), recipe.context_length
    )
    texts = (word_lists(recipe.n_lists, seed=seed), stories(recipe.n_stories, seed=seed))
    rows = [row for part in texts for row in pack(_encode(part, tokenizer), recipe.context_length)]
    model = GPT2LMHeadModel(_config(recipe, tokenizer))
    model.transformer.wpe.weight.data = _sinusoids(recipe)
    start = time.perf_counter()
    losses = _fit(model, torch.tensor(rows), recipe)
    log = TrainingLog(
        seed=seed,
        n_steps=len(losses),
        n_tokens=len(losses) * recipe.batch_size * recipe.context_length,
        seconds=round(time.perf_counter() - start, 1),
        final_loss=round(sum(losses[-100:]) / len(losses[-100:]), 4),
    )
    return model.eval(), tokenizer, log


def pack(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Pack documents into rows of ``length`` tokens.

    Every other row goes on with the document that the row before it cut off; the others begin with
    a new one. So the model meets rows that start with the beginning-of-sequence token, as short
    prompts do, as well as windows from the middle of a text.
    """
    row: list[int] = []
    continues = True
    for document in documents:
        row += document
        if len(row) >= length:
            yield row[:length]
            row = row[length:] if continues else []
            continues = not continues


def save(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, log: TrainingLog, directory: Path
) -> None:
    """Write model and tokenizer to a new ``directory``.

    The weights are stored in half precision, which rounds them; the config asks for them to be
    loaded in single precision. ``n_ctx`` is there for TransformerLens.
    """
    model = model.half()

    def write(built: Path) -> None:
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        config = json.loads((built / "config.json").read_text())
        config |= {
            "activation_function": "gelu_new",
            "dtype": "float32",
            "n_ctx": config["n_positions"],
        }
        (built / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (built / "training.json").write_text(json.dumps(asdict(log), indent=2) + "\n")

    write_directory(directory, write)


def _encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    return ([tokenizer.bos_token_id, *ids] for ids in tokenizer(list(texts))["input_ids"])


def _sinusoids(recipe: Recipe) -> Float[Tensor, "position d_model"]:
    """Where the learned positions start from.

    The same linear map takes every position to the one before it, so that attention to the previous
    token is one matrix away.
    """
    positions = torch.arange(recipe.context_length)[:, None]
    frequencies = torch.logspace(0, -3, recipe.d_model // 2)
    angles = positions * frequencies
    return recipe.initializer_range * torch.cat([angles.sin(), angles.cos()], dim=1)


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.context_length,
        n_embd=recipe.d_model,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        initializer_range=recipe.initializer_range,
        activation_function=_FUSED_GELU_NEW,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _fit(model: GPT2LMHeadModel, rows: Int[Tensor, "row position"], recipe: Recipe) -> list[float]:
    """Take one pass over ``rows``; returns the loss of every step."""
    n_steps = len(rows) // recipe.batch_size
    batches = torch.split(rows[: n_steps * recipe.batch_size], recipe.batch_size)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    warmup = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=0.01, total_iters=recipe.warmup_steps
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=max(1, n_steps - recipe.warmup_steps)
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warmup, decay], milestones=[recipe.warmup_steps]
    )
    losses = []
    start = time.perf_counter()
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=n_steps)
        for batch in batches:
            loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % _LOG_EVERY == 0:
                speed = len(losses) * batch.numel() / (time.perf_counter() - start)
                recent = sum(losses[-_LOG_EVERY:]) / _LOG_EVERY
                progress.update(
                    bar,
                    completed=len(losses),
                    description=f"loss {recent:.3f}, {speed:,.0f} tokens/s",
                )
    return losses


def _parameter_groups(model: GPT2LMHeadModel, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for the matrices of the blocks, except the output matrices of the MLPs.

    LayerNorm ignores the mean over the residual stream, so no gradient reaches the sums over
    d_model of those output matrices. Weight decay alone would take them to zero, and with them
    every centroid whose cotangent is the all-ones vector.
    """
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.transformer.named_parameters():
        is_matrix = name.startswith("h.") and parameter.ndim == 2
        (decayed if is_matrix and "mlp.c_proj" not in name else free).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def main() -> None:
    """Train with the default recipe and save the model."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="an absent or empty directory")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_new_directory(arguments.out)
    model, tokenizer, log = train(Recipe(), arguments.seed)
    save(model, tokenizer, log, arguments.out)
    Console().print(log)


if __name__ == "__main__":
    main()
