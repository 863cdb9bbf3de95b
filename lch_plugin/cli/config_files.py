"""``--config FILE.yaml``: options of a command in a file. Those on the command line win."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperCommand
from typer.main import get_command

from lch_plugin.errors import InputError
from lch_plugin.names import did_you_mean

# Of every command, what cannot be said in a file.
_NOT_HERE = ("config", "help")


class CommandWithConfig(TyperCommand):
    """A command whose options can be in a file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        others = typer.Typer(add_completion=False)
        others.command()(_has_config)
        (option,) = get_command(others).params
        option.callback = _read
        self.params.append(option)


def _read(ctx: Any, _option: Any, path: str | None) -> None:
    """Make the options of a file the command's defaults."""
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **_options(Path(path), ctx.command)}


def _has_config(
    config: Annotated[
        str | None,
        typer.Option(
            help="YAML file of these options; those on the command line win.",
            metavar="FILE.yaml",
            is_eager=True,
            expose_value=False,
        ),
    ] = None,
) -> None:
    """Of every such command, the option that it has besides its own."""


def _options(path: Path, command: Any) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--config {path} is no YAML file: {reason}. Give another.") from error
    if not isinstance(found, Mapping):
        raise InputError(f"--config {path} holds no options, as in 'tokens: 300000'. Add some.")
    known = {p.name: p for p in command.params if p.name not in _NOT_HERE}
    options: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise InputError(
                f"{key} of --config {path} is no option of this command. "
                f"{did_you_mean(name, sorted(known))}"
            )
        takes_many = known[name].multiple if hasattr(known[name], "multiple") else False
        takes_many = takes_many or known[name].nargs == -1
        if value is not None:
            options[name] = _as_given(value, takes_many=takes_many)
    return options


def _as_given(value: Any, *, takes_many: bool) -> Any:
    """As the command line would have it: settings as ``name=value``, lists with commas."""
    if isinstance(value, Mapping):
        return [f"{name}={json.dumps(one)}" for name, one in value.items()]
    if takes_many:
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, bool) else str(value)
