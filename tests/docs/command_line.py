"""Every command, its arguments and options, as the page lists them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.main import get_command

from lch_plugin import cli
from tests.docs import table

_TYPES = {int: "integer", float: "number", bool: "flag", str: "text", Path: "path"}


def commands() -> str:
    return "\n\n".join(_described(name, command) for name, command in _each(get_command(cli.app)))


def _each(command: Any, name: str = "lch") -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
    for word, sub in sorted(getattr(command, "commands", {}).items()):
        yield from _each(sub, f"{name} {word}")


def _described(name: str, command: Any) -> str:
    # An option of the class of commands, and of no function.
    hints = {"config": Path, **get_type_hints(command.callback)}
    parameters = [p for p in command.params if p.name in hints]
    arguments = [p.name.upper() for p in parameters if _is_argument(p)]
    return (
        f"## {name}\n\n{_line(command.help)}\n\n"
        f"    {' '.join([name, *arguments, '[OPTIONS]'])}\n\n"
        + table(("option", "type", "default", "what"), [_row(p, hints[p.name]) for p in parameters])
    )


def _row(parameter: Any, hint: Any) -> tuple[str, ...]:
    names = [*parameter.opts, *parameter.secondary_opts]
    shown = "`, `".join([parameter.name.upper()] if _is_argument(parameter) else names)
    within = (hint, *get_args(hint), *(a for h in get_args(hint) for a in get_args(h)))
    kind = next(_TYPES[t] for t in within if t in _TYPES)
    if parameter.multiple or parameter.nargs == -1:
        kind += ", repeatable"
    default = parameter.default if isinstance(parameter.default, str | int | float | Path) else ""
    said = "" if kind == "flag" or default == "" else f"`{default}`"
    return f"`{shown}`", kind, "needed" if parameter.required else said, _line(parameter.help)


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", r"\|")
