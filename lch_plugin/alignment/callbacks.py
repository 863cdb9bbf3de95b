"""A monitor where somebody else writes the loop: transformers' Trainer, Lightning's."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lch_plugin.alignment.monitor import Monitor
from lch_plugin.errors import InputError

_PREFIX = "alignment/"


class TrainerMonitor(TrainerCallback):
    """Measures whenever a transformers ``Trainer`` logs, and adds to the same entry of its log.

    The measures are in ``trainer.state.log_history``, and so in ``trainer_state.json``, as
    ``alignment/alignment``, ``alignment/centroid_norm`` and so on. ``logging_steps`` of the
    arguments says how often. Of several processes the first one measures. Callbacks that report
    elsewhere (TensorBoard) see the measures if they come later in the list of callbacks than this.

    Args:
        monitor: of the model that is trained.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[lch.alignment.TrainerMonitor(monitor)])
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure, and write it beside what is logged; once a step."""
        del args, control, kwargs
        history = self.monitor.history
        if not state.is_world_process_zero or (
            history and history[-1]["step"] == state.global_step
        ):
            return
        found = _named(self.monitor.update(state.global_step))
        state.log_history[-1].update(found)
        if logs is not None:
            logs.update(found)


class _BatchMonitor:
    """Measures after every so many batches, and logs through the module that is trained."""

    def __init__(self, monitor: Monitor, every: int) -> None:
        super().__init__()
        self.monitor, self.every = monitor, every

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        del outputs, batch, batch_idx
        step, history = int(trainer.global_step), self.monitor.history
        # Gradients are accumulated over several batches of one step.
        if step % self.every or (history and history[-1]["step"] == step):
            return
        found = _named(self.monitor.update(step))
        pl_module.log_dict({name: value for name, value in found.items() if value is not None})


def lightning_monitor(monitor: Monitor, every: int = 1) -> Any:
    """A callback for Lightning, or any loop that calls ``on_train_batch_end`` as Lightning does.

    It logs with ``pl_module.log_dict`` under the names of `TrainerMonitor`. Lightning is not needed
    here: if it is imported (``lightning.pytorch`` or ``pytorch_lightning``), the callback is one of
    its ``Callback``.

    Args:
        monitor: of the model that is trained.
        every: steps of the optimiser from one measurement to the next.

    Raises:
        InputError: ``every`` is below 1.

    Example:
        >>> trainer = Trainer(callbacks=[lch.alignment.lightning_monitor(monitor, every=100)])
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"every={every!r} must be an integer, 1 or more.")
    names = ("lightning.pytorch", "pytorch_lightning")
    bases = tuple(sys.modules[name].Callback for name in names if name in sys.modules)
    kind = type("LightningMonitor", (_BatchMonitor, *bases[:1]), {})
    return kind(monitor, every)


def _named(record: dict[str, Any]) -> dict[str, Any]:
    return {f"{_PREFIX}{name}": value for name, value in record.items() if name != "step"}
