"""What `lch info` says of a model, held to the model and to what attaching to it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import locate_mlps
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR
from lch_plugin.inspection import ModelInfo, inspect_model
from lch_plugin.loading import LoadedModel
from lch_plugin.sites import KINDS
from tests.cli import run

CLOSED = {"mlp", "neuron", "head, detached"}


@pytest.fixture(scope="module")
def demo() -> ModelInfo:
    return inspect_model(lch.load(DEMO_MODEL_DIR))


def test_every_kind_of_site_is_there_by_the_method_that_attaching_says(demo: ModelInfo) -> None:
    found = {site.site: site for site in demo.sites}
    assert found.keys() == {*KINDS, "head, detached"}
    for name, site in found.items():
        assert set(site.methods.values()) == {"closed form" if name in CLOSED else "VJP"}, name
        assert site.problem is None
        assert site.why
    with lch.attach(lch.load_demo_model()) as handle:
        assert found["mlp"].methods == handle.methods


def test_sizes_are_those_of_the_model(demo: ModelInfo) -> None:
    model = lch.load(DEMO_MODEL_DIR).model
    assert demo.n_parameters == model.num_parameters()
    assert demo.weight_bytes == 4 * model.num_parameters()
    config = model.config
    assert (demo.n_layers, demo.d_model, demo.d_mlp, demo.context) == (
        *(config.n_layer, config.n_embd, 4 * config.n_embd, config.n_positions),
    )
    assert demo.residual_bytes == 4 * config.n_embd
    for site in demo.sites:
        assert site.shape == [1, 32, config.n_embd]
        assert site.n_bytes == 4 * config.n_embd
        assert site.seconds is not None
        assert site.seconds > 0
    assert demo.processing == {"processed": False, "writing_weights_centered": False}


def test_it_is_a_record_in_json(demo: ModelInfo) -> None:
    record = json.loads(json.dumps(demo.record()))
    assert record["versions"].keys() == {"lch-plugin", "torch", "transformers"}
    assert [site["site"] for site in record["sites"]] == [site.site for site in demo.sites]


@pytest.mark.slow
def test_centred_writing_weights_are_a_refusal_of_mlps_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def centred(loaded: LoadedModel) -> Any:
        bridge = bridge_of(loaded)
        for parts in locate_mlps(bridge):
            W_out = parts.weights.W_out
            with torch.no_grad():
                W_out -= W_out.mean(-1, keepdim=True)
        return bridge

    bridge_of = LoadedModel.bridge
    monkeypatch.setattr(LoadedModel, "bridge", centred)
    found = inspect_model(lch.load(DEMO_MODEL_DIR))
    assert found.processing is not None
    assert found.processing["writing_weights_centered"]
    by_site = {site.site: site for site in found.sites}
    assert by_site["mlp"].methods == {}
    assert "center" in str(by_site["mlp"].problem)
    assert by_site["neuron"].problem is None


def test_a_model_of_images_is_looked_at_as_huggingface_has_it() -> None:
    found = inspect_model(lch.load(DEMO_VISION_MODEL_DIR))
    assert found.adapter == "lch.huggingface.attach"
    assert "no tokens" in str(found.why_adapter)
    (site,) = found.sites
    assert set(site.methods.values()) == {"closed form"}
    assert len(site.methods) == found.n_layers
    assert site.shape is not None
    assert site.shape[-1] == found.d_model


def test_a_model_without_a_tokenizer_says_why_it_is_no_bridge(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    GPT2Model(config).save_pretrained(tmp_path / "model")
    found = inspect_model(lch.load(tmp_path / "model", dtype="bfloat16"))
    assert found.adapter == "lch.huggingface.attach"
    assert "no tokenizer" in str(found.why_adapter)
    assert found.n_positions == 8
    # A centroid is float32 where the model is not.
    assert (found.dtype, found.residual_bytes, found.sites[0].n_bytes) == ("bfloat16", 16, 32)
    assert found.weight_bytes == 2 * found.n_parameters


def test_the_command_says_the_same_to_people_and_to_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, demo: ModelInfo
) -> None:
    monkeypatch.setattr("lch_plugin.inspection.inspect_model", lambda loaded: demo)
    from lch_plugin.cli.info import info

    info(json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(demo.record()))
    monkeypatch.setenv("COLUMNS", "200")
    info()
    said = capsys.readouterr().out
    assert f"{demo.n_parameters:,}" in said
    for site in demo.sites:
        assert site.site in said
    assert "closed form" in said
    assert "as in the checkpoint" in said


def test_a_model_that_is_not_there_is_one_line() -> None:
    code, said = run("info", "--model", "./nowhere")
    assert code == 1
    assert said.startswith("Error: ")
