"""Rows of what vision models compute, and SAEs trained on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTImageProcessor

import lch_plugin as lch
from lch_plugin.saes import Images, Rows, evaluate, train_on
from tests import families, models

MLP, PIXELS = "layers.1.mlp", "embeddings.patch_embeddings"
D_MODEL, N_PATCHES, SIDE = 32, 4, 16


@pytest.fixture(scope="module")
def vit() -> Any:
    return families.huggingface("vit_base", torch.float32)


def pixels(n: int = 70) -> Tensor:
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def topk(**changes: Any) -> TrainingSAEConfig:
    settings = {"d_in": D_MODEL, "d_sae": 64, "k": 4, "normalize_activations": "none"}
    return TopKTrainingSAEConfig(**(settings | changes))


def trainer(n: int = 2048, **changes: Any) -> SAETrainerConfig:
    settings = {"train_batch_size_samples": 64, "lr": 3e-3, "n_batches_for_norm_estimate": 4}
    return SAETrainerConfig(total_training_samples=n, **(settings | changes))


def test_rows_are_the_adapters_centroids(vit: Any) -> None:
    x = pixels()
    with torch.no_grad(), lch.huggingface.attach(vit, MLP) as handle:
        vit(x)
    rows = torch.cat(list(Rows(vit, x.split(32), MLP)))
    # The last bits depend on the size of the batch.
    torch.testing.assert_close(rows, handle.cache[MLP].flatten(0, 1), rtol=1e-4, atol=1e-5)
    cls, patches = (
        torch.cat(list(Rows(vit, x.split(32), MLP, positions=positions)))
        for positions in (slice(0, 1), slice(1, None))
    )
    assert len(cls) == len(x)
    assert len(patches) == N_PATCHES * len(x)


@pytest.mark.parametrize("of", ["input", "output"])
def test_rows_of_activations_are_the_modules_own(vit: Any, of: Any) -> None:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen.append(args[0] if of == "input" else output)

    handle = vit.get_submodule(MLP).register_forward_hook(hook)
    with torch.no_grad():
        vit(pixels(5))
    handle.remove()
    (rows,) = Rows(vit, [pixels(5)], MLP, of=of)
    assert torch.equal(rows, seen[0].flatten(0, 1))


def test_the_model_stops_after_the_component_and_is_as_before(vit: Any) -> None:
    last_norm: list[int] = []
    handle = vit.layernorm.register_forward_hook(lambda *_: last_norm.append(1))
    vit.train()
    before = [(m, m.training, "forward" in vars(m)) for m in vit.modules()]
    for of in ("centroid", "input", "output"):
        for _ in Rows(vit, pixels().split(32), MLP, of=of):  # type: ignore[arg-type]
            assert [(m, m.training, "forward" in vars(m)) for m in vit.modules()] == before
    handle.remove()
    vit.eval()
    assert last_norm == []


def test_inputs_may_be_mappings_or_pairs(vit: Any) -> None:
    (a,) = Rows(vit, [pixels(4)], MLP)
    loader = DataLoader(TensorDataset(pixels(4), torch.arange(4)), batch_size=4)
    for batches in ([{"pixel_values": pixels(4)}], loader):
        (b,) = Rows(vit, batches, MLP)
        assert torch.equal(a, b)


def test_padding_makes_no_rows() -> None:
    bert = families.huggingface("bert", torch.float64)
    module = "bert.encoder.layer.1"
    ids = torch.randint(5, 40, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    v = lch.cotangents.Random(0)
    batch = {"input_ids": ids, "attention_mask": mask}
    (rows,) = Rows(bert, [batch], module, cotangent=v)
    (alone,) = Rows(bert, [{"input_ids": ids[1:, :2]}], module, cotangent=v)
    assert len(rows) == 8
    torch.testing.assert_close(rows[6:], alone)
    (first,) = Rows(bert, [batch], module, cotangent=v, positions=slice(0, 3))
    assert len(first) == 5


def test_activations_need_no_cotangent(vit: Any) -> None:
    centered = copy.deepcopy(vit)
    weight = centered.get_submodule(f"{MLP}.fc2").weight.data
    weight -= weight.mean(0)
    with pytest.raises(lch.VanishingCentroidError):
        Rows(centered, [pixels(4)], MLP)
    assert len(next(iter(Rows(centered, [pixels(4)], MLP, of="output")))) == 4 * (N_PATCHES + 1)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_saes_learn_rows(vit: Any, architecture: str, normalize: str) -> None:
    shared = {"d_in": D_MODEL, "d_sae": 64, "normalize_activations": normalize}
    sae_config: TrainingSAEConfig = {
        "topk": lambda: TopKTrainingSAEConfig(k=4, **shared),
        "batchtopk": lambda: BatchTopKTrainingSAEConfig(k=4, **shared),
        "standard": lambda: StandardTrainingSAEConfig(l1_coefficient=0.1, **shared),
    }[architecture]()
    rows = Rows(vit, Images(pixels(), seed=0), MLP, positions=slice(1, None))
    before = evaluate(train_on(rows, sae_config, trainer(64), buffer_size=256), rows)
    sae = train_on(rows, sae_config, trainer(8192), buffer_size=256)
    after = evaluate(sae, rows)
    assert after.explained_variance > before.explained_variance + 0.1
    assert after.n_rows == N_PATCHES * 70
    record = sae.cfg.metadata.lch_centroid
    assert record["site"] == MLP
    assert (record["scale"] is None) == (normalize == "none")


@pytest.mark.parametrize("config", [TopKTrainingSAEConfig, BatchTopKTrainingSAEConfig])
def test_saelens_loads_what_is_saved(vit: Any, config: Any, tmp_path: Path) -> None:
    rows = Rows(vit, [pixels()], MLP)
    sae = train_on(rows, config(d_in=D_MODEL, d_sae=64, k=4), trainer(640), buffer_size=256)
    sae.save_inference_model(str(tmp_path / "sae"))
    loaded = SAE.load_from_disk(str(tmp_path / "sae"))
    assert loaded.cfg.metadata.lch_centroid == sae.cfg.metadata.lch_centroid
    if config is TopKTrainingSAEConfig:
        before, after = evaluate(sae, rows), evaluate(loaded, rows)
        assert after.explained_variance == pytest.approx(before.explained_variance)
        assert torch.equal(after.density, before.density)


def test_the_decoders_bias_starts_at_the_mean(vit: Any) -> None:
    rows = Rows(vit, [pixels()], MLP)
    mean = next(iter(rows)).mean(0)
    settings = trainer(1, train_batch_size_samples=N_PATCHES * 70, lr=0.0)
    for normalize in ("none", "expected_average_only_in"):
        sae = train_on(rows, topk(normalize_activations=normalize), settings, buffer_size=1000)
        assert float((sae.b_dec - mean).norm() / mean.norm()) < 0.05


def test_training_is_reproducible_and_leaves_the_global_generator_alone(vit: Any) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rows = Rows(vit, Images(pixels(), seed=0), MLP)
    weights = [
        train_on(rows, topk(), trainer(640), buffer_size=256, seed=s).W_enc for s in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_loaders_own_shuffling_follows_the_seed() -> None:
    x = torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(0))
    weights = []
    for n, seed in enumerate((1, 1, 2)):
        torch.manual_seed(n)
        before = torch.get_rng_state()
        rows = DataLoader(x, batch_size=32, shuffle=True)  # By the global generator.
        weights.append(train_on(rows, topk(), trainer(640), buffer_size=256, seed=seed).W_enc)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def pictures(n: int = 10) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA")
    return [
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).convert(modes[i % 3])
        for i in range(n)
    ]


def streamed() -> IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        for picture in pictures():
            yield {"image": picture}

    return IterableDataset.from_generator(rows)


SOURCES: dict[str, Callable[[], Any]] = {
    "list": pictures,
    "dataset": lambda: Dataset.from_list([{"image": p} for p in pictures()]),
    "generator": lambda: iter(pictures()),
    "streamed": streamed,
}


@pytest.mark.parametrize("source", SOURCES)
def test_images_of_every_kind_make_the_same_batches(source: str) -> None:
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    truth = processor(images=[p.convert("RGB") for p in pictures()], return_tensors="pt")
    batches = list(Images(SOURCES[source](), processor, batch_size=4))
    assert [len(b["pixel_values"]) for b in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([b["pixel_values"] for b in batches]), truth["pixel_values"])


def test_images_come_in_the_order_of_the_seed() -> None:
    x = torch.arange(10.0).reshape(10, 1, 1, 1)

    def order(images: Images) -> list[float]:
        return torch.cat([b["pixel_values"] for b in images]).flatten().tolist()

    images = Images(x, batch_size=3, seed=1)
    shuffled = order(images)
    assert shuffled == order(images) != order(Images(x, batch_size=3, seed=2))
    assert sorted(shuffled) == order(Images(x)) == list(range(10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda vit: Rows(vit, [], MLP, of="centroids"), "of='centroids' is not known"),
        (lambda vit: Rows(vit, [], "layers.*.mlp"), "choose one"),
        (lambda vit: Rows(vit, [], MLP, positions=[1]), "must be a slice"),
        (lambda vit: Rows(vit, pixels(), MLP), "list of batches"),
        (lambda vit: Images(pictures()[0], object()), "pass a list"),
        (lambda vit: Images(DatasetDict(train=SOURCES["dataset"]()), object()), "several splits"),
        (lambda vit: Images(pictures(), models.tokenizer()), "image processor"),
        (lambda vit: Rows(vit, [], "layers.7.mlp"), "fits no module"),
        (lambda vit: next(iter(Rows(vit, [pixels()], PIXELS))), r"shape \(70, 3, 16, 16\)"),
        (lambda vit: train_on(Rows(vit, [], MLP), topk(), trainer()), "came to an end"),
        (lambda vit: train_on(iter([torch.ones(70, 32)]), topk(), trainer()), "came to an end"),
        (lambda vit: train_on(Rows(vit, [pixels()], MLP), topk(d_in=31), trainer()), "d_in=32"),
        (lambda vit: train_on([torch.ones(4, 32)], topk(), trainer(), buffer_size=8), "Raise it"),
        (lambda vit: train_on([torch.ones(4, 5, 32)], topk(), trainer()), r"flatten\(0, -2\)"),
        (lambda vit: Images(pictures()), "image processor"),
        (lambda vit: Images(torch.zeros(0, 3, 8, 8)), r"\(n, channel, height, width\)"),
        (lambda vit: Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), "floating point"),
        (lambda vit: Images(iter(pictures()), object(), seed=0), "have no order"),
        (lambda vit: Images(SOURCES["dataset"](), object(), column="img"), "column='img'"),
        (lambda vit: Images(pixels(), batch_size=0), "at least 1"),
    ],
)
def test_bad_input_is_refused(
    vit: Any, make: Callable[[Any], Any], message: str, as_users_run: None
) -> None:
    with pytest.raises(lch.LCHError, match=message):
        make(vit)
