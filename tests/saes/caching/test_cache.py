"""`lch.saes.cache`: what it writes, what is left after it was killed, and how it is read."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache as memoised
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    ActivationsStore,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from torch import Tensor
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import attached_readers
from lch_plugin.cli import app
from lch_plugin.demo.corpus import stories
from lch_plugin.saes.caching import writing
from lch_plugin.saes.caching.records import weights_fingerprint
from lch_plugin.saes.caching.shards import (
    Shard,
    features,
    record_batch,
    write_index,
    write_manifest,
    write_shard,
)
from tests import models

HOOK = "blocks.1.mlp.hook_centroid"
HOOKS = [HOOK, "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"]
IDS = models.tokens(60, models.N_CTX)
DATA = Dataset.from_dict({"tokens": IDS.tolist()})
# Three shards of 24, 24 and 12 sequences: three batches, three batches, and one and a half.
SETTINGS: dict[str, Any] = {"hook_names": HOOK, "batch_size": 8, "max_shard_size": "50KB"}
N_SHARDS = 3


@memoised
def model() -> Any:
    return models.bridge("gpt2")


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """The batch sizes of the forward passes of `model`, those that find a width left out."""
    seen: list[int] = []

    def see(_module: Any, _args: Any, value: Tensor) -> None:
        if len(value) > 1:
            seen.append(len(value))

    # Not of the model itself: what stops at a layer never comes to its end.
    handle = model().hook_dict["hook_embed"].register_forward_hook(see)
    yield seen
    handle.remove()


def at_embedding(work: Callable[[], None]) -> Any:
    """Do something in each of the passes that `passes` counts."""
    point = model().hook_dict["hook_embed"]
    return point.register_forward_hook(lambda _m, _a, x: work() if len(x) > 1 else None)


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@memoised
def reader() -> Any:
    """A model whose tokenizer reads more than single words."""
    return lch.load_demo_model()


def texts() -> list[str]:
    return list(stories(30, seed=0))


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_values_are_those_of_the_hook_points(kind: str, dtype: str, tmp_path: Path) -> None:
    lens = model() if kind == "bridge" else models.hooked()
    cache = lch.saes.cache(
        lens, DATA, tmp_path / "c", **{**SETTINGS, "hook_names": HOOKS}, dtype=dtype
    )
    assert cache.hook_names == HOOKS
    assert cache.n_tokens == IDS.numel()
    assert torch.equal(cache.token_ids(), IDS)
    assert not attached_readers(lens)
    with lch.attach(lens, layers=1):
        _, found = lens.run_with_cache(IDS, names_filter=HOOKS)
    for hook in HOOKS:
        expected = found[hook].flatten(2).to(getattr(torch, dtype)).float()
        value = cache.values(hook)
        assert cache.d_in[hook] == expected.shape[-1]
        torch.testing.assert_close(
            value, expected, rtol=1e-3 if dtype == "float16" else 1e-5, atol=1e-5
        )
        rows = [59, 3, 24, 3]
        assert torch.equal(cache.values(hook, rows), value[rows])


def test_a_huggingface_model_is_cached_alike(tmp_path: Path) -> None:
    activation, hook = "model.layers.1.mlp", "model.layers.1.mlp.hook_centroid"
    lens = lch.saes.HookedModel(
        models.huggingface("llama"), models.tokenizer(), activation, activations=[activation]
    )
    names = [hook, activation]
    cache = lch.saes.cache(lens, DATA, tmp_path / "c", **{**SETTINGS, "hook_names": names})
    _, found = lens.run_with_cache(IDS, names_filter=names)
    for name in names:
        torch.testing.assert_close(cache.values(name), found[name])
    cache.check(lens)
    record = cache.provenance(hook)
    assert record is not None
    assert record["site"] == activation
    assert cache.provenance(activation) is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prepend_bos": False},
        {"sequence_separator_token": None},
        {"disable_concat_sequences": True},
        {"context_size": 7},
    ],
)
def test_sequences_are_those_that_saelens_makes_of_the_text(
    options: dict[str, Any], tmp_path: Path
) -> None:
    data = Dataset.from_dict({"text": texts()})
    cache = lch.saes.cache(
        reader(), data, tmp_path / "c", **{**SETTINGS, "context_size": 16, **options}
    )
    store = ActivationsStore.from_config_multi_hook(
        reader(),
        dataset=data,
        hook_names=[HOOK],
        hook_d_ins={HOOK: 128},
        **{"context_size": 16, **options},
    )
    live = list(store._iterate_tokenized_sequences())  # A private name, in a test alone.
    assert torch.equal(cache.token_ids(), torch.stack(live))
    assert data.format["type"] is None


def test_texts_come_from_lists_and_streams_in_the_order_of_the_seed(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": texts()})
    ids = {
        (name, seed): lch.saes.cache(
            reader(),
            source,
            tmp_path / f"{name}{seed}",
            hook_names=HOOK,
            n_tokens=256,
            context_size=32,
            seed=seed,
        ).token_ids()
        for name, source in {
            "list": texts(),
            "data": data,
            "stream": data.to_iterable_dataset(),
        }.items()
        for seed in (None, 0, 1)
    }
    assert torch.equal(ids["list", None], ids["data", None])
    assert torch.equal(ids["list", None], ids["stream", None])
    assert torch.equal(ids["list", 0], ids["data", 0])
    for name in ("data", "stream"):
        assert not torch.equal(ids[name, 0], ids[name, None])
        assert not torch.equal(ids[name, 0], ids[name, 1])


def runner_config(path: Path, **changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    options: dict[str, Any] = {
        "sae": TopKTrainingSAEConfig(d_in=models.D_MODEL, d_sae=64, k=4),
        "hook_name": HOOK,
        "dataset_path": "none",
        "use_cached_activations": True,
        "cached_activations_path": str(path),
        "context_size": models.N_CTX,
        "training_tokens": 4096,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 16,
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAERunnerConfig(**{**options, **changes})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saelens_alone_reads_it_and_trains_on_it(
    dtype: str, tmp_path: Path, passes: list[int]
) -> None:
    cache = lch.saes.cache(model(), DATA, tmp_path / "c", **SETTINGS, dtype=dtype)
    passes.clear()
    runner = LanguageModelSAETrainingRunner(
        runner_config(cache.path), override_dataset=DATA, override_model=model()
    )
    x, ids = runner.activations_store.get_raw_llm_batch()
    assert ids is not None
    assert torch.equal(x, cache.values(HOOK, range(4)).flatten(0, 1))
    assert torch.equal(ids.long(), IDS[:4].flatten())
    assert isinstance(runner.run(), SAE)
    assert not passes


def test_a_directory_that_saelens_wrote_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_lens.cache_activations_runner.load_model", lambda **_: model())
    config = CacheActivationsRunnerConfig(
        dataset_path="none",
        model_name="tiny",
        model_batch_size=4,
        hook_name="blocks.1.hook_resid_pre",
        d_in=models.D_MODEL,
        context_size=models.N_CTX,
        training_tokens=32 * models.N_CTX,
        buffer_size_gb=2e-5,
        new_cached_activations_path=str(tmp_path / "c"),
    )
    CacheActivationsRunner(config, override_dataset=DATA).run()
    dataset = datasets.load_from_disk(tmp_path / "c")
    cache = lch.saes.Cache(tmp_path / "c")
    assert cache.manifest is None
    assert cache.n_sequences == len(dataset) > 0
    rows = dataset.with_format("torch")
    assert torch.equal(cache.values(config.hook_name), torch.as_tensor(rows[config.hook_name][:]))
    assert torch.equal(cache.token_ids(), rows["token_ids"][:])
    assert len(next(cache.stream(config.hook_name, batch_size=100))) == 100
    cache.check(model())


def write_fast(path: Path, **changes: Any) -> lch.saes.Cache:
    return lch.saes.cache(model(), DATA, path, **{**SETTINGS, **changes})


def in_another_process(work: Callable[[], Any]) -> multiprocessing.Process:
    """A fork, which has the model already."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_killed_at_random_moments_it_ends_up_the_same(tmp_path: Path) -> None:
    options = {"hook_names": HOOKS, "batch_size": 2, "max_shard_size": "40KB"}
    began = time.monotonic()
    write_fast(tmp_path / "whole", **options)
    usual = time.monotonic() - began
    generator, kills = random.Random(0), 0
    for _ in range(100):
        process = in_another_process(lambda: write_fast(tmp_path / "c", **options))
        process.join(generator.uniform(0.2, 0.9) * usual)
        process.kill()
        process.join()
        kills += process.exitcode != 0
        if process.exitcode == 0:
            assert files(tmp_path / "c") == files(tmp_path / "whole")
            assert {p.name for p in tmp_path.iterdir()} == {"c", "whole"}
            if kills >= 4:
                break
            shutil.rmtree(tmp_path / "c")
    assert process.exitcode == 0
    assert kills >= 4


@pytest.mark.parametrize("step", ["write_index", "write_manifest", "sync_directory"])
def test_ended_while_it_is_finished_no_shard_is_computed_again(
    step: str, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*args: Any) -> Any:
        # The manifest is written for each shard too; the last one says how many sequences.
        if step != "write_manifest" or args[1]["n_sequences"] == 60:
            raise KeyboardInterrupt
        return write_manifest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writing, step, end)
        with pytest.raises(KeyboardInterrupt):
            write_fast(tmp_path / "c")
    passes.clear()
    write_fast(tmp_path / "c")
    assert not passes
    write_fast(tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_files_beside_the_shards_are_written_again(tmp_path: Path, passes: list[int]) -> None:
    cache = write_fast(tmp_path / "c")
    before = files(cache.path)
    passes.clear()
    (cache.path / "state.json").unlink()
    assert write_fast(tmp_path / "c").n_sequences == 60
    (cache.path / "dataset_info.json").write_text("no json")
    write_fast(tmp_path / "c")
    assert files(cache.path) == before
    assert not passes


def test_after_an_interrupt_finished_shards_are_not_computed_again(
    tmp_path: Path, passes: list[int]
) -> None:
    def interrupt() -> None:
        if len(passes) == 5:
            raise KeyboardInterrupt

    with at_embedding(interrupt), pytest.raises(KeyboardInterrupt):
        write_fast(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert passes == [8] * 5  # One shard, and all but one batch of the next.
    with pytest.raises(lch.InputError, match="no finished cache"):
        lch.saes.Cache(tmp_path / "c")
    passes.clear()
    write_fast(tmp_path / "c")
    assert passes == [8, 8, 8, 8, 4]
    write_fast(tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_a_finished_cache_is_used_and_damaged_shards_alone_are_computed(
    tmp_path: Path, passes: list[int]
) -> None:
    cache = write_fast(tmp_path / "c")
    before = files(cache.path)
    shards = sorted(cache.path.glob("*.arrow"))
    assert len(shards) == N_SHARDS
    passes.clear()
    for path in [cache.path, *cache.path.iterdir()]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    write_fast(tmp_path / "c")
    assert not passes
    cache.path.chmod(0o755)
    for path in cache.path.iterdir():
        path.chmod(0o644)

    def remove(path: Path) -> None:
        path.unlink()

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])

    def alter(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    for damage, damaged, n_batches in [
        (remove, shards[:1], 3),
        (truncate, shards[1:2], 3),
        (alter, shards[2:], 2),
        (remove, shards[::2], 5),
    ]:
        passes.clear()
        kept = {p: p.stat().st_ino for p in shards if p not in damaged}
        for path in damaged:
            damage(path)
        write_fast(tmp_path / "c")
        assert len(passes) == n_batches
        assert files(cache.path) == before
        assert kept == {p: p.stat().st_ino for p in kept}


def test_the_order_in_which_hook_points_are_named_does_not_matter(
    tmp_path: Path, passes: list[int]
) -> None:
    cache = write_fast(tmp_path / "c", hook_names=HOOKS)
    before = files(cache.path)
    (cache.path / "data-00001.arrow").unlink()
    assert write_fast(tmp_path / "c", hook_names=HOOKS[::-1]).hook_names == HOOKS
    assert files(cache.path) == before


def test_the_command_makes_what_the_function_makes(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(texts()))
    arguments = [
        "sae",
        "cache",
        HOOK,
        "blocks.1.hook_resid_pre",
        "--n-tokens",
        "500",
        "--seed",
        "2",
    ]
    arguments += ["--text", str(tmp_path / "texts.txt"), "--streaming", "--context-size", "64"]
    arguments += ["--store-as", "float16", "--batch-size", "4", "--out", str(tmp_path / "c")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "512 tokens at 2 hook points" in result.output
    cache = lch.saes.cache(
        reader(),
        lch.saes.load_text(tmp_path / "texts.txt", streaming=True),
        tmp_path / "c",  # As it is there, all settings have to be the same.
        hook_names=[HOOK, "blocks.1.hook_resid_pre"],
        n_tokens=500,
        seed=2,
        context_size=64,
        dtype="float16",
        batch_size=4,
    )
    cache.check(reader())
    CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "d")], catch_exceptions=False)
    assert files(tmp_path / "d") == files(cache.path)


def test_damage_is_seen_when_it_is_read_and_named_with_its_cure(tmp_path: Path) -> None:
    cache = write_fast(tmp_path / "c")
    shard = cache.path / "data-00001.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(lch.InputError, match=r"data-00001.arrow of .* has .* bytes where .* again"):
        lch.saes.Cache(cache.path)
    shard.unlink()
    with pytest.raises(lch.InputError, match=r"data-00001.arrow of .* cannot be read"):
        lch.saes.Cache(cache.path)
    place = content.index(IDS[30].numpy().astype(np.int32).tobytes())
    for at, read in [
        (len(content) // 2, lambda c: c.values(HOOK, [30])),
        (place, lambda c: c.token_ids([30])),
    ]:
        shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        cache = lch.saes.Cache(cache.path)
        cache.values(HOOK, [0])
        with pytest.raises(lch.InputError, match=r"data-00001.arrow of .* other"):
            read(cache)
    for name in ("state.json", "dataset_info.json", "manifest.json"):
        text = (cache.path / name).read_text()
        (cache.path / name).write_text(text[:20])
        with pytest.raises(lch.InputError, match="no finished cache"):
            lch.saes.Cache(cache.path)
        (cache.path / name).write_text(text)


@pytest.mark.parametrize("finished", [True, False])
def test_another_model_text_or_setting_is_refused_by_name(
    finished: bool, tmp_path: Path, passes: list[int]
) -> None:
    path = tmp_path / "c"
    if finished:
        write_fast(path)
    else:
        with pytest.raises(lch.InputError, match="make 960 tokens"):
            write_fast(path, n_tokens=10_000)
    few = {} if finished else {"n_tokens": 10_000}
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("model, weights", models.bridge("gpt2", seed=1), DATA, {}),
        ("context_size is 8 and was 16", model(), DATA, {"context_size": 8}),
        ("dtype is 'float16' and was 'float32'", model(), DATA, {"dtype": "float16"}),
        ("seed is 0 and was None", model(), DATA, {"seed": 0}),
        ("batch_size is 4 and was 8", model(), DATA, {"batch_size": 4}),
        ("batches_per_shard is 1 and was 3", model(), DATA, {"max_shard_size": 1}),
        ("prepend_bos is False", model(), DATA, {"prepend_bos": False}),
        ("hook_resid_pre", model(), DATA, {"hook_names": HOOKS}),
        ("another text", model(), DATA.select(range(59, -1, -1)), {}),
        ("another text" if finished else "10000", model(), DATA.select(range(9)), few),
    ]
    passes.clear()
    with pytest.raises(lch.InputError, match="cotangent is"):
        with lch.attach(model(), layers=1, cotangent=torch.arange(32.0)):
            write_fast(path)
    for message, lens, data, changes in cases:
        with pytest.raises(lch.InputError, match=message):
            lch.saes.cache(lens, data, path, **{**SETTINGS, **changes})
    if finished:
        with pytest.raises(lch.InputError, match="n_tokens is 32 and was None"):
            write_fast(path, n_tokens=32)
    assert not passes
    write_fast(path)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    cache = write_fast(tmp_path / "c")
    lens = models.bridge("gpt2")
    cache.check(lens)
    lens.tokenizer.add_tokens(["w50"])
    with pytest.raises(lch.InputError, match="tokenizer"):
        cache.check(lens)
    with pytest.raises(lch.InputError, match="weights"):
        cache.check(models.bridge("gpt2", seed=1))
    with pytest.raises(lch.InputError, match=r"cotangent is .* and was 'ones'"):
        with lch.attach(model(), layers=1, cotangent=torch.arange(32.0)):
            cache.check(model())


def test_too_little_text_says_how_much_there_is_and_is_kept(
    tmp_path: Path, passes: list[int]
) -> None:
    with pytest.raises(lch.InputError, match=r"n_tokens=961: the 60 texts make 960 tokens"):
        write_fast(tmp_path / "c", n_tokens=961)
    assert passes == [8] * 6  # The shards that are full.
    passes.clear()
    cache = write_fast(tmp_path / "c", n_tokens=950)
    assert passes == [8, 4]
    assert cache.n_tokens == 960
    write_fast(tmp_path / "whole", n_tokens=950)
    assert files(cache.path) == files(tmp_path / "whole")
    # As if the process had ended just before the directory got its name.
    cache.path.rename(tmp_path / ".c.partial")
    passes.clear()
    assert write_fast(tmp_path / "c", n_tokens=500).n_tokens == 512
    assert passes == [8]
    with pytest.raises(lch.InputError, match="the 3 texts do not fill a sequence"):
        lch.saes.cache(model(), ["w1", "w2", "w3"], tmp_path / "d", **SETTINGS)
    few = write_fast(tmp_path / "e", n_tokens=17)
    assert few.n_sequences == 2


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    message = multiprocessing.get_context("fork").SimpleQueue()

    def write() -> None:
        # Room for a shard of 50 kB but not for the manifest's growth, by and by: a limit on files.
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            write_fast(tmp_path / "c", max_shard_size="50KB", hook_names=HOOK)
        except lch.OutputError as error:
            message.put(str(error))
        else:
            message.put("")

    process = in_another_process(write)
    process.join()
    assert process.exitcode == 0
    text = message.get()
    assert "Make room and call lch.saes.cache again" in text
    assert "File too large" in text
    assert not (tmp_path / "c").exists()
    assert not list((tmp_path / ".c.partial").glob("*.tmp"))
    write_fast(tmp_path / "c")
    write_fast(tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_two_processes_do_not_write_the_same_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    under_way, go_on = context.Event(), context.Event()

    def write() -> None:
        def wait() -> None:
            under_way.set()
            go_on.wait(60)

        with at_embedding(wait):
            write_fast(tmp_path / "c", hook_names="blocks.0.hook_resid_pre")

    process = in_another_process(write)
    try:
        assert under_way.wait(60)
        with pytest.raises(lch.OutputError, match="another process"):
            write_fast(tmp_path / "c", hook_names="blocks.0.hook_resid_pre")
    finally:
        go_on.set()
        process.join()
    assert process.exitcode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"c"}


def test_what_another_process_finished_meanwhile_is_not_computed_again(
    tmp_path: Path, passes: list[int]
) -> None:
    meanwhile: list[int] = []

    def write(_module: Any, _args: Any, x: Tensor) -> None:
        if not meanwhile:  # In the pass that finds the width, before anything is written.
            meanwhile.append(len(x))
            in_another_process(lambda: write_fast(tmp_path / "c")).join()

    handle = model().hook_dict["hook_embed"].register_forward_hook(write)
    try:
        with pytest.raises(lch.OutputError, match="another process since"):
            write_fast(tmp_path / "c")
    finally:
        handle.remove()
    assert meanwhile == [1]
    assert {p.name for p in tmp_path.iterdir()} == {"c"}
    write_fast(tmp_path / "c")
    assert not passes


def test_memory_does_not_grow_with_the_text(tmp_path: Path, passes: list[int]) -> None:
    """Of the values, no more than two batches are alive at any time."""
    alive: list[int] = []

    def count() -> None:
        if len(passes) % 5 == 4:
            shape = (8, models.N_CTX, models.D_MODEL)
            alive.append(sum(type(o) is Tensor and o.shape == shape for o in gc.get_objects()))

    hook = "blocks.0.hook_resid_pre"
    with at_embedding(count):
        write_fast(tmp_path / "c", hook_names=hook, max_shard_size="500MB")
        few = max(alive)
        alive.clear()
        data = Dataset.from_dict({"tokens": IDS.tolist() * 6})
        lch.saes.cache(
            model(), data, tmp_path / "d", hook_names=hook, batch_size=8, max_shard_size="500MB"
        )
    assert len(alive) > 5
    assert max(alive) <= few + 1


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    lens = models.bridge("gpt2")
    with torch.no_grad():
        lens.blocks[0].mlp.out.weight.mul_(1e6)
    hook = "blocks.0.hook_mlp_out"
    with pytest.raises(lch.NonFiniteError, match="float16"):
        lch.saes.cache(lens, DATA, tmp_path / "c", hook_names=hook, dtype="float16")
    assert not list(tmp_path.iterdir())
    lch.saes.cache(lens, DATA, tmp_path / "d", hook_names=hook)


def test_numbers_too_small_for_float16_are_refused(tmp_path: Path) -> None:
    lens = models.bridge("gpt2")
    with torch.no_grad():
        lens.blocks[1].mlp.out.weight.mul_(1e-6)
    with pytest.raises(lch.InputError, match=r"changes it by .*Take dtype='float32'"):
        lch.saes.cache(lens, DATA, tmp_path / "c", hook_names=HOOK, dtype="float16")
    cache = lch.saes.cache(lens, DATA, tmp_path / "d", hook_names=HOOK)
    assert 0 < float(cache.values(HOOK).abs().max()) < 1e-4


def test_a_batch_that_arrow_cannot_count_is_refused() -> None:
    columns = features(2**16, {"a": 2**15}, "float32")
    values = torch.zeros(1).expand(2, 2**16, 2**15)  # Takes no memory.
    with pytest.raises(lch.InputError, match="Lower batch_size"):
        record_batch(columns, torch.zeros(2, 2**16, dtype=torch.long), {"a": values})


def test_the_fingerprint_reads_no_more_values_than_it_says() -> None:
    layer = torch.nn.Linear(1, 2047, bias=False)
    before = weights_fingerprint(layer)
    with torch.no_grad():
        layer.weight[1::2] += 1
        assert weights_fingerprint(layer) == before
        layer.weight[2] += 1
    assert weights_fingerprint(layer) != before


def test_the_manifest_says_what_the_values_are_of(tmp_path: Path) -> None:
    data, v = DATA, torch.linspace(-1, 1, models.D_MODEL)
    with lch.attach(model(), layers=1, cotangent=v):
        cache = lch.saes.cache(model(), data, tmp_path / "c", **SETTINGS, seed=3)
    manifest = json.loads((cache.path / "manifest.json").read_text())
    assert manifest == cache.manifest
    assert manifest["model"]["name"] == "tiny"
    assert manifest["model"]["revision"] is None
    record = manifest["hooks"][HOOK]["centroid"]
    assert record == cache.provenance(HOOK)
    assert (record["site"], record["layer"], record["cotangent"]) == ("mlp", 1, v.tolist())
    assert record["weight_processing"]["processed"] is False
    assert manifest["settings"]["seed"] == 3
    assert manifest["dataset"]["fingerprint"] == data._fingerprint
    assert set(manifest["versions"]) >= {"lch-plugin", "torch", "sae-lens", "transformer-lens"}
    assert sum(s["n_sequences"] for s in manifest["shards"]) == manifest["n_sequences"]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    lens = models.bridge("gpt2")
    lens.train()
    lch.saes.cache(lens, DATA, tmp_path / "c", **SETTINGS)
    assert lens.training
    assert all(block.training for block in lens.blocks)
    assert not attached_readers(lens)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused_before_work_starts(tmp_path: Path, passes: list[int]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "manifest.json").write_text("[1]")
    (tmp_path / "file").write_text("keep me")
    outside = Dataset.from_dict({"tokens": [[0] * 15 + [models.D_VOCAB]]})
    short = Dataset.from_dict({"tokens": [[0] * 16, [0] * 9]})
    cases: list[tuple[type[lch.LCHError], str, Any, dict[str, Any]]] = [
        (lch.InputError, "names no hook point", DATA, {"hook_names": []}),
        (lch.SiteError, "no hook point", DATA, {"hook_names": "blocks.1.mlp.hook_centriod"}),
        (lch.SiteError, r"layers \[7\]", DATA, {"hook_names": "blocks.7.mlp.hook_centroid"}),
        (lch.InputError, "float32", DATA, {"dtype": "bfloat16"}),
        (lch.InputError, "context of 16", DATA, {"context_size": 17}),
        (lch.InputError, "context_size=0", DATA, {"context_size": 0}),
        (lch.InputError, "at least 1", DATA, {"batch_size": 0}),
        (lch.InputError, "at least 1", DATA, {"n_tokens": 0}),
        (lch.InputError, "500MB", DATA, {"max_shard_size": "big"}),
        (lch.InputError, "vocabulary", outside, {}),
        (lch.InputError, "vocabulary", outside.to_iterable_dataset(), {}),
        (lch.InputError, "9 tokens", short, {}),
        (lch.InputError, "9 tokens", short.to_iterable_dataset(), {}),
        (lch.InputError, "columns", Dataset.from_dict({"words": ["a"]}), {}),
        (lch.InputError, "column", Dataset.from_dict({"words": ["a"]}).to_iterable_dataset(), {}),
        (lch.InputError, "has 0 rows", DATA.to_iterable_dataset().take(0), {}),
        (lch.InputError, "9 tokens", short.select([1]).to_iterable_dataset(), {}),
        (lch.InputError, "need use_chat_formatting", Dataset.from_dict({"messages": [[]]}), {}),
        (lch.InputError, "does not exist", "nowhere.txt", {}),
        (lch.OutputError, "other content", DATA, {"path": tmp_path / "taken"}),
        (lch.OutputError, "other content", DATA, {"path": tmp_path / "file"}),
        (lch.OutputError, "written", DATA, {"path": tmp_path / "file" / "c"}),
    ]
    for error, match, data, changes in cases:
        options = {"path": tmp_path / "c", **SETTINGS, **changes}
        with pytest.raises(error, match=match):
            lch.saes.cache(model(), data, **options)
        assert not attached_readers(model())
        assert not (tmp_path / "c").exists()
    with pytest.raises(lch.InputError, match="hook points"):
        lch.saes.cache(models.huggingface("gpt2"), DATA, tmp_path / "c", hook_names=HOOK)
    assert not passes
    cache = lch.saes.cache(model(), DATA, tmp_path / "good", **SETTINGS)
    for read in [
        lambda: cache.values("blocks.1.hook_resid_pre"),
        lambda: cache.values(HOOK, [60]),
        lambda: cache.values(HOOK, [-1]),
        lambda: cache.values(HOOK, [True] * 60),
        lambda: cache.values(HOOK, [0.5]),
        lambda: cache.values(HOOK, 3),
        lambda: cache.stream("blocks.1.hook_resid_pre", batch_size=8),
        lambda: cache.stream(HOOK, batch_size=0),
        lambda: cache.stream(HOOK, batch_size=8, buffer_size=15),
        lambda: cache.stream(HOOK, batch_size=8, seed=-1),
        lambda: cache.stream(HOOK, batch_size=8, exclude_tokens=range(models.D_VOCAB)),
        lambda: cache.stream(HOOK, batch_size=8).seek(-1),
        lambda: lch.saes.Cache(tmp_path / "nowhere"),
        lambda: lch.saes.Cache(tmp_path / "taken"),
    ]:
        with pytest.raises(lch.InputError):
            read()
    DATA.save_to_disk(tmp_path / "tokens")
    with pytest.raises(lch.InputError, match="no cache of values"):
        lch.saes.Cache(tmp_path / "tokens")


CONTEXT = 4


@memoised
def numbered(n_sequences: int, per_shard: int, per_batch: int) -> Any:
    """A cache whose values say which row they are, and whose tokens are that modulo 7."""
    directory = Path(models._DIRECTORY.name) / f"{n_sequences}-{per_shard}-{per_batch}"
    directory.mkdir()
    columns = features(CONTEXT, {"a": 2, "b": 1}, "float32")
    numbers = torch.arange(n_sequences * CONTEXT).reshape(-1, CONTEXT)
    shards = []
    for i, shard in enumerate(numbers.split(per_shard)):
        batches = [
            record_batch(
                columns,
                batch % 7,
                {"a": torch.stack([batch, -batch], -1).float(), "b": batch[..., None].float()},
            )
            for batch in shard.split(per_batch)
        ]
        file = f"data-{i:05d}.arrow"
        n_bytes, xxh3 = write_shard(directory / file, columns.arrow_schema, batches)
        shards.append(Shard(file, len(shard), n_bytes, xxh3))
    write_index(directory, columns, shards)
    # As SAELens writes it, without a manifest.
    DatasetInfo(features=columns).write_to_directory(str(directory))
    return lch.saes.Cache(directory)


caches = st.builds(
    numbered, st.sampled_from([1, 5, 20]), st.sampled_from([1, 7]), st.sampled_from([2, 3])
)
streams = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 30),
        "buffer_size": st.integers(CONTEXT, 50),
        "seed": st.integers(0, 2**40),
        "exclude_tokens": st.one_of(st.none(), st.lists(st.integers(0, 8), max_size=3)),
    }
)


def take(stream: lch.saes.Stream, n_rows: int) -> Tensor:
    """At least this many rows."""
    batches = [next(stream) for _ in range(-(-n_rows // stream.batch_size))]
    assert {len(batch) for batch in batches} == {stream.batch_size}
    return torch.cat(batches)


@given(caches, streams)
@settings(max_examples=30, deadline=None)
def test_each_epoch_has_every_row_once(cache: lch.saes.Cache, options: dict[str, Any]) -> None:
    stream = cache.stream("a", **options)
    rows = take(stream, 3 * stream.rows_per_epoch).long()
    excluded = options["exclude_tokens"] or []
    wanted = [n for n in range(cache.n_tokens) if n % 7 not in excluded]
    assert stream.rows_per_epoch == len(wanted)
    for epoch in rows[: 3 * len(wanted)].split(len(wanted)):
        assert sorted(epoch[:, 0].tolist()) == wanted
    assert torch.equal(rows[:, 1], -rows[:, 0])


@given(caches, streams, st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_a_stream_that_went_somewhere_goes_on_as_one_that_came_there(
    cache: lch.saes.Cache, options: dict[str, Any], position: int, elsewhere: int
) -> None:
    stream, other = (cache.stream("a", **options) for _ in range(2))
    for _ in range(position):
        next(stream)
    other.seek(elsewhere)
    next(other)
    other.seek(position)
    assert stream.position == other.position == position
    for _ in range(5):
        assert torch.equal(next(stream), next(other))


@given(caches, streams)
@settings(max_examples=20, deadline=None)
def test_streams_of_two_hook_points_keep_step(
    cache: lch.saes.Cache, options: dict[str, Any]
) -> None:
    a, b = cache.stream("a", **options), cache.stream("b", **options)
    for _ in range(5):
        assert torch.equal(next(a)[:, :1], next(b))


def test_the_order_is_the_seeds_and_mixes_the_whole_text() -> None:
    cache = numbered(400, 50, 8)
    options = {"batch_size": 160, "buffer_size": 160}
    torch.manual_seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batch = next(cache.stream("a", seed=0, **options))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(batch, next(cache.stream("a", seed=0, **options)))
    assert not torch.equal(batch, next(cache.stream("a", seed=1, **options)))
    # 40 of 400 sequences: from everywhere, and not a token beside its neighbour.
    sequences = (batch[:, 0] // CONTEXT).unique()
    assert len(sequences) == 40
    assert len((sequences // 50).unique()) > 5
    assert (batch[:, 0].diff() == 1).sum() < 10
    stream = cache.stream("a", seed=0, **options)
    epochs = [take(stream, 1600)[:, 0] for _ in range(2)]
    assert not torch.equal(*epochs)


def test_seeking_reads_no_values(tmp_path: Path) -> None:
    cache = write_fast(tmp_path / "c")
    with (cache.path / "data-00000.arrow").open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        file.write(b"\xff" * 64)
    for exclude in (None, [0]):
        stream = cache.stream(HOOK, batch_size=8, seed=0, exclude_tokens=exclude)
        stream.seek(1000)
        with pytest.raises(lch.InputError, match="other content"):
            next(stream)
