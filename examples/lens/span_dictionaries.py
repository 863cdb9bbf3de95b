"""Centroids of spans that begin at block 0, dictionaries of them, and what these share.

What `one_dictionary.py` is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import mean
from typing import Any

import torch
from sae_lens import TopKTrainingSAEConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from torch import Tensor
from torch.nn.functional import normalize

import lch_plugin as lch

N_POS = 32  # tokens of a text; the first, an attention sink, only stands before the others
FIRES, ENERGY, ALIKE = 1e-3, 0.1, 0.7
Note = Callable[[str, Mapping[str, float]], None]  # Takes numbers of one name and seed.


class EarlyExit:
    """Towards a logit difference read at a depth: the gradient of the final norm there, and W_U."""

    def __init__(self, model: Any, token: int, foil: int) -> None:
        self.name, self.model = f"logit_{token}_minus_{foil}", model
        self.w = (model.W_U[:, token] - model.W_U[:, foil]).detach()

    def logits(self, y: Tensor) -> Tensor:
        return (self.model.ln_final(y) @ self.w)[..., None]

    def at(self, y: Tensor) -> Tensor:
        return lch.centroid(self.logits, y)

    def after(self, tokens: Tensor, before: Tensor, depth: int) -> Callable[[Tensor], Tensor]:
        """The logits at a depth, as a function of what block 0 reads at all tokens but the first"""

        def run(x: Tensor) -> Tensor:
            read: list[Tensor] = []
            hooks = [
                ("blocks.0.hook_in", lambda _, hook: torch.cat([before, x], 1)),
                (f"blocks.{depth}.hook_out", lambda y, hook: read.append(y)),
            ]
            self.model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=depth + 1)
            return self.logits(read[0])

        return run


def collect(model: Any, tokens: Tensor, depths: list[int], vs: list[Any]) -> tuple[Tensor, Tensor]:
    """Centroids ``(cotangent, depth, text, pos, d)``; streams ``(1 + depth, text, 1 + pos, d)``."""
    ends = [(i, depth) for i in range(len(vs)) for depth in depths]
    sites = [lch.Site("span", layers=(0, l), cotangent=vs[i], label=f"v{i}") for i, l in ends]
    streams, mus, xs = ["blocks.0.hook_in", *(f"blocks.{l}.hook_out" for l in depths)], [], []
    with lch.attach(model, site=sites) as handle, torch.no_grad():
        names = [*handle.centroid_names, *streams]
        for batch in tokens.split(32):
            _, cache = model.run_with_cache(batch, names_filter=names, stop_at_layer=depths[-1] + 1)
            mus.append(torch.stack([cache[name][:, 1:] for name in handle.centroid_names]))
            xs.append(torch.stack([cache[name] for name in streams]))
    return torch.cat(mus, 1).unflatten(0, (len(vs), -1)), torch.cat(xs, 1)


def scaled(x: Tensor, like: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows less the mean of others, their mean square one, ``(..., row, d)``; and the way back."""
    x, like = x.flatten(-3, -2), like.flatten(-3, -2)
    mu = like.mean(-2, keepdim=True)
    scale = (like - mu).square().mean((-2, -1), keepdim=True).sqrt()
    return (x - mu) / scale, lambda z: (z * scale + mu).unflatten(-2, (-1, N_POS - 1))


class Shuffled:
    """Batches of rows, in another order each time."""

    def __init__(self, rows: Tensor, seed: int) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.rows), generator=self.generator)
        return (self.rows[index] for index in order.split(4096))


def train(rows: Tensor, d_sae: int, k: int, n_rows: int, seed: int) -> Any:
    config = TopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=d_sae, k=k)
    trainer = SAETrainerConfig(
        total_training_samples=n_rows, train_batch_size_samples=256, lr=1e-3, device="cpu"
    )
    return lch.saes.train_on(Shuffled(rows, seed), config, trainer, seed=seed)


@torch.no_grad()
def untrained(rows: Tensor, directions: Tensor, k: int) -> Any:
    """Directions that are read by products with themselves, at one scale that is fitted to rows."""
    config = TopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=len(directions), k=k)
    sae: Any = TrainingSAE.from_dict(config.to_dict())
    sae.W_dec.copy_(normalize(directions, dim=-1))
    sae.W_enc.copy_(sae.W_dec.T)
    x_hat = sae.decode(sae.encode(rows))
    sae.W_enc *= (rows * x_hat).sum() / x_hat.square().sum()
    return sae


def explained(x: Tensor, x_hat: Tensor) -> float:
    return float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def sharing(codes: Tensor, energy: Tensor) -> dict[str, float]:
    """What live features do at two depths or more; codes ``(depth, row, feature)``."""
    fires = (codes > 0).float()
    rates, n_depths = fires.mean(1), fires.sum(0)
    live = (rates >= FIRES).any(0)
    return {
        "live": int(live.sum()),
        "fires at two": float(((rates >= FIRES).sum(0) >= 2)[live].float().mean()),
        "at once at two": float(((n_depths >= 2).float().mean(0) >= FIRES)[live].float().mean()),
        "firings at once": float(n_depths[n_depths >= 2].sum() / n_depths.sum()),
        "energy at two": float(
            ((energy >= ENERGY * energy.sum(0)).sum(0) >= 2)[live].float().mean()
        ),
    }


def counterparts(saes: list[Any]) -> float:
    """Share of features with one of nearly the same direction in the SAE of another depth."""
    unit = [normalize(sae.W_dec, dim=-1) for sae in saes]
    best = [(w @ torch.cat(unit[:i] + unit[i + 1 :]).T).amax(1) for i, w in enumerate(unit)]
    return float((torch.cat(best) >= ALIKE).float().mean())


def n_parameters(saes: list[Any]) -> int:
    return sum(p.numel() for sae in saes for p in sae.parameters())


def width(n_depths: int, d: int) -> int:
    """About ten times d; a part of it for each depth, or each stream, is a whole number."""
    parts = n_depths * (n_depths + 1)
    return parts * round(10 * d / parts)


def centroid_saes(
    z: Tensor, z_test: Tensor, k: int, n_rows: int, seed: int, note: Note
) -> dict[str, Tensor]:
    """Train on ``(cotangent, depth, row, d)``; held-out rows as each dictionary makes them."""
    n, d = z.shape[1], z.shape[-1]
    d_sae, rows, g = width(n, d), z.flatten(0, 2), torch.Generator().manual_seed(seed)
    each = [z[:, j].flatten(0, 1) for j in range(n)]
    some = rows[torch.randperm(len(rows), generator=g)[: max(d_sae, 8192)]]
    fitted = {
        "one dictionary": [train(rows, d_sae, k, n_rows, seed)],
        "one a depth": [train(own, d_sae // n, k, n_rows, seed) for own in each],
        "training rows": [untrained(some, some[:d_sae], k)],
        "random directions": [untrained(some, torch.randn(d_sae, d, generator=g), k)],
    }
    made = {}
    for name, saes in fitted.items():
        at = saes * (n // len(saes))
        with torch.no_grad():
            codes = [sae.encode(z_test[:, j]) for j, sae in enumerate(at)]
            z_hat = torch.stack([s.decode(c) for s, c in zip(at, codes, strict=True)], 1)
            pairs = zip(z_test.flatten(0, 1), z_hat.flatten(0, 1), strict=True)
            values = torch.tensor([explained(*pair) for pair in pairs]).view(-1, n)
            fired = torch.stack([c[: len(z)].flatten(0, 1) for c in codes])
            alone = {"counterparts": counterparts(saes)} if len(saes) > 1 else {}
        shared = alone or sharing(fired, fired.square().mean(1))
        own = values[: len(z)].mean(0)
        note(name, shared | {"parameters": n_parameters(saes), "explained": float(own.mean())})
        note(name, {"explained, new v": float(values[len(z) :].mean())})
        note(name, {f"explained at depth {j}": float(value) for j, value in enumerate(own)})
        made[name] = z_hat
    return made


def crosscoders(
    y: Tensor, y_test: Tensor, k: int, n_rows: int, seed: int, note: Note
) -> dict[str, Tensor]:
    """Train on streams ``(1 + depth, row, d)`` end to end; held-out ones as each makes them."""
    n, d = len(y) - 1, y.shape[-1]
    made = {}
    for name, active in (("crosscoder", k), ("crosscoder, k a stream", (n + 1) * k)):
        ends = y.transpose(0, 1).flatten(1)
        sae = train(ends, width(n, d) // (n + 1), active, n_rows, seed)
        with torch.no_grad():
            codes = sae.encode(y_test.transpose(0, 1).flatten(1))
            y_hat = sae.decode(codes).unflatten(1, (n + 1, d)).transpose(0, 1)
            written = sae.W_dec.unflatten(1, (n + 1, d)).square().sum(-1).T
        values = [explained(*pair) for pair in zip(y_test, y_hat, strict=True)]
        shared = sharing(codes.expand(n, -1, -1), written[1:])
        note(name, {key: shared[key] for key in ("live", "energy at two")})
        note(name, {"parameters": n_parameters([sae]), "explained": mean(values[1:])})
        note(name, {"explained at input": values[0]})
        note(name, {f"explained at depth {j}": value for j, value in enumerate(values[1:])})
        made[name] = y_hat
    return made
