"""Writing output so that nothing half-written ever bears its final name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lch_plugin.errors import OutputError

#: In a directory that was made in parts, what was asked for.
SETTINGS = "settings.json"


def check_new_directory(path: str | Path) -> Path:
    """Refuse a path that cannot become a new directory, before any work is done for it.

    Returns:
        The path, absolute and with links followed.

    Raises:
        OutputError: the path holds other content already, or its parent cannot be written.
    """
    try:
        path = Path(path).resolve()
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {error}. Choose another path.") from error
    if taken:
        raise OutputError(f"{path} exists with other content. Choose a new path, or remove it.")
    return path


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path`` that takes its name when the block succeeds.

    An exception, Ctrl-C included, leaves ``path`` as it was.

    Raises:
        OutputError: as `check_new_directory`.
    """
    path = check_new_directory(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def resumable_directory(path: str | Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a directory beside ``path`` that outlives an interruption, for long work in parts.

    It is called ``.NAME.partial``, says in ``settings.json`` what is being made, and takes the name
    of ``path`` when the block succeeds. After an exception, or a process that was killed, the next
    call with the same settings yields it again with what was finished. Write each part with
    `new_directory`, so that a part that exists is whole: what such a block left unfinished is
    removed here.

    Args:
        path: an absent or empty directory.
        settings: everything that decides the content, in terms of JSON.

    Raises:
        OutputError: as `check_new_directory`; or the unfinished work has other settings.
    """
    path = check_new_directory(path)
    partial = path.with_name(f".{path.name}.partial")
    record = partial / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if differing:
            raise OutputError(
                f"{partial} holds unfinished work with other settings: {', '.join(differing)} "
                "differ. Repeat the call it was begun with, choose another path, or remove it."
            )
        for unfinished in [p for p in partial.rglob(".*-*") if p.is_dir()]:
            shutil.rmtree(unfinished, ignore_errors=True)
    else:
        with new_directory(partial) as directory:
            text = json.dumps(wanted, indent=2, ensure_ascii=False)
            (directory / SETTINGS).write_text(text + "\n", encoding="utf-8")
    yield partial
    partial.replace(path)


def write_file(path: str | Path, text: str) -> None:
    """Put text in place of a file, or leave it as it was.

    Raises:
        OutputError: it cannot be written.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Choose another path.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    # mkdtemp makes private directories; what we leave behind should be like any other.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def portable(name: str) -> str:
    """A model's name, or its path; of a path within this package, the part that every machine has.

    >>> portable("gpt2")
    'gpt2'
    """
    package = Path(__file__).parent
    path = Path(name)
    return str(path.relative_to(package.parent)) if path.is_relative_to(package) else name
