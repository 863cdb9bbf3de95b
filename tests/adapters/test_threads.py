"""Threads that share a model with centroids take turns, and each gets its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.turns import Turn
from tests import models

N_THREADS, N_PASSES = 3, 8
IDS = [models.tokens(2, 6, seed) for seed in range(N_THREADS)]


@pytest.fixture(autouse=True)
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[Tensor], Any]) -> list[list[Any]]:
    """What each thread got from its passes."""
    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(lambda ids: [work(ids) for _ in range(N_PASSES)], IDS))


@pytest.mark.parametrize("name", ["bridge", "hooked"])
def test_transformer_lens(name: str) -> None:
    model = models.bridge("gpt2") if name == "bridge" else models.hooked()
    sites = ["mlp", "attn", "block", lch.Site("block", 1, cotangent=lch.cotangents.Logit(3))]
    with lch.attach(model, site=sites) as handle:

        def work(ids: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                found = model.run_with_cache(ids, names_filter=handle.hook_names)[1]
                assert not torch.is_grad_enabled()
            return {name: found[name] for name in handle.hook_names}

        expected = [work(ids) for ids in IDS]
        for truth, passes in zip(expected, in_threads(work), strict=True):
            for found in passes:
                assert found.keys() == truth.keys()
                assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_huggingface() -> None:
    model = models.huggingface("llama")
    with lch.huggingface.attach(model, ["model.layers.1", "model.layers.*.mlp"]) as handle:

        def work(ids: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                model(ids)
            return dict(handle.cache)

        expected = [work(ids) for ids in IDS]
        for truth, passes in zip(expected, in_threads(work), strict=True):
            for found in passes:
                assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_a_pass_of_another_thread_can_be_looked_at() -> None:
    model = models.huggingface("gpt2")
    with lch.huggingface.attach(model, "transformer.h.1.mlp") as handle:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model, IDS[0]).result()
            theirs = handle.cache["transformer.h.1.mlp"]
            model(IDS[1])
            ours = handle.cache["transformer.h.1.mlp"]
            pool.submit(model, IDS[0]).result()
    assert not torch.equal(ours, theirs)
    assert torch.equal(handle.cache["transformer.h.1.mlp"], ours)


def test_a_pass_that_fails_ends_its_turn() -> None:
    model = models.huggingface("gpt2")
    with lch.huggingface.attach(model, "transformer.h.1"):
        with pytest.raises(IndexError):
            model(torch.tensor([[models.D_VOCAB]]))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model, IDS[0]).result(timeout=60)


def test_copies_take_turns_of_their_own() -> None:
    turn = Turn()
    with turn, ThreadPoolExecutor(1) as pool:

        def enter() -> None:
            with deepcopy(turn):
                pass

        pool.submit(enter).result(timeout=60)


def test_attaching_waits_for_the_passes_of_others() -> None:
    model = models.bridge("gpt2")
    site = lch.Site("block", 1, cotangent=lch.cotangents.Random(0))
    with lch.attach(model, site=site) as handle:
        wanted = {handle.hook_names[0], "blocks.0.hook_out"}

        def work(_: int) -> set[str]:
            with torch.no_grad():
                return set(model.run_with_cache(IDS[0], names_filter=list(wanted))[1])

        def attach_others() -> None:
            other = lch.Site("attn", cotangent=lch.cotangents.Random(0))
            for _ in range(4):
                with lch.attach(model, site=other):
                    pass

        with ThreadPoolExecutor(2) as pool:
            attaching = pool.submit(attach_others)
            found = list(pool.map(work, range(N_PASSES)))
            attaching.result()
        assert all(names == wanted for names in found)
