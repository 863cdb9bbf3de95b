"""Writing files so that what bears its final name is whole and what is finished is kept.

Everything that the package writes goes through here. A directory is made beside its final name,
gets a record of its files (`CONTENTS`, with a hash of each), is put on the disk, and takes its name
in one step. Whoever writes a path holds a lock on it (`claimed`) that ends with the process, and so
may remove what killed runs left beside it. Where a path cannot be written in the end, what was to
be written is kept in another place, which the error names.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from filelock import FileLock, Timeout

from lch_plugin.errors import InputError, LCHError, OutputError
from lch_plugin.records import (
    Count,
    FileName,
    Hash,
    Record,
    check_plain,
    read_json,
    read_record,
    reason,
)

#: In a directory that the package wrote, the hash of each of its files.
CONTENTS = "files.json"
#: In a directory that was made in parts, what was asked for.
SETTINGS = "settings.json"
# In a directory that is being written: that it is ours to remove if its process was killed.
_UNFINISHED = ".lch-unfinished"
# How the names of files and directories end that have not got their own yet.
_UNDER_WAY = r"-[a-z0-9_]{8}\.tmp"
_BLOCK = 2**24
_MOST_NAMES = 1000
# Seconds that writing one file waits for another process that writes the same.
_PATIENCE = 10.0
# What only writing can meet with.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)

T = TypeVar("T")


class FileRecord(Record):
    """A file as it was written.

    Attributes:
        n_bytes: its size.
        xxh3: of its content.
    """

    n_bytes: Count
    xxh3: Hash


class Contents(Record):
    """The files of a directory, by name."""

    files: dict[FileName, FileRecord]


# Locks that this process holds, by path, with the thread that does.
_held: dict[Path, int] = {}


def check_new_directory(path: str | Path) -> Path:
    """Refuse a path that cannot become a new directory, before any work is done for it.

    Returns:
        The path, absolute and with links followed.

    Raises:
        OutputError: the path holds other content already, its parent cannot be written, or another
            process is at work on it.
    """
    with claimed(path) as found:
        return found


@contextmanager
def claimed(path: str | Path) -> Iterator[Path]:
    """Be the only process that writes a new directory, for as long as the block takes.

    The lock is that of the operating system, and ends with the process however it ends. What killed
    runs left beside the path is removed: of that only what this module made.

    Yields:
        The path, absolute and with links followed.

    Raises:
        OutputError: as `check_new_directory`.
    """
    try:
        path = Path(path).expanduser().resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(**_named_for(path)):
            pass
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(
            f"{path} cannot be written: {reason(error)}. Choose another path."
        ) from error
    with locked(path):
        if _is_taken(path):
            raise OutputError(f"{path} exists with other content. Choose a new path, or remove it.")
        yield path


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Be the only process that writes to a path, and remove what killed ones left beside it.

    Args:
        path: absolute, and with links followed.
        patience: seconds to wait for another process.

    Raises:
        OutputError: another process is at work on it, or its directory cannot be written.
    """
    thread = threading.get_ident()
    if _held.get(path) == thread:
        yield  # By a caller of ours.
        return
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise OutputError(
            f"{path} is being written by another process. Wait for it, or choose another path."
        ) from None
    except OSError as error:
        raise OutputError(f"{_unwritable(path, error)}") from error
    _held[path] = thread
    try:
        _remove_leftovers(path.parent, path.name)
        yield
    finally:
        del _held[path]
        file.unlink(missing_ok=True)  # Still held, so that nobody's but ours is removed.
        lock.release()


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path`` that takes its name when the block succeeds.

    An exception, Ctrl-C included, leaves ``path`` as it was. For what takes long to make use
    `write_directory`, which does not lose it.

    Raises:
        OutputError: as `claimed`; or the name was taken meanwhile, and then the directory is kept
            beside it, under the name that the error says.
    """
    with claimed(path) as path:
        temporary = _temporary(path)
        try:
            yield temporary
            _finish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_directory(path: str | Path, write: Callable[[Path], T]) -> T:
    """Make a directory of what is finished, and lose it under no circumstances.

    Args:
        path: where; in the end it holds what ``write`` writes, and `CONTENTS`.
        write: writes everything into the directory that it is given. It is called again, for
            another place, if the path cannot be written.

    Raises:
        OutputError: the path cannot be written. The error says where everything is kept: beside the
            path, or if there is no room, where the system has its temporary files.
    """
    path = Path(path).expanduser().resolve()
    try:
        with new_directory(path) as directory:
            return write(directory)
    except Exception as error:
        if isinstance(error, _Kept):
            raise
        kept = _write_elsewhere(path, write)
        if kept is None and not isinstance(error, OSError):
            raise  # It is not the place.
        where = "nothing could be kept" if kept is None else f"everything is kept in {kept}"
        said = str(error) if isinstance(error, LCHError) else _unwritable(path, error)
        raise OutputError(f"{said} Of this run {where}.") from error


def unfinished(path: Path) -> Path:
    """Where work in parts is kept until all of it is there: ``.NAME.partial``, beside its path."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def resumable_directory(path: str | Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a directory beside ``path`` that outlives an interruption, for long work in parts.

    It is called ``.NAME.partial``, says in ``settings.json`` what is being made, and takes the name
    of ``path`` when the block succeeds. After an exception, or a process that was killed, the next
    call with the same settings yields it again with what was finished. Write each part with
    `new_directory` or `write_directory`, so that a part that exists is whole.

    Args:
        path: an absent or empty directory.
        settings: everything that decides the content, in terms of JSON.

    Raises:
        OutputError: as `claimed`; the unfinished work has other settings; or the disk refuses to
            take more, and then finished parts are kept.
        InputError: what the unfinished work says of itself cannot be read.
    """
    wanted = json.loads(json.dumps(settings))
    with claimed(path) as path:
        partial = unfinished(path)
        with locked(partial):
            if partial.exists():
                _check_unfinished(partial, wanted)
                for parent in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
                    if parent.exists():
                        _remove_leftovers(parent)
            else:
                with new_directory(partial) as directory:
                    _write_json(directory / SETTINGS, wanted)
        try:
            yield partial
            _finish(partial, path)
        except OSError as error:
            if isinstance(error, _Kept) or not _is_about(error, partial):
                raise
            said = str(error) if isinstance(error, LCHError) else _unwritable(partial, error)
            raise OutputError(
                f"{said} Finished parts are kept in {partial}: repeat the call, and it goes on "
                "after them."
            ) from error


def remove_leftovers(directory: Path) -> None:
    """Remove what killed runs left in a directory, but for what other processes are writing."""
    for found in list(directory.iterdir()) if directory.is_dir() else []:
        if name := re.fullmatch(rf"\.(.+)(?:{_UNDER_WAY}|\.lock)", found.name):
            with suppress(OutputError), locked(directory / name[1]):
                pass


def write_file(path: str | Path, text: str) -> None:
    """Put text in place of a file, or leave it as it was.

    Raises:
        OutputError: it cannot be written. The error says where the text is kept.
    """
    path = Path(path).expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, patience=_PATIENCE):
            replace_file(path, text)
    except (OSError, ValueError) as error:
        kept = _write_elsewhere(path, lambda place: _plain_write(place / path.name, text))
        where = "" if kept is None else f" It is kept in {kept / path.name}."
        raise OutputError(f"{_unwritable(path, error)}{where}") from error


def remove_directory(path: Path) -> None:
    """Remove a directory that this module made, so that it is whole or gone if the process dies."""
    grave = _temporary(path)
    path.replace(grave / path.name)
    shutil.rmtree(grave)


def replace_file(path: Path, text: str) -> None:
    """Put text in place of a file in one step, on the disk.

    Raises:
        OSError: the disk refuses; the file is as it was.
    """
    handle, name = tempfile.mkstemp(**_named_for(path))
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def seal(directory: Path) -> None:
    """Record every file of a directory, and see that all of them are on the disk."""
    (directory / CONTENTS).unlink(missing_ok=True)
    files = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.name != _UNFINISHED:
            sync_file(file)
            files[file.relative_to(directory).as_posix()] = {
                "n_bytes": file.stat().st_size,
                "xxh3": hash_file(file),
            }
    _write_json(directory / CONTENTS, {"files": files})
    for parent in (directory, *(p for p in directory.rglob("*") if p.is_dir())):
        sync_directory(parent)


def check_contents(directory: str | Path, cure: str) -> bool:
    """See that the files of a directory are what they were when it was written.

    Args:
        directory: that this package wrote; files that were added to it since do not matter.
        cure: what to do if they are not, a sentence.

    Returns:
        Whether the directory says what it holds. One that others wrote does not.

    Raises:
        InputError: a file is missing, damaged or another one, or the record is.
    """
    directory = Path(directory)
    if not os.path.lexists(directory / CONTENTS):
        return False
    for name, record in read_record(directory / CONTENTS, Contents, cure).files.items():
        found = check_plain(directory / name, cure)
        if found.st_size != record.n_bytes:
            raise InputError(
                f"{directory / name} has {found.st_size:,} bytes where {record.n_bytes:,} were "
                f"written. {cure}"
            )
        if hash_file(directory / name) != record.xxh3:
            raise InputError(f"{directory / name} has other content than was written. {cure}")
    return True


def hash_file(path: Path) -> str:
    """xxh3 of a file, read a block at a time."""
    xxh3 = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            xxh3.update(block)
    return xxh3.hexdigest()


def sync_file(path: Path) -> None:
    """See that what was written to a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """See that names given and taken in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def portable(name: str) -> str:
    """A model's name, or its path; of a path within this package, the part that every machine has.

    >>> portable("gpt2")
    'gpt2'
    """
    package = Path(__file__).parent
    path = Path(name)
    return str(path.relative_to(package.parent)) if path.is_relative_to(package) else name


class _Kept(OutputError):
    """The path could not be written, and what was to be there is in another place."""


def _remove_leftovers(parent: Path, name: str | None = None) -> None:
    """What killed runs left of a path, or of all in a directory that is ours alone."""
    of = r".+" if name is None else re.escape(name)
    temporary = re.compile(rf"\.{of}{_UNDER_WAY}")
    for found in [p for p in parent.iterdir() if not p.is_symlink()]:
        is_lock = name is None and re.fullmatch(r"\..+\.lock", found.name)
        if not is_lock and not temporary.fullmatch(found.name):
            continue
        if not found.is_dir():
            found.unlink(missing_ok=True)
        elif (found / _UNFINISHED).exists() or (found / CONTENTS).exists():
            shutil.rmtree(found, ignore_errors=True)
        else:  # Killed as it began; or somebody else's, with something in it.
            with suppress(OSError):
                found.rmdir()


def _named_for(path: Path) -> dict[str, Any]:
    """How `tempfile` names what will be called as ``path``: as `_UNDER_WAY` says."""
    return {"prefix": f".{path.name}-", "suffix": ".tmp", "dir": path.parent}


def _temporary(path: Path) -> Path:
    directory = Path(tempfile.mkdtemp(**_named_for(path)))
    (directory / _UNFINISHED).touch()
    return directory


def _finish(directory: Path, path: Path) -> None:
    """Record what a directory holds, and give it its name, or a free one if that is taken."""
    seal(directory)
    directory.chmod(0o777 & ~_umask())
    (directory / _UNFINISHED).unlink(missing_ok=True)
    try:
        if _is_taken(path):
            raise FileExistsError(None, "it exists with other content since this run began")
        directory.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        kept = _free(path)
        try:
            directory.replace(kept)
        except OSError:
            kept = directory
        raise _Kept(f"{_unwritable(path, error)} Of this run everything is kept in {kept}.") from (
            error
        )


def _write_elsewhere(path: Path, write: Callable[[Path], Any]) -> Path | None:
    """Write to a free name beside a path, or among temporary files; where, if it was possible."""
    for parent in (path.parent, Path(tempfile.gettempdir())):
        place = None
        with suppress(Exception):  # The next place, or none.
            place = _temporary(parent / path.name)
            write(place)
            seal(place)
            (place / _UNFINISHED).unlink()
            # The path itself is not ours to take: whoever is at work on it would find it taken.
            kept = _free(parent / path.name, also=parent != path.parent)
            place.replace(kept)
            return kept
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
    return None


def _free(path: Path, *, also: bool = False) -> Path:
    """A name like this one, or this one ``also``, that nothing has."""
    numbered = [path.with_name(f"{path.name}-{i}") for i in range(2, _MOST_NAMES)]
    return next(name for name in [path] * also + numbered if not os.path.lexists(name))


def _is_taken(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


def _check_unfinished(partial: Path, wanted: dict[str, Any]) -> None:
    cure = "Remove the directory, or choose another path."
    found = read_json(partial / SETTINGS, cure)
    if not isinstance(found, dict):
        raise InputError(f"{partial / SETTINGS} holds no settings. {cure}")
    differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    if differing:
        raise OutputError(
            f"{partial} holds unfinished work with other settings: {', '.join(differing)} "
            "differ. Repeat the call it was begun with, choose another path, or remove it."
        )


def _is_about(error: OSError, directory: Path) -> bool:
    """Whether an error is about writing to a directory, and not about what was read meanwhile."""
    named = str(error.filename or "")
    return (
        isinstance(error, OutputError)
        or error.errno in _OF_DISKS
        or named.startswith(f"{directory}{os.sep}")
    )


def _unwritable(path: Path, error: BaseException) -> str:
    return f"{path} cannot be written: {reason(error)}. Choose another path, or make room there."


def _write_json(path: Path, content: Any) -> None:
    _plain_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _plain_write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync_file(path)


def _umask() -> int:
    # mkdtemp makes private directories; what we leave behind should be like any other.
    mask = os.umask(0)
    os.umask(mask)
    return mask
