"""What a component of any model has, as rows: of images, sound, anything that comes in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.arguments import input_of, output_of
from lch_plugin.adapters.checks import known_at_once
from lch_plugin.adapters.hooked import real_tokens
from lch_plugin.adapters.huggingface import make_readers, model_name, resolve_modules
from lch_plugin.adapters.states import evaluating
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError
from lch_plugin.names import check_known
from lch_plugin.sites import Settings

Of = Literal["centroid", "input", "output"]


class Rows:
    """What one component of a model has at each token, one row a token.

    An iterable over tensors of rows, one for each batch. While a batch is under way the model is in
    evaluation mode and stops after the component; between batches it is as it was.

    Attributes:
        model: any module.
        batches: the model's inputs, tensors or mappings of keyword arguments, on any device; or
            pairs of a tensor and labels, which are left alone, as a DataLoader gives them.
        module: name of the component, as in `lch_plugin.huggingface.attach`. Of one that is called
            several times in a pass, rows are of the first call.
        of: its centroid, what it reads (``"input"``), or what it writes (``"output"``).
        positions: which tokens count. Of a ViT ``slice(0, 1)`` is the CLS token and
            ``slice(1, None)`` are the patches. Padding never does, where a batch has an
            ``attention_mask``.

    Raises:
        InputError: ``of`` is none of the three, positions are no slice, or the name fits several
            components.
        SiteError, VanishingCentroidError: as `lch_plugin.huggingface.attach`.

    Example:
        >>> rows = lch.saes.Rows(model, pixel_values.split(64), "encoder.layer.2.mlp")
        >>> sae = lch.saes.train_on(rows, TopKTrainingSAEConfig(d_in=64, d_sae=512, k=8), config)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
        module: str,
        *,
        of: Of = "centroid",
        positions: slice = slice(None),
        cotangent: Float[Tensor, " d_out"] | Cotangent | None = None,
    ) -> None:
        """Choose what rows are of; nothing runs yet."""
        check_known("of", of, get_args(Of))
        if isinstance(batches, Tensor | Mapping):
            raise InputError(
                "batches is a single one: pass a list of batches, such as pixel_values.split(64)."
            )
        if not isinstance(positions, slice):
            raise InputError(f"positions={positions!r} must be a slice, such as slice(1, None).")
        targets, v = resolve_modules(model, module), known_at_once(cotangent)
        if len(targets) > 1:
            raise InputError(f"module={module!r} fits {[t.name for t in targets]}: choose one.")
        self.model, self.batches, self.module = model, batches, module
        self.of, self.positions = of, positions
        self._first = model.get_submodule(targets[0].first)
        self._last = model.get_submodule(targets[0].last)
        self._found: list[Tensor] = []
        # An input or output has no cotangent that could be wrong for it.
        settings, sink = Settings(cotangent=v), (self._keep, lambda: True)
        is_centroid = of == "centroid"
        readers = make_readers(model, targets, settings, lambda _: sink) if is_centroid else []
        self._reader = readers[0] if readers else None

    def __iter__(self) -> Iterator[Float[Tensor, "_ d_in"]]:
        for batch in self.batches:
            value = self.value(batch)
            if value.ndim not in (2, 3):
                raise InputError(
                    f"{self.module}: its {self.of} has shape {tuple(value.shape)}; rows are of "
                    "tokens, (batch, pos, d), or (batch, d). Name a component that reads those."
                )
            if value.ndim == 2:
                yield value
                continue
            is_token = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
            tokens = real_tokens(self.model, batch)
            if tokens is not None and tokens.shape == is_token.shape:
                is_token = tokens.to(value.device)
            yield value[:, self.positions][is_token[:, self.positions]]

    def record(self) -> dict[str, Any]:
        """What the rows are of, in terms of JSON."""
        config = getattr(self.model, "config", None)
        return {
            **(self._reader.record() if self._reader else {"site": self.module}),
            "of": self.of,
            "positions": [self.positions.start, self.positions.stop, self.positions.step],
            "model": model_name(self.model),
            "revision": getattr(config, "_commit_hash", None),
            "lch_plugin_version": version("lch-plugin"),
        }

    def value(self, batch: Tensor | Mapping[str, Any] | Sequence[Any]) -> Float[Tensor, ...]:
        """What it has on one batch, padding and all positions included."""
        self._found.clear()
        hooks = []
        if self.of == "input":
            hooks.append(self._first.register_forward_pre_hook(self._on_input, with_kwargs=True))
        elif self.of == "output":
            hooks.append(self._last.register_forward_hook(self._on_output))
        elif self._reader is not None:
            self._reader.install()
        hooks.append(self._last.register_forward_hook(_stop))
        try:
            with torch.no_grad(), evaluating(self.model):
                if isinstance(batch, Mapping):
                    self.model(**{key: self._on_device(value) for key, value in batch.items()})
                else:  # Of a DataLoader's pairs the first.
                    first = batch[0] if isinstance(batch, tuple | list) else batch
                    self.model(self._on_device(first))
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
            if self._reader is not None:
                self._reader.remove()
        if not self._found:
            raise InputError(f"{self.module} was not called: the model's path does not lead there.")
        return self._found[0]

    def _keep(self, found: dict[str, Tensor]) -> None:
        self._found.append(found[""])

    def _on_device(self, value: Any) -> Any:
        device = next((p.device for p in self.model.parameters()), None)
        return value.to(device) if isinstance(value, Tensor) else value

    def _on_input(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._found.append(input_of((args, kwargs), self.module)[0].detach())

    def _on_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._found.append(output_of(output, self.module).detach())


class _Stop(Exception):
    """Nothing after the component is wanted."""


def _stop(*_: Any) -> None:
    raise _Stop
