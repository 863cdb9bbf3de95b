"""What a GPU computes is what the processor computes. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lch_plugin as lch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")

TEXT = "I climbed up the pear tree and picked a pear."
SITES = ("mlp", "attn", "block", lch.Site("span", (0, 3)))


def centroids(device: str, dtype: torch.dtype, site: str | lch.Site = "mlp") -> list[Tensor]:
    model = lch.load_demo_model(device, dtype)
    with lch.attach(model, site=site) as handle, torch.no_grad():
        _, cache = model.run_with_cache(TEXT, names_filter=handle.hook_names)
    return [cache[name].cpu().double() for name in handle.hook_names]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_every_site_is_that_of_the_processor(site: str | lch.Site) -> None:
    pairs = zip(
        centroids("cuda", torch.float64, site), centroids("cpu", torch.float64, site), strict=True
    )
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_lower_precision_is_off_by_its_rounding(dtype: torch.dtype, error: float) -> None:
    wanted = centroids("cpu", torch.float64)
    for found, exact in zip(centroids("cuda", dtype), wanted, strict=True):
        assert float((found - exact).norm() / exact.norm()) < error


@pytest.mark.usefixtures("as_users_run")  # The compiler cannot trace run-time type checks.
def test_compiled_mlps_give_the_same_centroids() -> None:
    model = lch.load_demo_model("cuda")
    with lch.attach(model) as handle, torch.no_grad():
        wanted = model.run_with_cache(TEXT, names_filter=handle.hook_names)[1]
        for block in model.blocks:
            block.original_component.mlp.compile()
        found = model.run_with_cache(TEXT, names_filter=handle.hook_names)[1]
        for name in handle.hook_names:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
