"""Which of a module's arguments and results a centroid is about."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import lch_plugin as lch
from lch_plugin.adapters.arguments import holds_tokens, input_of, output_of, with_output

X, MASK, IDS = torch.randn(2, 3, 4), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long)
Pair = namedtuple("Pair", ["y", "cache"])


@dataclass
class Written:
    logits: Tensor
    loss: Tensor | None = None


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (IDS, y, None),
    "list": lambda y: [y, IDS],
    "named tuple": lambda y: Pair(y, None),
    "dictionary": lambda y: {"mask": IDS, "y": y},
    "dataclass": lambda y: Written(y, MASK),
    "ModelOutput": lambda y: BaseModelOutputWithPast(last_hidden_state=y, hidden_states=(X, X)),
}


def values(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return list(output.values())
    if isinstance(output, Written):
        return [output.logits, output.loss]
    return list(output) if isinstance(output, tuple | list) else [output]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_keeps_its_class_and_all_but_one_of_its_values(kind: str) -> None:
    y, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    output = OUTPUTS[kind](y)
    before = values(output)
    assert output_of(output, "it") is y
    changed = with_output(output, y, other)
    assert type(changed) is type(output)
    assert output_of(changed, "it") is other
    for old, new in zip(before, values(changed), strict=True):
        assert new is (other if old is y else old)
    assert all(old is new for old, new in zip(before, values(output), strict=True))
    assert with_output(output, other, y) is output


def test_a_model_output_has_its_value_under_every_way_to_ask() -> None:
    output = BaseModelOutputWithPast(last_hidden_state=X)
    changed = with_output(output, X, MASK)
    assert changed.last_hidden_state is changed["last_hidden_state"] is changed[0] is MASK


def test_the_logits_of_a_model_come_before_its_loss() -> None:
    assert output_of({"loss": MASK.sum(), "logits": X}, "it") is X


@pytest.mark.parametrize("output", [IDS, None, (None, IDS), {"ids": IDS}])
def test_outputs_without_numbers_are_refused(output: Any) -> None:
    with pytest.raises(lch.InputError, match=r"the_module returned .* Name a module within"):
        output_of(output, "the_module")


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((IDS, X), {"attention_mask": MASK}),
        ((), {"attention_mask": MASK, "hidden_states": X}),
        ((), {"query": X, "key": X, "value": X}),
        ((), {"query_input": X, "key_input": X.clone(), "value_input": X.clone()}),
    ],
    ids=["alone", "after ids", "beside a mask", "three times", "as three tensors"],
)
def test_the_input_is_replaced_wherever_it_is(args: Any, kwargs: dict[str, Any]) -> None:
    x, instead = input_of((args, kwargs), "it")
    assert x is X
    other = torch.randn(2, 3, 4)
    new_args, new_kwargs = instead(other)
    given, new = (*args, *kwargs.values()), (*new_args, *new_kwargs.values())
    assert len(given) == len(new)
    assert new_kwargs.keys() == kwargs.keys()
    for old, now in zip(given, new, strict=True):
        assert now is (other if old.shape == X.shape else old)


@pytest.mark.parametrize(
    "value", [X + 1, torch.randn(2, 3, 2, 4)], ids=["of others", "one for each head"]
)
def test_queries_keys_and_values_that_are_read_apart_are_refused(value: Tensor) -> None:
    with pytest.raises(lch.SiteError, match="Turn off use_split_qkv_input and use_attn_in"):
        input_of(((), {"query_input": X, "key_input": X, "value_input": value}), "it")


def test_calls_without_numbers_are_refused() -> None:
    with pytest.raises(lch.InputError, match=r"\['Tensor', 'NoneType'\].*inputs_embeds"):
        input_of(((IDS,), {"attention_mask": None}), "it")


def test_a_cache_holds_tokens_by_layer() -> None:
    """Within a pass the layers before have added theirs already."""
    cache = DynamicCache()
    assert not holds_tokens(cache)
    cache.update(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), 0)
    assert holds_tokens(cache, 0)
    assert not holds_tokens(cache, 1)
    assert not holds_tokens(X)
    assert not holds_tokens(None)
