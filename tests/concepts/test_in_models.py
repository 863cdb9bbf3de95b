"""Directions found at a component's input move the component; erasures take the concept from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.concepts import boundary, cav, difference_of_means, inlp, leace

MLP = "blocks.2.mlp"
TEXT = "In the {} Tom {} {} {}"
VERBS = ("saw", "had", "got")
THINGS = ("dog", "cat", "ball", "tree", "apple", "egg", "owl", "orange")
PLACES = ("park", "house", "garden", "tree")


@pytest.fixture(scope="module")
def rows() -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """The demo model, prompts, labels, and what an MLP reads and its centroids at the article."""
    model = lch.load_demo_model()
    texts = [
        TEXT.format(place, verb, "an" if thing[0] in "aeiou" else "a", thing)
        for verb in VERBS
        for thing in THINGS
        for place in PLACES
    ]
    rows = [model.to_tokens(text)[0] for text in texts]
    n_pos = len(rows[0])
    kept = [i for i, row in enumerate(rows) if len(row) == n_pos]  # No padding.
    tokens = torch.stack([rows[i] for i in kept])
    labels = torch.tensor([int(" an " in texts[i]) for i in kept])
    assert 8 <= int(labels.sum()) <= len(labels) - 8
    with lch.attach(model, layers=2), torch.no_grad():
        names = [f"{MLP}.hook_centroid", f"{MLP}.hook_in"]
        _, cache = model.run_with_cache(tokens, names_filter=names)
    mu, x = (cache[name][:, -1] for name in names)
    return model, tokens, labels, x, mu


def read(model: Any, tokens: Tensor) -> Tensor:
    """What the MLP reads at the last token; hooks of the model see edits."""
    found: list[Tensor] = []
    hook = model.get_submodule(MLP).register_forward_pre_hook(lambda _m, a: found.append(a[0]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return found[0][:, -1]


@pytest.mark.parametrize("estimator", [difference_of_means, cav, boundary])
@pytest.mark.parametrize("of", ["inputs", "centroids"])
def test_adding_a_direction_raises_the_concepts_score(rows: Any, estimator: Any, of: str) -> None:
    model, tokens, labels, x, mu = rows
    probe = cav(x, labels)
    found = estimator(x if of == "inputs" else mu, labels)
    concept = getattr(found, "concept", found)
    before = probe.scores(read(model, tokens))
    with lch.steering.steering(model, MLP, concept.scale * concept.direction):
        after = probe.scores(read(model, tokens))
    expected = concept.scale * float(concept.direction @ probe.direction)
    torch.testing.assert_close(after - before, torch.full_like(before, expected), rtol=1e-3, atol=0)
    if of == "inputs":
        assert expected > 0


@pytest.mark.filterwarnings("ignore:leace of")  # The rows it was fitted on are looked at.
@pytest.mark.parametrize("method", [leace, inlp])
def test_an_erasure_is_an_edit_of_what_the_mlp_reads(rows: Any, method: Any) -> None:
    model, tokens, labels, x, _ = rows
    erasure = method(x, labels)
    with lch.steering.edited_input(model, MLP, erasure):
        erased = read(model, tokens)
    torch.testing.assert_close(erased, erasure(x), rtol=1e-4, atol=1e-4)
    assert cav(x, labels).accuracy(x, labels) > 0.9
    gap = erased[labels == 1].mean(0) - erased[labels == 0].mean(0)
    if method is leace:
        assert float(gap.norm()) < 1e-3 * difference_of_means(x, labels).scale
    assert torch.equal(read(model, tokens), x)
