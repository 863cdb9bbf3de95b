"""How the centroid of one component comes about while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence, ValuesView
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lch_plugin.adapters.arguments import (
    Call,
    arguments_of,
    caches,
    holds_tokens,
    input_of,
    is_causal,
    output_of,
    token_mask,
)
from lch_plugin.adapters.checks import check_cotangent, check_finite, check_mlp_cotangent
from lch_plugin.adapters.huggingface.calls import unwatch, watch
from lch_plugin.adapters.huggingface.names import Target
from lch_plugin.adapters.passes import Pass, gradients
from lch_plugin.adapters.states import detach_cache, without_graph
from lch_plugin.adapters.structure import Structure
from lch_plugin.adapters.turns import Turn
from lch_plugin.cotangents import Cotangent, Ones, Vector, evaluate, is_fixed
from lch_plugin.errors import SiteError
from lch_plugin.mlp import at_least_float32, centroid_of_neurons, read_direction
from lch_plugin.padding import Finder, PadToken, blank, spread
from lch_plugin.weak_cache import WeakCache as Memo


@dataclass(eq=False)
class Running:
    """One call of a component under way.

    Attributes:
        name: of the component, for messages.
        x: what it reads, with a graph behind or before it.
        tokens: which of the positions it reads are tokens, if its own arguments say.
        caches: key-value caches it was called with.
        outputs: what its input projections gave.
        between: what its first module returned.
        hooks: registered for this call alone.
    """

    name: str
    x: Float[Tensor, ...] | None = None
    tokens: Bool[Tensor, "batch pos"] | None = None
    caches: list[Any] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    between: Any = None
    hooks: list[RemovableHandle] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name


class Graph(Pass):
    """That of one model.

    Attributes:
        turn: passes take turns, whichever threads they are of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()
        self._models: Memo[ModelCall] = Memo()

    def model_call(self, model: PreTrainedModel) -> ModelCall:
        """What watches the calls of a model, or of one within: the same for all its readers."""
        return self._models.setdefault(model, ModelCall(model))

    def drop(self, output: Any, caches_called_with: list[Any]) -> Any:
        """What a module has returned, without a graph that nobody but centroids wants."""
        if self.is_open or torch.is_grad_enabled():
            return output
        values = output.values() if isinstance(output, dict) else output
        results = values if isinstance(values, tuple | list | ValuesView) else ()
        for cache in (*caches_called_with, *caches(results)):
            detach_cache(cache)
        return without_graph(output)


class ModelCall:
    """Calls of a model, which say what positions its components read are tokens.

    Without the model, which would be kept alive.

    Attributes:
        finder: of padding in its inputs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._forward = type(model).forward
        self._is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        self.finder = Finder(PadToken.of(model.config), is_causal=is_causal(model.config))
        self._users = 0
        # One for each call under way: a model may call itself. Empty if it says nothing, as an
        # inner model that reads embeddings does.
        self._calls: list[list[Bool[Tensor, "batch pos"] | None]] = []

    @property
    def said(self) -> list[Bool[Tensor, "batch pos"] | None]:
        """Which positions are tokens in the call under way, None if all are; empty if unknown."""
        return self._calls[-1] if self._calls else []

    def install(self, model: nn.Module, turn: Turn) -> None:
        """Start watching, with the first that asks."""
        self._users += 1
        if self._users == 1:
            watch(self, model, model, model, turn)

    def remove(self, model: nn.Module) -> None:
        """Stop watching, with the last."""
        self._users -= 1
        if not self._users:
            unwatch(self, model, model, model)
            self._calls.clear()

    def open(self) -> None:
        self._calls.append([])

    def begin(self, call: Call) -> Call:
        if self._calls:
            named = arguments_of(self._forward, ((None, *call[0]), call[1]))
            # A model that writes at other positions than it reads.
            writes = any(k.startswith("decoder_") and isinstance(named[k], Tensor) for k in named)
            writes |= self._is_encoder_decoder and named.get("labels") is not None
            prefix = "decoder_" if writes else ""
            ids, mask = named.get(f"{prefix}input_ids"), named.get(f"{prefix}attention_mask")
            if isinstance(ids, Tensor) or isinstance(mask, Tensor):
                like = named.get(f"{prefix}inputs_embeds") if ids is None else ids
                continued = any(map(holds_tokens, named.values()))
                self._calls[-1] = [self.finder.tokens(like, mask, is_continued=continued)]
        return call

    def pass_on(self, output: Any) -> None:
        """Nothing of ours."""

    def end(self, _call: Call, output: Any) -> Any:
        return output

    def close(self) -> None:
        if self._calls:
            self._calls.pop()


class Reader:
    """One component of one model.

    Attributes:
        target: its name.
        cotangent: ``v``.
        publish: is handed each centroid.
        is_wanted: whether to compute any.
    """

    method = ""

    def __init__(
        self,
        target: Target,
        modules: tuple[nn.Module, nn.Module, nn.Module],
        cotangent: Cotangent,
        graph: Graph,
        *,
        models: Sequence[PreTrainedModel],
        publish: Callable[[Tensor], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        self.target = target
        self.cotangent = cotangent
        self.publish, self.is_wanted = publish, is_wanted
        self._modules = modules
        self._graph = graph
        self._model_calls = {model: graph.model_call(model) for model in models}
        # One for each call of the enclosing module: a model may call itself.
        self._calls: list[Running | None] = []

    @property
    def name(self) -> str:
        """Of the component."""
        return self.target.name

    @property
    def padding(self) -> Finder | None:
        """What finds the padding of the inputs of the innermost model around it."""
        return next((call.finder for call in self._model_calls.values()), None)

    @property
    def label(self) -> str:
        """Of the component, in messages."""
        return self.name or "the model"

    def record(self) -> dict[str, Any]:
        """What the centroid is of, in terms of JSON."""
        v = self.cotangent
        return {
            "site": self.name,
            "cotangent": v.v.tolist() if isinstance(v, Vector) else v.name,
            "linearization": "jacobian",
        }

    def install(self) -> None:
        """Start watching the model."""
        for model, model_call in self._model_calls.items():
            model_call.install(model, self._graph.turn)
        watch(self, *self._modules, self._graph.turn)

    def remove(self) -> None:
        """Stop watching it."""
        unwatch(self, *self._modules)
        for model, model_call in self._model_calls.items():
            model_call.remove(model)
        while self._calls:
            self.close()

    def open(self) -> None:
        self._calls.append(None)

    def begin(self, call: Call) -> Call:
        if not self._calls or not self.is_wanted():
            return call
        before, running = self._calls[-1], Running(self.label)
        self._calls[-1] = running
        if before is not None:  # The first module runs again before the last has.
            self._stop(before)
        return self._start(running, call)

    def pass_on(self, output: Any) -> None:
        if self._calls and self._calls[-1] is not None:
            self._calls[-1].between = output

    def end(self, call: Call, output: Any) -> Any:
        running = self._calls[-1] if self._calls else None
        if running is None:
            return output
        self._calls[-1] = None
        try:
            y = output_of(output, self.label)
            mu = self._finish(running, call, y).detach()
            with self._graph.outside():
                check_finite(self.label, mu)
                self.publish(mu.to(at_least_float32(mu)))
        finally:
            self._stop(running)
        return self._returned(running, output)

    def close(self) -> None:
        running = self._calls.pop() if self._calls else None
        if running is not None:
            self._stop(running)

    def _tokens(self, call: Call, running: Running, y: Tensor) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of an output are tokens, as the model says, or the component's call."""
        # The innermost model around it that says.
        said = next(filter(None, (call.said for call in self._model_calls.values())), [None])
        tokens = said[0]
        if tokens is None and y.ndim == 3:
            tokens = token_mask(call, y.shape[1])
        # A last module without a mask, as a norm, has that of the first.
        return running.tokens if tokens is None else tokens

    def _start(self, running: Running, call: Call) -> Call:
        raise NotImplementedError

    def _finish(self, running: Running, call: Call, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _stop(self, running: Running) -> None:
        raise NotImplementedError

    def _returned(self, _running: Running, output: Any) -> Any:
        return output


class ClosedFormReader(Reader):
    """An MLP, from the pre-activations that the model computes (`lch_plugin.mlp`)."""

    method = "closed form"

    def __init__(self, *args: Any, structure: Structure, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._structure = structure
        self._is_connected = self._modules[0] is self._modules[1]
        self._parts = self._list_parts()
        if is_fixed(self.cotangent):
            check_mlp_cotangent(self.label, structure.weights, self.cotangent)

    def _start(self, running: Running, call: Call) -> Call:
        # Registered now, they come after every hook of the user's.
        running.hooks += [
            projection.register_forward_hook(
                lambda _m, _i, output: running.outputs.append(output.detach())
            )
            for projection in self._structure.inputs
        ]
        return call

    def _finish(self, running: Running, call: Call, y: Tensor) -> Tensor:
        structure = self._structure
        if self._list_parts() != self._parts:
            raise SiteError(
                f"{self.label}: modules within it were added or replaced since it was attached to, "
                "and it may be another MLP now, or none. Detach and attach again."
            )
        if len(running.outputs) != len(structure.inputs):
            raise SiteError(
                f"{self.label}: its input projections ran {len(running.outputs)} times in one "
                f"call, not {len(structure.inputs)}, so it is not the MLP that its modules make "
                "up. Name the module around it, whose centroid is a vector-Jacobian product."
            )
        self._check_connected(running, call)
        with torch.no_grad():
            mlp, pre = structure.weights, structure.pre_activations(running.outputs)
            v = None if isinstance(self.cotangent, Ones) else evaluate(self.cotangent, y)
            mu = centroid_of_neurons(mlp, pre, read_direction(mlp, v))
        return blank(mu, self._tokens(call, running, mu))

    def _list_parts(self) -> list[nn.Module]:
        first, last, _ = self._modules
        return [*first.modules(), *last.modules()]

    def _check_connected(self, running: Running, call: Call) -> None:
        """Once, that the second module reads what the first has given."""
        if self._is_connected:
            return
        read, _ = input_of(call, self.label)
        if not isinstance(running.between, Tensor) or not torch.equal(read, running.between):
            raise SiteError(
                f"{self.label}: the second module does not read what the first returned; something "
                "between them changes it (a module, or a hook of yours the first time), so that "
                "they are no MLP. Name the module that holds both."
            )
        self._is_connected = True

    def _stop(self, running: Running) -> None:
        for hook in running.hooks:
            hook.remove()


class VJPReader(Reader):
    """Any component: one vector-Jacobian product on the graph of the model's own call."""

    method = "VJP"
    _is_checked = False

    def _start(self, running: Running, call: Call) -> Call:
        x, instead = input_of(call, self.label)
        self._graph.hold(running)
        # A tensor of the component's own: paths from x that lead around the component do not count.
        own = x.clone() if x.requires_grad or x.is_inference() else x.detach()
        running.x = own.requires_grad_()
        running.tokens = token_mask(call, x.shape[1]) if x.ndim == 3 else None
        running.caches = list(caches((*call[0], *call[1].values())))
        # A copy, so that the module, or a hook of the user's, may write to it in place.
        return instead(running.x.clone())

    def _finish(self, running: Running, call: Call, y: Tensor) -> Tensor:
        assert running.x is not None
        x = running.x

        def gradient(v: Tensor) -> Tensor:
            return gradients(self.label, y, [x], v, keep=True)[0]

        tokens = self._tokens(call, running, y)
        v = spread(evaluate(self.cotangent, y), y, tokens)
        mu = gradient(v)
        if not self._is_checked:
            check_cotangent(self.label, v, mu, gradient, y.dtype)
            self._is_checked = True
        return blank(mu, tokens)

    def _stop(self, running: Running) -> None:
        self._graph.release(running)

    def _returned(self, running: Running, output: Any) -> Any:
        return self._graph.drop(output, running.caches)
