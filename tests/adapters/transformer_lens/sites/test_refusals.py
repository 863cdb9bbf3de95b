"""Sites that mean nothing, or do not fit a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lch_plugin as lch
from lch_plugin.cotangents import Logit, Metric, Random, logit_difference
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import F64, IDS, read

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("error", "match", "kw"),
    [
        (lch.SiteError, "'mpl'", {"kind": "mpl"}),
        (lch.SiteError, "needs two", {"kind": "span", "layers": 1}),
        (lch.SiteError, "no layers to choose", {"kind": "model", "layers": 1}),
        (lch.SiteError, "names no layer", {"layers": []}),
        (lch.InputError, "index=None", {"kind": "neuron"}),
        (lch.InputError, "index=3", {"kind": "mlp", "index": 3}),
        (lch.InputError, "zero or more", {"kind": "head", "index": -1}),
        (lch.InputError, "needs a label", {"kind": "neuron", "index": range(9)}),
        (lch.InputError, "does not mix positions", {"output_positions": 1}),
        (lch.InputError, "must be integers", {"kind": "attn", "output_positions": "x"}),
        (lch.InputError, "linearization='tangent'", {"linearization": "tangent"}),
        (
            lch.InputError,
            "one linearisation",
            {"kind": "neuron", "index": 0, "linearization": "detached"},
        ),
        (
            lch.InputError,
            "a head is differentiated",
            {"kind": "head", "index": 0, "compute_dtype": torch.float64},
        ),
        (lch.InputError, "label='a b'", {"label": "a b"}),
        (lch.InputError, "label='x_input'", {"label": "x_input"}),
        (lch.InputError, "compute_dtype", {"kind": "block", "compute_dtype": torch.float64}),
        (lch.InputError, "compute_dtype", {"compute_dtype": torch.int64}),
        (lch.InputError, "radius=-1", {"radius": -1.0}),
        (lch.InputError, "radius=nan", {"radius": float("nan")}),
        (lch.InputError, "n_samples=1", {"radius": 0.1, "n_samples": 1}),
        (lch.InputError, "neighbourhood='cube'", {"radius": 0.1, "neighbourhood": "cube"}),
        (lch.InputError, "offered for", {"kind": "head", "index": 0, "radius": 0.1}),
        (lch.InputError, "expert=True", {"radius": 0.1, "expert": True}),
        (lch.InputError, "method `at", {"cotangent": "ones"}),
        (lch.InputError, "not finite|finite", {"cotangent": torch.tensor([1.0, float("inf")])}),
        (lch.InputError, "zeros", {"cotangent": torch.zeros(4)}),
        (lch.InputError, r"\(d_out,\)", {"cotangent": torch.ones(2, 2)}),
        (lch.InputError, "method `at", {"cotangent": Random}),
        (lch.InputError, "n_samples=2.5", {"radius": 0.1, "n_samples": 2.5}),
        (lch.InputError, "radius='a'", {"radius": "a"}),
        (lch.InputError, "generator=3", {"radius": 0.1, "generator": 3}),
        (lch.InputError, "compute_dtype='float32'", {"compute_dtype": "float32"}),
        (lch.InputError, "label=None", {"label": None}),
        (
            lch.InputError,
            "through everything downstream",
            {"kind": "block", "linearization": "detached", "cotangent": logit_difference(3, 4)},
        ),
        (lch.InputError, "twice", {"kind": "head", "index": [1, 1]}),
    ],
)
def test_sites_that_mean_nothing_are_refused(error: Any, match: str, kw: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        Site(**kw)


@pytest.mark.usefixtures("as_users_run")
def test_sites_that_do_not_fit_a_model_are_refused(gpt2: Any) -> None:
    before = set(gpt2.hook_dict)
    for error, match, site in [
        (lch.SiteError, "ends with block 0, before block 2", Site("span", (2, 0))),
        (lch.SiteError, r"\[5\]", Site("span", (1, 5))),
        (lch.SiteError, "neurons 0 to 47", Site("neuron", 1, 48)),
        (lch.SiteError, "heads 0 to 3", Site("head", 1, 4)),
        (lch.InputError, r"shape \(32,\)", Site("block", cotangent=torch.ones(50))),
        (lch.InputError, r"shape \(50,\)", Site("model", cotangent=torch.ones(32))),
        (lch.InputError, r"shape \(1,\)", Site("neuron", 1, 3, cotangent=torch.ones(32))),
        (lch.InputError, "residual stream", Site("model", cotangent=Logit(3))),
        (lch.InputError, "outside 0 to 49", Site("mlp", cotangent=Logit(50))),
        (lch.InputError, "differentiable", Site("mlp", cotangent=Metric(lambda x: x.argmax()))),
        (lch.InputError, r"\(1, 3\)", Site("mlp", cotangent=Metric(lambda x: x.sum(-1)))),
        (lch.NonFiniteError, "metric", Site("mlp", cotangent=Metric(lambda x: (x / 0).sum()))),
        (lch.SiteError, "'decoder_blocks' is none", Site("mlp", stack="decoder_blocks")),
    ]:
        with pytest.raises(error, match=match):
            lch.attach(gpt2, site=site)
        assert set(gpt2.hook_dict) == before
        assert torch.is_grad_enabled()
    with pytest.raises(lch.AttachError, match="label"):
        lch.attach(gpt2, site=[Site("attn"), Site("attn", cotangent=Random(1))])
    with pytest.raises(lch.InputError, match="beside a Site"):
        lch.attach(gpt2, layers=1, site=Site("attn"))
    with pytest.raises(lch.InputError, match="names no component"):
        lch.attach(gpt2, site=[])
    with pytest.raises(lch.SiteError, match=r"position 6 .* 6 tokens"):
        read(gpt2, Site("block", 1, output_positions=6), ids=IDS)
    assert set(gpt2.hook_dict) == before


def test_centered_weights_make_a_block_read_nothing_and_are_refused() -> None:
    model = models.bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    refused = [
        *(Site("attn"), Site("head", index=1), Site("block"), Site("span", (0, 2)), Site("model")),
        *(Site("attn", radius=0.1, n_samples=2), Site("block", radius=0.1, n_samples=2)),
    ]
    for site in refused:
        with pytest.raises(lch.VanishingCentroidError, match="another cotangent"):
            lch.attach(model, site=site)
    with lch.attach(model, site=Site("block", cotangent=Random(0))):
        pass


def test_an_mlp_that_is_differentiated_has_no_compute_dtype() -> None:
    from tests import families

    site = Site("mlp", compute_dtype=F64)
    with pytest.raises(lch.InputError, match="differentiated in the model's dtype"):
        lch.attach(families.bridge("mixtral"), site=site)


def test_a_logit_less_itself_is_refused() -> None:
    for make in (Logit, logit_difference):
        with pytest.raises(lch.InputError, match="both 3"):
            make(3, 3)


@pytest.mark.usefixtures("as_users_run")
def test_cotangents_of_other_types_are_refused() -> None:
    for make, match in (
        (lambda: Logit("a"), "integers"),  # type: ignore[arg-type]
        (lambda: Metric(3), "function of the logits"),  # type: ignore[arg-type]
        (lambda: Random("x"), "must be an integer"),  # type: ignore[arg-type]
    ):
        with pytest.raises(lch.InputError, match=match):
            make()


def test_non_finite_centroids_name_hook_layer_and_number() -> None:
    model = models.bridge("gpt2")
    edit = ("blocks.1.hook_in", lambda x, hook: x * float("inf"))
    for kind in ("mlp", "block"):
        with lch.attach(model, site=kind) as handle, torch.no_grad(), model.hooks([edit]):
            match = rf"{handle.hook_names[1]} came out with 384 of 384 .* layer 1"
            with pytest.raises(lch.NonFiniteError, match=match):
                model.run_with_cache(IDS, names_filter=handle.hook_names)
            assert not torch.is_grad_enabled()
