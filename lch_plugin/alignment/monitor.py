"""Measures at steps of a training run that does not notice them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.huggingface import model_name
from lch_plugin.adapters.states import evaluating
from lch_plugin.alignment.measures import measure
from lch_plugin.alignment.runs import Inputs, Model, find_component
from lch_plugin.cotangents import Cotangent, Ones
from lch_plugin.errors import InputError
from lch_plugin.files import write_file


class Monitor:
    """Measures a probe batch in evaluation mode, and keeps what it found.

    An update leaves the model and the run as they were: training mode of each module, gradients in
    ``.grad``, random states, grad mode.

    Attributes:
        history: a record for each update, as `update` returns it, in terms of JSON.

    Args:
        model, site, cotangent, output, rank: as `measure`.
        probe: the inputs to measure at, two items or more, always the same. They follow the model
            to its device.

    Raises:
        InputError: the probe has no tensor, or one item alone.
        SiteError: no such module, or several.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU())
        >>> monitor = lch.alignment.Monitor(model, torch.randn(16, 3))
        >>> sorted(monitor.update(step=0))
        ['alignment', 'centroid_norm', 'effective_rank', 'first_component', 'step']
    """

    def __init__(
        self,
        model: Model,
        probe: Inputs,
        site: str = "",
        *,
        cotangent: Float[Tensor, ...] | Cotangent | None = None,
        output: Callable[[Any], Tensor] | None = None,
        rank: bool = True,
    ) -> None:
        find_component(model, site)
        tensors = _tensors(probe)
        if not tensors or any(t.ndim == 0 or len(t) < 2 for t in tensors):
            shapes = [tuple(t.shape) for t in tensors]
            raise InputError(
                f"the probe has tensors of shapes {shapes}: pass two items or more, as the model "
                "takes them. A principal component needs two."
            )
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise InputError("the probe has values that are not finite (NaN or infinite).")
        self._model, self._probe, self._site = model, probe, site
        self._cotangent, self._output, self._rank = cotangent, output, rank
        self.history: list[dict[str, Any]] = []

    def update(self, step: int) -> dict[str, Any]:
        """Measure now.

        Args:
            step: of the training run, zero or more.

        Returns:
            The fields of `Measurement`, and the step.

        Raises:
            InputError: the step is no such number; or as `measure`.
            SiteError, NotDifferentiableError, NonFiniteError: as `measure`.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise InputError(f"step={step!r} must be an integer, zero or more.")
        with _unnoticed(self._model) as device:
            found = measure(
                self._model,
                _on(self._probe, device),
                self._site,
                cotangent=self._cotangent,
                output=self._output,
                rank=self._rank,
            )
        self.history.append({"step": step, **asdict(found)})
        return self.history[-1]

    def to_dataframe(self) -> pd.DataFrame:
        """The history, a row for each update."""
        return pd.DataFrame(self.history)

    def record(self) -> dict[str, Any]:
        """What was measured, in terms of JSON."""
        model, v = self._model, self._cotangent
        named = "vector" if isinstance(v, Tensor) else (v or Ones()).name
        return {
            "model": model_name(model) if isinstance(model, nn.Module) else type(model).__name__,
            "site": self._site,
            "cotangent": named,
            "n_items": len(_tensors(self._probe)[0]),
            "versions": {name: version(name) for name in ("lch-plugin", "torch")},
        }

    def save(self, path: str | Path) -> None:
        """Write record and history as JSON, in place of what is there.

        Raises:
            OutputError: the file cannot be written.
        """
        content = {"of": self.record(), "history": self.history}
        write_file(path, json.dumps(content, indent=2) + "\n")

    def __repr__(self) -> str:
        return f"Monitor({type(self._model).__name__}, {self._site!r}: {len(self.history)} updates)"


@contextmanager
def _unnoticed(model: Model) -> Iterator[torch.device | None]:
    """Evaluation mode and random states that come back; gives the device of the model."""
    is_module = isinstance(model, nn.Module)
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    device = next((t.device for t in tensors), None)
    cuda = [device] if device is not None and device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        evaluating(model) if is_module else nullcontext(),  # type: ignore[arg-type]
    ):
        yield device


def _tensors(inputs: Inputs) -> list[Tensor]:
    values = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
    return [value for value in values if isinstance(value, Tensor)]


def _on(inputs: Inputs, device: torch.device | None) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
