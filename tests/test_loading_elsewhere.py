"""Loaded models in the classes of TransformerLens and SAELens, and spread over several devices."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.errors import InputError, SiteError, ToolkitError
from lch_plugin.loading import LoadedModel, load
from tests import models
from tests.test_loading import IDS, output, save_tokenizer, tiny, write_gguf
from tests.toolkits import needs_hooked, needs_saes

MLPS = {"gpt2": "transformer.h.*.mlp", "llama": "model.layers.*.mlp"}


def saved(family: str, path: Path) -> Path:
    model = models.huggingface(family, torch.float64)
    if family == "gpt2":  # TransformerLens knows GPT-2 with four times d_model alone.
        model = load(DEMO_MODEL_DIR, dtype="float64").model
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def centroids(model: Any, names: str | None = None) -> dict[str, Tensor]:
    with lch.huggingface.attach(model, names) as handle, torch.no_grad():
        model(IDS)
    return dict(handle.cache)


def of_hook_points(model: Any) -> list[Tensor]:
    with lch.attach(model) as handle, torch.no_grad():
        _, cache = model.run_with_cache(IDS, names_filter=handle.hook_names)
    return [cache[name] for name in handle.hook_names]


# HookedTransformer and SAELens' bridge


@needs_hooked
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_hooked_transformer_has_the_models_own_centroids(family: str, tmp_path: Path) -> None:
    loaded = load(saved(family, tmp_path))
    hooked, before = loaded.hooked(), output(loaded.model)
    assert type(hooked).__name__ == "HookedTransformer"
    assert (hooked.cfg.model_name, hooked.cfg.dtype) == (str(tmp_path), torch.float64)
    assert torch.equal(output(loaded.model), before)
    # transformers' RMS norms compute in float32.
    close = {"atol": 1e-5, "rtol": 1e-5} if family != "gpt2" else {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(hooked(IDS), before, **close)
    found, want = of_hook_points(hooked), centroids(loaded.model)
    for mu, own in zip(found, want.values(), strict=True):
        torch.testing.assert_close(mu, own, **close)
        assert own.norm() > 1e-3


@needs_hooked
def test_a_hooked_transformer_needs_no_tokenizer(tmp_path: Path) -> None:
    models.huggingface("llama").save_pretrained(tmp_path)
    loaded = load(tmp_path)
    torch.testing.assert_close(loaded.hooked()(IDS), output(loaded.model), atol=1e-4, rtol=1e-4)


@needs_hooked
def test_a_directory_called_after_another_family_misleads_nobody(tmp_path: Path) -> None:
    loaded = load(saved("gpt2", tmp_path / "gemma-llama"))
    assert loaded.hooked().cfg.normalization_type == "LN"


@needs_hooked
def test_a_conversion_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    loaded = load(saved("gpt2", tmp_path))
    loaded.model.config.layer_norm_epsilon = 0.5  # Which is not what the modules were made with.
    with pytest.raises(InputError, match=r"computes something else: its logits differ by"):
        loaded.hooked()


@needs_hooked
def test_a_gpt2_of_another_width_is_refused_in_one_line(tmp_path: Path) -> None:
    models.huggingface("gpt2").save_pretrained(tmp_path)  # d_mlp is not 4 d_model.
    with pytest.raises(
        InputError, match=r"cannot make a HookedTransformer.*size mismatch"
    ) as error:
        load(tmp_path).hooked()
    assert "\n" not in str(error.value)


@needs_hooked
def test_a_family_without_a_conversion_is_refused(tmp_path: Path) -> None:
    models.huggingface("phi3").save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.model.config.architectures = ["NoSuchModel"]
    with pytest.raises(InputError, match=r"cannot make a HookedTransformer of .*\.bridge\(\)"):
        loaded.hooked()


def test_without_hooked_transformers_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lch_plugin.adapters.transformer_lens.unprocessed.loading_from_pretrained", None
    )
    with pytest.raises(ToolkitError, match=r"TransformerLens 4 has no HookedTransformer: use"):
        load(saved("gpt2", tmp_path)).hooked()


@needs_saes
def test_a_bridge_for_saes_takes_an_sae_on_centroids(tmp_path: Path) -> None:
    from sae_lens import SAETransformerBridge, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    loaded = load(saved("llama", tmp_path))
    want = centroids(loaded.model)
    bridge = loaded.bridge(saes=True)
    assert type(bridge) is SAETransformerBridge
    for mu, own in zip(of_hook_points(bridge), want.values(), strict=True):
        torch.testing.assert_close(mu, own, atol=1e-5, rtol=1e-5)
    with lch.attach(bridge, layers=[1]) as handle:
        name = handle.hook_names[0]
        config = TopKSAEConfig(d_in=models.D_MODEL, d_sae=64, k=4, dtype="float64")
        config.metadata = SAEMetadata(hook_name=name)
        sae = TopKSAE(config)
        _, cache = bridge.run_with_cache_with_saes(IDS, saes=[sae])
    torch.testing.assert_close(
        cache[f"{name}.hook_sae_acts_post"],
        sae.encode(list(want.values())[1]),
        atol=1e-4,
        rtol=1e-4,
    )


# Memory


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.huggingface("gpt2", torch.bfloat16).save_pretrained(tmp_path)
    n = sum(p.numel() for p in models.huggingface("gpt2").parameters())

    def free(n_bytes: int) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=n_bytes))

    free(2 * n)  # bfloat16, as it is stored.
    load(tmp_path)
    free(2 * n - 1)
    with pytest.raises(InputError, match=r"weights of .* take 0\.0 GB.*device_map"):
        load(tmp_path)
    free(4 * n - 1)
    with pytest.raises(InputError, match=r"dtype='bfloat16' \(0\.0 GB\), device_map.*smaller"):
        load(tmp_path, dtype="float32")
    free(4 * n)
    load(tmp_path, dtype="float32")


def test_a_gguf_file_that_cannot_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(InputError, match=r"weights of .*m\.gguf take"):
        load(path, dtype="float32")


# Several devices


def test_a_gguf_file_is_spread_once_it_is_converted(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    with pytest.raises(InputError, match=r"device_map='auto' asks for several.*lch convert"):
        load(path, device_map="auto")
    load(path).save(tmp_path / "m")
    load(tmp_path / "m", device_map="cpu")


def spread(loaded: LoadedModel, family: str, layer_1: str) -> dict[str, str]:
    """A device for each module, and another for the middle layer."""
    layers = MLPS[family].removesuffix(".*.mlp")
    root, name = layers.split(".")
    places = {key: "cpu" for key, _ in loaded.model.named_children() if key != root}
    inner = loaded.model.get_submodule(root).named_children()
    places |= {f"{root}.{key}": "cpu" for key, _ in inner if key != name}
    blocks = loaded.model.get_submodule(layers)
    places |= {f"{layers}.{i}": "cpu" for i in range(len(blocks))}
    return {**places, f"{layers}.1": layer_1}


@pytest.mark.parametrize("family", list(MLPS))
def test_a_layer_kept_on_the_disk_has_the_same_centroids(family: str, tmp_path: Path) -> None:
    whole = load(saved(family, tmp_path))
    apart = load(tmp_path, device_map=spread(whole, family, "disk"))
    mlp = apart.model.get_submodule(MLPS[family].replace("*", "1"))
    assert all(p.is_meta for p in mlp.parameters())
    torch.testing.assert_close(output(apart.model), output(whole.model))
    blocks = MLPS[family].removesuffix(".mlp")
    for names in (MLPS[family], blocks):
        want = centroids(whole.model, names)
        found = centroids(apart.model, names)
        assert found.keys() == want.keys()
        for name, mu in found.items():
            torch.testing.assert_close(mu, want[name], atol=1e-12, rtol=1e-9)
    with lch.huggingface.attach(apart.model, MLPS[family]) as handle:
        assert [*handle.methods.values()][:3] == ["closed form", "VJP", "closed form"]
    assert all(p.is_meta for p in mlp.parameters())


def test_a_model_offloaded_by_its_user_has_the_same_centroids() -> None:
    model = models.huggingface("llama", torch.float64)
    want = centroids(model, MLPS["llama"])
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    for name, mu in centroids(model, MLPS["llama"]).items():
        torch.testing.assert_close(mu, want[name], atol=1e-12, rtol=1e-9)


def test_what_needs_weights_at_hand_says_so(tmp_path: Path) -> None:
    whole = load(saved("llama", tmp_path))
    apart = load(tmp_path, device_map=spread(whole, "llama", "disk"))
    with pytest.raises(SiteError, match=r"is offloaded by accelerate.*'model\.layers\.\*\.mlp'"):
        lch.huggingface.attach(apart.model)
    with pytest.raises(InputError, match=r"TransformerLens cannot boot .*disk"):
        apart.bridge()
    with pytest.raises(InputError, match=r"HookedTransformer"):
        apart.hooked()


def test_one_device_by_a_map_is_that_device(tmp_path: Path) -> None:
    whole = load(saved("llama", tmp_path))
    mapped = load(tmp_path, device_map="cpu")
    for mu, own in zip(
        of_hook_points(mapped.bridge()), centroids(whole.model).values(), strict=True
    ):
        torch.testing.assert_close(mu, own, atol=1e-5, rtol=1e-5)


def test_device_and_device_map_are_not_both_taken(tmp_path: Path) -> None:
    for device in ("meta", "cpu:0"):
        with pytest.raises(InputError, match=re.escape("device_map both say")):
            load(tmp_path, device=device, device_map="auto")
    with pytest.raises(InputError, match="cannot read the weights"):
        load(saved("gpt2", tmp_path), device_map="everywhere")
