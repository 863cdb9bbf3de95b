"""SAELens' SAEs on centroids, and within MLPs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from tests import models
from tests.adapters.transformer_lens.common import BACKENDS, IDS, NAMES, cached, snapshot
from tests.toolkits import HAS_SAES, needs_saes

if HAS_SAES:
    from sae_lens import StandardSAE, StandardSAEConfig


def random_sae(name: str) -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=models.D_MODEL, d_sae=24))
    sae.cfg.metadata.hook_name = name
    nn.init.normal_(sae.W_enc, std=0.3)
    return sae


@needs_saes
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("SAETransformerBridge", "blocks.1.mlp.hook_in"),
        ("SAETransformerBridge", "blocks.1.mlp.in.hook_in"),
        ("SAETransformerBridge", "blocks.1.mlp.hook_out"),
        ("HookedSAETransformer", "blocks.1.mlp.hook_pre"),
    ],
)
def test_an_sae_within_the_mlp_is_named_and_not_the_mlp_blamed(backend: str, name: str) -> None:
    model = BACKENDS[backend]()
    model.add_sae(random_sae(name))
    with pytest.raises(lch.SiteError, match=r"SAE stands at .*reset_saes\(\)"):
        lch.attach(model)
    model.reset_saes()
    with lch.attach(model):
        cached(model)


@needs_saes
@pytest.mark.parametrize("backend", ["SAETransformerBridge", "HookedSAETransformer"])
def test_saes_attach_to_centroids_and_come_off_again(backend: str) -> None:
    model = BACKENDS[backend]()
    logits, _ = model.run_with_cache(IDS)
    before = snapshot(model)
    seen: list[Tensor] = []
    with lch.attach(model):
        mu = cached(model)[NAMES[1]]
        sae = random_sae(NAMES[1])
        for _ in range(2):
            out, cache = model.run_with_cache_with_saes(IDS, saes=[sae])
            codes = cache[NAMES[1] + ".hook_sae_acts_post"]
            torch.testing.assert_close(codes, sae.encode(mu))
            assert torch.equal(out, logits)
            # After an SAE came off, the hook point answers to its full name as before.
            model.run_with_hooks(IDS, fwd_hooks=[(NAMES[1], lambda v, hook: seen.append(v))])
        assert len(seen) == 2
        assert torch.equal(seen[1], mu)
        model.add_sae(sae)
    assert not model.acts_to_saes
    assert snapshot(model) == before
