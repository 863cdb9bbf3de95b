"""What ``lch lens`` does: the lens of one prompt as a page, a picture and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.errors import InputError
from lch_plugin.files import claimed, portable, write_directory
from lch_plugin.lens.asked import Prompt, as_prompt, indices, text, token_ids
from lch_plugin.lens.drawing import flow_map, heat_map
from lch_plugin.lens.flows import flows_of, layer_names
from lch_plugin.lens.passes import ResidualPass
from lch_plugin.lens.reading import reading_of
from lch_plugin.linear_maps import graphs_that_last
from lch_plugin.loading import LoadedModel
from lch_plugin.report import write_report
from lch_plugin.sites import Linearization


def run(
    loaded: LoadedModel,
    prompt: str,
    out: str | Path,
    *,
    tokens: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    n_targets: int = 4,
    k: int = 5,
    linearization: Linearization = "detached",
) -> None:
    """Read a prompt at every layer and position, and write a report.

    Numbers in the report are less their mean over the vocabulary, which no probability depends on.
    A share is what a cell adds to a token's logit, over all that the cells of its layer and the
    rest add to it and take from it, in magnitude.

    Args:
        loaded: a language model with its tokenizer.
        prompt: text.
        out: directory to make.
        tokens: texts of single tokens to read besides the likeliest.
        layers: as `lch_plugin.lens.read`.
        n_targets: how many of the last positions can be chosen as the target.
        k: tokens listed for each cell, and the likeliest that are read.
        linearization: as `lch_plugin.lens.read`.

    Raises:
        InputError, SiteError: as `lch_plugin.lens.read`.
        OutputError: ``out`` holds other content or cannot be written.
    """
    if n_targets < 1 or k < 1:
        raise InputError(f"n_targets={n_targets} and k={k} must be at least 1.")
    model = loaded.bridge()
    given = as_prompt(model, prompt)
    named = token_ids(model, list(tokens)) if tokens else []
    n_layers = model.cfg.n_layers + 1
    chosen = tuple(range(n_layers)) if layers is None else indices(layers, n_layers, "layers")
    with claimed(out) as out:
        frozen = ResidualPass(model, given.ids, linearization)
        targets = list(range(max(0, frozen.n_pos - n_targets), frozen.n_pos))
        read = _read_targets(model, frozen, given, targets, chosen, named, k)
        _add_flows(model, frozen, read)
        last = read[-1]
        title = (
            f"{last['tokens'][0]!r} after {prompt if len(prompt) < 60 else '...' + prompt[-57:]!r}"
        )
        words, writers = given.texts(model), layer_names(frozen)
        results = {
            "run": {
                "model": portable(loaded.name),
                "revision": loaded.revision,
                "dtype": str(loaded.model.dtype),
                "site": "residual stream before each block, and after the last",
                "cotangent": "the logits of the target, less their mean",
                "linearization": linearization,
                "versions": {
                    name: version(name)
                    for name in ("lch-plugin", "torch", "transformers", "transformer-lens")
                },
            },
            "prompt": prompt,
            "words": list(words),
            "layers": list(chosen),
            "writers": list(writers),
            "targets": read,
            "texts": {i: text(model, i) for i in sorted(_listed(read))},
        }
        parts, rest = torch.tensor(last["parts"])[..., 0], torch.tensor(last["rest"])[..., 0]
        flow, biases = torch.tensor(last["flow"])[..., 0], torch.tensor(last["biases"])[..., 0]
        figures = {
            "lens": heat_map(parts, rest, chosen, words, title),
            "flow": flow_map(flow, biases, writers, words, title),
        }
        write_directory(out, lambda it: write_report(it, "lens.html", results, figures))


@without_autocast()
@graphs_that_last()
def _read_targets(
    model: LensModel,
    frozen: ResidualPass,
    prompt: Prompt,
    targets: Sequence[int],
    layers: Sequence[int],
    named: Sequence[int],
    k: int,
) -> list[dict[str, Any]]:
    """Of each target, its tokens, what each cell adds to them, and the cell's own first tokens."""
    span = frozen.span(targets)
    z = span.y.detach().float()
    z = z - z.mean(-1, keepdim=True)
    likeliest = z.topk(min(k, z.shape[-1])).indices.tolist()
    wanted = [list(dict.fromkeys([*named, *row])) for row in likeliest]
    found: list[dict[str, Any]] = []
    for i, target in enumerate(targets):
        # Whether the parts add up is looked at with `read`'s own way to the offset.
        reading_of(model, frozen, prompt, target, wanted[i][:1], layers, [target])
        found.append(
            {
                "target": target,
                "token_ids": wanted[i],
                "tokens": [text(model, j) for j in wanted[i]],
                "logits": _rounded(z[i, wanted[i]]),
                "parts": [],
                "rest": [],
                "top": [],
            }
        )
    everywhere = range(frozen.n_pos)
    for layer in track(layers, "layers", transient=True):
        cells = span.push(frozen.cells(layer, everywhere), layer).float()
        cells = cells - cells.mean(-1, keepdim=True)
        for i, of_target in enumerate(found):
            parts = cells[:, i]
            rest = z[i] - parts.sum(0)
            first = parts.topk(min(k, z.shape[-1]))
            shares = first.values / (parts.abs().sum(0) + rest.abs())[first.indices]
            of_target["parts"].append(_rounded(parts[:, wanted[i]]))
            of_target["rest"].append(_rounded(rest[wanted[i]]))
            of_target["top"].append(
                {
                    "ids": first.indices.tolist(),
                    "adds": _rounded(first.values),
                    "shares": _rounded(shares),
                }
            )
    return found


def _add_flows(model: LensModel, frozen: ResidualPass, read: Sequence[dict[str, Any]]) -> None:
    """To each target, which prompt tokens its logits come from, through which layers."""
    pairs = [(of["target"], i) for of in read for i in of["token_ids"]]
    cotangents = torch.full((len(pairs), frozen.logits.shape[-1]), -1 / frozen.logits.shape[-1])
    cotangents[range(len(pairs)), [i for _, i in pairs]] += 1
    cotangents = cotangents.to(frozen.logits.device)
    parts, biases = flows_of(model, frozen, [target for target, _ in pairs], cotangents)
    sizes = [len(of["token_ids"]) for of in read]
    for of, some, rest in zip(read, parts.split(sizes, -1), biases.split(sizes, -1), strict=True):
        of["flow"], of["biases"] = _rounded(some), _rounded(rest)


def _listed(read: Sequence[dict[str, Any]]) -> set[int]:
    """Ids of all tokens that are the first of some cell."""
    return {i for of in read for layer in of["top"] for of_cell in layer["ids"] for i in of_cell}


def _rounded(values: torch.Tensor) -> Any:
    """As lists of numbers with the digits that a page shows."""
    return values.double().nan_to_num(0, 0, 0).mul(1e4).round().div(1e4).tolist()
