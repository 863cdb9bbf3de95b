"""What the scripts of the paper's experiments share: arguments, results, and SAEs on images."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import lch_plugin as lch
from lch_plugin.demo.vision import digits

if TYPE_CHECKING:
    from lch_plugin.saes import Rows

EMBEDDED = "embedded"
VERSIONS = ("lch-plugin", "torch", "transformers", "transformer-lens", "scikit-learn")


def parser(doc: str | None, model: str | None) -> argparse.ArgumentParser:
    """The options of every script.

    ``model`` is the one of the published setting; None where a script trains a network of its own,
    which is then neither chosen nor moved.
    """
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--small", action="store_true", help="minutes on 2 cores, offline")
    options.add_argument("--out", type=Path, required=True, help="directory of results")
    options.add_argument("--seed", type=int, default=0)
    if model is not None:
        options.add_argument("--model", help=f"hub name or directory; published: {model}")
        options.add_argument("--device", default="cpu")
    options.set_defaults(published=model)
    return options


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """``args.model`` becomes a name: what was asked for, the embedded one, or the published."""
    args = options.parse_args()
    if args.published is not None:
        args.model = args.model or (EMBEDDED if args.small else args.published)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def save(
    args: argparse.Namespace, results: dict[str, Any], figure: Figure, **settings: Any
) -> None:
    """Write results.json and figure.png. A number that is not finite is an error."""
    record = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        | settings,
        "versions": {name: version(name) for name in VERSIONS},
        "results": results,
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    (args.out / "results.json").write_text(text + "\n", encoding="utf-8")
    figure.savefig(args.out / "figure.png")
    print(f"wrote {args.out / 'results.json'} and figure.png")


@dataclass
class Vision:
    """A vision model, the component looked at, and labelled images."""

    model: Any
    processor: Any
    module: str
    train: Any
    train_labels: Tensor
    test: Any
    test_labels: Tensor

    def images(self, split: str, seed: int | None = None) -> Any:
        """Images as the model takes them; in random order with a seed."""
        return lch.saes.Images(getattr(self, split), self.processor, seed=seed)

    def rows(self, split: str, of: Any, positions: slice, seed: int | None = None) -> Rows:
        """Centroids, inputs or outputs of the component, one row a token."""
        images = self.images(split, seed)
        return lch.saes.Rows(self.model, images, self.module, of=of, positions=positions)

    def sae(
        self,
        of: Any,
        k: int,
        positions: slice,
        *,
        epochs: int,
        lr: float,
        seed: int,
        factor: int = 10,
    ) -> Any:
        """A TopK SAE with ``factor`` times as many features as the rows are wide."""
        from sae_lens import TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig

        d_in, per_image = self.shape(of, positions)
        device = str(next(self.model.parameters()).device)
        config = TopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=factor * d_in,
            k=k,
            device=device,
            normalize_activations="expected_average_only_in",
        )
        trainer = SAETrainerConfig(
            total_training_samples=epochs * len(self.train) * per_image,
            train_batch_size_samples=512 if per_image > 1 else 64,
            lr=lr,
            n_batches_for_norm_estimate=20,
            device=device,
        )
        rows: Any = self.rows("train", of, positions, seed)
        if per_image == 1:  # So few rows are kept, and the model runs once.
            rows = list(rows)
        return lch.saes.train_on(rows, config, trainer, seed=seed)

    def codes(self, sae: Any, split: str, of: Any, positions: slice) -> Tensor:
        """Features of each image, averaged over its tokens, ``(n_images, d_sae)``."""
        per_image = self.shape(of, positions)[1]
        with torch.no_grad():
            found = [
                sae.encode(rows).unflatten(0, (-1, per_image)).mean(1).cpu()
                for rows in self.rows(split, of, positions)
            ]
        return torch.cat(found)

    def shape(self, of: Any, positions: slice) -> tuple[int, int]:
        """Width of a row, and rows of an image."""
        images = next(iter(self.images("test")))
        rows = next(iter(self.rows("test", of, positions)))
        return rows.shape[1], len(rows) // len(images["pixel_values"])


def load_vision(name: str, module: str | None, images: str, device: str) -> Vision:
    """The embedded model with its digits, or a model of the hub with a dataset of the hub."""
    if name == EMBEDDED:
        (train, train_labels), (test, test_labels) = digits("train"), digits("test")
        model = lch.load_demo_vision_model(device=device)
        return Vision(
            model, None, module or "encoder.layer.3.mlp", train, train_labels, test, test_labels
        )
    from datasets import load_dataset

    loaded = lch.load(name, device=device)
    model = getattr(loaded.model, "vision_model", loaded.model)  # CLIP has a tower for images.
    splits = load_dataset(*images.split(":"))
    train, test = splits["train"], splits["validation"]
    labels = [torch.tensor(split["label"]) for split in (train, test)]
    return Vision(
        model, loaded.processor, module or _last_mlp(model), train, labels[0], test, labels[1]
    )


def _last_mlp(model: Any) -> str:
    return [name for name, _ in model.named_modules() if name.endswith(".mlp")][-1]
