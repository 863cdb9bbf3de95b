"""Train the vision model: ``python -m lch_plugin.demo.vision.train --out DIR --seed 0``.

Self-distillation without labels, after DINO (arXiv 2104.14294). A student sees a large view and
small ones of an image, and learns to say of each what its teacher, the moving average of students,
says of another large view. As in DINOv2 (arXiv 2304.07193), Sinkhorn-Knopp iterations centre what
the teacher says and the KoLeo term spreads the CLS tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from lch_plugin.demo.vision.augment import Augmentation, augment
from lch_plugin.demo.vision.images import IMAGE_SIZE, normalise, pixels
from lch_plugin.errors import InputError
from lch_plugin.files import check_new_directory, write_directory

_N_LARGE = 2
_LARGE_VIEWS = Augmentation(size=IMAGE_SIZE, side=(0.85, 1.15))
_SMALL_VIEWS = Augmentation(size=IMAGE_SIZE // 2, side=(0.6, 0.9))


@dataclass(frozen=True)
class Recipe:
    """What the model is and how it is trained. Pairs are what a quantity starts and ends with."""

    n_layer: int = 4
    n_head: int = 4
    d_model: int = 64
    patch_size: int = 4
    initializer_range: float = 0.1
    large_views: Augmentation = _LARGE_VIEWS
    small_views: Augmentation = _SMALL_VIEWS
    n_small_views: int = 4
    d_head: int = 128
    d_bottleneck: int = 32
    n_prototypes: int = 128
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.03, 0.04)
    teacher_momentum: tuple[float, float] = (0.97, 1.0)
    sinkhorn_iterations: int = 3
    koleo: float = 0.05
    n_steps: int = 1500
    batch_size: int = 48
    learning_rate: float = 2e-3
    final_learning_rate: float = 1e-5
    weight_decay: tuple[float, float] = (0.04, 0.2)
    warmup_steps: int = 50
    frozen_steps: int = 20
    clip_norm: float = 3.0
    n_threads: int = 1
    log_every: int = 50


@dataclass(frozen=True)
class Entry:
    """Means over the steps since the entry before.

    Attributes:
        step: how many steps were taken.
        loss: what the student minimises.
        teacher_entropy: of what the teacher says of one view, in nats.
        mean_entropy: of its mean over a batch. By as much as it is above ``teacher_entropy`` the
            teacher tells views apart: by nothing after a collapse.
        spread: standard deviation of the teacher's normalised CLS tokens over a batch, times the
            root of d_model; 1 if they point everywhere, 0 if all one way.
    """

    step: int
    loss: float
    teacher_entropy: float
    mean_entropy: float
    spread: float


@dataclass(frozen=True)
class TrainingLog:
    """What a training run was asked for, what it took and how it went."""

    seed: int
    recipe: Recipe
    seconds: float
    entries: list[Entry]


class _Head(nn.Module):
    """From a CLS token to logits over prototypes: cosines, which only a temperature sharpens."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(recipe.d_model, recipe.d_head, bias=False),
            nn.BatchNorm1d(recipe.d_head),
            nn.GELU(),
            nn.Linear(recipe.d_head, recipe.d_head, bias=False),
            nn.BatchNorm1d(recipe.d_head),
            nn.GELU(),
            nn.Linear(recipe.d_head, recipe.d_bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(recipe.n_prototypes, recipe.d_bottleneck))

    def forward(self, cls: Float[Tensor, "view d_model"]) -> Float[Tensor, "view prototype"]:
        return F.linear(F.normalize(self.project(cls), dim=-1), F.normalize(self.prototypes))


class _Network(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = Dinov2Model(_config(recipe))
        self.head = _Head(recipe)

    def forward(
        self, views: Float[Tensor, "view 1 size size"]
    ) -> tuple[Float[Tensor, "view d_model"], Float[Tensor, "view prototype"]]:
        cls = self.backbone(normalise(views)).pooler_output
        return cls, self.head(cls)


def train(recipe: Recipe, seed: int) -> tuple[Dinov2Model, TrainingLog]:
    """Train on the training digits; the same seed gives the same weights.

    Returns:
        The teacher, and how training went.

    Raises:
        InputError: no steps, batches that the training split cannot fill, or no log.
    """
    images, _ = pixels("train")
    if min(recipe.n_steps, recipe.log_every) < 1 or not 1 < recipe.batch_size <= len(images):
        raise InputError(
            f"{recipe.n_steps} steps of {recipe.batch_size} of {len(images)} images cannot be "
            f"taken and logged every {recipe.log_every}. Take at least one step, of at least two "
            "images and no more than there are, and log every one or more."
        )
    torch.manual_seed(seed)
    torch.set_num_threads(recipe.n_threads)
    start = time.perf_counter()
    student = _Network(recipe)
    teacher = copy.deepcopy(student).requires_grad_(False)
    entries = _fit(student, teacher, images, recipe, Generator().manual_seed(seed))
    log = TrainingLog(
        seed=seed, recipe=recipe, seconds=round(time.perf_counter() - start, 1), entries=entries
    )
    return teacher.backbone.eval(), log


def save(model: Dinov2Model, log: TrainingLog, directory: Path) -> None:
    """Write model, log and card to a new ``directory``."""

    def write(built: Path) -> None:
        model.save_pretrained(built)
        (built / "training.json").write_text(json.dumps(asdict(log), indent=2) + "\n")
        (built / "README.md").write_text(_card(model, log))

    write_directory(directory, write)


def _card(model: Dinov2Model, log: TrainingLog) -> str:
    recipe, last = log.recipe, log.entries[-1]
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
license: mit
library_name: transformers
---

# A vision transformer trained on digits

`Dinov2Model` of {recipe.n_layer} layers, d_model {recipe.d_model}, {n_parameters:,} parameters,
trained without labels on the training digits of `lch_plugin.demo.vision.digits` by
`lch_plugin.demo.vision.train`: {recipe.n_steps} steps of {recipe.batch_size} images from seed
{log.seed}, in {log.seconds:.0f} seconds. The loss was {last.loss:.3f} at the end, the teacher's
entropy {last.teacher_entropy:.2f} nats on one view and {last.mean_entropy:.2f} on the mean of a
batch. `training.json` has the recipe and how training went.

`python -m lch_plugin.demo.vision.evaluate --model DIR` says what its features are worth.
"""


def _config(recipe: Recipe) -> Dinov2Config:
    return Dinov2Config(
        hidden_size=recipe.d_model,
        num_hidden_layers=recipe.n_layer,
        num_attention_heads=recipe.n_head,
        mlp_ratio=4,
        num_channels=1,
        image_size=IMAGE_SIZE,
        patch_size=recipe.patch_size,
        initializer_range=recipe.initializer_range,
        use_mask_token=False,
    )


def _fit(
    student: _Network,
    teacher: _Network,
    images: Float[Tensor, "image 1 height width"],
    recipe: Recipe,
    generator: Generator,
) -> list[Entry]:
    optimizer = torch.optim.AdamW(_parameter_groups(student), lr=0.0, betas=(0.9, 0.999))
    order = torch.empty(0, dtype=torch.int64)
    sums = torch.zeros(4)
    entries: list[Entry] = []
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=recipe.n_steps)
        for step in range(recipe.n_steps):
            if len(order) < recipe.batch_size:
                order = torch.randperm(len(images), generator=generator)
            batch, order = images[order[: recipe.batch_size]], order[recipe.batch_size :]
            _set_rates(optimizer, recipe, step)
            large = augment(batch.repeat(_N_LARGE, 1, 1, 1), recipe.large_views, generator)
            with torch.no_grad():
                teacher_cls, teacher_logits = teacher(large)
            temperature = _warm_up(recipe.teacher_temperature, recipe, step)
            targets = _balance(teacher_logits / temperature, recipe.sinkhorn_iterations)
            small = augment(
                batch.repeat(recipe.n_small_views, 1, 1, 1), recipe.small_views, generator
            )
            # A large view costs the student as much as five small ones: it sees one of the two.
            cls, logits = student(large[: recipe.batch_size])
            loss = _distil(targets, torch.cat([logits, student(small)[1]]), recipe)
            loss = loss + recipe.koleo * _koleo(cls)
            optimizer.zero_grad()
            loss.backward()
            if step < recipe.frozen_steps:
                student.head.prototypes.grad = None
            nn.utils.clip_grad_norm_(student.parameters(), recipe.clip_norm)
            optimizer.step()
            _follow(teacher, student, _cosine(recipe.teacher_momentum, recipe, step))
            sums += torch.stack([loss.detach(), *_health(targets, teacher_cls)])
            taken = step + 1
            if taken % recipe.log_every == 0 or taken == recipe.n_steps:
                n_summed = taken - (entries[-1].step if entries else 0)
                entries.append(Entry(taken, *(round(x, 4) for x in (sums / n_summed).tolist())))
                sums.zero_()
                progress.update(bar, completed=taken, description=_describe(entries[-1]))
    return entries


def _balance(
    logits: Float[Tensor, "view prototype"], n_iterations: int
) -> Float[Tensor, "view prototype"]:
    """Probabilities that sum to one over prototypes, and nearly to the same for each prototype.

    So no prototype can win every view, and no views can be alike for all prototypes: centring.
    """
    for _ in range(n_iterations):
        logits = logits - logits.logsumexp(0, keepdim=True)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def _distil(
    targets: Float[Tensor, "large_view prototype"],
    logits: Float[Tensor, "view prototype"],
    recipe: Recipe,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of each view with what the teacher says of each other large view."""
    by_view = (-1, recipe.batch_size, recipe.n_prototypes)
    log_probabilities = (logits / recipe.student_temperature).log_softmax(-1).view(by_view)
    losses = -torch.einsum("tbp,sbp->ts", targets.view(by_view), log_probabilities)
    other = ~torch.eye(len(losses), losses.shape[1], dtype=torch.bool)
    return losses[other].mean() / recipe.batch_size


def _koleo(cls: Float[Tensor, "image d_model"]) -> Float[Tensor, ""]:
    """Minus the mean log distance to the nearest other image: small if images spread evenly."""
    cls = F.normalize(cls, dim=-1)
    # A cosine with itself must not be the greatest.
    nearest = (cls @ cls.T - 2 * torch.eye(len(cls))).argmax(-1)
    return -(F.pairwise_distance(cls, cls[nearest]) + 1e-8).log().mean()


def _health(
    targets: Float[Tensor, "view prototype"], cls: Float[Tensor, "view d_model"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """What collapse would show in: the three last numbers of an `Entry`."""
    mean = targets.mean(0)
    spread = F.normalize(cls, dim=-1).std(dim=0).square().sum().sqrt()
    return torch.special.entr(targets).sum(-1).mean(), torch.special.entr(mean).sum(), spread


def _follow(teacher: _Network, student: _Network, momentum: float) -> None:
    for mine, yours in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(yours.detach(), 1 - momentum)


def _set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    rise = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    peak_to_end = (recipe.learning_rate, recipe.final_learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = rise * _cosine(peak_to_end, recipe, step)
        if group["decays"]:
            group["weight_decay"] = _cosine(recipe.weight_decay, recipe, step)


def _cosine(start_to_end: tuple[float, float], recipe: Recipe, step: int) -> float:
    start, end = start_to_end
    return end + (start - end) * (1 + math.cos(math.pi * step / recipe.n_steps)) / 2


def _warm_up(start_to_end: tuple[float, float], recipe: Recipe, step: int) -> float:
    """Straight from one to the other in the first third of training, constant after it."""
    start, end = start_to_end
    return start + (end - start) * min(1.0, 3 * step / recipe.n_steps)


def _parameter_groups(network: _Network) -> list[dict[str, object]]:
    """Weight decay for matrices, except those that write to the residual stream.

    LayerNorm ignores the mean over the residual stream, so no gradient reaches the sums over
    d_model of what attention (``o_proj``) and MLPs (``fc2``) write there. Weight decay alone would
    take them to zero, and with them every centroid whose cotangent is the all-ones vector.
    """
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in network.named_parameters():
        is_matrix = name.endswith(".weight") and parameter.ndim == 2
        writes = ".fc2." in name or ".o_proj." in name
        (decayed if is_matrix and not writes else free).append(parameter)
    return [
        {"params": decayed, "decays": True},
        {"params": free, "decays": False, "weight_decay": 0.0},
    ]


def _describe(entry: Entry) -> str:
    return f"loss {entry.loss:.3f}, teacher entropy {entry.teacher_entropy:.2f}"


def main() -> None:
    """Train with the default recipe and save the model."""
    parser = argparse.ArgumentParser(description="Train the demo vision model.")
    parser.add_argument("--out", type=Path, required=True, help="an absent or empty directory")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_new_directory(arguments.out)
    model, log = train(Recipe(), arguments.seed)
    save(model, log, arguments.out)
    Console().print(log.entries[-1], f"{log.seconds} s")


if __name__ == "__main__":
    main()
