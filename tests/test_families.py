"""Every family TransformerBridge boots: which sites have a centroid, and that it is the right one.

The truth is torch's own: a plain forward pass with gradients on, tensors kept at TransformerLens'
hook points, and `torch.autograd.grad` between them. None of this package's code computes it.

`python -m tests.test_families` writes `docs/reference/families.md`, with each TransformerLens its
own table; with names of families after it, it prints what these have.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch
from tests import families
from tests.slow import all_but
from tests.toolkits import HAS_HOOKED

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "families.md"
HELD = "detached head"
KINDS = ("mlp", "neuron", "attn", "head", HELD, "block", "span", "model")
COLUMNS = (*KINDS, "detached block")
STACKS = ("blocks", "encoder_blocks", "decoder_blocks")
NEURON, HEAD = 3, 1
EXACT, ROUNDED = 1e-10, 1e-4

# Whose experts add one to what their gates multiply, so that they are not linear without biases.
CONSTANT_INSIDE = frozenset({"gpt_oss"})

# Short reasons for refusals, by what their messages say.
REASONS = {
    r"no `blocks`": "no blocks",
    r"no `embed`": "no token embedding",
    r"has two inputs": "two inputs",
    r"has no attention": "no attention",
    r"mlp does not exist": "no MLP",
    r"a \w*MoE\w* where a plain or gated MLP": "mixture of experts",
    r"cannot be read as a plain or gated MLP|other than an activation": "no plain or gated MLP",
    r"keeps its activation function under none": "activation not found",
    r"heads cannot be read": "heads not readable",
    r"the closed form and autograd": "closed form does not hold",
    r"without passing its pattern": "pattern not hooked",
    r"is not affine|no detached linearisation": "not affine",
    r"did not fire": "does not fire",
}


#: Run by `make test`; the others by `make test-slow`.
COMMON = (
    *("bert", "bloom", "cohere", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "gpt2"),
    *("gpt_neox", "gpt_oss", "gptj", "llama", "mamba", "mistral", "mixtral", "olmo2", "opt"),
    *("phi3", "qwen2", "qwen3", "t5gemma", "vit"),
)


# ---------------------------------------------------------------- the truth


@dataclass(eq=False)
class Component:
    """One component of one model, by the hook points around it.

    Attributes:
        name: of the centroid's hook point.
        kind: as of a `lch_plugin.Site`.
        entry: hook point of what it reads.
        exit: hook point of what it writes; of a head, where the values of all heads pass; None of
            the whole model.
        part: from the tensor at the exit to what the component writes.
    """

    name: str
    kind: str
    entry: HookPoint
    exit: HookPoint | None
    part: Any = None


@dataclass
class Truth:
    x: Tensor
    y: Tensor
    mu: Tensor | None


def components(model: TransformerBridge) -> Iterator[Component]:
    """All that could have a centroid."""
    for stack in STACKS:
        blocks = getattr(model, stack, ())
        for layer, block in enumerate(blocks):
            path = f"{stack}.{layer}"
            yield Component(f"{path}.hook_centroid", "block", block.hook_in, block.hook_out)
            yield from _mlp(block, path)
            yield from _attention(model, block, path)
        if blocks:
            ends = blocks[0].hook_in, blocks[-1].hook_out
            yield Component(f"{stack}.{len(blocks) - 1}.hook_centroid_from_0", "span", *ends)
    embed = getattr(model, "embed", None)
    if embed is not None:
        yield Component("hook_centroid", "model", embed.hook_out, None)


def _mlp(block: nn.Module, path: str) -> Iterator[Component]:
    mlp: Any = block._modules.get("mlp")
    if mlp is None:
        return
    first, last = (mlp, mlp) if mlp.name is not None else (getattr(mlp, "in"), mlp.out)
    yield Component(f"{path}.mlp.hook_centroid", "mlp", first.hook_in, last.hook_out)
    if hasattr(mlp, "out"):
        name = f"{path}.mlp.hook_centroid_neuron_{NEURON}"
        part = lambda activations: activations[..., NEURON, None]  # noqa: E731
        yield Component(name, "neuron", first.hook_in, mlp.out.hook_in, part)


def _attention(model: TransformerBridge, block: nn.Module, path: str) -> Iterator[Component]:
    for attribute in ("attn", "self_attn"):
        attn: Any = block._modules.get(attribute)
        if attn is None or attn.original_component is None:
            continue
        name = f"{path}.{attribute}.hook_centroid"
        yield Component(name, "attn", attn.hook_in, attn.hook_out)
        if hasattr(attn, "o"):

            def written(z: Tensor, attn: Any = attn) -> Tensor:
                z = z.flatten(2)
                kept = torch.zeros_like(z)
                d_head = z.shape[-1] // model.cfg.n_heads
                kept[..., HEAD * d_head : (HEAD + 1) * d_head] = 1
                o = attn.o.original_component
                return o(z * kept) - o(torch.zeros_like(z))

            ends = attn.hook_in, attn.o.hook_in, written
            yield Component(f"{name}_head_{HEAD}", "head", *ends)
            yield Component(f"{name}_head_{HEAD}_held", HELD, *ends)


def truths(model: TransformerBridge, inputs: dict[str, Any]) -> dict[str, Truth]:
    """By name of the centroid's hook point, what it has to show."""
    everything = list(components(model))
    held = [c for c in everything if c.kind == HELD]
    found = _gradients(model, inputs, [c for c in everything if c not in held])
    with _pattern_fixed(model):
        return found | _gradients(model, inputs, held)


def _gradients(
    model: TransformerBridge, inputs: dict[str, Any], wanted: list[Component]
) -> dict[str, Truth]:
    seen: dict[nn.Module, Tensor] = {}
    points = {p for c in wanted for p in (c.entry, c.exit) if p is not None}
    hooks = [
        point.register_forward_hook(lambda point, _, output: seen.update({point: output}))
        for point in points
    ]
    for point in points:  # TransformerLens 4 passes some only if it knows of a hook there.
        point.add_hook(lambda value, hook: None)
    logits = model(**inputs)
    for hook in hooks:
        hook.remove()
    for point in points:
        point.remove_hooks()
    found = {}
    for c in wanted:
        x, y = seen.get(c.entry), logits if c.exit is None else seen.get(c.exit)
        if x is None or y is None:
            continue
        y = y if c.part is None else c.part(y)
        (mu,) = torch.autograd.grad(
            y, x, cotangent(y.shape[-1]).to(y).expand_as(y), retain_graph=True, allow_unused=True
        )
        found[c.name] = Truth(x.detach(), y.detach(), mu)
    return found


@contextmanager
def _pattern_fixed(model: TransformerBridge) -> Iterator[None]:
    """Gradients take attention patterns for constants."""
    softmax = F.softmax
    fixed = lambda *args, **kwargs: softmax(*args, **kwargs).detach()  # noqa: E731
    with mock.patch.object(F, "softmax", fixed), mock.patch.object(torch, "softmax", fixed):
        yield


def cotangent(d_out: int) -> Tensor:
    return (
        torch.linspace(-1, 2, d_out, dtype=torch.float64) if d_out > 1 else torch.ones(1).double()
    )


# ---------------------------------------------------------------- one family


def cell(methods: list[str], refusals: list[str]) -> str:
    """What the table says of one kind of site, given what became of it block by block."""
    parts = [", ".join(sorted(set(methods), key=("closed form", "VJP", "exact").index))]
    for short in dict.fromkeys(refusals):
        count = f"{refusals.count(short)} of {len(methods) + len(refusals)} "
        parts.append(f"{count if methods else ''}refused: {short}")
    return "; ".join(part for part in parts if part)


def attach(
    model: TransformerBridge, site: lch.Site, stack: ExitStack
) -> tuple[dict[str, str], list[str]]:
    """Attach a site, at each block by itself if not all have it: methods by name, and refusals."""
    try:
        return _attach(model, site, stack), []
    except lch.LCHError as error:
        refusal = reason(error)
    blocks = [(name, layer) for name in STACKS for layer in range(len(getattr(model, name, ())))]
    if site.kind in ("span", "model") or not blocks:
        return {}, [refusal]
    methods: dict[str, str] = {}
    refusals = []
    for name, layer in blocks:
        try:
            methods |= _attach(model, replace(site, stack=name, layers=layer), stack)
        except lch.LCHError as error:
            refusals.append(reason(error))
    return methods, refusals


def _attach(model: TransformerBridge, site: Any, stack: ExitStack) -> dict[str, str]:
    try:
        return stack.enter_context(lch.attach(model, site=site)).methods
    finally:
        assert torch.is_grad_enabled()


def reason(error: lch.LCHError) -> str:
    """The category of a refusal."""
    found = [short for pattern, short in REASONS.items() if re.search(pattern, str(error))]
    assert len(found) == 1, f"a refusal of no known category: {error}"
    return found[0]


def site(kind: Any, known: dict[str, Truth], names: dict[str, str], **options: Any) -> lch.Site:
    widths = {known[name].y.shape[-1] for name, of in names.items() if of == kind and name in known}
    width = widths.pop() if len(widths) == 1 else families.D_MODEL
    layers = (0, -1) if kind == "span" else None
    index = {"neuron": NEURON, "head": HEAD, HELD: HEAD}.get(kind)
    if kind == HELD:
        kind, options = "head", {"linearization": "detached", "label": "held"}
    return lch.Site(kind, layers, index, cotangent=cotangent(width), **options)


def row(name: str) -> dict[str, str]:
    """Check every kind of site on a family; returns how each is computed, or why not.

    Raises:
        AssertionError: a centroid is wrong, or attaching changed the model.
    """
    dtype = torch.float32 if name in families.FLOAT32_ONLY else torch.float64
    tolerance = ROUNDED if name in families.FLOAT32_INSIDE else EXACT
    model, inputs = families.bridge(name, dtype), families.inputs(name, dtype=dtype)
    plain, _ = run(model, inputs, [])  # A bridge sets up its own hooks in its first pass.
    before = snapshot(model)
    known = truths(model, inputs)
    names = {c.name: c.kind for c in components(model)}
    assert snapshot(model) == before
    refusals: dict[str, list[str]] = {}
    with ExitStack() as stack:
        sites = {kind: site(kind, known, names) for kind in KINDS}
        try:
            methods = _attach(model, [*sites.values()], stack)
        except lch.LCHError:
            found = {kind: attach(model, s, stack) for kind, s in sites.items()}
            methods = {name: method for m, _ in found.values() for name, method in m.items()}
            refusals = {kind: r for kind, (_, r) in found.items()}
        cells = {
            kind: cell([m for n, m in methods.items() if names[n] == kind], refusals.get(kind, []))
            for kind in KINDS
        }
        logits, shown = run(model, inputs, list(methods))
        assert torch.equal(logits, plain), "listening changed the logits"
    assert set(shown) == set(methods), "hook points that did not fire"
    for hook_name, mu in shown.items():
        truth = known[hook_name]
        assert truth.mu is not None, f"{hook_name}: shown, but there is no gradient path"
        assert mu.numel() == truth.mu.numel(), f"{hook_name}: {mu.shape} for {truth.mu.shape}"
        error = float((mu.reshape_as(truth.mu) - truth.mu).norm())
        norm = float(truth.mu.norm())  # Zero of a neuron that is off.
        assert error <= tolerance * norm, (
            f"{hook_name}: off by {error:.1e}, at a norm of {norm:.1e}"
        )
    assert snapshot(model) == before, "detaching left traces"
    with ExitStack() as stack:
        detached = site("block", known, names, linearization="detached")
        methods, reasons = attach(model, detached, stack)
        cells["detached block"] = cell(["exact"] * len(methods), reasons)
        assert torch.equal(run(model, inputs, list(methods))[0], plain)
        if name not in CONSTANT_INSIDE:
            _check_detached(model, inputs, list(methods), tolerance)
    assert snapshot(model) == before, "detaching left traces"
    return cells


def _check_detached(
    model: TransformerBridge, inputs: dict[str, Any], names: list[str], tolerance: float
) -> None:
    """Without biases a block is linear once its factors are fixed: ``v . y = mu . x``.

    What else it reads has to be zero as well: an encoder's output, values of an earlier
    block, the token embeddings.
    """
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data.zero_()
    _check_linear(model, inputs, [n for n in names if n.startswith("encoder")], tolerance)
    with _nothing_else_read(model):
        _check_linear(model, inputs, [n for n in names if not n.startswith("encoder")], tolerance)


@contextmanager
def _nothing_else_read(model: TransformerBridge) -> Iterator[None]:
    """What blocks read besides the residual stream before them is zero."""

    def no_output(_point: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def no_embeddings(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        zeros = torch.zeros_like(kwargs["original_hidden_states"])
        return args, {**kwargs, "original_hidden_states": zeros}

    hooks = [
        blocks[-1].hook_out.register_forward_hook(no_output)
        for blocks in [getattr(model, "encoder_blocks", ())]
        if blocks
    ]
    for block in getattr(model, "blocks", ()):
        for attn in (block._modules.get("attn"), block._modules.get("self_attn")):
            if getattr(getattr(attn, "original_component", None), "is_kv_shared_layer", False):
                hooks.append(attn.hook_out.register_forward_hook(no_output))
        shared = getattr(block.original_component, "shared_transformer", None)
        if shared is not None:
            hooks.append(shared.register_forward_pre_hook(no_embeddings, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_linear(
    model: TransformerBridge, inputs: dict[str, Any], names: list[str], tolerance: float
) -> None:
    ends = [name.replace("centroid", end) for name in names for end in ("in", "out")]
    _, cache = run(model, inputs, names + ends)
    for name in names:
        mu, x, y = (
            cache[name.replace("centroid", end)].double() for end in ("centroid", "in", "out")
        )
        vy = cotangent(y.shape[-1]) * y
        off = float((mu * x).sum() - vy.sum())
        assert abs(off) <= tolerance * float(vy.norm()), f"{name}: off by {off:.1e}"


def run(
    model: TransformerBridge, inputs: dict[str, Any], names: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        logits, cache = model.run_with_cache(**inputs, names_filter=names)
        assert not torch.is_grad_enabled()
    return logits, {name: cache[name] for name in names if name in cache}


def snapshot(model: TransformerBridge) -> dict[str, Any]:
    """Everything attaching could disturb, by identity where there is one."""
    return {
        "hook_dict": {k: id(v) for k, v in model.hook_dict.items()},
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "hooks": {
            name: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for name, m in model.named_modules()
        },
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
    }


# ---------------------------------------------------------------- the page

INTRODUCTION = """\
# Model families

What `lch.attach` computes on every family of models that TransformerBridge boots. Each was built
with small random weights and compared with torch's own gradients, in float64 where the family can.
`make docs-families` writes the tables, and `tests/test_families.py` fails where they do not hold.

Columns are the kinds of `lch_plugin.Site`, with the Jacobian but for two: `detached head` holds the
attention pattern, and `detached block` is `Site("block", linearization="detached")`.

- **closed form**: from values the model computes anyway, no backward pass
- **VJP**: by a vector-Jacobian product through the model's own modules
- **exact**: with its nonlinear factors fixed the block is affine, and the centroid is that map's
- **refused**: `attach` raises an `lch.LCHError`. Where only some blocks refuse, the cell counts
  them; `layers=` chooses the others

Families with two stacks were checked on both. Families with routed experts are differentiated
through the routing weights, with the choice of experts as it is.

Reasons for refusals:

- **activation not found**: the MLP calls its activation without keeping it as an attribute
- **closed form does not hold**: something else lies between weights and output, such as a gate or a
  norm on the values of attention, or quantised weights
- **does not fire**: the model does not pass the component's hook points
- **heads not readable**: no value and output weights by head, as in latent attention (MLA)
- **mixture of experts**: no one set of neurons
- **no attention**, **no MLP**, **no blocks**, **no token embedding**: TransformerLens shows none
- **not affine**: a function in the block has no detached form
- **no plain or gated MLP**: one whose parts or activation do not fit the closed forms
- **pattern not hooked**: the attention pattern passes no hook point
- **two inputs**: an encoder-decoder as a whole; use spans of its stacks
"""

NEWER_INTRODUCTION = """
## On TransformerLens 4

The same families were checked on version 4. Here are those of which it shows more or less; of all
others the table above is right.
"""

REFUSED_INTRODUCTION = """
## Not tried

Architectures TransformerLens knows that cannot be built, booted and run offline from a config.
"""


@dataclass
class Table:
    """What one version of TransformerLens has: version 4 only where it differs."""

    versions: str
    rows: dict[str, dict[str, str]]

    @classmethod
    def read(cls, text: str) -> Table:
        """That of a part of the page."""
        found = re.search(r"^Versions: .*$", text, re.MULTILINE)
        assert found is not None
        cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
        rows = {
            name: dict(zip(COLUMNS, values, strict=True))
            for name, *values in cells
            if len(values) == len(COLUMNS) and name not in ("family", "---")
        }
        return cls(found[0], rows)

    def lines(self) -> list[str]:
        rows = [(name, *row.values()) for name, row in self.rows.items()]
        return [self.versions, "", *_table(("family", *COLUMNS), rows)]


def page(older: Table, newer: Table) -> str:
    """`docs/reference/families.md`."""
    lines = [INTRODUCTION, *older.lines(), NEWER_INTRODUCTION, *newer.lines()]
    lines += [REFUSED_INTRODUCTION]
    lines += _table(("architecture", "reason"), list(families.REFUSED.items()))
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


def on_page() -> tuple[Table, Table]:
    """Of the older version of TransformerLens, and of the newer."""
    older, heading, newer = PAGE.read_text().partition(NEWER_INTRODUCTION.splitlines()[1])
    assert heading
    return Table.read(older), Table.read(newer)


def rows_on_page() -> dict[str, dict[str, str]]:
    """What the page says of the TransformerLens that is installed."""
    older, newer = on_page()
    return older.rows if HAS_HOOKED else older.rows | newer.rows


def write_page(rows: dict[str, dict[str, str]]) -> None:
    """Put what the installed TransformerLens has in its table."""
    packages = ("torch", "transformers", "transformer-lens")
    versions = f"Versions: {', '.join(f'{p} {version(p)}' for p in packages)}."
    older, newer = on_page()
    if HAS_HOOKED:
        there = older.rows | newer.rows
        older = Table(versions, rows)
    else:
        there, newer = rows, Table(versions, {})
    newer.rows = {name: row for name, row in there.items() if row != older.rows.get(name)}
    PAGE.write_text(page(older, newer))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", all_but(COMMON, families.FAMILIES))
def test_every_site_of_a_family_is_right_and_as_the_page_says(name: str) -> None:
    assert row(name) == rows_on_page().get(name)


def test_the_page_is_what_the_code_prints() -> None:
    older, newer = on_page()
    assert list(older.rows) == list(families.FAMILIES)
    assert all(older.rows[name] != row for name, row in newer.rows.items())
    # Other versions than the page's may give the same tables.
    assert PAGE.read_text() == page(older, newer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {name: row(name) for name in sys.argv[1:] or families.FAMILIES}
    if sys.argv[1:]:
        for name, cells in rows.items():
            print(name, *(f"{kind}: {found}" for kind, found in cells.items()), sep="\n  ")  # noqa: T201
    else:
        write_page(rows)
