"""Centroids of every kind of site in the embedded model: size, direction, spread, and reach.

python examples/centroids_by_site.py [--out centroids_by_site.png]
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin import plots
from lch_plugin.demo.corpus import stories
from lch_plugin.diagnostics import PointCloud, linearity_error

N_TOKENS, BATCH = 32, 50
N_LINEARITY = 8  # stories
RADII = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


class Component(NamedTuple):
    kind: str
    layer: int | None
    name: str  # of its centroid's hook point
    reads: str  # hook point of its input
    modules: Sequence[Callable[[Tensor], Any]]  # one after the other

    def __call__(self, x: Tensor) -> Tensor:
        for module in self.modules:
            y = module(x)
            x = y[0] if isinstance(y, tuple) else y
        return x


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", default="centroids_by_site.png")
out = parser.parse_args().out

# Small radii need double precision.
model = lch.load_demo_model(dtype=torch.float64)
texts = (model.to_tokens(text) for text in stories(600, split="test"))
# Beginnings of the same length, so that there is no padding.
tokens = torch.cat([t[:, :N_TOKENS] for t in texts if t.shape[1] >= N_TOKENS])[:200]


def logits(embeddings: Tensor) -> Tensor:
    return model.original_model(inputs_embeds=embeddings).logits


last = model.cfg.n_layers - 1
components = []
for layer, block in enumerate(model.blocks):
    at = f"blocks.{layer}"
    for kind, part in (("mlp", block.mlp), ("attn", block.attn)):
        name, reads = f"{at}.{kind}.hook_centroid", f"{at}.{kind}.hook_in"
        components.append(Component(kind, layer, name, reads, [part]))
    components.append(Component("block", layer, f"{at}.hook_centroid", f"{at}.hook_in", [block]))
for layer in range(last):
    name, reads = f"blocks.{last}.hook_centroid_from_{layer}", f"blocks.{layer}.hook_in"
    components.append(Component("span", layer, name, reads, model.blocks[layer:]))
components.append(Component("model", None, "hook_centroid", "embed.hook_out", [logits]))

sites = [lch.Site(kind, expert=True) for kind in ("mlp", "attn", "block", "model")]
sites += [lch.Site("span", layers=(layer, last), expert=True) for layer in range(last)]
names = {n for c in components for n in (c.name, f"{c.name}_alignment", c.reads)}
norms, alignments = ({c.name: [] for c in components} for _ in range(2))
centroids, activations = ({c.name: PointCloud() for c in components} for _ in range(2))
with lch.attach(model, site=sites), torch.no_grad():
    for batch in tokens.split(BATCH):
        _, cache = model.run_with_cache(batch, names_filter=list(names))
        for c in components:
            # Not the first token, which is the same in every story.
            mu, x = cache[c.name][:, 1:], cache[c.reads][:, 1:]
            d_out = model.cfg.d_vocab if c.kind == "model" else model.cfg.d_model
            norms[c.name].append(mu.norm(dim=-1).flatten() / d_out**0.5)
            alignments[c.name].append(cache[f"{c.name}_alignment"][:, 1:].flatten())
            centroids[c.name].update(mu)
            activations[c.name].update(x)


def linearity(c: Component, x: Tensor) -> Tensor:
    """Median error at each radius, which is relative to the typical norm of a token's input."""

    def stories_as_rows(rows: Tensor) -> Tensor:
        return c(rows.reshape(-1, *x.shape[1:])).reshape(*rows.shape[:-1], -1)

    # An MLP treats each token on its own. All others read whole stories: a row is a story.
    one_by_one = c.kind == "mlp"
    typical = x.norm(dim=-1).median().item() * (1 if one_by_one else N_TOKENS**0.5)
    errors = linearity_error(
        c if one_by_one else stories_as_rows,
        x[:, 1:] if one_by_one else x.flatten(1),
        [radius * typical for radius in RADII],
        n_directions=4,
        generator=torch.Generator().manual_seed(0),
    )
    return errors.flatten(1).median(dim=1).values


_, cache = model.run_with_cache(tokens[:N_LINEARITY], names_filter=list(names))
statistics = [
    plots.SiteStatistics(
        kind=c.kind,
        layer=c.layer,
        norms=torch.cat(norms[c.name]),
        alignments=torch.cat(alignments[c.name]),
        dimensions=(centroids[c.name].effective_dimension, activations[c.name].effective_dimension),
        errors=linearity(c, cache[c.reads].detach()),
    )
    for c in components
]
plots.centroids_by_site(statistics, RADII).savefig(out)

print(f"{len(tokens)} stories of {N_TOKENS} tokens; medians over all but the first token")
print("site    layer  |mu|/|v|  cos(mu, x)  dim mu  dim x  linearity error at radius 0.01, 0.1, 1")
for s in sorted(statistics, key=lambda s: list(plots.SITES).index(s.kind)):
    errors = "  ".join(f"{e:.3f}" for e in s.errors[2::2].tolist())
    print(
        f"{s.kind:6}  {'-' if s.layer is None else s.layer!s:>5}  {s.norms.median():8.3f}  "
        f"{s.alignments.median():10.3f}  {s.dimensions[0]:6.1f}  {s.dimensions[1]:5.1f}  {errors}"
    )
print("wrote", out)
