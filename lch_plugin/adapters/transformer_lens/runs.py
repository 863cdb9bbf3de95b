"""One forward pass of a model: how it begins and ends, and what is kept of it meanwhile.

A `Run` is the state of one pass, `Runs` all of those under way on one model, the innermost last: a
user's hook may run the model again within a pass. Gates are installed here, since those of the
model itself are passed by who calls its ``forward``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lch_plugin.adapters.arguments import Call, arguments_of, holds_tokens, padding_finder
from lch_plugin.adapters.deferred import Deferred
from lch_plugin.adapters.grad_scope import GradScope
from lch_plugin.adapters.states import detach_cache, evaluating, without_graph
from lch_plugin.adapters.transformer_lens.architecture import score_points
from lch_plugin.adapters.transformer_lens.gates import Act, Gate, PointGate, RootGate, Wanted
from lch_plugin.adapters.transformer_lens.hook_points import silenced
from lch_plugin.adapters.transformer_lens.stand_ins import Forward, ToTokens, Turns
from lch_plugin.adapters.transformer_lens.toolkit import (
    HookedTransformer,
    LensModel,
    StopAtLayerException,
)
from lch_plugin.adapters.turns import Turn
from lch_plugin.padding import Finder, PadToken, tokens_in_mask


@dataclass(eq=False)
class Seen:
    """What a reader has seen of its component's call, until the component has come to its end.

    Attributes:
        x: what the component reads; by a vector-Jacobian product a variable of the graph.
        values: what passed the gates within, by the gate's key.
        call: arguments of the component.
    """

    x: Tensor | None = None
    values: dict[Hashable, Tensor] = field(default_factory=dict)
    call: Call | None = None


class Run:
    """State of one forward pass.

    Attributes:
        call: what the model was called with.
        given: the same, by name.
        n_pos: positions that it reads, of a model that makes tokens of what it is given.
        masks: by list of blocks that read padding, which positions are tokens.
        caches: key-value caches that may have seen a graph.
        scope: where gradients are on.
        seen: by reader, what it has seen of a call under way.
        deferred: by reader, a centroid that waits for its cotangent.
    """

    def __init__(self) -> None:
        self.call: Call = ((), {})
        self.given: dict[str, Any] = {}
        self.n_pos = 0
        self.masks: dict[str, Bool[Tensor, "batch pos"]] = {}
        self.caches: list[Any] = []
        self.scope = GradScope()
        self.seen: dict[Any, Seen] = {}
        self.deferred: dict[Any, Deferred] = {}

    def see(self, reader: Any) -> Seen:
        """What a reader has seen so far."""
        return self.seen.setdefault(reader, Seen())

    def take(self, reader: Any) -> Seen:
        """The same, at the end of the call."""
        return self.seen.pop(reader, None) or Seen()

    def forget(self, reader: Any) -> None:
        """Keep nothing of a reader's."""
        self.seen.pop(reader, None)
        self.deferred.pop(reader, None)
        self.scope.release(reader)

    def abandon(self) -> None:
        """Keep nothing."""
        self.scope.release_all()
        self.seen.clear()
        self.deferred.clear()

    @property
    def tokens_at_the_end(self) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of the logits are tokens, if some are not."""
        return self.masks.get("decoder_blocks", self.masks.get("blocks"))


class Runs:
    """The passes of one model, and the gates they go through.

    Attributes:
        model: whose.
        paused: True while components run for our own sake.
        turn: passes take turns, whichever threads they are of.
        padding: finds it in what the model is called with.
    """

    def __init__(self, model: LensModel) -> None:
        self.model = model
        self.paused = False
        self.turn = Turn()
        # The first stands for calls of a component by itself, outside any pass of the model.
        self._under_way = [Run()]
        self._gates: list[Gate] = []
        self._score_gates: list[PointGate] = []
        self._hooks: list[RemovableHandle] = []
        self._stand_ins: list[Forward | ToTokens | Turns] = []
        self.padding = (
            Finder(PadToken.of(model.tokenizer), is_causal=model.cfg.attention_dir == "causal")
            if isinstance(model, HookedTransformer)
            else padding_finder(model.original_model.config, model.tokenizer)
        )

    @property
    def root(self) -> Any:
        """The module whose ``forward`` is every pass: of a bridge the model within."""
        return getattr(self.model, "original_model", self.model)

    @property
    def current(self) -> Run:
        """The innermost pass."""
        return self._under_way[-1]

    @property
    def in_model(self) -> bool:
        """Whether the whole model is running."""
        return len(self._under_way) > 1

    def start(self) -> None:
        """Watch the model, if nobody does yet."""
        if self._stand_ins:
            return
        # A bridge's run_with_cache and generation by HuggingFace call the original model alone.
        model = self.model
        hooked = isinstance(model, HookedTransformer)
        taking_turns = ("run_with_cache", "run_with_hooks", *(() if hooked else ("forward",)))
        self._stand_ins = [
            Forward(self, self.root),
            ToTokens(model),
            *(Turns(self.turn, model, name) for name in taking_turns),
        ]
        if hooked:
            self._hooks.append(model.embed.register_forward_pre_hook(self._note_tokens))
            self._hooks += [
                hook
                for block in model.blocks
                for hook in (
                    block.register_forward_pre_hook(self._note_mask, with_kwargs=True),
                    block.register_forward_hook(self._forget_mask, always_call=True),
                )
            ]
        self._score_gates = score_points(model)
        for gate in self._score_gates:
            self.install(gate, self._has_padding, _guard_masked_rows)

    def stop(self) -> None:
        """Leave the model as it was, in the middle of a pass too."""
        for run in self._under_way:
            run.abandon()
        for gate in list(self._gates):
            self.uninstall(gate)
        for handle in (*self._hooks, *self._stand_ins):
            handle.remove()
        self._hooks.clear()
        self._stand_ins.clear()

    def install(self, gate: Gate, wanted: Wanted, act: Act) -> None:
        """Have a gate call ``act`` with what passes it, whenever it is ``wanted``."""
        self._gates.append(gate)
        gate.install(wanted, act)

    def uninstall(self, gate: Gate) -> None:
        """Take it off the model."""
        self._gates.remove(gate)
        gate.remove()

    def forget(self, reader: Any) -> None:
        """Keep nothing of a reader's in any pass."""
        for run in self._under_way:
            run.forget(reader)

    @contextmanager
    def silence(self, module: nn.Module) -> Iterator[None]:
        """No hook on any hook point within fires, no reader reads, and nothing drops out."""
        before, self.paused = self.paused, True
        try:
            with silenced(module), evaluating(module):
                yield
        finally:
            self.paused = before
            self._detach_patterns()

    # ------------------------------------------------------- the model's ``forward``, as `Passes`

    def enter(self, call: Call) -> None:
        """A pass of the whole model begins."""
        run = Run()
        self._under_way.append(run)
        root = self.root
        run.call = call
        run.given = arguments_of(type(root).forward, ((root, *call[0]), call[1]))
        run.caches = [run.given.get(name) for name in ("past_kv_cache", "past_key_values")]
        if root is not self.model:  # A HookedTransformer has yet to make tokens of what it reads.
            own = "encoder_blocks" if hasattr(self.model, "encoder_blocks") else "blocks"
            ids = run.given.get("input_ids")
            self._find_padding(
                own, run.given.get("inputs_embeds") if ids is None else ids, "attention_mask"
            )
            if own != "blocks":
                self._find_decoders_padding(ids, run.given.get("decoder_input_ids"))
        elif run.given.get("start_at_layer") is not None:
            run.n_pos = run.given["input"].shape[1]
            self._find_padding("blocks", run.given.get("tokens"), "attention_mask")
        for gate in self._root_gates():
            gate.enter()

    def see(self, output: Any) -> None:
        """It has computed this, and is not over yet."""
        for gate in self._root_gates():
            gate.see(output)

    def leave(self, output: Any, error: BaseException | None) -> Any:
        """It ends, with an output or an error; what the model is to return instead."""
        for gate in self._root_gates():
            gate.leave()
        if not self.in_model:
            return output  # Attached within the call.
        run = self._under_way.pop()
        run.abandon()
        if error is not None and not self.in_model:
            # Torch does not call hooks on leaving a module by an interrupt.
            for gate in self._gates:
                gate.reset()
        if not run.scope.was_open or run.scope.caller_grad:
            return output
        for cache in (*run.caches, getattr(output, "past_key_values", None)):
            detach_cache(cache)
        self._detach_patterns()
        if isinstance(error, StopAtLayerException):  # On its way to become the return value.
            error.layer_output = without_graph(error.layer_output)
        return without_graph(output)

    def _detach_patterns(self) -> None:
        for scores in self._score_gates:
            _detach_attributes(scores.owner)

    def _root_gates(self) -> list[RootGate]:
        return [gate for gate in self._gates if isinstance(gate, RootGate)]

    # ------------------------------------------------------------------------------- padding

    def _find_padding(self, stack: str, ids: Any, mask_name: str) -> None:
        """Note which positions of a list of blocks are tokens, if some are not."""
        side = getattr(self.model.tokenizer, "padding_side", "right")
        tokens = self.padding.tokens(
            ids,
            self.current.given.get(mask_name),
            side=side,
            is_continued=any(map(holds_tokens, self.current.caches)),
            masks_leading=isinstance(self.model, HookedTransformer) and side == "left",
        )
        if tokens is not None:
            self.current.masks[stack] = tokens

    def _find_decoders_padding(self, ids: Any, written: Any) -> None:
        masks, given = self.current.masks, self.current.given
        own = masks.get("encoder_blocks")
        is_shifted = (
            isinstance(ids, Tensor)
            and isinstance(written, Tensor)
            and ids.shape == written.shape
            and torch.equal(ids[:, :-1], written[:, 1:])
        )
        if own is None or given.get("decoder_attention_mask") is not None or not is_shifted:
            self._find_padding("decoder_blocks", written, "decoder_attention_mask")
            return
        # What a bridge makes of the encoder's ids, without a mask: as long as these, but that it
        # reads padding that rows begin with.
        masks["decoder_blocks"] = own
        self.padding.warn(own, is_guess=False, is_read=not bool(own[:, 0].all()))

    def _note_tokens(self, _module: nn.Module, args: Any) -> None:
        if not self.in_model:
            return
        self.current.n_pos = args[0].shape[-1]
        self._find_padding("blocks", args[0], "attention_mask")

    def _note_mask(self, _module: nn.Module, _args: Any, kwargs: Any) -> None:
        # A HookedTransformer makes a mask of its own where its tokenizer pads on the left.
        mask, masks = kwargs.get("attention_mask"), self.current.masks
        if not isinstance(mask, Tensor) or self.padding.is_off:
            return
        n_pos = self.current.n_pos if self.in_model else mask.shape[-1]
        known, tokens = masks.get("blocks"), tokens_in_mask(mask, n_pos)
        if tokens is not None and not bool(tokens.all()):
            masks["blocks"] = tokens if known is None else tokens & known.to(tokens.device)

    def _forget_mask(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if not self.in_model:  # A block by itself, whose mask is that of this call.
            self.current.masks.clear()

    def _has_padding(self) -> bool:
        return (self.current.scope.is_open or self.paused) and bool(self.current.masks)


def _guard_masked_rows(scores: Tensor) -> None:
    """Keep the NaN gradient of a softmax over nothing away from the keys of real tokens.

    A padding position may attend to nothing at all. TransformerLens turns its NaN pattern into
    zeros, but the gradient of that softmax is NaN whatever arrives at it.
    """
    nothing = torch.isneginf(scores).all(-1, keepdim=True)
    if scores.requires_grad and bool(nothing.any()):
        scores.register_hook(partial(torch.Tensor.masked_fill, mask=nothing, value=0.0))


def _detach_attributes(module: Any) -> None:
    """A bridge's attention keeps its last pattern, which must not keep this pass's graph alive."""
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor) and value.requires_grad and value.grad_fn is not None:
            setattr(module, name, value.detach())
