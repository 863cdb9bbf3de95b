"""Centroids of every layer of a real model, by each adapter, beside autograd in float64.

    python examples/real_models/exactness.py MODEL --out exactness

MODEL is a name on the hub, a directory or a .gguf file. The oracle is HuggingFace's model in
float64: each component is called again as the model called it, and differentiated. The adapters
read the model in float32. Reported is the largest relative error of any layer,
``|mu - oracle| / |oracle|``, and what attaching and a pass of the prompt take.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lch_plugin as lch

PROMPT = "When Mary and John went to the store, John gave a bottle of milk to"
#: Sites, and what HuggingFace calls the component inside a block.
SITES = {"mlp": "mlp", "attn": "self_attn", "block": ""}


def oracle(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """``J^T 1`` of components, each called again as the model called it."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.update({name: (args, kwargs)}),
            with_kwargs=True,
        )
        for name in names
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, (args, kwargs) in calls.items():
        x = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        y = model.get_submodule(name)(*args, **kwargs)
        y = y[0] if isinstance(y, tuple) else y
        (found[name],) = torch.autograd.grad(y.sum(), x)
    return found


def by_bridge(source: str, tokens: Tensor, site: str) -> Iterator[Tensor]:
    model = lch.load(source, dtype="float32").bridge()
    with lch.attach(model, site=site) as handle:
        _, cache = model.run_with_cache(tokens, names_filter=handle.hook_names)
        yield from (cache[name] for name in handle.hook_names)


def by_huggingface(source: str, tokens: Tensor, names: list[str]) -> Iterator[Tensor]:
    model = lch.load(source, dtype="float32").model
    with lch.huggingface.attach(model, names) as handle, torch.no_grad():
        model(tokens)
        yield from (handle.cache[name] for name in names)


def largest_error(found: Iterator[Tensor], wanted: list[Tensor]) -> float:
    errors = [
        float((mu.double() - true).norm() / true.norm())
        for mu, true in zip(found, wanted, strict=True)
    ]
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    loaded = lch.load(args.model, dtype="float64")
    # As the bridge has it.
    loaded.model.set_attn_implementation("eager")
    tokens = loaded.processor(PROMPT, return_tensors="pt")["input_ids"]
    n_layers = loaded.model.config.num_hidden_layers
    rows = []
    for site, component in SITES.items():
        names = [f"model.layers.{i}.{component}".rstrip(".") for i in range(n_layers)]
        true = oracle(loaded.model, tokens, names)
        wanted = [true[name] for name in names]
        for adapter, read in (
            ("TransformerBridge", lambda s=site: by_bridge(args.model, tokens, s)),
            ("HuggingFace", lambda n=names: by_huggingface(args.model, tokens, n)),
        ):
            start = time.perf_counter()
            error = largest_error(read(), wanted)
            row = {"site": site, "adapter": adapter, "layers": n_layers, "error": error}
            rows.append({**row, "seconds": time.perf_counter() - start})
            print(json.dumps(rows[-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"model": args.model, "prompt": PROMPT, "lch_plugin": lch.__version__, "rows": rows}
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
