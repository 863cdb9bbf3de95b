"""The shipped vision model and its data: split, views, training and what the features are worth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from transformers import AutoModel, Dinov2Model

from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR, digits, load_demo_vision_model
from lch_plugin.demo.vision.augment import Augmentation, augment
from lch_plugin.demo.vision.evaluate import evaluate, features, knn, score_untrained
from lch_plugin.demo.vision.images import N_CLASSES, pixels, split_indices
from lch_plugin.demo.vision.train import Recipe, save, train
from lch_plugin.errors import InputError, OutputError

VIEWS = Augmentation(size=16, side=(0.6, 0.9))
TINY = Recipe(
    n_layer=2,
    n_head=2,
    d_model=16,
    n_small_views=2,
    d_head=16,
    d_bottleneck=8,
    n_prototypes=8,
    n_steps=2,
    batch_size=4,
    warmup_steps=1,
    log_every=1,
)


@pytest.fixture(scope="module")
def model() -> Dinov2Model:
    return load_demo_vision_model()


def images(n: int = 8) -> Tensor:
    return pixels("train")[0][:n]


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_split_is_disjoint_complete_and_fixed() -> None:
    train_split, test_split = split_indices("train"), split_indices("test")
    assert sorted(train_split + test_split) == list(range(len(load_digits().target)))
    assert (len(train_split), len(test_split)) == (1438, 359)
    assert test_split[:5] == [1, 6, 7, 28, 32]


def test_a_fifth_of_every_digit_is_held_out() -> None:
    counts = [torch.bincount(digits(split)[1], minlength=N_CLASSES) for split in ("train", "test")]
    fraction = counts[1] / (counts[0] + counts[1])
    torch.testing.assert_close(fraction, torch.full((N_CLASSES,), 0.2), rtol=0, atol=0.005)


def test_images_are_normalised() -> None:
    for split in ("train", "test"):
        normalised, labels = digits(split)
        assert normalised.shape == (len(labels), 1, 32, 32)
        assert normalised.dtype == torch.float32
        assert abs(normalised.mean()) < 0.02
        assert abs(normalised.std() - 1) < 0.02


def test_pixels_are_ink_between_0_and_1() -> None:
    ink, _ = pixels("test")
    assert ink.min() == 0
    assert 0.9 < ink.max() <= 1


def test_no_other_split() -> None:
    with pytest.raises(InputError, match="'validation'"):
        split_indices("validation")


def test_seed_decides_the_views() -> None:
    first, again, other = (augment(images(), VIEWS, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_views_leave_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    augment(images(), VIEWS, generator())
    assert torch.equal(torch.rand(3), expected)


def test_views_are_bounded() -> None:
    strong = dataclasses.replace(VIEWS, contrast=1.0, brightness=1.0, noise=1.0, rotation=180.0)
    views = augment(images(200), strong, generator())
    assert views.shape == (200, 1, 16, 16)
    assert views.min() >= 0
    assert views.max() <= 1


def test_views_of_one_image_differ() -> None:
    views = augment(images(1).repeat(4, 1, 1, 1), VIEWS, generator())
    assert torch.cdist(views.flatten(1), views.flatten(1)).fill_diagonal_(1).min() > 0.5


def test_a_view_that_changes_nothing_is_the_image() -> None:
    nothing = dict.fromkeys(("shift", "rotation", "stretch", "thickness", "blur"), 0.0)
    nothing |= dict.fromkeys(("contrast", "brightness", "noise"), 0.0)
    same = Augmentation(size=32, side=(1.0, 1.0), **nothing)
    torch.testing.assert_close(augment(images(), same, generator()), images())


@pytest.mark.parametrize(
    "impossible",
    [{"size": 0}, {"side": (0.0, 0.5)}, {"side": (0.9, 0.5)}, {"noise": -0.1}, {"blur": 1.1}],
)
def test_impossible_views(impossible: dict[str, object]) -> None:
    with pytest.raises(InputError):
        dataclasses.replace(VIEWS, **impossible)


def test_neighbours_vote() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([3, 7, 7, 5])
    queries = torch.tensor([[2.0, 0.1], [0.0, 0.5]])
    assert knn(bank, labels, queries, k=1).tolist() == [3, 7]
    assert knn(bank, labels, queries, k=3).tolist() == [3, 7]
    with pytest.raises(InputError):
        knn(bank, labels, queries, k=5)


def test_features_are_of_the_tokens_after_the_last_layernorm(model: Dinov2Model) -> None:
    batch = digits("test")[0][:5]
    with torch.no_grad():
        output = model(batch)
    assert output.last_hidden_state.shape == (5, 1 + 64, 64)
    found = features(model, batch)
    torch.testing.assert_close(found["CLS"], output.pooler_output)
    torch.testing.assert_close(found["mean patch"], output.last_hidden_state[:, 1:].mean(1))


def test_loaded_model_is_ready_for_inference(model: Dinov2Model) -> None:
    assert not model.training
    assert model.dtype == torch.float32
    batch = digits("test")[0][:5]
    with torch.no_grad():
        first, again, reloaded = model(batch), model(batch), load_demo_vision_model()(batch)
    assert torch.equal(first.last_hidden_state, again.last_hidden_state)
    assert torch.equal(first.last_hidden_state, reloaded.last_hidden_state)
    assert load_demo_vision_model(dtype=torch.float64).dtype == torch.float64


def test_auto_model_loads_the_same(model: Dinov2Model) -> None:
    loaded = AutoModel.from_pretrained(DEMO_VISION_MODEL_DIR)
    assert isinstance(loaded, Dinov2Model)
    mine, other = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_no_model_where_none_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no vision model"):
        load_demo_vision_model(tmp_path)


@pytest.mark.slow
def test_training_beats_an_untrained_network(model: Dinov2Model) -> None:
    trained, untrained = evaluate(model)["CLS"], score_untrained(model, n=1)["CLS"]
    assert trained.knn > untrained.knn + 0.15
    assert trained.knn_views > untrained.knn_views + 0.15
    assert min(trained.knn, trained.linear) > 0.97


def test_every_mlp_and_attention_has_an_all_ones_centroid(model: Dinov2Model) -> None:
    """Sums over d_model of what is written, which the all-ones cotangent sees, are not small."""
    for layer in model.encoder.layer:
        for linear, scale in (
            (layer.mlp.fc2, layer.layer_scale2.lambda1),
            (layer.attention.o_proj, layer.layer_scale1.lambda1),
        ):
            for written in (linear.weight, scale[:, None] * linear.weight):
                assert written.sum(dim=0).norm() / written.norm() > 0.3


def test_size_on_disk() -> None:
    weights = DEMO_VISION_MODEL_DIR / "model.safetensors"
    assert weights.stat().st_size < 10**6
    assert sum(file.stat().st_size for file in DEMO_VISION_MODEL_DIR.iterdir()) < 1.1 * 10**6


def test_shipped_log_is_of_the_default_recipe() -> None:
    log = json.loads((DEMO_VISION_MODEL_DIR / "training.json").read_text())
    assert log["recipe"] == json.loads(json.dumps(dataclasses.asdict(Recipe())))
    assert log["entries"][-1]["step"] == Recipe().n_steps
    # A collapsed teacher says the same of all images, or has nothing to say of any.
    last = log["entries"][-1]
    assert last["mean_entropy"] - last["teacher_entropy"] > 1
    assert last["spread"] > 0.3


def test_training_is_reproducible() -> None:
    (first, log), (second, _), (other, _) = (train(TINY, seed) for seed in (1, 1, 2))
    mine, same, different = (each.state_dict() for each in (first, second, other))
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert any(not torch.equal(mine[name], different[name]) for name in mine)
    assert [entry.step for entry in log.entries] == [1, 2]


def test_saved_model_loads(tmp_path: Path) -> None:
    trained, log = train(TINY, seed=0)
    save(trained, log, tmp_path / "model")
    loaded = load_demo_vision_model(tmp_path / "model")
    assert all(
        torch.equal(value, loaded.state_dict()[name])
        for name, value in trained.state_dict().items()
    )
    assert json.loads((tmp_path / "model" / "training.json").read_text())["seed"] == 0
    with pytest.raises(OutputError):
        save(trained, log, tmp_path / "model")


def test_the_last_step_is_logged() -> None:
    _, log = train(dataclasses.replace(TINY, n_steps=3, log_every=2), seed=0)
    assert [entry.step for entry in log.entries] == [2, 3]


@pytest.mark.parametrize(
    "impossible", [{"n_steps": 0}, {"batch_size": 1}, {"batch_size": 5000}, {"log_every": 0}]
)
def test_impossible_recipes(impossible: dict[str, int]) -> None:
    with pytest.raises(InputError):
        train(dataclasses.replace(TINY, **impossible), seed=0)
