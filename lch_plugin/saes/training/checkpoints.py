"""Checkpoints of SAELens' trainers: whole or absent, and resumed only as they were written.

A checkpoint is a directory named after its number of tokens. SAELens' ``trainer_state.pt`` in it is
a torch file, which torch reads without running code that it may hold (``weights_only=True``, its
default since 2.6).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    MultiSAETrainingRunnerConfig,
    TrainingSAEConfig,
)
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from lch_plugin.errors import InputError, OutputError
from lch_plugin.files import (
    CONTENTS,
    check_contents,
    remove_directory,
    remove_leftovers,
    write_directory,
)
from lch_plugin.records import check_plain, read_json, reason

#: A directory with this file is a checkpoint.
CHECKPOINT_FILE = TRAINER_STATE_FILENAME
#: What a checkpoint holds beside SAELens' files: the state of torch's generator, and how many
#: batches scale and mean were estimated from.
RESUME_FILE = "lch_resume.safetensors"
# What decides which rows of a cache come when.
_ORDER = (
    "hook_name",
    "context_size",
    "train_batch_size_tokens",
    "n_batches_in_buffer",
    "exclude_special_tokens",
    "seed",
)

_Config: TypeAlias = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, of one SAE or of several."""
    return any(path.glob(CHECKPOINT_FILE)) or any(path.glob(f"*/{CHECKPOINT_FILE}"))


class Regularly:
    """Checkpoints every so many minutes, of which only the newest stays.

    What is measured is the time since the last one was written, so that writing them never takes
    most of it. Checkpoints that SAELens is told to write stay.

    Args:
        trainer: of SAELens, after `save_whole`.
        minutes: between two.
    """

    def __init__(self, trainer: Any, minutes: float) -> None:
        self._trainer, self._minutes = trainer, minutes
        self._written: Path | None = None
        self._since = time.monotonic()

    def __call__(self) -> None:
        """Write one if it is time; to be called between two steps."""
        trainer = self._trainer
        n, base = trainer.n_training_samples, trainer.cfg.checkpoint_path
        is_under_way = 0 < n < trainer.cfg.total_training_samples
        if not is_under_way or time.monotonic() - self._since < 60 * self._minutes:
            return
        path = Path(base, str(n))
        is_new = not path.exists()
        trainer.save_checkpoint(checkpoint_name=path.name)
        if is_new and _is_good(path):
            if self._written is not None:
                remove_directory(self._written)
            self._written = path
        self._since = time.monotonic()


def save_whole(trainer: Any, check: Callable[[], None]) -> None:
    """Make a trainer of SAELens write checkpoints that are whole when they have their name.

    ``check`` is called first, and raises where there is nothing worth keeping.

    One that cannot be written is a warning that says where it is kept instead: training goes on.
    """
    save, base = trainer.save_checkpoint, trainer.cfg.checkpoint_path
    if base is None:
        return
    for run in Path(base).parent.glob("*/"):
        remove_leftovers(run)

    def write(directory: Path) -> None:
        # SAELens puts a directory of the name that it is told into one that the settings name.
        trainer.cfg.checkpoint_path = str(directory.parent)
        try:
            save(checkpoint_name=directory.name)
        finally:
            trainer.cfg.checkpoint_path = base

    def save_checkpoint(checkpoint_name: str, **_more: Any) -> None:
        path = Path(base, checkpoint_name)
        if _is_good(path):
            return  # Interrupted right after it was written.
        check()
        try:
            write_directory(path, write)
        except OutputError as error:
            warnings.warn(f"a checkpoint was not written. {error}", stacklevel=2)

    trainer.save_checkpoint = save_checkpoint


def save_resume_file(checkpoint: Path | None, n_estimate: int) -> None:
    """Write what a checkpoint holds beside SAELens' files."""
    if checkpoint is not None:
        state = {"rng": torch.get_rng_state(), "n_estimate": torch.tensor(n_estimate)}
        save_file(state, checkpoint / RESUME_FILE)


def read_resume_file(checkpoint: str) -> dict[str, Tensor] | None:
    """What `save_resume_file` wrote; None if SAELens alone wrote the checkpoint."""
    path = Path(checkpoint) / RESUME_FILE
    return load_file(path) if path.exists() else None


def n_batches_taken(config: LanguageModelSAERunnerConfig[Any]) -> int:
    """How many batches of a stream a checkpoint's run had used.

    Raises:
        InputError: it does not say.
    """
    assert config.resume_from_checkpoint is not None
    checkpoint = Path(config.resume_from_checkpoint)
    state = read_resume_file(config.resume_from_checkpoint)
    if state is None or not checkpoint.name.isdigit():
        raise InputError(
            f"resume_from_checkpoint={config.resume_from_checkpoint!r} holds no {RESUME_FILE}, or "
            "is not named after its number of tokens: it is no checkpoint that lch.saes.train "
            "wrote on the way, from which a run on a cache can be resumed."
        )
    return int(state["n_estimate"]) + int(checkpoint.name) // config.train_batch_size_tokens


def newest_good(run: Path) -> Path | None:
    """Of the checkpoints of a run, the last whose files are what they were."""
    found = [path for path in run.glob("*/") if path.name.isdigit()]
    newest_first = sorted(found, key=lambda path: int(path.name), reverse=True)
    return next(filter(_is_good, newest_first), None)


def check_checkpoint(config: _Config, checkpoint: Path) -> None:
    """Refuse a checkpoint that is damaged, or of another run than is to be resumed.

    Raises:
        InputError: so it is; with the newest one of its run that is good.
    """
    if isinstance(config, MultiSAETrainingRunnerConfig):
        saes, is_cached = config.saes, False
    else:
        saes, is_cached = {"": config.sae}, config.use_cached_activations
    needed = [Path(name, TRAINER_STATE_FILENAME) for name in saes]
    if not is_cached:
        needed.append(Path(ACTIVATIONS_STORE_STATE_FILENAME))
    for file in needed:
        if not (checkpoint / file).is_file():
            raise InputError(
                f"resume_from_checkpoint={str(checkpoint)!r} is no directory with a file {file}, "
                f"so no checkpoint of such a run. {_cure(checkpoint)}"
            )
    try:
        is_ours = check_contents(checkpoint, "")
    except InputError as error:  # Only now are the others of its run looked at.
        raise InputError(f"{str(error).rstrip()} {_cure(checkpoint)}") from error
    if not is_ours and (checkpoint / RESUME_FILE).exists():
        raise InputError(
            f"resume_from_checkpoint={str(checkpoint)!r} has lost its {CONTENTS}, by which its "
            f"files are checked. {_cure(checkpoint)}"
        )
    if not is_ours:
        for name in saes:
            _check_state(checkpoint / name / TRAINER_STATE_FILENAME)
    if is_cached:
        wanted = config.to_dict()
        _check_same(checkpoint / RUNNER_CFG_FILENAME, {name: wanted[name] for name in _ORDER})
    for name, sae in saes.items():
        saved = check_sae(checkpoint / name, sae)
        if saved.get("normalize_activations") != sae.normalize_activations:
            raise InputError(
                f"resume_from_checkpoint={str(checkpoint)!r} has normalize_activations="
                f"{saved.get('normalize_activations')!r} and not {sae.normalize_activations!r}. "
                "If it was written when training was done, the scale is folded into its weights, "
                "and scaled once more they would be wrong: resume from one written on the way, or "
                "start from this one with from_pretrained_path."
            )


def check_sae(directory: Path, sae: TrainingSAEConfig) -> dict[str, Any]:
    """Refuse a saved SAE of another kind than is to be trained.

    Returns:
        Its configuration.

    Raises:
        InputError: it is of another kind, or cannot be read.
    """
    wanted = {"architecture": sae.architecture(), "d_in": sae.d_in, "d_sae": sae.d_sae}
    return _check_same(directory / SAE_CFG_FILENAME, wanted)


def _check_same(file: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} does not exist: {file.parent} is none that SAELens wrote.")
    found = read_json(file, "Give another one.")
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no configuration of SAELens. Give another one.")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{name}={value!r}, but {file} has {found.get(name)!r}. Set it to that. (SAELens "
                "saves a finished BatchTopK SAE as a JumpReLU one; its checkpoints are BatchTopK.)"
            )
    return found


def _check_state(file: Path) -> None:
    """Of a checkpoint that says no hashes: that torch can read it, and need run nothing in it."""
    check_plain(file, "Give another checkpoint.")
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # Of many types, and all of them about the file.
        raise InputError(
            f"{file} is damaged, or holds more than tensors and numbers: {reason(error)[:200]}. "
            "Give another checkpoint."
        ) from error


def _cure(checkpoint: Path) -> str:
    good = newest_good(checkpoint.parent)
    if good is None or good == checkpoint:
        return (
            "Give one below checkpoint_path that is named after its number of tokens, or start "
            "again without."
        )
    return f"The newest good one of its run is {good}."


def _is_good(checkpoint: Path) -> bool:
    try:
        return check_contents(checkpoint, "")
    except InputError:
        return False
