"""SAEs on the centroids of a vision transformer's MLP, beside SAEs on what it reads and writes.

python examples/vision_sae.py [--out vision_sae.png]

takes the embedded model, trained on digits. Any other goes by name, with a dataset of images:

python examples/vision_sae.py --model facebook/dinov2-base --images frgfm/imagenette:320px \
    --module encoder.layer.8.mlp --d-sae 6144 --rows 4_000_000 --device cuda
"""

import argparse
from typing import Any

import torch
from datasets import load_dataset
from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

import lch_plugin as lch
from lch_plugin.demo.vision import digits, load_demo_vision_model
from lch_plugin.saes import Images, Rows, evaluate, train_on
from lch_plugin.saes.evaluation.plots import patches_by_feature

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="name on the hub, or a directory; the embedded one by default")
parser.add_argument(
    "--images",
    help="dataset[:configuration] with columns image and label; or a directory of such images",
)
parser.add_argument("--module", default="encoder.layer.2.mlp")
parser.add_argument("--k", type=int, default=8)
parser.add_argument("--d-sae", type=int, default=256)
parser.add_argument("--rows", type=int, default=200_000, help="of training, one a patch")
parser.add_argument("--device", default="cpu")
parser.add_argument("--out", default="vision_sae.png")
args = parser.parse_args()

if args.model:
    loaded = lch.load(args.model, device=args.device)
    model, processor = loaded.model, loaded.processor
    splits = load_dataset(*args.images.split(":"))
    train = splits["train"]
    test = splits["test" if "test" in splits else "validation"].shuffle(seed=0)
    train_labels, test_labels = train["label"], test["label"]
else:
    model, processor = load_demo_vision_model(device=args.device), None
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")


def rows(images: Any, of: Any, seed: int | None = None) -> Rows:
    """Of the patches; the CLS token comes before them."""
    batches = Images(images, processor, seed=seed)
    return Rows(model, batches, args.module, of=of, positions=slice(1, None))


def codes(sae: Any, images: Any, of: Any) -> torch.Tensor:
    """Features of each image, averaged over its patches."""
    with torch.no_grad():
        means = [sae.encode(x).unflatten(0, (-1, n_patches)).mean(1) for x in rows(images, of)]
    return torch.cat(means).cpu()


def accuracy(sae: Any, of: Any) -> float:
    """Of a linear probe of the label on the features."""
    probe = make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=1000))
    probe.fit(codes(sae, train, of), train_labels)
    return float(probe.score(codes(sae, test, of), test_labels))


first = next(iter(Images(test, processor)))["pixel_values"]
n_patches = len(next(iter(rows(test, "centroid")))) // len(first)
trainer = SAETrainerConfig(
    total_training_samples=args.rows,
    train_batch_size_samples=512,
    lr=1e-3,
    n_batches_for_norm_estimate=20,
    device=args.device,
)
print(f"{args.module}, held-out images  variance explained   L0  features fired  label probed")
saes = {}
for name, of, config in (
    ("centroid, TopK", "centroid", TopKTrainingSAEConfig),
    ("centroid, BatchTopK", "centroid", BatchTopKTrainingSAEConfig),
    ("input, TopK", "input", TopKTrainingSAEConfig),
    ("output, TopK", "output", TopKTrainingSAEConfig),
):
    d_in = next(iter(rows(test, of))).shape[-1]
    sae_config = config(
        d_in=d_in,
        d_sae=args.d_sae,
        device=args.device,
        k=args.k,
        normalize_activations="expected_average_only_in",
    )
    saes[name] = train_on(rows(train, of, seed=0), sae_config, trainer)
    scores = evaluate(saes[name], rows(test, of))
    print(
        f"{name:>38} {scores.explained_variance:19.3f} {scores.l0:4.1f} "
        f"{scores.n_fired:7} of {args.d_sae} {accuracy(saes[name], of):12.1%}"
    )

sae = saes["centroid, TopK"]
features = sae.encode(next(iter(rows(test, "centroid")))).detach()
figure = patches_by_feature(first, features)
figure.savefig(args.out)
print("wrote", args.out)
