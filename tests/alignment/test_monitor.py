"""A monitor measures, and the training run does not notice it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import lch_plugin as lch
from lch_plugin.alignment import Monitor, TrainerMonitor, lightning_monitor, measure
from lch_plugin.errors import InputError, SiteError

FIELDS = ["alignment", "centroid_norm", "first_component", "effective_rank"]


def network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 3)]
    return nn.Sequential(*layers), torch.randn(8, 6)


def test_an_update_measures_in_evaluation_mode() -> None:
    model, x = network()
    monitor = Monitor(model, x, "1:")
    record = monitor.update(7)
    expected = measure(model.eval(), x, "1:")
    assert record == {"step": 7, **vars(expected)}
    assert list(record) == ["step", *FIELDS]


def train(model: nn.Module, x: Tensor, monitor: Monitor | None) -> list[Tensor]:
    torch.manual_seed(1)
    model[2].eval()  # One module in another mode than the rest.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(4):
        loss = model(x).square().mean() + nn.functional.dropout(x).mean()
        loss.backward()
        if monitor is not None:
            monitor.update(step)
        optimizer.step()
        if step % 2:
            optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def test_training_goes_on_bit_for_bit_as_without_it() -> None:
    model, x = network()
    model.train()
    other = copy.deepcopy(model)
    monitor = Monitor(model, x)
    watched, alone = train(model, x, monitor), train(other, x, None)
    assert torch.equal(torch.stack(watched), torch.stack(alone))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    assert model[0].training
    assert not model[2].training
    assert len(monitor.history) == 4


def test_a_measurement_that_fails_leaves_the_model_as_it_was() -> None:
    model, x = network()
    monitor = Monitor(model.train(), x)
    with torch.no_grad():
        model[0].weight[:] = torch.nan
    with pytest.raises(lch.NonFiniteError):
        monitor.update(0)
    assert all(m.training for m in model.modules())
    assert monitor.history == []


def test_grad_modes_do_not_matter() -> None:
    model, x = network()
    monitor = Monitor(model.eval(), x)
    with torch.no_grad():
        first = monitor.update(0)
        assert not torch.is_grad_enabled()
    assert {**first, "step": 1} == monitor.update(1)
    assert all(p.grad is None for p in model.parameters())


def test_the_history_goes_to_json_and_to_pandas(tmp_path: Path) -> None:
    model, x = network()
    monitor = Monitor(model.eval(), {"input": x}, "0", rank=False)
    monitor.update(0)
    monitor.update(10)
    monitor.save(tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["history"] == monitor.history
    assert content["of"]["site"] == "0"
    assert content["of"]["cotangent"] == "ones"
    assert content["of"]["n_items"] == 8
    # A linear layer: all centroids are equal.
    assert content["history"][0]["first_component"] is None
    assert list(monitor.to_dataframe()["step"]) == [0, 10]
    assert "2 updates" in repr(monitor)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_transformers_trainer_has_the_measures_in_its_log(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(16, 6)
    data = [{"x": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(x)]
    monitor = Monitor(model, {"x": x}, "body.1:")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        logging_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[TrainerMonitor(monitor)])
    trainer.train()
    assert [record["step"] for record in monitor.history] == [2, 4, 6]
    logged = {e["step"]: e for e in trainer.state.log_history if "loss" in e}
    assert list(logged) == [2, 4, 6]
    for record in monitor.history:
        for name in FIELDS:
            assert logged[record["step"]][f"alignment/{name}"] == record[name]


class Module(nn.Linear):
    """What a callback sees of Lightning's module."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.logged: list[dict[str, float]] = []

    def log_dict(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def test_a_loop_that_calls_as_lightning_does_has_the_measures_in_its_log() -> None:
    module, x = Module(), torch.randn(8, 6)
    monitor = Monitor(module, x)
    callback: Any = lightning_monitor(monitor, every=2)
    for batch in range(8):
        step = (batch + 1) // 2  # Gradients of two batches make a step.
        trainer = SimpleNamespace(global_step=step)
        callback.on_train_batch_end(trainer, module, None, x, batch)
    assert [record["step"] for record in monitor.history] == [0, 2, 4]
    assert len(module.logged) == 3
    assert set(module.logged[0]) == {f"alignment/{n}" for n in FIELDS if n != "first_component"}


def test_bad_input_is_refused_in_one_line(as_users_run: None) -> None:
    model, x = network()
    monitor = Monitor(model, x)
    cases: list[tuple[type[Exception], str, Any]] = [
        (InputError, "two items or more", lambda: Monitor(model, x[:1])),
        (InputError, "two items or more", lambda: Monitor(model, {"text": "a"})),
        (InputError, "not finite", lambda: Monitor(model, x * torch.nan)),
        (SiteError, "fits no module", lambda: Monitor(model, x, "head")),
        (InputError, "step=-1", lambda: monitor.update(-1)),
        (InputError, "step=1.5", lambda: monitor.update(1.5)),  # type: ignore[arg-type]
        (InputError, "every=0", lambda: lightning_monitor(monitor, every=0)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
