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
    caches_of,
    holds_tokens,
    input_of,
    output_of,
    padding_finder,
    token_mask,
    with_output,
    without_caches,
)
from lch_plugin.adapters.checks import (
    AFFINE_TOLERANCE,
    check_cotangent,
    check_finite,
    check_mlp_cotangent,
    distance_from_affine,
    not_affine,
)
from lch_plugin.adapters.deferred import Deferred
from lch_plugin.adapters.grad_scope import GradScope, gradients
from lch_plugin.adapters.huggingface.calls import unwatch, watch
from lch_plugin.adapters.huggingface.names import Target
from lch_plugin.adapters.passes import through
from lch_plugin.adapters.states import detach_cache, without_graph
from lch_plugin.adapters.structure import Alone, Structure
from lch_plugin.adapters.turns import Turn
from lch_plugin.adapters.values import Values, expert_values, local_values, local_values_by_running
from lch_plugin.centroids import check_gradients_on
from lch_plugin.cotangents import Cotangent, Ones, evaluate, is_fixed
from lch_plugin.errors import SiteError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import at_least_float32, centroid_of_neurons, read_direction
from lch_plugin.padding import Finder, blank, spread
from lch_plugin.sites import Settings
from lch_plugin.weak_cache import WeakCache


@dataclass(frozen=True, eq=False)
class Around:
    """One call of the module that encloses a component.

    Attributes:
        call: what it was called with.
        is_continued: whether that held earlier tokens; the call itself adds its own to a cache.
    """

    call: Call
    is_continued: bool


@dataclass(eq=False)
class Running:
    """One call of a component under way.

    Attributes:
        name: of the component, for messages.
        call: what its first module was called with.
        x: what it reads; by a vector-Jacobian product with a graph behind it.
        tokens: which of the positions it reads are tokens, if its own arguments say.
        outputs: what its input projections gave.
        between: what its first module returned.
        hooks: registered for this call alone.
        again: the component as a function of what it reads, where it has to run again.
    """

    name: str
    call: Call
    x: Float[Tensor, ...] | None = None
    tokens: Bool[Tensor, "batch pos"] | None = None
    outputs: list[Tensor] = field(default_factory=list)
    between: Any = None
    hooks: list[RemovableHandle] = field(default_factory=list)
    again: Callable[[Tensor], Tensor] | None = None

    @property
    def caches(self) -> list[Any]:
        """Key-value caches it was called with."""
        return caches_of(self.call)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Waiting:
    """A call whose centroid waits for the logits.

    Attributes:
        reader: whose.
        deferred: the centroid.
        tokens: which positions of the logits are tokens, if anything says.
    """

    reader: Reader
    deferred: Deferred
    tokens: Bool[Tensor, "batch pos"] | None


class Graph(GradScope):
    """That of one model.

    Attributes:
        turn: passes take turns, whichever threads they are of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()
        self._models: WeakCache[ModelCall] = WeakCache()

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
        self.finder = padding_finder(model.config)
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

    def open(self, _call: Call) -> None:
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
        settings: how its centroid is to be taken.
        publish: is handed the values of each call, by ending.
        is_wanted: whether to compute any.
        wait: is handed a call whose centroid waits for the logits.
    """

    method = ""
    #: Whether a graph is built, which what the model returns is not to keep.
    builds_graph = False

    def __init__(
        self,
        target: Target,
        modules: tuple[nn.Module, nn.Module, nn.Module],
        settings: Settings,
        graph: Graph,
        *,
        models: Sequence[PreTrainedModel],
        publish: Callable[[dict[str, Tensor]], None],
        is_wanted: Callable[[], bool],
        wait: Callable[[Running, Waiting], None] | None,
    ) -> None:
        self.target = target
        self.settings = settings
        self.publish, self.is_wanted, self.wait = publish, is_wanted, wait
        self._modules = modules
        self._graph = graph
        self._model_calls = {model: graph.model_call(model) for model in models}
        # For each call of the enclosing module (a model may call itself) that call, and the
        # component's own within.
        self._calls: list[tuple[Around, Running | None]] = []

    @property
    def name(self) -> str:
        """Of the component."""
        return self.target.name

    @property
    def _runs_again(self) -> bool:
        """Whether the component is to be run again in the next call, by itself."""
        return False

    @property
    def input_name(self) -> str:
        """Name of the module whose input is what the component reads."""
        return self.target.first

    @property
    def padding(self) -> Finder | None:
        """What finds the padding of the inputs of the innermost model around it."""
        return next((call.finder for call in self._model_calls.values()), None)

    @property
    def label(self) -> str:
        """Of the component, in messages."""
        return self.name or "the model"

    @property
    def said(self) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are tokens, as the innermost model around it says that says anything."""
        return next(filter(None, (call.said for call in self._model_calls.values())), [None])[0]

    def record(self) -> dict[str, Any]:
        """What the centroid is of, in terms of JSON."""
        return {"site": self.name, **self.settings.record()}

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

    # The calls of its modules, as `calls.Watcher`.

    def open(self, call: Call) -> None:
        self._calls.append((Around(call, self._runs_again and self._holds_tokens(call)), None))

    def begin(self, call: Call) -> Call:
        if not self._calls or not self.is_wanted():
            return call
        (around, before), running = self._calls[-1], Running(self.label, call)
        self._calls[-1] = around, running
        if before is not None:  # The first module runs again before the last has.
            self.stop(before)
        return self._start(running)

    def pass_on(self, output: Any) -> None:
        if self._calls and (running := self._calls[-1][1]) is not None:
            running.between = output

    def end(self, call: Call, output: Any) -> Any:
        around, running = self._calls[-1] if self._calls else (None, None)
        if around is None or running is None:
            return output
        self._calls[-1], is_waiting = (around, None), False
        try:
            y = output_of(output, self.label)
            self._look(running, call)
            tokens = self._tokens(running, call, y)
            if self.settings.is_late:
                output = self._defer(running, y, tokens, output)
                is_waiting = True
            else:
                self._show(self._values(running, y, tokens, None), tokens)
        finally:
            # What waits for the logits needs its graph until then, and no hook any longer.
            self.stop(running, keep_graph=is_waiting)
        return self._graph.drop(output, running.caches) if self.builds_graph else output

    def close(self) -> None:
        running = self._calls.pop()[1] if self._calls else None
        if running is not None:
            self.stop(running)

    def stop(self, running: Running, *, keep_graph: bool = False) -> None:
        """A call is over, or of no interest any longer."""
        for hook in running.hooks:
            hook.remove()
        if not keep_graph:
            self._graph.release(running)

    def _start(self, running: Running) -> Call:
        """Get ready; with what the first module is to be called."""
        raise NotImplementedError

    def _look(self, running: Running, call: Call) -> None:
        """Look at the call of the last module before anything is computed."""

    def _values(
        self, running: Running, y: Tensor, tokens: Tensor | None, v: Tensor | None
    ) -> Values:
        """What is to be shown; ``v`` is given if it was not known before the logits."""
        raise NotImplementedError

    def _defer(self, running: Running, y: Tensor, tokens: Tensor | None, output: Any) -> Any:
        """Wait for the logits; returns what the model is to go on with."""
        assert self.wait is not None
        graph = self._graph
        graph.hold(running)
        if not y.requires_grad:
            leaf, passed_on = graph.variable(y)
            output, y = with_output(output, y, passed_on), leaf

        def finish(v: Tensor) -> None:
            v = spread(v, y, tokens, self.settings.positions)
            with torch.enable_grad():
                values = self._values(running, y, tokens, v)
            self._show(values, tokens)

        # Of the logits the outermost model says it, and now: its call may be over before they are
        # looked at.
        said = [call.said for call in self._model_calls.values() if call.said]
        try:
            self.wait(running, Waiting(self, Deferred(y, finish), said[-1][0] if said else tokens))
        except BaseException:
            graph.release(running)
            raise
        return output

    def _kept(self, tensor: Tensor) -> Tensor:
        """A tensor, with its graph only where that is asked for."""
        return tensor if self.settings.create_graph else tensor.detach()

    def _show(self, values: Values, tokens: Tensor | None) -> None:
        with self._graph.outside():
            if self.settings.create_graph:
                check_gradients_on()
            found = {}
            for ending, value in values.items():
                shown = blank(self._kept(value()), tokens)
                check_finite(f"{self.label}{ending}", shown)
                found[ending] = shown.to(at_least_float32(shown))
            self.publish(found)

    def _tokens(self, running: Running, call: Call, y: Tensor) -> Bool[Tensor, "batch pos"] | None:
        """Which positions of an output are tokens, as the model says, or the component's call."""
        tokens = self.said
        if tokens is None and y.ndim == 3:
            tokens = token_mask(call, y.shape[1])
        # A last module without a mask, as a norm, has that of the first.
        return running.tokens if tokens is None else tokens

    def _holds_tokens(self, call: Call) -> bool:
        modules = self._modules[2].modules()
        layers = {vars(module)["layer_idx"] for module in modules if "layer_idx" in vars(module)}
        return any(
            holds_tokens(cache, layer) for cache in caches_of(call) for layer in layers or {0}
        )

    def _by_itself(self, running: Running) -> Callable[[Tensor], Tensor]:
        """The component as a function of what it reads, that runs it again with no one watching.

        A stretch is run by the module around it. Call it under `Alone` with that module.

        Raises:
            SiteError: it was called with a cache of earlier tokens.
        """
        first, last, _ = self._modules
        around, _ = self._calls[-1]
        if around.is_continued:
            raise SiteError(
                f"{self.label} has to be run again for this, which a key-value cache that holds "
                "earlier tokens does not allow. Run the whole sequence at once, without a cache."
            )
        call = without_caches(running.call if first is last else around.call)
        if first is not last:
            return lambda x: self._through(call, x)
        _, instead = input_of(call, self.label)

        def run(x: Tensor) -> Tensor:
            args, kwargs = instead(x)
            return output_of(first(*args, **kwargs), self.label)

        return run

    def _through(self, call: Call, x: Tensor) -> Tensor:
        """What the last module writes when the one around it is called and the first reads x."""
        first, last, around = self._modules
        _, y = through(
            self.label,
            first,
            last,
            lambda own: input_of(own, self.label)[1](x),
            lambda: around(*call[0], **call[1]),
        )
        return output_of(y, self.label)


class ClosedFormReader(Reader):
    """An MLP, from the pre-activations that the model computes (`lch_plugin.mlp`)."""

    method = "closed form"

    def __init__(self, *args: Any, structure: Structure, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._structure = structure
        self._is_connected = self._modules[0] is self._modules[1]
        self._parts = self._list_parts()
        v = self.settings.v
        if isinstance(v, Cotangent) and is_fixed(v):
            check_mlp_cotangent(self.label, structure.weights, v)

    def _start(self, running: Running) -> Call:
        # Registered now, they come after every hook of the user's.
        running.hooks += [
            projection.register_forward_hook(
                lambda _m, _i, output: running.outputs.append(self._kept(output))
            )
            for projection in self._structure.inputs
        ]
        if self.settings.expert or self.settings.is_local:
            running.x = self._kept(input_of(running.call, self.label)[0])
        return running.call

    def _look(self, running: Running, call: Call) -> None:
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

    def _values(
        self, running: Running, y: Tensor, tokens: Tensor | None, v: Tensor | None
    ) -> Values:
        mlp, pre = self._structure.weights, self._structure.pre_activations(running.outputs)
        own = self.settings.v
        if v is None and not isinstance(own, Ones):
            assert isinstance(own, Cotangent)
            v = evaluate(own, y)
        create_graph = self.settings.create_graph
        s = read_direction(mlp, v, create_graph=create_graph)
        if self.settings.is_local:
            assert running.x is not None

            def mu_at(samples: Tensor) -> Tensor:
                pre = mlp.pre_activations(samples)
                return centroid_of_neurons(mlp, pre, s, create_graph=create_graph)

            return local_values(self.settings, running.x.to(at_least_float32(y)), mu_at)
        mu = centroid_of_neurons(mlp, pre, s, create_graph=create_graph)
        if not self.settings.expert:
            return {"": lambda: mu}
        assert running.x is not None
        v = torch.ones_like(y) if v is None else v
        return expert_values(mu, running.x, self._kept(y), v, mixes_positions=False)

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


class VJPReader(Reader):
    """Any component: one vector-Jacobian product on the graph of the model's own call."""

    method = "VJP"
    builds_graph = True

    def __init__(self, *args: Any, mixes_positions: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mixes_positions = mixes_positions
        self._is_checked = False

    def _start(self, running: Running) -> Call:
        x, instead = input_of(running.call, self.label)
        self._graph.hold(running, DetachedMode if self._is_detached else None)
        # A tensor of the component's own: paths from x that lead around the component do not count.
        own = x.clone() if x.requires_grad or x.is_inference() else x.detach()
        running.x, passed_on = self._graph.variable(own.requires_grad_())
        if self._runs_again:
            running.again = self._by_itself(running)
        running.tokens = token_mask(running.call, x.shape[1]) if x.ndim == 3 else None
        return instead(passed_on)

    @property
    def _runs_again(self) -> bool:
        return self._is_detached and not self._is_checked

    @property
    def _is_detached(self) -> bool:
        return self.settings.linearization == "detached"

    def _values(
        self, running: Running, y: Tensor, tokens: Tensor | None, v: Tensor | None
    ) -> Values:
        assert running.x is not None
        x, create_graph = running.x, self.settings.create_graph

        def gradient(v: Tensor) -> Tensor:
            return gradients(self.label, y, [x], v, keep=True, create_graph=create_graph)[0]

        if v is None:
            own = self.settings.v
            assert isinstance(own, Cotangent)
            v = spread(evaluate(own, y), y, tokens, self.settings.positions)
        mu = gradient(v)
        if not self._is_checked:
            if not self.settings.is_late:
                check_cotangent(self.label, v, mu, gradient, y.dtype)
            if self._is_detached:
                self._check_affine(running, x.detach(), v)
            self._is_checked = True
        if not self.settings.expert:
            return {"": lambda: mu}
        known = (self._kept(t) for t in (mu, x, y, v))
        return expert_values(*known, mixes_positions=self._mixes_positions)

    def _check_affine(self, running: Running, x: Tensor, v: Tensor) -> None:
        """Once, that with its factors held fixed the component is affine."""
        assert running.again is not None
        with self._graph.outside(), Alone([self._modules[2]]):
            off = distance_from_affine(running.again, x, v)
        if not off <= AFFINE_TOLERANCE[x.dtype]:
            raise not_affine(self.label, "component", off)


class LocalReader(Reader):
    """Mean centroid over a neighbourhood of a module with no closed form.

    The module (of a stretch the one around it) runs again, once a sample and one at a time, without
    anybody's hooks within and in evaluation mode: memory is that of one graph, and nobody's hooks
    see the samples.
    """

    method = "VJP"

    @property
    def _runs_again(self) -> bool:
        return True

    def _start(self, running: Running) -> Call:
        running.x = self._kept(input_of(running.call, self.label)[0])
        running.again = self._by_itself(running)
        return running.call

    def _values(
        self, running: Running, y: Tensor, tokens: Tensor | None, v: Tensor | None
    ) -> Values:
        x, run = running.x, running.again
        assert x is not None
        assert run is not None
        if v is None:
            own = self.settings.v
            assert isinstance(own, Cotangent)
            v = spread(evaluate(own, y), y, tokens, self.settings.positions).detach()
        with self._graph.outside():
            grad = torch.is_grad_enabled()
            with Alone([self._modules[2]]), torch.set_grad_enabled(grad):
                return local_values_by_running(self.settings, x, run, v)
