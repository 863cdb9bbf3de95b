"""Names of modules, and wildcards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lch_plugin as lch
from lch_plugin.adapters.huggingface import attach
from lch_plugin.adapters.huggingface.names import resolve
from tests import models
from tests.adapters.huggingface.common import ATTN, MLP, SPAN

BLOCKS = [f"transformer.h.{i}" for i in range(models.N_LAYERS)]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("transformer.h.*.mlp", [f"{b}.mlp" for b in BLOCKS]),
        ("transformer.h.?", BLOCKS),
        ("transformer.h.[0-1]", BLOCKS[:2]),
        ("transformer.h.[!0]", BLOCKS[1:]),
        ("transformer.w*", ["transformer.wte", "transformer.wpe"]),
        ("*", ["transformer", "lm_head"]),
        ("transformer.h.2.*tn", ["transformer.h.2.attn"]),
        (["transformer.h.2", "transformer.h.0", "transformer.h.?"], BLOCKS),
        ("transformer.h.*:transformer.h.*.mlp", [f"{b}:{b}.mlp" for b in BLOCKS]),
        # A stretch from a module to itself is the module.
        (
            "transformer.h.*.ln_?:transformer.h.*.ln_?",
            [f"{b}.ln_{i}" for b in BLOCKS for i in "12"],
        ),
        ("", [""]),
        (["transformer.h.2:", BLOCKS[1]], ["transformer.h.2:", BLOCKS[1]]),
        ("transformer.h.1:transformer.h.2", ["transformer.h.1:transformer.h.2"]),
    ],
)
def test_names_and_wildcards(gpt2: Any, patterns: Any, expected: list[str]) -> None:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = [target.name for target in resolve(gpt2, patterns)]
    assert names == expected


def test_names_are_in_the_order_of_the_model(gpt2: Any) -> None:
    with attach(gpt2, ["transformer.h.2", "transformer.h.*.mlp", SPAN, ATTN]) as handle:
        assert handle.centroid_names == [
            *("transformer.h.0.mlp", ATTN, MLP, SPAN, "transformer.h.2", "transformer.h.2.mlp"),
        ]


@pytest.mark.parametrize(
    ("modules", "error", "match"),
    [
        ("h.*.mlp", lch.SiteError, r"fits no module.*transformer\.h\.0\.mlp"),
        ("transformer.h.1.mpl", lch.SiteError, r"Did you mean transformer\.h\.1\.mlp\?"),
        ("transformer.h.*:transformer.h.*.mpl", lch.SiteError, "does not"),
        ("transformer.h.1:transformer.h.*", lch.SiteError, "more wildcards"),
        ("transformer.h.[2-0]", lch.InputError, "bad character range"),
        ([], lch.InputError, "name at least one"),
        ([3], lch.InputError, "strings"),
        ([nn.ReLU()], lch.InputError, "strings"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_names_that_fit_nothing_are_refused(
    gpt2: Any, modules: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        attach(gpt2, modules)


@pytest.mark.usefixtures("as_users_run")
def test_models_without_mlps_and_things_that_are_no_models_are_refused() -> None:
    with pytest.raises(lch.SiteError, match="no MLP with a closed form"):
        attach(nn.Sequential(nn.Conv1d(2, 2, 1)))
    with pytest.raises(lch.InputError, match=r"torch\.nn\.Module"):
        attach(lambda x: x)  # type: ignore[arg-type]
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    for modules in (None, "1:2", ""):
        with pytest.raises(lch.SiteError, match="meta"):
            attach(net, modules)


def test_a_model_that_is_an_mlp_is_found_once() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert lch.huggingface.mlp_names(net) == [""]


@pytest.mark.parametrize("make", [lambda: models.bridge("gpt2"), models.hooked])
def test_models_of_transformerlens_are_referred_to_their_own_adapter(make: Any) -> None:
    """HookedTransformer's attention reads one value as three tensors, of which one was followed."""
    with pytest.raises(lch.AttachError, match=r"lch\.attach"):
        lch.huggingface.attach(make(), "blocks.1.attn")
