"""Models come back as they were saved, from wherever they are; what cannot be loaded is named."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    GPT2Model,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from lch_plugin.errors import InputError
from lch_plugin.loading import load
from tests import families, models

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    asked = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not asked


def dinov2() -> Any:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=16,
        patch_size=8,
    )
    return Dinov2Model(config).eval()


def save_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w0", pad_token="w0", mask_token="w0"
    ).save_pretrained(directory)


def built(family: str) -> Any:
    if family == "dinov2":
        return dinov2()
    if family in ("bert", "vit", "vit_base"):
        return families.huggingface(family, torch.float32)
    return models.huggingface(family)


def inputs(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.manual_seed(1))}
    return {"input_ids": IDS}


@torch.no_grad()
def output(model: Any) -> Tensor:
    return model(**inputs(model))[0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A GPT-2 and its tokenizer."""
    models.huggingface("gpt2").save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Directories


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit", "vit_base", "dinov2"])
def test_directory(family: str, tmp_path: Path) -> None:
    model = built(family)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    assert loaded.processor is None
    assert (loaded.name, loaded.path, loaded.revision) == (str(tmp_path), tmp_path, None)
    torch.testing.assert_close(output(loaded.model), output(model))


def test_directory_by_string_from_home_or_here(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    for source in ("gpt2", "./gpt2", "~/gpt2", str(saved)):
        assert load(source).name == source


def test_tokenizer_and_image_processor(saved: Path, tmp_path: Path) -> None:
    assert load(saved).processor("w7 w9").input_ids == [7, 9]
    for model, processor in ((built("vit"), ViTImageProcessor), (dinov2(), BitImageProcessor)):
        directory = tmp_path / type(model).__name__
        model.save_pretrained(directory)
        processor(size={"height": 16, "width": 16}).save_pretrained(directory)
        image = np.zeros((20, 20, 3), dtype=np.uint8)
        pixels = load(directory).processor(image, return_tensors="pt").pixel_values
        assert pixels.shape[:2] == (1, 3)


def test_dtype_and_device(saved: Path) -> None:
    models.huggingface("gpt2", torch.bfloat16).save_pretrained(saved)
    assert load(saved).model.dtype == torch.bfloat16
    for dtype in (torch.float64, "float64", "torch.float64"):
        assert load(saved, dtype=dtype).model.dtype == torch.float64
    assert load(saved, device=torch.device("cpu")).model.device == torch.device("cpu")
    parameters = list(load(saved).model.parameters())
    assert all(parameter.requires_grad for parameter in parameters)


def test_sharded(saved: Path) -> None:
    model = models.huggingface("gpt2")
    (saved / "model.safetensors").unlink()
    model.save_pretrained(saved, max_shard_size="20KB")
    assert not (saved / "model.safetensors").exists()
    torch.testing.assert_close(output(load(saved).model), output(model))
    shard = next(saved.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks {shard.name}"):
        load(saved)
    (saved / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="lists no weights"):
        load(saved)


def test_class_without_architectures(saved: Path) -> None:
    edit_config(saved, architectures=None)
    model = load(saved).model
    assert type(model) is transformers.GPT2LMHeadModel
    assert model.config.architectures == ["GPT2LMHeadModel"]
    edit_config(saved, architectures=["os", "AutoModel", "GPT2Config", "OfItsOwnModel"])
    assert type(load(saved).model) is transformers.GPT2LMHeadModel


def test_auto_model_where_there_is_no_language_model(tmp_path: Path) -> None:
    dinov2().save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)
    model = load(tmp_path).model
    assert type(model) is Dinov2Model
    assert model.config.architectures == ["Dinov2Model"]


# Code that comes with a checkpoint

OWN_CODE = """
from pathlib import Path

import transformers

Path(__file__).with_name("ran").touch()


class OwnConfig(transformers.GPT2Config):
    model_type = "{model_type}"


class {name}(transformers.GPT2LMHeadModel):
    config_class = {config}

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class OwnTokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers copies code to before it runs it; nothing has been run from there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("sys.path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "m"


def add_code(
    directory: Path, *, name: str = "OwnModel", model_type: str = "gpt2", **auto_map: Any
) -> None:
    """Put code beside a GPT-2, and refer to it in its config."""
    config = "OwnConfig" if "AutoConfig" in auto_map else "transformers.GPT2Config"
    code = OWN_CODE.format(name=name, model_type=model_type, config=config)
    (directory / "modeling_own.py").write_text(code)
    edit_config(directory, auto_map=auto_map, model_type=model_type, architectures=[name])


def ran(modules: Path) -> bool:
    return any(modules.rglob("ran"))


def test_own_code_under_a_known_type_is_refused(saved: Path, modules: Path) -> None:
    add_code(saved, AutoModelForCausalLM="modeling_own.OwnModel")
    with pytest.raises(InputError, match=r"modeling_own\.py \(config\.json\).*trust_remote_code"):
        load(saved)
    assert not ran(modules)


@pytest.mark.parametrize(
    ("name", "auto_map", "found"),
    [
        ("config.json", {"AutoConfig": "configuration_x.C"}, r"configuration_x\.py \(config"),
        ("config.json", {"AutoModel": "someone/else--code.C"}, r"code\.py of someone/else"),
        ("tokenizer_config.json", {"AutoTokenizer": ["t.Slow", None]}, r"t\.py \(tokenizer_config"),
        ("tokenizer_config.json", [None, "t.Fast"], r"t\.py \(tokenizer_config"),
        ("preprocessor_config.json", {"AutoImageProcessor": {"pil": "p.C"}}, r"p\.py \(prepro"),
    ],
)
def test_every_reference_to_code_is_found(
    saved: Path, name: str, auto_map: Any, found: str
) -> None:
    path = saved / name
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**config, "auto_map": auto_map}))
    with pytest.raises(InputError, match=f"code of its own, {found}"):
        load(saved)


# A class of the checkpoint's may be called as one of transformers', and is not it.
@pytest.mark.parametrize("name", ["OwnModel", "GPT2LMHeadModel"])
def test_own_code_runs_where_it_is_trusted(saved: Path, modules: Path, name: str) -> None:
    expected = output(load(saved).model)
    add_code(saved, name=name, AutoModelForCausalLM=f"modeling_own.{name}")
    loaded = load(saved, trust_remote_code=True)
    assert ran(modules)
    assert type(loaded.model).__name__ == name
    torch.testing.assert_close(output(loaded.model), 2 * expected)
    wrapper = loaded.nnsight()
    with wrapper.trace(IDS):
        logits = wrapper.output.logits.save()
    torch.testing.assert_close(logits, 2 * expected)
    with pytest.raises(InputError, match=rf"{name} of its own code.*huggingface\.attach"):
        loaded.bridge()


def test_own_code_that_is_not_trusted_gives_way_to_the_stock_class(
    saved: Path, modules: Path
) -> None:
    expected = output(load(saved).model)
    add_code(saved, AutoModelForCausalLM="modeling_own.OwnModel")
    loaded = load(saved, trust_remote_code=False)
    assert type(loaded.model) is transformers.GPT2LMHeadModel
    torch.testing.assert_close(output(loaded.model), expected)
    assert not ran(modules)


@pytest.mark.parametrize("architectures", [["OwnModel"], None])
def test_own_code_of_an_unknown_type(saved: Path, modules: Path, architectures: Any) -> None:
    expected = output(load(saved).model)
    add_code(
        saved,
        model_type="gpt17",
        AutoConfig="modeling_own.OwnConfig",
        AutoModelForCausalLM="modeling_own.OwnModel",
    )
    edit_config(saved, architectures=architectures)
    with pytest.raises(InputError, match=r"'gpt17', which.*trust_remote_code=True runs it"):
        load(saved, trust_remote_code=False)
    loaded = load(saved, trust_remote_code=True)
    torch.testing.assert_close(output(loaded.model), 2 * expected)
    assert loaded.model.config.architectures == ["OwnModel"]


def add_tokenizer_code(directory: Path) -> None:
    add_code(directory)
    path = directory / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))


def test_own_tokenizer(saved: Path, modules: Path) -> None:
    add_tokenizer_code(saved)
    assert type(load(saved, trust_remote_code=True).processor).__name__ == "OwnTokenizer"
    assert type(load(saved, trust_remote_code=False).processor).__name__ != "OwnTokenizer"


# What a directory can lack


def test_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "./none", "/none", "~/none", "none.gguf", Path("none")):
        with pytest.raises(InputError, match=r"none.* does not exist.*directory.*gguf.*hub"):
            load(source)
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match=r"neither a directory nor a \.gguf file"):
        load(tmp_path / "model.bin")


def test_no_config(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json.*save_pretrained"):
        load(saved)
    for text in ("{", "[]", '{"model_type": 3}'):
        (saved / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"is damaged|model_type"):
            load(saved)


def test_unknown_architecture(saved: Path) -> None:
    edit_config(saved, model_type="gpt17")
    with pytest.raises(InputError, match=r"'gpt17', which transformers .* does not know"):
        load(saved)
    edit_config(saved, auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(InputError, match=r"code of its own, code\.py"):
        load(saved)


def test_invalid_config(saved: Path) -> None:
    edit_config(saved, n_head=5)
    with pytest.raises(InputError, match=r"cannot read the (weights|config\.json) of .*gpt2"):
        load(saved)
    edit_config(saved, n_head="four")
    with pytest.raises(InputError, match=r"cannot read the config\.json"):
        load(saved)


def test_pickled_weights_are_not_read(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors in \S+\. Pickled"):
        load(saved)
    torch.save(models.huggingface("gpt2").state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"but pytorch_model\.bin.*can run code.*save_pretrained"):
        load(saved)


@pytest.mark.parametrize("length", [0, 5, 500, -100])
def test_truncated_weights(saved: Path, length: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"damaged or incomplete.*again"):
        load(saved)


def test_missing_weights_are_not_random(saved: Path) -> None:
    GPT2Model(models.huggingface("gpt2").config).save_pretrained(saved)
    edit_config(saved, architectures=["GPT2DoubleHeadsModel"])
    with pytest.raises(InputError, match=r"lacks .* weights of a GPT2DoubleHeadsModel.*random"):
        load(saved)


def test_weights_of_other_sizes(saved: Path) -> None:
    edit_config(saved, n_embd=64)
    with pytest.raises(InputError, match="cannot read the weights"):
        load(saved)


def test_a_missing_pooler_is_no_matter(tmp_path: Path) -> None:
    model = transformers.ViTModel(built("vit_base").config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(load(tmp_path).model), output(model))


def test_quantized(saved: Path) -> None:
    edit_config(saved, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"quantised .gptq.*unquantised"):
        load(saved)


def test_damaged_tokenizer(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load(saved)


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.long, "nn", "float8_e4m3fn", ""])
def test_unknown_dtype(dtype: Any) -> None:
    with pytest.raises(InputError, match=r"dtype=.*bfloat16"):
        load("./not-looked-at", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x"])
def test_unavailable_device(device: str) -> None:
    with pytest.raises(InputError, match=r"device=.*'cpu'"):
        load("./not-looked-at", device=device)


# The hub


def unreachable(*args: Any, **kwargs: Any) -> None:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture
def cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with ``someone/tiny`` in it."""
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached(
    cache: Path, offline: bool, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.perf_counter()
    loaded = load("someone/tiny", revision=revision)
    assert time.perf_counter() - start < 2
    assert (loaded.name, loaded.revision) == ("someone/tiny", COMMIT)
    assert loaded.path == cache / "snapshots" / COMMIT
    assert loaded.model.name_or_path == "someone/tiny"
    assert loaded.processor("w7").input_ids == [7]
    torch.testing.assert_close(output(loaded.model), output(models.huggingface("gpt2")))


@pytest.mark.parametrize(
    ("offline", "message"),
    [(True, "HF_HUB_OFFLINE is set. Unset"), (False, "the hub cannot be reached .* Connect")],
)
def test_not_cached(
    cache: Path, offline: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.perf_counter()
    with pytest.raises(InputError, match=f"'someone/else'.*{message}.*directory.*gguf"):
        load("someone/else")
    for revision in ("v2", COMMIT[::-1]):
        with pytest.raises(InputError, match=f"in the hub's cache at revision '{revision}'"):
            load("someone/tiny", revision=revision)
    assert time.perf_counter() - start < 2


def test_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads, code = [], []

    def download(*args: Any, **kwargs: Any) -> str:
        downloads.append((args, kwargs["revision"], kwargs["local_files_only"]))
        code.append("*.py" in kwargs["allow_patterns"])
        return str(cache / "snapshots" / COMMIT)

    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr("lch_plugin.loading.origins.snapshot_download", download)
    assert load("someone/tiny", revision="main").revision == COMMIT
    assert downloads == [(("someone/tiny",), "main", False)]
    for trust in (False, True):
        load("someone/tiny", trust_remote_code=trust)
    assert code == [False, False, True]


def test_refused_by_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RepositoryNotFoundError("404 Client Error", response=mock.MagicMock())

    monkeypatch.setattr(HfApi, "model_info", refuse)
    assert load("someone/tiny").revision == COMMIT
    with pytest.raises(InputError, match=r"the hub refuses it \(404 Client Error.*hf auth"):
        load("someone/else")


def test_half_a_snapshot(cache: Path) -> None:
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"someone/tiny has no model\.safetensors"):
        load("someone/tiny")


def test_impossible_name() -> None:
    with pytest.raises(InputError, match=r"'a/b/c' is neither a path.* nor a possible name"):
        load("a/b/c")


def test_revision_of_a_path(saved: Path) -> None:
    with pytest.raises(InputError, match=r"revision='main'.*is a path"):
        load(saved, revision="main")


# GGUF


def write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A byte-level vocabulary of single letters and one merge."""
    letters = [chr(i) for i in range(ord("!"), ord("~"))]
    tokens = ["<|end|>", "ab", *letters][:size]
    tokens += [f"w{i}" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (size - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rotary halves as llama.cpp pairs them."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The model's weights as llama.cpp's converter writes them."""
    config = model.config
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    written = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        if architecture == "llama" and "q_proj" in key:
            value = interleaved(value, config.num_attention_heads)
        elif architecture == "llama" and "k_proj" in key:
            value = interleaved(value, config.num_key_value_heads)
        elif architecture == "gpt2" and value.ndim == 2 and ".h." in key:
            value = np.ascontiguousarray(value.T)
        elif architecture in ("gemma2", "gemma3") and key.endswith("norm.weight"):
            value = value + 1
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        written[name] = value
    return written


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    *,
    drop: str = "",
    extra: dict[str, np.ndarray] | None = None,
    **stated: Any,
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    write_vocabulary(writer, config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_context_length(config.max_position_embeddings)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        rope = config.rope_parameters
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        if architecture == "llama":
            writer.add_rope_dimension_count(config.head_dim)
        if architecture.startswith(("gemma", "qwen3")):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        if architecture.startswith("gemma"):
            writer.add_sliding_window(config.sliding_window)
    for key, value in stated.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{architecture}.{key}", value)
    for name, value in {**tensors(model, architecture), **(extra or {})}.items():
        if name != drop:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GGUF = {
    "gpt2": {},
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "rms_norm_eps": 1e-3},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
}


def tiny(family: str, **values: Any) -> Any:
    """With a vocabulary of 100, and biases and norms away from where they start."""
    torch.manual_seed(0)
    common = models.FAMILIES["llama" if family == "qwen3" else family].config
    config = AutoConfig.for_model(
        family, **{**common, "vocab_size": 100, **_GGUF[family], **values}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "llama.gguf", tiny("llama"), "llama")


@pytest.mark.parametrize("family", list(_GGUF))
def test_gguf(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    path = write_gguf(tmp_path / "model.gguf", model, family.removesuffix("_text"))
    loaded = load(str(path))
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    assert (loaded.name, loaded.path, loaded.revision) == (str(path), path, None)
    assert loaded.model.dtype == torch.float32
    assert loaded.model.config.architectures == [type(model).__name__]
    torch.testing.assert_close(output(loaded.model), output(model), atol=1e-5, rtol=1e-5)
    assert loaded.processor.decode(loaded.processor("abc").input_ids) == "abc"


def test_gguf_of_gemma_27b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention divides by the root of d_model / heads, not of the heads' dimension."""
    model = tiny("gemma2", head_dim=4)  # d_model / heads = query_pre_attn_scalar = 8
    monkeypatch.setattr("lch_plugin.loading.gguf._GEMMA_27B_LAYERS", {"gemma2": models.N_LAYERS})
    path = write_gguf(tmp_path / "model.gguf", model, "gemma2")
    torch.testing.assert_close(output(load(path).model), output(model), atol=1e-5, rtol=1e-5)


def test_gguf_quantized_tensors_are_unpacked(tmp_path: Path) -> None:
    model = tiny("llama")
    name, value = "blk.0.ffn_up.weight", tensors(model, "llama")["blk.0.ffn_up.weight"]
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quantize(value, kind)
    writer = gguf.GGUFWriter(tmp_path / "packed.gguf", "llama")
    reader = gguf.GGUFReader(write_gguf(tmp_path / "plain.gguf", model, "llama"))
    for field in reader.fields.values():
        if field.name not in ("general.architecture",) and not field.name.startswith("GGUF."):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = load(tmp_path / "packed.gguf").model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.detach(), torch.tensor(gguf.dequantize(packed, kind)))


def test_gguf_dtype(llama: Path) -> None:
    model = load(llama, dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_gguf_unsupported(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mpt")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="architecture mpt is not supported"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize("length", [0, 2, 40, 3000, -10, -3000])
def test_gguf_truncated(llama: Path, length: int) -> None:
    llama.write_bytes(llama.read_bytes()[:length])
    with pytest.raises(InputError, match=r"no whole \.gguf file.*again"):
        load(llama)


def test_gguf_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content in (b"PK" * 1000, b"GGUF\x01" + bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"no whole \.gguf file: .*(magic|version)"):
            load(path)


def test_gguf_lacks_a_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", drop="blk.1.ffn_up.weight")
    with pytest.raises(InputError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj.*random"):
        load(path)


def test_gguf_with_a_tensor_that_transformers_drops(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", extra=bias)
    with pytest.raises(InputError, match=r"holds .* weights, but.*safetensors"):
        load(path)


def test_gguf_with_rescaled_rotation(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.full(4, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", extra=factors)
    with pytest.raises(InputError, match=r"rope_freqs.*safetensors"):
        load(path)


@pytest.mark.parametrize(
    "stated",
    [
        {"attention.key_length": 9.0},
        {"final_logit_softcapping": 20.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ],
)
def test_gguf_says_what_transformers_does_not_read(tmp_path: Path, stated: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", **stated)
    with pytest.raises(InputError, match=rf"says {list(stated)[-1]} = .*safetensors"):
        load(path)


def test_gguf_without_the_package(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lch_plugin.loading.gguf.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lch-plugin\[gguf\]'"):
        load(llama)


# Toolkits


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_bridge(family: str, tmp_path: Path) -> None:
    model = built(family)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    bridge = load(tmp_path, dtype="float64").bridge()
    assert bridge.cfg.dtype == torch.float64
    assert bridge.cfg.model_name == str(tmp_path)
    _, cache = bridge.run_with_cache(IDS)
    assert "blocks.0.attn.hook_pattern" in cache
    torch.testing.assert_close(bridge(IDS), output(model.double()))


def test_toolkits_of_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither asks the network about the name, even where it might."""
    loaded = load("someone/tiny")
    images = cache / "snapshots" / COMMIT
    shutil.rmtree(images)
    built("vit").save_pretrained(images)
    ViTImageProcessor().save_pretrained(images)
    loaded_images = load("someone/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loaded.nnsight()
    assert loaded.bridge().cfg.model_name == "someone/tiny"
    loaded_images.nnsight()
    assert loaded_images.bridge().processor is not None


@pytest.mark.parametrize("family", list(_GGUF))
def test_bridge_of_gguf(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    path = write_gguf(tmp_path / "model.gguf", model, family.removesuffix("_text"))
    bridged = load(path).bridge()
    torch.testing.assert_close(bridged(IDS), output(model), atol=1e-5, rtol=1e-5)


def test_code_beside_a_gguf_file_is_not_its_own(llama: Path, modules: Path) -> None:
    models.huggingface("gpt2").save_pretrained(llama.parent)
    save_tokenizer(llama.parent)
    add_tokenizer_code(llama.parent)
    for trust in (None, False, True):
        load(llama, trust_remote_code=trust)
    assert not ran(modules)


def test_bridge_of_images(tmp_path: Path) -> None:
    model = built("vit")
    model.save_pretrained(tmp_path)
    assert load(tmp_path).bridge().processor is None
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    bridge = load(tmp_path).bridge()
    assert bridge.processor is not None
    pixels = inputs(model)["pixel_values"]
    torch.testing.assert_close(bridge(pixels), output(model))


def test_bridge_refuses(tmp_path: Path) -> None:
    models.huggingface("gpt2").save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match=r"no tokenizer.*save_pretrained"):
        load(tmp_path / "text").bridge()
    dinov2().save_pretrained(tmp_path / "image")
    with pytest.raises(InputError, match=r"cannot boot .*Dinov2Model"):
        load(tmp_path / "image").bridge()


def test_bridge_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.huggingface("llava", torch.float32).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    monkeypatch.setattr("lch_plugin.loading.models.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torchvision"):
        load(tmp_path).bridge()


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "vit_base", "dinov2"])
@pytest.mark.parametrize("with_processor", [True, False])
def test_nnsight(family: str, with_processor: bool, tmp_path: Path) -> None:
    model = built(family)
    model.save_pretrained(tmp_path)
    if with_processor and model.main_input_name == "pixel_values":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    elif with_processor:
        save_tokenizer(tmp_path)
    loaded = load(tmp_path)
    wrapper = loaded.nnsight()
    with wrapper.trace(**inputs(model)):
        out = wrapper.output[0].save()
    torch.testing.assert_close(out, output(model))
    assert wrapper._module is loaded.model


def test_nnsight_refuses(tmp_path: Path) -> None:
    transformers.BertForNextSentencePrediction(built("bert").config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"BertForNextSentencePrediction: Could not infer.*task="):
        load(tmp_path).nnsight()


def test_sound(tmp_path: Path) -> None:
    model = families.huggingface("audio-spectrogram-transformer", torch.float32)
    model.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=16).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded.processor, transformers.ASTFeatureExtractor)
    wrapper = loaded.nnsight()
    with wrapper.trace(input_values=torch.zeros(1, 16, 16)):
        out = wrapper.output.logits.save()
    torch.testing.assert_close(out, loaded.model(torch.zeros(1, 16, 16)).logits)
    assert loaded.bridge().processor is not None


def test_nnsight_takes_text(saved: Path) -> None:
    loaded = load(saved)
    wrapper = loaded.nnsight()
    with wrapper.trace("w3 w1 w4"):
        out = wrapper.lm_head.output.save()
    expected = loaded.model(torch.tensor([[3, 1, 4]])).logits
    torch.testing.assert_close(out, expected)
    assert loaded.nnsight(task="fill-mask").task == "fill-mask"
