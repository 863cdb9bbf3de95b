"""The lens on every family that TransformerBridge boots: parts that add up, or a refusal.

`make test-slow`: it takes minutes.
"""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from tests import families
from tests.test_families import rows_on_page

TOKENS = [3, 4, 5]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_parts_add_up_where_every_detached_block_is_exact(name: str) -> None:
    dtype = torch.float32 if name in families.FLOAT32_ONLY else torch.float64
    model, inputs = families.bridge(name, dtype), families.inputs(name, dtype=dtype)
    is_text = not inputs["input"].is_floating_point() and "decoder_input_ids" not in inputs
    ids = inputs["input"] if is_text else torch.tensor([[1, 2, 3]])
    if not is_text or rows_on_page()[name]["detached block"] != "exact":
        with pytest.raises(lch.LCHError):
            lch.lens.read(model, ids, tokens=TOKENS)
        return
    reading = lch.lens.read(model, ids, tokens=TOKENS)
    total = reading.logits.sum(1) + reading.offset
    tolerance = 1e-4 if name in families.FLOAT32_INSIDE or dtype == torch.float32 else 1e-10
    torch.testing.assert_close(
        total, reading.model_logits.expand_as(total), rtol=tolerance, atol=tolerance
    )
    # The same of what layers write of tokens and biases.
    flow = lch.lens.flow(model, ids, tokens=TOKENS)
    torch.testing.assert_close(
        flow.logits.sum((0, 1)) + flow.biases.sum(0),
        flow.model_logits,
        **{"rtol": tolerance, "atol": tolerance},
    )
    # And of a cell's list, which goes the other way.
    found = reading.top_cells([0], [2], 1)
    cell = lch.lens.read(model, ids, [0], [2], tokens=found.ids[0, 0].tolist()).logits[0, 0, 0]
    others = reading._span.push(reading._run.cells(0, [2]), 0)[0, 0].mean()
    torch.testing.assert_close(
        found.values[0, 0, 0].to(cell), cell - others.to(cell), rtol=tolerance, atol=tolerance
    )
