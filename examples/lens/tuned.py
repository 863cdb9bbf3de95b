"""A tuned lens (Belrose et al., arXiv 2303.08112), by the authors' own package where it is there.

    pip install --no-deps --target DIR tuned-lens    # and DIR on PYTHONPATH

Published lenses are on a hub. So translators are fitted here, on the texts of the averaged lenses,
whole: each layer's Kullback-Leibler divergence from the model's own next-token distribution, which
is the package's loss, by Adam.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

N_TOKENS, N_STEPS, N_ROWS, RATE = 128, 150, 192, 1e-3


def tuned_lens(
    model: Any, loaded: Any, texts: list[str], layers: list[int], seed: int, out: Path
) -> tuple[Any, str]:
    """A `TunedLens` with fitted translators of these layers, or why there is none."""
    if not texts:
        return None, "no texts were given to fit it on"
    try:
        from tuned_lens.nn.lenses import TunedLens
    except ImportError as error:
        return None, f"the package tuned-lens is not installed ({error})"
    try:
        lens = TunedLens.from_model(loaded.model).requires_grad_(False)
    except Exception as error:
        return None, f"tuned-lens does not know the model: {type(error).__name__}: {error}"
    for layer in layers:
        path = out / f"tuned-{len(texts)}-{seed}-{layer:02d}.pt"
        if not path.is_file():
            print(f"fitting {path.name} ...", flush=True)
            fit_translator(model, lens, texts, layer, seed)
            torch.save(lens.layer_translators[layer].state_dict(), path)
        lens.layer_translators[layer].load_state_dict(torch.load(path, weights_only=True))
    return lens, ""


def fit_translator(model: Any, lens: Any, texts: list[str], layer: int, seed: int) -> None:
    rows, last = _rows(model, texts, layer)
    generator = torch.Generator().manual_seed(seed)
    translator = lens.layer_translators[layer].requires_grad_(True)
    adam = torch.optim.Adam(translator.parameters(), lr=RATE)
    for _ in range(N_STEPS):
        some = torch.randint(len(rows), (N_ROWS,), generator=generator)
        with torch.no_grad():
            wanted = F.log_softmax(lens.unembed(last[some]), -1)
        said = F.log_softmax(lens(rows[some], layer), -1)
        loss = F.kl_div(said, wanted, log_target=True, reduction="batchmean")
        adam.zero_grad()
        loss.backward()
        adam.step()
    translator.requires_grad_(False)
    print(f"layer {layer}: divergence of the last batch {float(loss):.2f} nats", flush=True)


@torch.no_grad()
def _rows(model: Any, texts: list[str], layer: int) -> tuple[Tensor, Tensor]:
    """Residual streams that a layer reads and that the last block leaves, first positions out."""
    names = [f"blocks.{i}.hook_out" for i in (layer - 1, model.cfg.n_layers - 1)]
    found = []
    for text in texts:
        ids = model.to_tokens(text)[:, :N_TOKENS]
        _, cache = model.run_with_cache(ids, names_filter=names)
        found.append([cache[name][0, 1:] for name in names])
    rows, last = (torch.cat(some) for some in zip(*found, strict=True))
    return rows, last
