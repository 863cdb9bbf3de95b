"""Many pushes at once: each row of text runs one time for all features and tokens in it.

What `lch_plugin.saes.dashboards.effects.push` asks of one token in a row, the derivative of the
logits there, depends on earlier tokens by their values alone: nothing moves them. So the row runs
once, followed by a copy of each of its tokens that is to be moved. A copy has its token's position,
and attends to what its token attends to: the tokens before it, and itself. All copies are moved,
each along a direction of its own, and no copy sees another.

This takes a model that attends as its mask says, which is found out by trying: where a copy does
not give what `push` gives, or the model takes no such mask, each token has a pass of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel, TransformerBridge
from lch_plugin.saes.dashboards.effects import derivative, push
from lch_plugin.saes.sources.hooked_model import HookedModel

Pushed = tuple[Float[Tensor, "item d_in"], Float[Tensor, "item d_vocab"]]
#: What models raise that take no mask of this form.
_REFUSED = (TypeError, ValueError, IndexError, RuntimeError)


class Pusher:
    """Pushes along directions in the space of one hook of a model.

    Attributes:
        shares_rows: whether items in a row of text share its pass; None before the first.
    """

    def __init__(self, model: LensModel | HookedModel, hook_name: str, batch_size: int) -> None:
        """Choose where to push; ``batch_size`` rows of text run together."""
        self.model, self.hook_name, self.batch_size = model, hook_name, batch_size
        self.shares_rows: bool | None = None

    def __call__(
        self,
        tokens: Int[Tensor, "item pos"],
        positions: Int[Tensor, " item"],
        directions: Float[Tensor, "item d_in"],
        advance: Callable[[int], None] = lambda n: None,
    ) -> Pushed:
        """As `push`, of any number of items, in batches.

        Args:
            tokens: the row of text of each item.
            positions: its token.
            directions: along which it is moved.
            advance: called with the number of items that are done.
        """
        if self.shares_rows is None:
            self.shares_rows = self._can_share(tokens, positions, directions)
        if not self.shares_rows:
            batches = (t.split(self.batch_size) for t in (tokens, positions, directions))
            parts = []
            for t, p, d in zip(*batches, strict=True):
                parts.append(push(self.model, self.hook_name, t, p, d))
                advance(len(t))
            points, logits = zip(*parts, strict=True)
            return torch.cat(points), torch.cat(logits)
        rows, row_of = tokens.unique(dim=0, return_inverse=True)
        found: Any = None
        for part in _batches(row_of, tokens.shape[1], self.batch_size):
            items = torch.cat([torch.tensor(own) for own in part]).to(tokens.device)
            pushed = self._push(rows, row_of, positions, directions, part)
            if found is None:
                found = tuple(t.new_empty(len(tokens), t.shape[1]) for t in pushed)
            for whole, values in zip(found, pushed, strict=True):
                whole[items] = values
            advance(len(items))
        points, logits = found
        return points, logits

    def _push(
        self,
        rows: Int[Tensor, "row pos"],
        row_of: Int[Tensor, " item"],
        positions: Int[Tensor, " item"],
        directions: Float[Tensor, "item d_in"],
        part: list[list[int]],
    ) -> tuple[Float[Tensor, "own d_in"], Float[Tensor, "own d_vocab"]]:
        """Items of some rows, in the order of ``part``: of each sequence its items."""
        n_copies = max(map(len, part))
        # A sequence with fewer copies has more of its first item's, which nobody reads.
        filled = torch.tensor([own + own[:1] * (n_copies - len(own)) for own in part])
        filled = filled.to(rows.device)
        is_item = torch.tensor([[j < len(own) for j in range(n_copies)] for own in part])
        text, at = rows[row_of[filled[:, 0]]], positions[filled]
        points, logits = self._run(text, at, directions[filled])
        return points[is_item], logits[is_item]

    def _run(
        self,
        text: Int[Tensor, "row pos"],
        at: Int[Tensor, "row copy"],
        directions: Float[Tensor, "row copy d_in"],
    ) -> tuple[Float[Tensor, "row copy d_in"], Float[Tensor, "row copy d_vocab"]]:
        n_rows, n_pos = text.shape
        n_copies = at.shape[1]
        ids = torch.cat([text, text.gather(1, at)], dim=1)
        own = torch.arange(n_pos, device=text.device)
        place = torch.cat([own.expand(n_rows, -1), at], dim=1)
        # A copy reads what is before its token, and itself; of the text everything as always.
        sees_text = own <= place[:, :, None]
        sees_text[:, n_pos:] = own < at[:, :, None]
        itself = torch.eye(n_copies, dtype=torch.bool, device=text.device)
        sees_copies = torch.cat([itself.new_zeros(n_pos, n_copies), itself])
        sees = torch.cat([sees_text, sees_copies.expand(n_rows, -1, -1)], dim=2)
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=text.device)
        mask = mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]
        wanted = torch.arange(n_pos, n_pos + n_copies, device=text.device).expand(n_rows, -1)

        def run() -> Tensor:
            arguments = {"attention_mask": mask, "position_ids": place}
            if isinstance(self.model, HookedModel):
                return self.model.model(ids, **arguments, **self._kept(n_copies)).logits
            return self.model(ids, **arguments, **self._kept(n_copies))

        return derivative(self.model, self.hook_name, run, ids.shape, wanted, directions)

    def _kept(self, n: int) -> dict[str, int]:
        """That logits of the last positions are all that is wanted, for a model that takes it."""
        return {"logits_to_keep": n} if "logits_to_keep" in _arguments(self.model) else {}

    def _can_share(
        self,
        tokens: Int[Tensor, "item pos"],
        positions: Int[Tensor, " item"],
        directions: Float[Tensor, "item d_in"],
    ) -> bool:
        """Whether copies in one row give what each token's own pass gives."""
        if not {"attention_mask", "position_ids"} <= _arguments(self.model):
            return False
        if any(point.fwd_hooks for point in self.model.hook_dict.values()):
            return False  # They may mean positions in the row.
        # The last token sees most: where attention reaches less far than the row, it shows there.
        last = positions.argmax()[None]
        text, at, along = tokens[last], positions[last], directions[last]
        expected = push(self.model, self.hook_name, text, at, along)
        # Beside it another copy, which it must not see.
        two = torch.stack([at, at // 2], dim=1)
        try:
            found = self._run(text, two, along[:, None].expand(-1, 2, -1))
        except _REFUSED:
            return False
        # Models have parts in float32 at most; a wrong mask is off by more than rounding.
        tolerance = 0.1 if expected[1].dtype.itemsize < 4 else 1e-3
        return all(
            bool((a[:, 0] - b).float().norm() <= tolerance * b.float().norm())
            for a, b in zip(found, expected, strict=True)
        )


def _arguments(model: LensModel | HookedModel) -> set[str]:
    """By name, what HuggingFace's model takes; nothing of another toolkit's."""
    if isinstance(model, HookedModel):
        inner = model.model
    elif isinstance(model, TransformerBridge):
        inner = model.original_model
    else:
        return set()
    return set(inspect.signature(inner.forward).parameters)


def _batches(
    row_of: Int[Tensor, " item"], n_pos: int, batch_size: int
) -> Iterator[list[list[int]]]:
    """Items by sequence, in batches of no more tokens than ``batch_size`` rows have.

    A row with more items than tokens is more than one sequence.
    """
    by_row: dict[int, list[int]] = {}
    for item, row in enumerate(row_of.tolist()):
        by_row.setdefault(row, []).append(item)
    sequences = [
        items[i : i + n_pos] for items in by_row.values() for i in range(0, len(items), n_pos)
    ]
    # Those of about as many items go together, so that little is filled up.
    sequences.sort(key=len, reverse=True)
    start = 0
    while start < len(sequences):
        n = max(1, batch_size * n_pos // (n_pos + len(sequences[start])))
        yield sequences[start : start + n]
        start += n
