"""What each adapter can do, tried on the embedded model and held to torch's own gradients.

Every row is an `Asked`, every adapter a class that answers it or raises. Where a toolkit learns to
do more, its class here says how it is asked, and ``python -m tests.docs`` writes the tables anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from nnsight import NNsight
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import dec, inc
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin import sites
from lch_plugin.cotangents import Logit, Metric, Random
from lch_plugin.demo import DEMO_MODEL_DIR
from tests.docs import table

F64 = torch.float64
PROMPTS = ["I climbed up the apple tree and picked", "Tom went to the"]
LAYER, LAST = 2, 3
INDEX = 1  # Of the head and of the neuron.
ANSWER, FOIL = 300, 200
TOLERANCE = 1e-8
NO = "–"


class Cannot(Exception):
    """The adapter has no way to be asked this."""


@dataclass(frozen=True)
class Asked:
    """A centroid, and what is special about it."""

    kind: str = "mlp"
    cotangent: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    layer: int = LAYER
    #: ``"input"`` or ``"within"``: twice what the component reads, or what its attention writes.
    edit: str | None = None
    #: ``"left"`` or ``"right"``: a second, shorter prompt beside the first.
    padding: str | None = None
    inference: bool = False


@dataclass
class Found:
    """What an adapter gave: the centroid, and values beside it."""

    centroid: Tensor
    beside: dict[str, Tensor] = field(default_factory=dict)


# ---------------------------------------------------------------- the model, and the truth


@cache
def loaded() -> Any:
    return lch.load(DEMO_MODEL_DIR, dtype=F64)


def ids(padding: str | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and mask, of the first prompt alone or of both."""
    rows = [loaded().processor(p)["input_ids"] for p in PROMPTS[: 2 if padding else 1]]
    width = max(map(len, rows))
    blank = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    if padding == "left":
        pairs = [(b + r, b + o) for b, r, o in zip(blank, rows, ones, strict=True)]
    else:
        pairs = [(r + b, o + b) for b, r, o in zip(blank, rows, ones, strict=True)]
    tokens, mask = zip(*pairs, strict=True)
    return torch.tensor(tokens), torch.tensor(mask)


def truth(asked: Asked) -> Tensor:
    """The centroid by torch alone, through HuggingFace's own modules; of one prompt."""
    model, (tokens, _) = loaded().model, ids()
    read: dict[str, Tensor] = {}
    block = model.transformer.h[asked.layer]
    modules = {"mlp": block.mlp, "neuron": block.mlp, "attn": block.attn, "head": block.attn}
    first = model.transformer.h[1] if asked.kind == "span" else modules.get(asked.kind, block)
    last = modules.get(asked.kind, block)

    def reads(_module: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        x = (2 * x if asked.edit == "input" else x).detach().requires_grad_()
        read["x"] = x
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x}

    def writes(_module: Any, _args: Any, output: Any) -> None:
        read["y"] = output[0] if isinstance(output, tuple) else output

    def inner(_module: Any, args: Any) -> None:
        read["inner"] = args[0]

    def twice(_module: Any, _args: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:])

    with ExitStack() as hooks, torch.enable_grad():
        if asked.kind != "model":
            hooks.enter_context(_held(first.register_forward_pre_hook(reads, with_kwargs=True)))
            hooks.enter_context(_held(last.register_forward_hook(writes)))
        projection = (block.attn if asked.kind == "head" else block.mlp).c_proj
        hooks.enter_context(_held(projection.register_forward_pre_hook(inner)))
        if asked.edit == "within":
            hooks.enter_context(_held(block.attn.register_forward_hook(twice)))
        if asked.kind == "model":
            read["x"] = model.get_input_embeddings()(tokens).detach().requires_grad_()
            read["y"] = logits = model(inputs_embeds=read["x"]).logits
        else:
            logits = model(tokens).logits
        y = read["y"]
        if asked.kind == "neuron":
            y = read["inner"][..., [INDEX]]
        elif asked.kind == "head":
            d_head = model.config.hidden_size // model.config.num_attention_heads
            part = slice(INDEX * d_head, (INDEX + 1) * d_head)
            y = read["inner"][..., part] @ block.attn.c_proj.weight[part]
        v = asked.cotangent
        if isinstance(v, Metric):
            (weight,) = torch.autograd.grad(v.fn(logits).sum(), y, retain_graph=True)
        elif isinstance(v, Logit):  # In the last block the direct path is the only one.
            difference = logits[:, -1, ANSWER] - logits[:, -1, FOIL]
            (weight,) = torch.autograd.grad(difference.sum(), y, retain_graph=True)
        elif v is None:
            weight = torch.ones_like(y)
        else:
            weight = (v if isinstance(v, Tensor) else v.at(y)).expand_as(y)
        positions = asked.options.get("output_positions")
        if positions is not None:
            chosen = torch.zeros_like(weight)
            chosen[:, positions] = weight[:, positions]
            weight = chosen
        (mu,) = torch.autograd.grad(y, read["x"], weight)
    return mu


@contextmanager
def _held(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


# ---------------------------------------------------------------- the adapters


class TransformerLens:
    """`lch.attach`."""

    name = "TransformerLens"

    def __init__(self) -> None:
        self.model = lch.load(DEMO_MODEL_DIR, dtype=F64).bridge()

    def centroid(self, asked: Asked) -> Found:
        layers: Any = {"span": (1, asked.layer), "model": None}.get(asked.kind, asked.layer)
        index = INDEX if asked.kind in ("head", "neuron") else None
        site = lch.Site(
            asked.kind,  # type: ignore[arg-type]
            layers=layers,
            index=index,
            cotangent=asked.cotangent,
            **asked.options,
        )
        tokens, mask = ids(asked.padding)
        edits: list[Any] = []
        if asked.edit == "input":
            edits = [(f"blocks.{asked.layer}.mlp.hook_in", lambda x, hook: 2 * x)]
        elif asked.edit == "within":
            edits = [(f"blocks.{asked.layer}.attn.hook_out", lambda x, hook: 2 * x)]
        with lch.attach(self.model, site=site) as handle, self.model.hooks(edits):
            _, values = self.model.run_with_cache(
                tokens, attention_mask=mask, names_filter=handle.hook_names
            )
            (name,) = handle.centroid_names
            beside = {n.removeprefix(f"{name}_"): values[n] for n in handle.hook_names if n != name}
            self.methods = handle.methods[name]
            return Found(values[name], beside)

    def method(self, asked: Asked) -> str:
        return self.methods

    def any_module(self, module: nn.Module, x: Tensor) -> Tensor:
        lch.attach(module)  # type: ignore[arg-type]
        raise Cannot

    def remote(self) -> Tensor:
        raise Cannot


class HuggingFace:
    """`lch.huggingface.attach`."""

    name = "HuggingFace"

    def centroid(self, asked: Asked) -> Found:
        model, (tokens, mask) = loaded().model, ids(asked.padding)
        h = "transformer.h"
        name = {
            "mlp": f"{h}.{asked.layer}.mlp",
            "attn": f"{h}.{asked.layer}.attn",
            "block": f"{h}.{asked.layer}",
            "span": f"{h}.1:{h}.{asked.layer}",
            "model": "",
        }.get(asked.kind)
        if name is None:
            raise Cannot
        inputs = {"input_ids": tokens}
        if asked.kind == "model":
            inputs = {"inputs_embeds": model.get_input_embeddings()(tokens).detach()}
        block = model.transformer.h[asked.layer]
        with ExitStack() as stack:
            if asked.edit == "input":
                stack.enter_context(
                    _held(block.mlp.register_forward_pre_hook(lambda _, args: (2 * args[0],)))
                )
            elif asked.edit == "within":
                stack.enter_context(
                    _held(block.attn.register_forward_hook(lambda _, __, y: (2 * y[0], *y[1:])))
                )
            handle = stack.enter_context(
                lch.huggingface.attach(model, [name], cotangent=asked.cotangent, **asked.options)
            )
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            model(**inputs, attention_mask=mask, position_ids=positions)
            self.methods = handle.methods[name]
            return Found(handle.cache[name], self._beside(handle, name))

    def method(self, asked: Asked) -> str:
        return self.methods

    def _beside(self, handle: Any, name: str) -> dict[str, Tensor]:
        """Offsets, variances and so on, where there are any."""
        values = {n.removeprefix(f"{name}_"): handle.cache[n] for n in handle.hook_names}
        return {ending: value for ending, value in values.items() if ending != name}

    def any_module(self, module: nn.Module, x: Tensor) -> Tensor:
        with lch.huggingface.attach(module, [""]) as handle:
            module(x)
        return handle.cache[""]

    def remote(self) -> Tensor:
        raise Cannot


class Keep(Backend):
    """What ``remote=True`` would send."""

    def __call__(self, tracer: Any) -> None:
        self.request = RequestModel.serialize(tracer)


class NNSight:
    """`lch.nnsight.centroid`."""

    name = "nnsight"

    def __init__(self) -> None:
        self.model = lch.load(DEMO_MODEL_DIR, dtype=F64).nnsight()

    def centroid(self, asked: Asked) -> Found:
        if asked.kind in ("head", "neuron", "model"):  # A trace names modules, and reads ids.
            raise Cannot
        tokens, mask = ids(asked.padding)
        centroid, v, options = lch.nnsight.centroid, asked.cotangent, asked.options
        block = self.model.transformer.h[asked.layer]
        span = self.model.transformer.h[1 : asked.layer + 1]
        envoy = {"mlp": block.mlp, "attn": block.attn, "block": block, "span": span}[asked.kind]
        late = isinstance(v, Logit | Metric)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        with torch.set_grad_enabled(late), self.model.trace(inputs):
            if asked.edit == "input":
                block.mlp.input = 2 * block.mlp.input
            if asked.edit == "within":
                block.attn.output[0][:] *= 2
            mu = centroid(envoy, v, **options).save()
        return Found(mu)

    def method(self, asked: Asked) -> str:
        """A closed form takes no gradient, once the module is known."""
        with mock.patch.object(torch.autograd, "grad", wraps=torch.autograd.grad) as grad:
            self.centroid(asked)
        return "VJP" if grad.called else "closed form"

    def any_module(self, module: nn.Module, x: Tensor) -> Tensor:
        traced = NNsight(nn.Sequential(module))
        centroid = lch.nnsight.centroid
        with traced.trace(x):
            mu = centroid(traced[0]).save()
        return mu  # noqa: RET504 (the trace gives it its value when it ends)

    def remote(self) -> Tensor:
        import nnsight

        nnsight.register("lch_plugin")
        model, keep, tokens = self.model, Keep(), ids()[0]
        centroid = lch.nnsight.centroid
        with model.trace(tokens, backend=keep):
            found = {"mu": centroid(model.transformer.h[2].mlp)}.save()  # type: ignore[attr-defined]
        tracer = RequestModel.deserialize(keep.request, model._remoteable_persistent_objects())
        inc()
        tracer.execute(tracer.info.code)
        found = tracer.info.frame.f_locals["found"]
        dec()
        return found["mu"]


ADAPTERS = (TransformerLens, NNSight, HuggingFace)


# ---------------------------------------------------------------- what is tried


def right(adapter: Any, asked: Asked) -> str:
    """How the centroid comes about, once it is what torch says."""
    with torch.inference_mode(asked.inference):
        found = adapter.centroid(asked)
    check(found.centroid, truth(asked))
    return str(adapter.method(asked))


def padded(adapter: Any, asked: Asked) -> str:
    """The second prompt has the centroids that it has alone, and padding has none."""
    found = adapter.centroid(asked).centroid
    mask = ids(asked.padding)[1].bool()
    assert not found[~mask].any()
    check(found[0], truth(Asked(asked.kind))[0])
    PROMPTS.reverse()
    try:
        check(found[1][mask[1]], truth(Asked(asked.kind))[0])
    finally:
        PROMPTS.reverse()
    return ""


def detached(adapter: Any, asked: Asked) -> str:
    """What the block's own modules give with gates, patterns and norm scales held."""
    held = adapter.centroid(asked).centroid
    free = adapter.centroid(Asked(asked.kind)).centroid
    assert (held - free).norm() > 1e-3 * free.norm()
    block, read = loaded().model.transformer.h[asked.layer], {}
    with _held(block.register_forward_pre_hook(lambda _, args: read.update(x=args[0]))):
        loaded().model(ids()[0])

    def fn(x: Tensor) -> Tensor:
        y = block(x)
        return y[0] if isinstance(y, tuple) else y

    check(held, lch.centroid(lch.detached(fn), read["x"].detach()))
    return ""


def with_expert(adapter: Any, asked: Asked) -> str:
    found = adapter.centroid(asked)
    check(found.centroid, truth(Asked(asked.kind)))
    if not {"offset", "radius", "alignment"} <= found.beside.keys():
        raise Cannot
    return ""


def local(adapter: Any, asked: Asked) -> str:
    """The mean over a tiny ball is the centroid, over a larger one it is not; both vary."""
    exact = truth(Asked(asked.kind))
    found = adapter.centroid(Asked(asked.kind, options={**asked.options, "radius": 1e-7}))
    check(found.centroid, exact, 1e-5)
    wide = adapter.centroid(asked)
    assert (wide.centroid - exact).norm() > 1e-3 * exact.norm()
    if "variance" not in wide.beside:
        raise Cannot
    return ""


def any_module(adapter: Any, asked: Asked) -> str:
    torch.manual_seed(0)
    module, x = nn.Conv2d(2, 3, 3).to(F64), torch.randn(1, 2, 5, 5, dtype=F64)
    with torch.no_grad():
        mu = adapter.any_module(module, x)
    with torch.enable_grad():
        x.requires_grad_()
        check(mu, torch.autograd.grad(module(x).sum(), x)[0])
    return ""


def remote(adapter: Any, asked: Asked) -> str:
    check(adapter.remote(), truth(Asked()))
    return ""


def check(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = (found - expected).norm() / expected.norm()
    if not error < tolerance:
        raise AssertionError(f"{error:.1e}")


def answer(adapter: Any, trial: Callable[[Any, Asked], str], asked: Asked) -> str:
    """``"yes"`` or how, or that the adapter refuses. Other numbers than torch's are an error."""
    try:
        return trial(adapter, asked) or "yes"
    except (Cannot, lch.LCHError, TypeError):
        return NO


class Largest:
    """A cotangent of one's own: the largest coordinate of the output."""

    name = "largest"

    def at(self, y: Tensor) -> Tensor:
        return nn.functional.one_hot(y.argmax(-1), y.shape[-1]).to(y)


def _difference(logits: Tensor) -> Tensor:
    return logits[:, -1, ANSWER] - logits[:, -1, FOIL]


KINDS = tuple(sites.KINDS)
METRIC = Metric(_difference, position=-1)


def yes(trial: Callable[[Any, Asked], str]) -> Callable[[Any, Asked], str]:
    return lambda adapter, asked: trial(adapter, asked) and "yes"


def rows() -> Iterator[tuple[str, Callable[[Any, Asked], str], Asked]]:
    d_model = loaded().model.config.hidden_size
    direction = torch.linspace(-1, 1, d_model, dtype=F64)
    yield "a cotangent as a tensor", yes(right), Asked(cotangent=direction)
    yield "`Random`", yes(right), Asked(cotangent=Random(0))
    yield "a cotangent of your own, with `at(y)`", yes(right), Asked(cotangent=Largest())
    logit = Logit(ANSWER, FOIL, position=-1)
    yield "`Logit`", yes(right), Asked("block", logit, layer=LAST)
    yield "`Metric`, of an MLP", yes(right), Asked(cotangent=METRIC)
    yield "`Metric`, of a block", yes(right), Asked("block", METRIC)
    yield "`output_positions`", yes(right), Asked("block", options={"output_positions": [-1]})
    held = {"linearization": "detached"}
    yield "the detached linearisation", detached, Asked("block", options=held)
    yield "an affine expert (`expert=True`)", with_expert, Asked("mlp", options={"expert": True})
    ball = {"radius": 1.0, "n_samples": 8}
    yield "a local centroid (`radius=`), with its variance", local, Asked(options=ball)
    yield "edits of what the component reads are seen", yes(right), Asked(edit="input")
    yield "edits within the component are seen", yes(right), Asked("block", edit="within")
    yield "padding on the left counts nowhere", padded, Asked("block", padding="left")
    yield "padding on the right counts nowhere", padded, Asked("block", padding="right")
    yield "closed forms under `torch.inference_mode()`", yes(right), Asked(inference=True)
    yield "any `nn.Module`, such as a convolution", any_module, Asked()
    yield "`remote=True`: the code travels with the request", remote, Asked()


def tables() -> str:
    with torch.no_grad():
        adapters = [adapter() for adapter in ADAPTERS]
        header = tuple(adapter.name for adapter in ADAPTERS)
        kinds = [(f"`{k}`", *(answer(a, right, Asked(k)) for a in adapters)) for k in KINDS]
        others = [
            (what, *(answer(a, trial, asked) for a in adapters)) for what, trial, asked in rows()
        ]
    return (
        f"{table(('component', *header), kinds)}\n\n"
        f"“{NO}” is a refusal, by an error that says why, or no way to ask.\n\n"
        f"{table(('what', *header), others)}"
    )
