"""Maps of a class are those of Captum where they have to be, and what is no image is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import lch_plugin as lch
from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR, digits
from lch_plugin.demo.vision.classifier import load_demo_classifier
from lch_plugin.saliency import IMAGE_METHODS, ClassMetric, image_by_method, image_curves, images
from tests import cli

F64 = torch.float64


@pytest.fixture(scope="module")
def metric() -> ClassMetric:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 5))
    net = nn.Sequential(*layers).to(F64)
    return ClassMetric(net, torch.rand(2, 6, 6, dtype=F64), target=3)


def test_it_is_the_log_probability_of_the_class(metric: ClassMetric) -> None:
    net: Any = metric._model
    truth = net(metric.image[None]).log_softmax(-1)[0]
    assert torch.allclose(metric(metric.image[None])[0], truth[3])
    assert metric.predicted == int(truth.argmax())
    assert ClassMetric(net, metric.image).target == metric.predicted


def test_without_magnitudes_captums_smoothgrad_is_the_local_centroid() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 5))
    metric = ClassMetric(net, torch.rand(2, 6, 6))  # In float32, as Captum's noise is.
    x = metric.image[None].clone().requires_grad_()
    size = float(x.detach().max() - x.detach().min())
    torch.manual_seed(7)
    signed: Any = captum.attr.NoiseTunnel(captum.attr.Saliency(metric)).attribute(
        x, nt_type="smoothgrad", nt_samples=5, stdevs=0.2 * size, abs=False
    )
    found = images(metric, metric.image[None], sigma=0.2, n_samples=5, seed=7)
    assert torch.allclose(found.centroids, signed, atol=1e-6)
    assert not torch.allclose(images(metric, metric.image[None]).centroids, signed, atol=1e-3)


def test_captum_is_the_oracle(metric: ClassMetric) -> None:
    found = image_by_method(metric, sigma=0.0, n_samples=2)
    assert tuple(found) == IMAGE_METHODS
    x = metric.image[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(metric(x).sum(), x)
    assert torch.allclose(found["local centroid"], gradient[0].sum(0).abs())
    assert torch.allclose(found["local centroid x input"], (gradient * x)[0].sum(0))
    assert torch.allclose(found["Saliency"], gradient[0].abs().sum(0))
    assert torch.allclose(found["InputXGradient"], (gradient * x)[0].sum(0))
    assert torch.allclose(found["SmoothGrad"], found["Saliency"])
    mean = metric.baseline[:, None, None].expand_as(metric.image)
    ends = metric(metric.image[None]) - metric(mean[None])
    assert torch.allclose(found["IntegratedGradients"].sum(), ends[0], rtol=1e-3)


def test_curves_replace_whole_pixels_by_the_mean_colour(metric: ClassMetric) -> None:
    scores = torch.arange(36.0, dtype=F64).view(6, 6)
    found = image_curves(metric, scores, steps=4, chunk=3)
    assert found.counts.tolist() == [0, 9, 18, 27, 36]
    half = metric.image.clone()
    half[:, 3:] = metric.baseline[:, None, None]
    assert torch.allclose(found.deletion[2], metric(half[None])[0])
    assert torch.allclose(found.insertion[4], metric(metric.image[None])[0])
    assert torch.equal(found.deletion[0], found.insertion[4])
    assert len(image_curves(metric, scores, steps=1000).counts) == 37


@pytest.mark.parametrize(
    ("image", "target", "said"),
    [
        (torch.rand(3, 32, 32), None, "takes 1 channels"),
        (torch.rand(1, 32, 32) * 255, None, "normalise"),
        (torch.full((1, 32, 32), math.inf), None, "not finite"),
        (torch.zeros(1, 32, 32), None, "constant"),
        (torch.rand(1, 32, 32), 10, "classes 0 to 9"),
        (torch.rand(1, 32, 32), -1, "classes 0 to 9"),
    ],
)
def test_bad_images_and_classes_are_one_line(
    classifier: Any, image: torch.Tensor, target: int | None, said: str
) -> None:
    with pytest.raises(lch.InputError, match=said) as error:
        ClassMetric(classifier, image, target)
    assert "\n" not in str(error.value)


def vit() -> ViTForImageClassification:
    size = {"hidden_size": 16, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    config = ViTConfig(**size, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    return ViTForImageClassification(config).eval()


def test_an_image_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(lch.InputError, match=r"shape \(3, 6, 8\)") as error:
        ClassMetric(vit(), torch.rand(3, 6, 8))
    assert "\n" not in str(error.value)


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(lch.InputError, match="no logits"):
        ClassMetric(lch.load_demo_vision_model(), torch.rand(1, 32, 32))


@pytest.fixture(scope="module")
def classifier() -> Any:
    return load_demo_classifier()


def test_the_embedded_classifier_tells_held_out_digits(classifier: Any) -> None:
    pixels, labels = digits("test")
    with torch.no_grad():
        found = classifier.model(pixels).logits.argmax(-1)
    assert float((found == labels).double().mean()) > 0.98


# ------------------------------------------------------------------------------------- the command


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.usefixtures("as_users_run")
def test_the_command_writes_a_report_of_the_embedded_classifier(
    picture: Path, tmp_path: Path
) -> None:
    settings = ["--radius", "2", "--samples", "3", "--target", "7", "--dtype", "bfloat16"]
    code, said = cli.run("saliency", "--image", str(picture), *settings, "--out", f"{tmp_path}/out")
    assert code == 0, said
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert (found["target"], found["label"], found["image"]) == (7, "7", "picture.png")
    run = found["run"]
    assert (run["radius"], run["sigma"], run["n_samples"]) == (2, None, 3)
    assert run["dtype"] == "bfloat16"
    assert run["noise"] == pytest.approx(2 * run["range"] / math.sqrt(32 * 32 + 2), rel=0.02)
    maps = load_file(tmp_path / "out/maps.safetensors")
    assert set(maps) == {"image", *IMAGE_METHODS}
    page = (tmp_path / "out/report.html").read_text()
    assert all(name in page for name in IMAGE_METHODS)


@pytest.mark.usefixtures("as_users_run")
def test_the_command_takes_a_model_with_its_image_processor(picture: Path, tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "vit")
    line = ["saliency", "--image", str(picture), "--model", str(tmp_path / "vit")]
    code, said = cli.run(*line, "--samples", "2", "--out", str(tmp_path / "out"))
    assert code == 0, said
    maps = load_file(tmp_path / "out/maps.safetensors")
    with Image.open(picture) as file:
        truth = processor(file.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(maps["image"], truth)
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["target"] == found["predicted"]


def make(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("no picture")
    elif kind == "sixteen bits":
        Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(path)
    elif kind == "transparent":
        Image.new("RGBA", (8, 8), (255, 0, 0, 100)).save(path)
    elif kind == "one colour":
        Image.new("RGB", (8, 8)).save(path)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "cannot be read"),
        ("text", "no picture"),
        ("sixteen bits", "eight bits"),
        ("transparent", "background"),
    ],
)
def test_a_file_that_is_no_picture_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    make(tmp_path / "x.png", kind)
    code, said = cli.run("saliency", "--image", f"{tmp_path}/x.png", "--out", f"{tmp_path}/out")
    assert code == 1
    assert message in " ".join(said.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--image", "PICTURE", "--model", "TEXT"], "reads input_ids, no images"),
        (["I picked", "--answer", " an", "--model", "VISION"], "reads pixel_values, no prompt"),
        (["--image", "PICTURE", "--model", "VISION"], "no image processor"),
        (["I picked", "--image", "PICTURE"], "no prompt"),
        (["--image", "PICTURE", "--foil", "x"], "no prompt"),
        (["--image", "PICTURE", "--sigma", "1", "--radius", "1"], "one of them"),
        (["I picked", "--answer", " an", "--radius", "1"], "--radius 1.0 is of an image"),
        (["I picked", "--answer", " an", "--target", "1"], "--target 1 is of an image"),
        (["--answer", " an"], "there is no prompt"),
        (["I picked"], "--answer is empty"),
    ],
)
def test_text_and_images_are_not_mixed(
    line: list[str], message: str, picture: Path, tmp_path: Path
) -> None:
    names = {
        "PICTURE": str(picture),
        "TEXT": str(lch.demo.DEMO_MODEL_DIR),
        "VISION": str(DEMO_VISION_MODEL_DIR),
    }
    line = [names.get(word, word) for word in line]
    code, said = cli.run("saliency", *line, "--out", str(tmp_path / "out"))
    assert code == 1, said
    assert message in " ".join(said.split())
    assert not (tmp_path / "out").exists()
