"""Attach to the modules of a model, and detach without a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Unpack

from lch_plugin.adapters.arguments import Call, caches_of, output_of
from lch_plugin.adapters.checks import check_loaded, is_offloaded
from lch_plugin.adapters.deferred import of_metric
from lch_plugin.adapters.huggingface.calls import unwatch, watch
from lch_plugin.adapters.huggingface.names import Target, mlp_names, resolve
from lch_plugin.adapters.huggingface.readers import (
    ClosedFormReader,
    Graph,
    LocalReader,
    Reader,
    Running,
    VJPReader,
    Waiting,
)
from lch_plugin.adapters.structure import recognise
from lch_plugin.cotangents import Cotangent, Logit, Metric
from lch_plugin.errors import AttachError, InputError, SiteError
from lch_plugin.files import portable
from lch_plugin.sites import Options, Settings
from lch_plugin.weak_cache import WeakCache

# By module: components of one model share graphs, whoever attached to them.
_graphs: WeakCache[Graph] = WeakCache()


class CentroidCache(Mapping[str, Tensor]):
    """Centroids of the last forward pass, by name of the component.

    ``cache[name]`` is a tensor of the shape of what the component reads. Of one that was called
    several times in the pass (tied layers, recurrence), ``cache[name, i]`` is that of call ``i``,
    in the order in which the centroids came to be known.
    A thread sees its own last pass; one that has run none, the last of any.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._own = threading.local()
        self._last: dict[str, list[Tensor]] = {name: [] for name in self._names}

    def __getstate__(self) -> dict[str, list[Tensor]]:
        return self._values  # A copy has what this thread sees.

    def __setstate__(self, values: dict[str, list[Tensor]]) -> None:
        self.__init__(values)  # type: ignore[misc]
        self._last = values

    @property
    def _values(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = getattr(self._own, "values", self._last)
        return found

    def begin(self) -> dict[str, list[Tensor]]:
        """A pass of this thread begins, with no centroids yet."""
        self._own.values = self._last = {name: [] for name in self._names}
        return self._last

    def keep(self, name: str, found: Mapping[str, Tensor], *, alone: bool) -> None:
        """Add the values of a call; of a component that was called on its own, in place of others.

        Args:
            name: of the component.
            found: by ending.
            alone: whether the whole model is not running.
        """
        values = getattr(self._own, "values", None) or self.begin()
        for ending, value in found.items():
            key = f"{name}{ending}"
            values[key] = [value] if alone else [*values[key], value]

    def __getitem__(self, key: str | tuple[str, int]) -> Float[Tensor, ...]:
        """The centroid of a component.

        Raises:
            KeyError: nothing of this name is attached.
            SiteError: it was not called in the last forward pass, or not so often.
            InputError: it was called several times, and the key does not say which.
        """
        name, call = key if isinstance(key, tuple) else (key, None)
        values = self._values[name]
        if not values:
            raise SiteError(
                f"{name} was not called in the last forward pass, or there was none: run the model "
                "first, on a path that leads through it; through first and then last, if it is a "
                "stretch."
            )
        if call is None and len(values) > 1:
            raise InputError(
                f"{name} was called {len(values)} times in the last forward pass. Say which: "
                f"cache[{name!r}, 0] is the first, cache[{name!r}, -1] the last."
            )
        try:
            return values[call or 0]
        except IndexError:
            raise SiteError(
                f"{name} was called {len(values)} times in the last forward pass: there is no call "
                f"{call}."
            ) from None

    def get(self, key: Any, default: Any = None) -> Any:
        """The centroid of a component, or the default where there is none."""
        if key not in self:
            return default
        return self[key]

    def __iter__(self) -> Iterator[Any]:
        for name, values in self._values.items():
            # Keys that have a value each: of several calls one a call.
            yield from [name] if len(values) == 1 else [(name, i) for i in range(len(values))]

    def __len__(self) -> int:
        return sum(map(len, self._values.values()))

    def __contains__(self, key: object) -> bool:
        name, call = key if isinstance(key, tuple) else (key, 0)
        n_calls = len(self._values.get(name, ()))
        return -n_calls <= call < n_calls

    def __repr__(self) -> str:
        shapes = (f"{key}: {tuple(mu.shape)}" for key, mu in self.items())
        return f"{type(self).__name__}({', '.join(shapes)})"

    def calls(self, name: str) -> int:
        """How often a component was called in the last forward pass."""
        return len(self._values[name])

    def clear(self) -> None:
        """Forget every centroid."""
        self.begin()


class Handle:
    """A model with centroids, until `detach`; a context manager. Copies of the model have none.

    Attributes:
        model: as it was passed to `attach`.
        cache: values of the last forward pass, also after detaching.
        hook_names: names of all values in `cache`: the centroids', and those beside them (offsets,
            variances, ...).
        centroid_names: names of the centroids alone, those of the components.
    """

    def __init__(self, model: nn.Module, targets: list[Target], settings: Settings) -> None:
        self.model = model
        self.centroid_names = [target.name for target in targets]
        self.hook_names = [f"{n}{e}" for n in self.centroid_names for e in settings.endings]
        self.cache = CentroidCache(self.hook_names)
        self._graph = _graph_of(model)
        # By call of the model under way, the components' calls that wait for its logits.
        self._calls: list[dict[Running, Waiting]] = []
        self._is_attached = True
        self._readers = make_readers(
            model,
            targets,
            settings,
            lambda target: (lambda found: self._keep(target.name, found), lambda: True),
            self._wait,
        )
        watch(self, model, model, model, self._graph.turn)
        for reader in self._readers:
            reader.install()

    @property
    def methods(self) -> dict[str, str]:
        """How each centroid is computed, ``"closed form"`` or ``"VJP"``, by name."""
        return {reader.name: reader.method for reader in self._readers}

    def records(self) -> list[dict[str, Any]]:
        """What each centroid is of, in terms of JSON, in the order of `centroid_names`."""
        return [reader.record() for reader in self._readers]

    def detach(self) -> None:
        """Restore the model exactly. Once is enough, and twice does no harm."""
        if self._is_attached:
            self._is_attached = False
            for reader in self._readers:
                reader.remove()
            unwatch(self, self.model, self.model, self.model)
            for waiting in self._calls:
                _give_up(waiting)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached to" if self._is_attached else "detached from"
        return f"Handle({state} {type(self.model).__name__}: {self.centroid_names})"

    def _keep(self, name: str, found: dict[str, Tensor]) -> None:
        self.cache.keep(name, found, alone=not self._calls)

    def _wait(self, running: Running, waiting: Waiting) -> None:
        if not self._calls:
            raise SiteError(
                f"{running.name} needs what the whole model returns: run the model that was "
                "attached to, not a part of it alone."
            )
        self._calls[-1][running] = waiting

    # The model's own calls, as `calls.Watcher`.

    def open(self, _call: Call) -> None:
        self._calls.append({})

    def begin(self, call: Call) -> Call:
        if len(self._calls) == 1:
            self.cache.begin()
        return call

    def pass_on(self, output: Any) -> None:
        """Nothing of ours."""

    def end(self, call: Call, output: Any) -> Any:
        waiting = self._calls[-1] if self._calls else {}
        has_waited = bool(waiting)
        if has_waited:
            _finish(waiting, output_of(output, "the model"))
            _give_up(waiting)
        # Attention patterns and hidden states from within come out here too.
        if not has_waited and not any(reader.builds_graph for reader in self._readers):
            return output
        return self._graph.drop(output, caches_of(call))

    def close(self) -> None:
        if self._calls:
            _give_up(self._calls.pop())


def _finish(waiting: Mapping[Running, Waiting], logits: Tensor) -> None:
    """Centroids whose metric is known now that the model has returned these logits."""
    by_metric: dict[int, list[Waiting]] = {}
    for one in waiting.values():
        by_metric.setdefault(id(one.reader.settings.v), []).append(one)
    for group in by_metric.values():
        metric: Any = group[0].reader.settings.v
        ys, labels = [one.deferred.y for one in group], [one.reader.label for one in group]
        vs = of_metric(metric, logits, ys, labels, group[0].tokens)
        for one, v in zip(group, vs, strict=True):
            one.deferred.finish(v)


def _give_up(waiting: dict[Running, Waiting]) -> None:
    """Nobody waits any longer."""
    while waiting:
        running, one = waiting.popitem()
        one.reader.stop(running)


def attach(
    model: nn.Module,
    modules: str | Iterable[str] | None = None,
    *,
    cotangent: Float[Tensor, " d_out"] | Cotangent | Metric | None = None,
    **settings: Unpack[Options],
) -> Handle:
    """Compute centroids of a model's modules whenever it runs.

    The modules may be any: MLPs have closed forms (`lch_plugin.mlp`), recognised by what they
    compute; attention, blocks, norms, convolutions and all else take one vector-Jacobian product on
    the model's own graph, whatever the caller's grad mode. Nothing the model computes changes.

    Hooks that edit what a component reads, or values within it, are seen: of an MLP with a closed
    form, those on the outputs of its input projections. What comes after these (dropout, hooks on
    the activation) is no part of a closed form, and edits of what a component writes are of none.
    Padding counts nowhere: outputs there do not, and centroids there are zero
    (`lch_plugin.padding`). Threads that share the model take turns.

    Args:
        model: HuggingFace's or any other.
        modules: names as in ``model.named_modules()``; ``*`` stands for a part of a name without
            dots (``"encoder.layer.*.mlp"``), and ``first:last`` for all that lies between the input
            of one module and the output of another (``"h.1:h.3"``,
            ``"encoder.layer.*.intermediate:encoder.layer.*.output.dense"``); what passes by the
            first module (a residual stream) is no part of it. The empty name is the model itself.
            If None, every MLP that has a closed form.
        cotangent: ``v`` of the centroids ``J^T v``: shape ``(d_out,)``, or from
            `lch_plugin.cotangents` but for `Logit`; all ones if None. A `Metric` is of what the
            model as a whole returns, and its centroids are there once it has.
        **settings: how centroids are taken, by the names of `lch_plugin.sites.Settings`:
            ``linearization``, ``expert``, ``output_positions``, and ``radius`` or ``sigma`` with
            ``n_samples``, ``neighbourhood``, ``centre`` and ``generator``. What they give beside a
            centroid is in the cache under its name with an ending: ``"h.5.mlp_offset"``. The
            detached linearisation and the local centroid of anything but an MLP with a closed form
            run a module again, which has to be one: the first to prove itself at its first pass.

    Raises:
        InputError: the model is no module, or the cotangent or settings none that work here.
        AttachError: the model is one of TransformerLens.
        SiteError: no such module, or one whose weights are not loaded or quantised.
        VanishingCentroidError: the cotangent reads nothing of what an MLP writes; of what another
            component writes this is raised when it first runs.

    Example:
        >>> with lch.huggingface.attach(model, "h.*.mlp") as handle:
        ...     model(**inputs)
        >>> handle.cache["h.5.mlp"]  # (batch, pos, d_model)
    """
    if isinstance(cotangent, Logit):
        raise InputError(
            f"cotangent {cotangent.name!r} lies in the residual stream, and which modules are the "
            "final norm and the unembedding is known of TransformerLens' models: use lch.attach, "
            "or lch.cotangents.logit_difference."
        )
    targets = resolve_modules(model, modules)
    return Handle(model, targets, Settings(cotangent=cotangent, **settings))


def resolve_modules(model: nn.Module, modules: str | Iterable[str] | None) -> list[Target]:
    """Components that the argument of `attach` stands for; raises as it does."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; a torch.nn.Module is needed.")
    if modules is None:
        check_loaded(model, "the model")
        modules = mlp_names(model)
        if not modules:
            raise SiteError(
                f"{type(model).__name__} has no MLP with a closed form. Name the modules you want: "
                "modules=['encoder.layer.*']."
            )
    patterns = [modules] if isinstance(modules, str) else list(modules)
    if not patterns:
        raise InputError("modules is empty: name at least one.")
    return resolve(model, patterns)


Sink = tuple[Callable[[dict[str, Tensor]], None], Callable[[], bool]]


def make_readers(
    model: nn.Module,
    targets: list[Target],
    settings: Settings,
    sink: Callable[[Target], Sink],
    wait: Callable[[Running, Waiting], None] | None = None,
) -> list[Reader]:
    """Readers of components, not yet installed.

    Args:
        model: their model.
        targets: the components.
        settings: how centroids are taken.
        sink: where the values of each one's calls go, by ending, and whether anybody wants them.
        wait: where calls go whose cotangent is known only from the logits; None if there are none.
    """
    if hasattr(model, "hook_dict"):
        raise AttachError(
            f"model is a {type(model).__name__}, whose components have hook points and are called "
            "in ways of their own. Attach it with lch.attach."
        )
    graph = _graph_of(model)
    readers: list[Reader] = []
    for target in targets:
        first, last = (model.get_submodule(name) for name in (target.first, target.last))
        for module, name in {first: target.first, last: target.last}.items():
            if _is_container(module):
                raise SiteError(
                    f"{name} is a {type(module).__name__}, which holds modules and is never "
                    f"called. Name what it holds: {name}.*"
                )
            if not is_offloaded(module):
                check_loaded(module, name or "the model")
        publish, is_wanted = sink(target)
        modules = (first, last, _around(model, target))
        is_within = first is not last and (first in {*last.modules()} or last in {*first.modules()})
        options: dict[str, Any] = {
            "models": _models_around(model, target),
            "publish": publish,
            "is_wanted": is_wanted,
            "wait": wait,
        }
        structure = None
        # Weights that come and go with each call are in the graph of that call alone.
        if not is_within and not (is_offloaded(first) or is_offloaded(last)):
            with graph.turn:  # Its weights are converted for as long as it is tried out.
                structure = recognise(first, None if last is first else last)
        if structure is not None and settings.linearization == "jacobian":
            readers.append(
                ClosedFormReader(target, modules, settings, graph, structure=structure, **options)
            )
        elif settings.is_local:
            readers.append(LocalReader(target, modules, settings, graph, **options))
        else:
            mixes = structure is None
            readers.append(
                VJPReader(target, modules, settings, graph, mixes_positions=mixes, **options)
            )
    return readers


def _graph_of(model: nn.Module) -> Graph:
    """One for models that share modules, as a model and a part of it do."""
    modules = list(model.modules())
    graph = next((_graphs[m] for m in modules if m in _graphs), Graph())
    _graphs.update(dict.fromkeys(modules, graph))
    return graph


def _around(model: nn.Module, target: Target) -> nn.Module:
    """The innermost module that is called and encloses both ends."""
    if target.first == target.last:
        return model.get_submodule(target.first)
    ends = [name.split(".") for name in (target.first, target.last)]
    shared = 0
    while all(len(e) > shared + 1 for e in ends) and ends[0][shared] == ends[1][shared]:
        shared += 1
    module = model.get_submodule(".".join(ends[0][:shared]))
    while _is_container(module):
        shared -= 1
        module = model.get_submodule(".".join(ends[0][:shared]))
    return module


def _models_around(model: nn.Module, target: Target) -> list[PreTrainedModel]:
    """The models of transformers that a component is a part of, or is itself; innermost first."""
    names = [target.first]
    while names[-1]:
        names.append(names[-1].rpartition(".")[0])
    around = (model.get_submodule(name) for name in names)
    return [module for module in around if isinstance(module, PreTrainedModel)]


def _is_container(module: nn.Module) -> bool:
    """Whether it only holds modules, as a ModuleList does, and is never called."""
    return type(module).forward is nn.Module.forward


def context_length(model: nn.Module) -> int | None:
    """The longest sequence a HuggingFace model reads, if its config says."""
    config: Any = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions")
    return next((n for name in names if (n := getattr(config, name, None))), None)


def model_name(model: nn.Module) -> str:
    """Where a HuggingFace model came from, or the class of one that does not say."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return portable(name) or type(model).__name__
