"""What is said of a name that nobody knows."""

from __future__ import annotations

from typing import Any

import pytest

import lch_plugin as lch
from lch_plugin import circuits
from lch_plugin.names import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("atn", ["mlp", "attn"], "Did you mean attn?"),
        ("MLP", ["mlp", "attn"], "Did you mean mlp?"),
        ("h.0.mlp", ["transformer.h.0.mlp", "lm_head"], "Did you mean transformer.h.0.mlp?"),
        ("zzz", ["mlp", "attn"], "There are mlp, attn."),
        ("zzz", [], "There is none."),
        (3, ["mlp", "attn"], "There are mlp, attn."),
        ("zzz", range(30), "22, 23, 6 more."),
    ],
)
def test_the_nearest_name_is_said_or_all_of_them(name: Any, known: Any, said: str) -> None:
    assert did_you_mean(name, known).endswith(said)


@pytest.fixture(scope="module")
def model() -> Any:
    return lch.load_demo_model()


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda _: lch.Site("blok"), "Did you mean block?"),
        (lambda _: lch.Site("attn", linearization="detachd"), "Did you mean detached?"),
        (lambda m: circuits.task(m, "induktion"), "Did you mean induction?"),
        (lambda m: lch.attach(m, site=lch.Site(stack="block")), "Did you mean blocks?"),
        (lambda m: lch.lens.read(m, "I picked", tokens=["apple"]), "Did you mean ' apple'?"),
        (lambda m: circuits.prompts(m, "I picked", "apple", " a"), "Did you mean ' apple'?"),
        (
            lambda m: lch.steering.editing.entry_of(m, "blocks.2.mpl"),
            "Did you mean blocks.2.mlp?",
        ),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_an_unknown_name_is_answered_by_the_nearest(ask: Any, said: str, model: Any) -> None:
    with pytest.raises(lch.LCHError) as refused:
        ask(model)
    assert said in str(refused.value)
