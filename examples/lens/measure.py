"""What every lens predicts, and what the model does, when a cell of the residual stream changes.

A cell is the residual stream that block ``l`` reads at position ``p``. It is replaced by what the
twin has there, or by the mean over all prompts and positions but the first, and the model runs on.
Measured is the change of the answer's logit at the last position, and of its difference from the
foil's. Each lens is asked the same:

- the exact lens, and the Jacobian of the prompt: ``row . delta``, the row of the token in the map
  from this very cell to the last position's logit
- the averaged lenses, the logit lens, the tuned lens: as they are read, ``norm(J x)`` unembedded,
  the changed cell less the cell. None of these knows positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from prompts import Pair
from torch import Tensor

import lch_plugin as lch

OF_PROMPT = {"exact": "detached", "Jacobian of the prompt": "jacobian"}
SHUFFLED = "shuffled "
Reader = Callable[[Tensor, int], Tensor]  # (n, d_model) of a layer -> (n, d_vocab)
_ROWS = 32  # Prompts at once in a forward pass.


@dataclass(frozen=True)
class Run:
    """A pair in the model: residual streams by layer, ``(pos, d_model)``, of both, and logits."""

    pair: Pair
    ids: Tensor
    tokens: tuple[int, int]
    streams: dict[int, Tensor]
    twin_streams: dict[int, Tensor]
    logits: Tensor
    twin_logits: Tensor


@torch.no_grad()
def run(model: Any, pair: Pair, layers: list[int]) -> Run:
    tokens = tuple(
        int(model.to_tokens(text, prepend_bos=False)[0, 0]) for text in (pair.answer, pair.foil)
    )
    ids, twin_ids = model.to_tokens(pair.prompt), model.to_tokens(pair.twin)
    (streams, logits), (twin_streams, twin_logits) = (
        _streams(model, one, layers) for one in (ids, twin_ids)
    )
    return Run(pair, ids, tokens, streams, twin_streams, logits, twin_logits)


def _streams(model: Any, ids: Tensor, layers: list[int]) -> tuple[dict[int, Tensor], Tensor]:
    names = {layer: f"blocks.{layer - 1}.hook_out" for layer in layers}
    logits, cache = model.run_with_cache(ids, names_filter=list(names.values()))
    return {layer: cache[name][0] for layer, name in names.items()}, logits[0, -1]


def means(runs: list[Run]) -> dict[int, Tensor]:
    """The mean residual stream of each layer, first positions left out."""
    layers = runs[0].streams
    return {layer: torch.cat([r.streams[layer][1:] for r in runs]).mean(0) for layer in layers}


def cells(
    model: Any, one: Run, mean: dict[int, Tensor], readers: dict[str, Reader]
) -> Iterator[dict[str, Any]]:
    """A row for each cell and replacement: what is measured, and what each lens predicts."""
    answer, foil = one.tokens
    n_pos = one.ids.shape[1]
    for layer, x in one.streams.items():
        twin = one.twin_streams[layer]
        changed = [p for p in range(1, n_pos) if not torch.equal(twin[p], x[p])]
        places = [("twin", p) for p in changed] + [("mean", p) for p in range(1, n_pos)]
        at = torch.tensor([p for _, p in places])
        new = torch.cat([twin[changed], mean[layer].expand(n_pos - 1, -1)])
        delta, n_twin = new - x[at], len(changed)
        deltas = {
            "": delta,
            SHUFFLED: torch.cat([d.roll(1, 0) for d in delta.split([n_twin, n_pos - 1])]),
        }
        measured = patched(model, one.ids, layer, at, new) - one.logits
        found: dict[str, Tensor] = {}
        for name, linearization in OF_PROMPT.items():
            rows = token_rows(model, one.ids, layer, one.tokens, linearization)
            for control, delta in deltas.items():
                found[control + name] = torch.einsum("tnd,nd->nt", rows[:, at], delta)
        for name, reader in readers.items():
            with torch.no_grad():
                before = reader(x[at], layer)[:, [answer, foil]]
                for control, delta in deltas.items():
                    found[control + name] = reader(x[at] + delta, layer)[:, [answer, foil]] - before
        for i, (replaced, p) in enumerate(places):
            row = {"prompt": one.pair.prompt, "kind": one.pair.kind, "layer": layer}
            row |= {"position": p, "is_last": p == n_pos - 1, "replaced": replaced}
            row |= {"measured": float(measured[i, answer])}
            row |= {"measured difference": float(measured[i, answer] - measured[i, foil])}
            for name, value in found.items():
                row[name] = float(value[i, 0])
                row[f"{name} difference"] = float(value[i, 0] - value[i, 1])
            yield row


@torch.no_grad()
def patched(model: Any, ids: Tensor, layer: int, at: Tensor, new: Tensor) -> Tensor:
    """Logits of the last position, ``(n, d_vocab)``, each with one position replaced at a layer."""
    found = []
    for places, values in zip(at.split(_ROWS), new.split(_ROWS), strict=True):

        def replace(x: Tensor, places: Tensor = places, to: Tensor = values, **_: Any) -> Tensor:
            x = x.clone()
            x[torch.arange(len(places)), places] = to
            return x

        hooks = [(f"blocks.{layer - 1}.hook_out", replace)]
        batch = ids.expand(len(places), -1)
        found.append(model.run_with_hooks(batch, fwd_hooks=hooks)[:, -1])
    return torch.cat(found)


def token_rows(
    model: Any, ids: Tensor, layer: int, tokens: tuple[int, ...], linearization: Any
) -> Tensor:
    """``w^T A_p`` of each token, ``(token, pos, d_model)``: centroids of the span to its logit."""
    site = lch.Site("span", layers=(layer, model.cfg.n_layers - 1), linearization=linearization)
    span = lch.lens.component_map(model, site, ids)

    def head(x: Tensor) -> Tensor:
        return model.unembed(model.ln_final(x[None]))[0][:, list(tokens)]

    fn = lch.detached(head) if linearization == "detached" else head
    cotangents = torch.zeros(len(tokens), *span.y.shape)
    for row, v in zip(cotangents, torch.eye(len(tokens)), strict=True):
        row[0, -1] = lch.centroid(fn, span.y[0, -1:].detach(), cotangent=v)[0]
    return span.pull(cotangents)[0][:, 0].detach()


@torch.no_grad()
def first_reads(
    model: Any, one: Run, readers: dict[str, Reader], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Where each lens has the answer as the first token of the last position, and what that is
    worth: the share of the prompt's logit difference over its twin's that goes with the twin's
    residual stream in that place."""
    answer, foil = one.tokens
    layers = list(one.streams)
    top = {
        name: [int(r(one.streams[n][-1:], n)[0].argmax()) for n in layers]
        for name, r in readers.items()
    }
    with torch.enable_grad():
        reading = lch.lens.read(model, one.ids, layers=layers, tokens=[answer])
        top["exact"] = reading.top_cells(layers, [-1], 1).ids[:, 0, 0].tolist()
    apart = [float(z[answer] - z[foil]) for z in (one.logits, one.twin_logits)]
    moved = {
        r["layer"]: r["measured difference"]
        for r in rows
        if r["is_last"] and r["replaced"] == "twin"
    }
    return {
        "kind": one.pair.kind,
        "prompt": one.pair.prompt,
        "is_solved": int(one.logits.argmax()) == answer,
        "is_preferred": apart[0] > 0,
        "moves": [-moved.get(n, 0.0) / (apart[0] - apart[1]) for n in layers],
        "read": {name: [i == answer for i in ids] for name, ids in top.items()},
    }
