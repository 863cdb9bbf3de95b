"""How far the affine expert at x describes a component around x (arXiv 2604.11962).

Published: GPT-2 Large and DINOv2-B, attention and MLP, steps of 1e-4 to 1e-2 of the input's norm;
a figure only.

    python examples/paper/taylor_error.py --out taylor_error            # published: GPT-2 Large
    python examples/paper/taylor_error.py --model facebook/dinov2-base --out taylor_error_dino
    python examples/paper/taylor_error.py --small --out taylor_error    # both embedded models

The error is ``|f(x+d) - f(x) - J d| / |f(x+d) - f(x)|``, d a random direction that is as long, at
each token, as a step times that token's input; norms are over all tokens. For a smooth component
it falls with the step itself: a slope of 1 in the logarithms. All is in float64, so that rounding
does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from circuit_discovery import PROMPT
from common import EMBEDDED, parse, parser, save
from datasets import load_dataset
from scipy.stats import linregress
from torch import Tensor

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR, digits
from lch_plugin.figures import ACTIVATIONS, CENTROIDS, new_figure

STEPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
KINDS = {"attn": "attention", "attention": "attention", "self_attn": "attention", "mlp": "mlp"}
COLOURS = {"attention": ACTIVATIONS, "mlp": CENTROIDS}
N_DIRECTIONS = 8


def components(
    model: Any, inputs: dict[str, Tensor]
) -> Iterator[tuple[str, str, Callable, Tensor]]:
    """Kind, name, function and input of each attention and MLP, as the model calls it."""
    seen: dict[str, tuple[Any, Any]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update({name: (args, kwargs)}), with_kwargs=True
        )
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in KINDS
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    for name, (args, kwargs) in seen.items():
        x = args[0] if args else kwargs["hidden_states"]
        rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values")}

        fn = partial(called, model.get_submodule(name), rest)
        yield KINDS[name.rpartition(".")[2]], name, fn, x.detach()


def called(module: Any, kwargs: dict[str, Any], x: Tensor) -> Tensor:
    y = module(x, **kwargs)
    return y[0] if isinstance(y, tuple) else y


def errors(fn: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> list[float]:
    """The mean of the relative error over directions, at each step."""
    found = torch.zeros(len(STEPS))
    for _ in range(N_DIRECTIONS):
        d = torch.randn(x.shape, dtype=x.dtype, generator=generator, device=x.device)
        d *= x.norm(dim=-1, keepdim=True) / d.norm(dim=-1, keepdim=True)
        y, slope = torch.func.jvp(fn, (x,), (d,))
        for i, step in enumerate(STEPS):
            move = fn(x + step * d) - y
            found[i] += float((move - step * slope).norm() / move.norm())
    return (found / N_DIRECTIONS).tolist()


def main() -> None:
    args = parse(parser(__doc__, "gpt2-large"))
    names = (DEMO_MODEL_DIR, DEMO_VISION_MODEL_DIR) if args.model == EMBEDDED else (args.model,)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    results: dict[str, Any] = {}
    curves: dict[str, list[tuple[str, list[float]]]] = {}
    steps = torch.tensor(STEPS).log()
    for name in names:
        loaded = lch.load(name, dtype="float64", device=args.device)
        loaded.model.set_attn_implementation("eager")
        if loaded.model.main_input_name == "input_ids":
            inputs = loaded.processor(PROMPT, return_tensors="pt")
        elif name == DEMO_VISION_MODEL_DIR:
            inputs = {"pixel_values": digits("test")[0][:1].double()}
        else:  # One image of Imagenette.
            image = load_dataset("frgfm/imagenette", "320px", split="validation")[0]["image"]
            pixels = loaded.processor(images=image.convert("RGB"), return_tensors="pt")
            inputs = {"pixel_values": pixels["pixel_values"].double()}
        inputs = {key: value.to(args.device) for key, value in inputs.items()}
        of = type(loaded.model).__name__
        for kind, module, fn, x in components(loaded.model, inputs):
            with torch.no_grad():
                error = errors(fn, x, generator)
            slope = float(linregress(steps, torch.tensor(error).log()).slope)
            results[f"{of} {module}"] = {"error": error, "slope": slope}
            curves.setdefault(of, []).append((kind, error))
            print(f"{of:>16} {module:28} error at 1e-2 {error[-1]:.2e}  slope {slope:.3f}")

    figure, axes = new_figure(4.4 * len(curves), 3.6, columns=len(curves))
    for (of, lines), axis in zip(curves.items(), axes, strict=True):
        for kind, error in lines:
            axis.loglog(STEPS, error, "o-", color=COLOURS[kind], alpha=0.7)
        for kind, colour in COLOURS.items():
            axis.plot([], [], "o-", color=colour, label=kind)
        axis.set(title=of, xlabel="step / norm of the input", ylabel="relative error")
        axis.legend(frameon=False)
    save(args, results, figure, steps=STEPS, n_directions=N_DIRECTIONS, dtype="float64")


if __name__ == "__main__":
    main()
