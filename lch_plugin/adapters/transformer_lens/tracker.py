"""What holds the readers of one model together: its forward passes, and who meets where.

Readers that start or end at the same place share one gate, and those that end at the same place
with the same cotangent share one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lch_plugin.adapters.arguments import Call, arguments_of, holds_tokens, is_causal
from lch_plugin.adapters.checks import check_no_padding
from lch_plugin.adapters.passes import Late, Pass, gradients
from lch_plugin.adapters.states import detach_cache, evaluating, without_graph
from lch_plugin.adapters.transformer_lens.anatomy import (
    final_norm,
    logits,
    post_norm,
    score_points,
)
from lch_plugin.adapters.transformer_lens.gates import (
    Gate,
    PointGate,
    RootOutputGate,
    RootPointGate,
)
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.stand_ins import Forward, ToTokens, Turns
from lch_plugin.adapters.transformer_lens.states import detach_attributes, silenced
from lch_plugin.adapters.transformer_lens.toolkit import (
    HookedTransformer,
    LensModel,
    StopAtLayerException,
)
from lch_plugin.adapters.transformer_lens.trial import Trial
from lch_plugin.adapters.transformer_lens.vjps import VJPReader, gradient
from lch_plugin.adapters.turns import Turn
from lch_plugin.cotangents import AnyCotangent, Logit, Metric
from lch_plugin.errors import InputError, NonFiniteError, NotDifferentiableError, SiteError
from lch_plugin.padding import Finder, PadToken, spread, tokens_in_mask

_ATTRIBUTE = "_centroid_tracker"
# Holds gradients on for Logit cotangents, under a name for messages.
_FINAL_NORM = "the final norm, for Logit cotangents,"


class Tracker:
    """Readers of one model, and the forward passes under way.

    Attributes:
        readers: by the name of their hook point.
        paused: True while the model runs for our own sake.
        trial: what the pass is an experiment in, if it is one.
        turn: passes take turns, whichever threads they are of.
        padding: finds it in what the model is called with.
    """

    def __init__(self, model: LensModel) -> None:
        self.model = model
        self.readers: dict[str, Reader] = {}
        self.paused = False
        self.trial: Trial | None = None
        # The first stands for calls of a component by itself, outside any pass of the model.
        self._passes = [Pass()]
        self._gates: dict[Hashable, Gate] = {}
        self._hooks: list[RemovableHandle] = []
        self._norm_gates: tuple[Gate, Gate] | None = None
        self._logits_gate: Gate | None = None
        self._score_gates: list[PointGate] = []
        self._stand_ins: list[Forward | ToTokens | Turns] = []
        self.turn = Turn()
        if isinstance(model, HookedTransformer):
            config, causal = None, model.cfg.attention_dir == "causal"
        else:
            config = model.original_model.config
            causal = is_causal(config)
        self.padding = Finder(PadToken.of(model.tokenizer, config), is_causal=causal)

    @property
    def current(self) -> Pass:
        """The innermost forward pass."""
        return self._passes[-1]

    @property
    def in_model(self) -> bool:
        """Whether the whole model is running."""
        return len(self._passes) > 1

    def add(self, reader: Reader) -> None:
        """Let a reader start, whose hook points are in place."""
        if not self._stand_ins:
            self._hook_model()
        self.readers[reader.name] = reader
        reader.install(self)
        if reader.site.is_late:
            self._watch_the_end(reader.site.v)

    def _watch_the_end(self, cotangent: AnyCotangent) -> None:
        if isinstance(cotangent, Metric) and self._logits_gate is None:
            self._logits_gate = logits(self.model)
            self._logits_gate.install(self._awaits_logits, self._on_logits)
        if isinstance(cotangent, Logit) and self._norm_gates is None:
            before, after = self._norm_gates = final_norm(self.model)
            before.install(self._awaits_norm, self._before_norm)
            after.install(self._awaits_norm, self._after_norm)

    def watch(self, gate: Gate, reader: Reader) -> None:
        """Call ``reader.at`` when a tensor passes there and somebody listens to the reader."""
        gate = self._gates.setdefault(gate.key, gate)
        gate.readers.append(reader)
        if len(gate.readers) == 1:
            gate.install(partial(self._is_wanted, gate), partial(self._at, gate))

    def forget(self, reader: Reader) -> None:
        """Undo `add`, also in the middle of a pass."""
        self.readers.pop(reader.name, None)
        for current in self._passes:
            current.inputs.pop(reader, None)
            current.late.pop(reader, None)
            current.release(reader)
        for key, gate in list(self._gates.items()):
            gate.readers = [r for r in gate.readers if r is not reader]
            if not gate.readers:
                gate.remove()
                del self._gates[key]
        if not self.readers:
            for current in self._passes:
                current.abandon()
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            for stand_in in self._stand_ins:
                stand_in.remove()
            self._stand_ins.clear()
            ends = (*(self._norm_gates or ()), self._logits_gate, *self._score_gates)
            for end in ends:
                if end is not None:
                    end.remove()
            self._logits_gate = None
            self._norm_gates = None
            vars(self.model).pop(_ATTRIBUTE, None)

    @contextmanager
    def silence(self, module: nn.Module) -> Iterator[None]:
        """No hook on any hook point within fires, no reader reads, and nothing drops out."""
        before, self.paused = self.paused, True
        try:
            with silenced(module), evaluating(module):
                yield
        finally:
            self.paused = before

    # ------------------------------------------------------------------ at a gate

    def _is_wanted(self, gate: Gate) -> bool:
        return any(reader.is_wanted() for reader in gate.readers)

    def _at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        seen = tensor
        vjps = [r for r in gate.readers if isinstance(r, VJPReader)]
        for reader in gate.readers:
            if reader.is_wanted() and not (reader in vjps and reader.has_end(gate)):
                tensor = _or(reader.at(gate, tensor), tensor)
        ending = [r for r in vjps if r.end_gate.key == gate.key and r in self.current.inputs]
        if ending:
            tensor = _or(self._close(ending, tensor), tensor)
        starting = [r for r in vjps if r.start_gate.key == gate.key and r.is_wanted()]
        starting = [r for r in starting if r.can_start()]
        if starting:
            tensor = self._open(starting, tensor)
        return None if tensor is seen else tensor

    def _open(self, readers: list[VJPReader], x: Tensor) -> Tensor:
        replay = None if self.trial is None else self.trial.replay
        for reader in readers:
            self.current.hold(reader, detached=reader.is_detached, replay=replay)
        if self.trial is not None and self.trial.shift is not None:
            x = x.detach() + self.trial.shift
        variable, passed_on = self.current.variable(x)
        for reader in readers:
            self.current.inputs[reader] = variable
        return passed_on

    def _close(self, readers: list[VJPReader], y: Tensor) -> Tensor | None:
        current = self.current
        inputs = {r: current.inputs.pop(r) for r in readers}
        try:
            self._finish_now(readers, inputs, y)
            for reader in readers:
                if reader.site.is_late:
                    finish = partial(reader.finish_late, inputs[reader], reader.output(y))
                    self.postpone(reader, y, finish)
        finally:
            for reader in readers:
                if not (reader.site.is_late and isinstance(reader.site.v, Metric)):
                    current.release(reader)
        if current.is_open or current.caller_grad:
            return None
        return y.detach()

    def _finish_now(
        self, readers: list[VJPReader], inputs: dict[VJPReader, Tensor], y: Tensor
    ) -> None:
        """Centroids whose cotangent is known: one backward pass for each cotangent."""
        groups: dict[Hashable, list[VJPReader]] = {}
        for reader in readers:
            if not reader.site.is_late:
                groups.setdefault(reader.cotangent_key, []).append(reader)
        shared = (
            self.current.is_held_besides(readers)
            or self.current.caller_grad
            or any(r.site.is_late for r in readers)
        )
        for i, group in enumerate(groups.values(), 1):
            written = group[0].output(y)
            v = group[0].weighed(written)
            keep = shared or i < len(groups) or self.trial is not None
            names = str([r.name for r in group])
            mus = gradients(names, written, [inputs[r] for r in group], v, keep=keep)
            for reader, mu in zip(group, mus, strict=True):
                if self.trial is not None:
                    x = inputs[reader]
                    self.trial.note(reader, x, written, v, partial(gradient, reader, written, x))
                    if self.current.mode is not None:
                        self.trial.recorded = list(self.current.mode.recorded)
                reader.finish(inputs[reader], written, mu, v)

    # --------------------------------------------------------- cotangents that come late

    def postpone(
        self, reader: Reader, y: Tensor, finish: Callable[[Tensor], None]
    ) -> Tensor | None:
        """Keep a centroid until its cotangent is known; returns what the model is to go on with."""
        current = self.current
        if not self.in_model:
            raise SiteError(
                f"{reader.name} needs the logits: run the whole model, not the component alone."
            )
        replaced = None
        if isinstance(reader.site.v, Metric):
            current.hold(reader)  # A `Site` with a Metric is never detached.
            if not y.requires_grad:
                y, replaced = current.variable(y)
        current.late[reader] = Late(y, finish)
        return replaced

    def _waiting(self, kind: type) -> dict[Reader, Late]:
        return {r: late for r, late in self.current.late.items() if isinstance(r.site.v, kind)}

    def _awaits_norm(self) -> bool:
        return not self.paused and self.in_model and bool(self._waiting(Logit))

    def _before_norm(self, x: Tensor) -> Tensor:
        self.current.hold(_FINAL_NORM)
        self.current.norm_input, passed_on = self.current.variable(x)
        return passed_on

    def _after_norm(self, y: Tensor) -> Tensor | None:
        current = self.current
        x, current.norm_input = current.norm_input, None
        assert x is not None
        vs: dict[Logit, Tensor] = {}
        try:
            for cotangent in {r.site.v for r in self._waiting(Logit)}:
                assert isinstance(cotangent, Logit)
                v = self._through_unembedding(cotangent, y)
                (vs[cotangent],) = torch.autograd.grad(y, x, v, retain_graph=True)
        finally:
            current.release(_FINAL_NORM)
        for reader, late in self._waiting(Logit).items():
            del current.late[reader]
            assert isinstance(reader.site.v, Logit)
            self._finish_logit(reader, late, vs[reader.site.v])
        return None if current.is_open or current.caller_grad else y.detach()

    def _through_unembedding(self, cotangent: Logit, y: Tensor) -> Tensor:
        W_U = self.model.W_U
        ids = [cotangent.token] + ([] if cotangent.foil is None else [cotangent.foil])
        if any(not 0 <= i < W_U.shape[-1] for i in ids):
            raise InputError(f"{cotangent} names a token outside 0 to {W_U.shape[-1] - 1}.")
        v = W_U[:, cotangent.token]
        v = v if cotangent.foil is None else v - W_U[:, cotangent.foil]
        position = cotangent.position if self.trial is None else None
        positions = None if position is None else [position]
        return spread(v.detach(), y, self._tokens_at_the_end, positions)

    def _finish_logit(self, reader: Reader, late: Late, v: Tensor) -> None:
        kind = reader.site.kind
        norm = None
        if kind in ("mlp", "neuron", "attn", "head"):
            assert reader.layer is not None
            norm = post_norm(self.model.blocks[reader.layer], kind)
        if norm is not None:
            with self.current.outside(), torch.enable_grad(), self.silence(self.model):
                y = late.y.detach().requires_grad_()
                (v,) = torch.autograd.grad(norm(y), y, v)
        v = v.reshape_as(late.y)
        with self.current.outside():
            late.finish(reader.weigh(v, late.y) if reader.site.mixes_positions else v)

    @property
    def _tokens_at_the_end(self) -> Tensor | None:
        """Which positions of the logits are tokens."""
        masks = self.current.masks
        return masks.get("decoder_blocks" if hasattr(self.model, "decoder_blocks") else "blocks")

    def metric(self, metric: Metric, logits: Tensor, tokens: Tensor | None) -> Tensor:
        """Its value, summed over sequences."""
        # Three tokens need not have the positions that the metric reads.
        if self.trial is not None and metric.position is not None:
            metric = replace(metric, position=-1)
        try:
            return metric.value(logits.clone(), tokens)  # It may write to a copy.
        except IndexError:
            if self.trial is None:
                raise
            return logits.sum()

    def _awaits_logits(self) -> bool:
        return not self.paused and self.in_model and bool(self._waiting(Metric))

    def _on_logits(self, logits: Tensor) -> None:
        waiting = self._waiting(Metric)
        by_metric: dict[int, list[Reader]] = {}
        for reader in waiting:
            by_metric.setdefault(id(reader.site.v), []).append(reader)
        for readers in by_metric.values():
            metric = readers[0].site.v
            assert isinstance(metric, Metric)
            ys = [waiting[r].y for r in readers]
            tokens = self._tokens_at_the_end
            value = self.metric(metric, logits, tokens)
            of_logits, *vs = torch.autograd.grad(
                value, [logits, *ys], retain_graph=True, allow_unused=True
            )
            check_no_padding(metric, of_logits, tokens)
            for reader, v in zip(readers, vs, strict=True):
                if v is not None and not bool(v.isfinite().all()):
                    raise NonFiniteError(
                        f"metric {metric.name!r}: its gradient in what {reader.path} writes has "
                        f"{int((~v.isfinite()).sum())} of {v.numel()} values NaN or infinite."
                    )
                if v is None:
                    raise NotDifferentiableError(
                        f"metric {metric.name!r} does not depend on what {reader.path} writes."
                    )
                with self.current.outside():
                    waiting[reader].finish(reader.weigh(v, waiting[reader].y))
        for reader in waiting:
            self.current.late.pop(reader, None)
            self.current.release(reader)

    # ------------------------------------------------------------------- the model's passes

    def _hook_model(self) -> None:
        # A bridge's run_with_cache and generation by HuggingFace call the original model alone.
        model = self.model
        hooked = isinstance(model, HookedTransformer)
        root = model if hooked else model.original_model
        taking_turns = ("run_with_cache", "run_with_hooks", *(() if hooked else ("forward",)))
        self._stand_ins = [
            Forward(self, root),
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
            gate.install(self._has_padding, _guard_masked_rows)

    def enter(self, call: Call) -> None:
        """A pass of the whole model begins."""
        self._passes.append(Pass())
        root = getattr(self.model, "original_model", self.model)
        named = arguments_of(type(root).forward, ((root, *call[0]), call[1]))
        self.current.given = named
        self.current.caches = [named.get("past_kv_cache"), named.get("past_key_values")]
        if root is not self.model:  # A HookedTransformer has yet to make tokens of what it reads.
            own = "encoder_blocks" if hasattr(self.model, "encoder_blocks") else "blocks"
            ids = named.get("input_ids")
            self._find_padding(
                own, named.get("inputs_embeds") if ids is None else ids, "attention_mask"
            )
            if own != "blocks":
                self._find_decoders_padding(ids, named.get("decoder_input_ids"))
        elif named.get("start_at_layer") is not None:
            self.current.n_pos = named["input"].shape[1]
            self._find_padding("blocks", named.get("tokens"), "attention_mask")
        for gate in self._root_gates():
            gate.enter()

    def see(self, output: Any) -> None:
        """It has computed this, and is not over yet."""
        for gate in (*self._gates.values(), self._logits_gate):
            if isinstance(gate, RootOutputGate):
                gate.see(output)

    def leave(self, output: Any, error: BaseException | None) -> Any:
        """It ends, with an output or an error."""
        for gate in self._root_gates():
            gate.leave()
        if not self.in_model:
            return output  # Attached within the call.
        current = self._passes.pop()
        current.abandon()
        if error is not None and not self.in_model:
            # Torch does not call hooks on leaving a module by an interrupt.
            for stateful in (*self._gates.values(), *self._score_gates, *self.readers.values()):
                stateful.reset()
        if not current.has_graph or current.caller_grad:
            return output
        for cache in (*current.caches, getattr(output, "past_key_values", None)):
            detach_cache(cache)
        for scores in self._score_gates:
            detach_attributes(scores.owner)
        if isinstance(error, StopAtLayerException):  # On its way to become the return value.
            error.layer_output = without_graph(error.layer_output)
        return without_graph(output)

    def _root_gates(self) -> list[RootPointGate]:
        return [gate for gate in self._gates.values() if isinstance(gate, RootPointGate)]

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

    def _has_padding(self) -> bool:
        return self.current.is_open and bool(self.current.masks)


def tracker_of(model: LensModel) -> Tracker:
    """The model's tracker, made at need."""
    tracker = vars(model).get(_ATTRIBUTE)
    if tracker is None:
        tracker = Tracker(model)
        vars(model)[_ATTRIBUTE] = tracker
    assert isinstance(tracker, Tracker)
    return tracker


@contextmanager
def without_padding(model: LensModel) -> Iterator[None]:
    """Nothing that the model reads within is padding, whatever ids it is tried out with."""
    tracker = vars(model).get(_ATTRIBUTE)
    finders = [] if tracker is None else [tracker.padding]
    for finder in finders:
        finder.is_off = True
    try:
        yield
    finally:
        for finder in finders:
            finder.is_off = False


def attached_readers(model: LensModel) -> dict[str, Reader]:
    """The readers a model carries now, by the name of their hook point."""
    tracker = vars(model).get(_ATTRIBUTE)
    return {} if tracker is None else dict(tracker.readers)


def _guard_masked_rows(scores: Tensor) -> None:
    """Keep the NaN gradient of a softmax over nothing away from the keys of real tokens.

    A padding position may attend to nothing at all. TransformerLens turns its NaN pattern into
    zeros, but the gradient of that softmax is NaN whatever arrives at it.
    """
    nothing = torch.isneginf(scores).all(-1, keepdim=True)
    if scores.requires_grad and bool(nothing.any()):
        scores.register_hook(partial(torch.Tensor.masked_fill, mask=nothing, value=0.0))


def _or(replacement: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if replacement is None else replacement
