"""Reading what says what files hold: JSON that is declared, and believed only where it fits.

A record may have been edited, cut off, or made by somebody else. So each kind has a schema, a
subclass of `Record`, and `read_record` gives one that fits it or one line that says what does not.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lch_plugin.errors import InputError

# Longer files are no records: the largest, of a cache of a million shards, has 0.3 GB.
_MOST_BYTES = 2**30
# As many things as can be counted: 2^63 - 1.
_MOST = 2**63 - 1


class Record(BaseModel):
    """A record in which every name is known, and every value is of its type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _within(name: str) -> str:
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError("is no name of a file in this directory")
    return name


#: A number of things, zero or more.
Count = Annotated[int, Field(ge=0, le=_MOST)]
#: One or more.
Positive = Annotated[int, Field(ge=1, le=_MOST)]
#: An xxh3 of 128 bits, as `lch_plugin.files.hash_file` has it.
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
#: Where a file is in the directory of its record: below it, with ``/``.
FileName = Annotated[str, AfterValidator(_within)]

R = TypeVar("R", bound=BaseModel)


def read_record(path: Path, schema: type[R], cure: str) -> R:
    """Read a JSON file that has to fit a schema.

    Args:
        path: of the file.
        schema: what it has to hold.
        cure: what to do if it does not, a sentence.

    Raises:
        InputError: it cannot be read, is no plain file or no JSON, says a name twice, or does not
            fit. One line, with the first thing that is wrong.
    """
    return check_record(read_json(path, cure), schema, str(path), cure)


def check_record(content: Any, schema: type[R], where: str, cure: str) -> R:
    """What was read, as the schema has it.

    Raises:
        InputError: it does not fit; ``where`` names what was read.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", not {_shortened(first['input'])}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(
            f"{where} is damaged or was edited: {place or 'all of it'}: "
            f"{first['msg']}{found}{more}. {cure}"
        ) from None


def read_json(path: Path, cure: str) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: as `read_record`.
    """
    check_plain(path, cure)
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or no record: {reason(error)}. {cure}") from error


def parse_json(text: str) -> Any:
    """Of JSON as the standard has it: each name once, and no number that is none.

    Raises:
        ValueError: it is not.
        RecursionError: it is nested without end.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def check_plain(path: Path, cure: str) -> os.stat_result:
    """Refuse what reading would wait for, or never end: pipes, devices, and endless files.

    Raises:
        InputError: there is none, or it is no plain file.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}. {cure}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is no plain file. {cure}")
    if path.suffix == ".json" and found.st_size > _MOST_BYTES:
        raise InputError(f"{path} has {found.st_size:,} bytes, too many for a record. {cure}")
    return found


def reason(error: BaseException) -> str:
    """What an error says, on one line and without a full stop."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split()).rstrip(".")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it says {_shortened(twice)} twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
