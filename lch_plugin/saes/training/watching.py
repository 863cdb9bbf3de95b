"""Training that has gone wrong ends where it does, and not with an SAE of NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from lch_plugin.errors import InputError, NonFiniteError
from lch_plugin.progress import Advance
from lch_plugin.saes.training.checkpoints import newest_good

# Steps in a row in which no feature at all fires, after which none will.
_SILENT = 100


class Watch:
    """Trainers that raise where training diverges, and say how far they are.

    Attributes:
        advance: called with the number of rows of each step; of several trainers, of the first's.

    Args:
        trainers: of SAELens, by the name of the SAE.
        checkpoints: the directory of the run's checkpoints, the last good one of which errors name.
    """

    def __init__(
        self, trainers: Mapping[str, SAETrainer[Any, Any]], checkpoints: str | Path | None = None
    ) -> None:
        self._trainers, self._checkpoints = trainers, checkpoints
        self._n_steps = dict.fromkeys(trainers, 0)
        self._first = next(iter(trainers))
        self.advance: Advance = lambda n: None
        for name, trainer in trainers.items():
            trainer.step = partial(self._step, name, trainer.step)

    def check(self) -> None:
        """Refuse weights that are no numbers, and dictionaries of which nothing fires.

        Raises:
            NonFiniteError, InputError: so they are.
        """
        for name, trainer in self._trainers.items():
            for key, weight in trainer.sae.state_dict().items():
                if weight.is_floating_point() and not weight.isfinite().all():
                    raise NonFiniteError(self._diverged(name, f"{key} is not finite"))
            self._check_alive(name)

    def _step(self, name: str, step: Callable[[Tensor], Any], batch: Tensor) -> Any:
        self._n_steps[name] += 1
        output = step(batch)
        loss = float(output.loss.detach())
        if not math.isfinite(loss):
            raise NonFiniteError(self._diverged(name, f"the loss is {loss}"))
        if self._n_steps[name] % _SILENT == 0:
            self._check_alive(name)
        if name == self._first:
            self.advance(len(batch))
        return output

    def _check_alive(self, name: str) -> None:
        sae, n_steps = self._trainers[name].sae, min(self._n_steps[name], _SILENT)
        silent = self._trainers[name].n_forward_passes_since_fired
        if n_steps and int(silent.min()) >= n_steps:
            why = f"all {sae.cfg.d_sae} features are dead: none fired in {n_steps} steps"
            raise InputError(self._diverged(name, why))

    def _diverged(self, name: str, why: str) -> str:
        good = None if self._checkpoints is None else newest_good(Path(self._checkpoints))
        of = f" of {name}" if name else ""
        return (
            f"training{of} diverged at step {self._n_steps[name]} "
            f"({self._trainers[name].n_training_samples:,} tokens): {why}. "
            + (
                "There is no checkpoint to go back to. Lower lr."
                if good is None
                else f"The last good checkpoint is {good}. Resume from it with a lower lr."
            )
        )


def check_scale(name: str, scaler: ActivationScaler) -> None:
    """Refuse a scale that would make everything zero, or nothing a number.

    Raises:
        InputError: so it is.
    """
    scale = scaler.scaling_factor
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        of = f" of {name}" if name else ""
        raise InputError(
            f"the scale{of} is {scale}: the rows it is estimated from are all zero, or not finite. "
            "Train on other ones."
        )


def _cure(checkpoints: str | Path | None) -> str:
    good = None if checkpoints is None else newest_good(Path(checkpoints))
    if good is None:
        return "There is no checkpoint to resume from. Lower lr."
    return f"The last good checkpoint is {good}. Lower lr and resume from it."
