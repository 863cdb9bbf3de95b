"""Writing output so that nothing half-written ever bears its final name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lch_plugin.errors import OutputError


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


def _umask() -> int:
    # mkdtemp makes private directories; what we leave behind should be like any other.
    mask = os.umask(0)
    os.umask(mask)
    return mask
