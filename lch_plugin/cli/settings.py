"""``--setting name=value``: what SAELens' configuration of an SAE takes, and nothing else."""

from __future__ import annotations

import itertools
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lch_plugin.cli.options import MOST
from lch_plugin.errors import InputError

# Known from the model and from options of their own.
_NOT_HERE = {
    "d_in": "it is that of the hook point",
    "device": "give --device",
    "metadata": "training writes them",
}
# Ends of names of numbers that may be zero: what they weigh or delay is then left out.
_MAY_BE_ZERO = ("_coefficient", "_steps", "_lr", "residual_threshold")


def parse(pairs: list[str] | None) -> dict[str, Any]:
    """Of ``name=value`` pairs, numbers, lists and truth values as JSON has them."""
    parsed: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--setting {pair} is no name=value, such as k=32.")
        try:
            parsed[name] = json.loads(value)
        except (ValueError, RecursionError):  # Not JSON, or a number or a list beyond all bounds.
            parsed[name] = value
    return parsed


def split(parsed: dict[str, Any], *, wandb: bool) -> tuple[dict[str, Any], Any]:
    """Settings of the SAE, and SAELens' configuration of its logging.

    Args:
        parsed: as `parse` gives them.
        wandb: whether to log to it.

    Raises:
        InputError: a setting of the logging that is of another type, or without ``--wandb``.
    """
    from lch_plugin.saes.training.configs import LoggingConfig

    hints = get_type_hints(LoggingConfig)
    logging = {name: value for name, value in parsed.items() if name in hints}
    for name, value in logging.items():
        given = f"--setting {name}={json.dumps(value)}"
        if not wandb or name == "log_to_wandb":
            raise InputError(f"{given} is about logging to wandb, which --wandb turns on. Give it.")
        if not _fits(value, hints[name]) or (hints[name] is int and value < 1):
            raise InputError(f"{given}: SAELens takes {_in_words(hints[name])} there.")
    rest = {name: value for name, value in parsed.items() if name not in hints}
    return rest, LoggingConfig(log_to_wandb=wandb, **logging)


def check(architecture: str, settings: dict[str, Any], d_sae: int | None) -> None:
    """Refuse settings that no SAE of an architecture can have, before its model is loaded.

    Args:
        architecture: any that SAELens trains.
        settings: as `parse` gives them.
        d_sae: features; None if they depend on the model.

    Raises:
        InputError: an unknown architecture or name, a value of another type or out of range, or
            more features active than there are.
    """
    from lch_plugin.saes.training.configs import DTYPES, sae_config

    for name, reason in _NOT_HERE.items():
        if name in settings:
            raise InputError(f"--setting {name} cannot be set: {reason}. Leave it out.")
    sizes = {"d_in": 1, "d_sae": d_sae or MOST}
    hints = get_type_hints(type(sae_config(architecture, **sizes)))
    for name, value in settings.items():
        if name not in hints:
            continue  # The configuration says below which there are.
        given = f"--setting {name}={json.dumps(value)}"
        if not _fits(value, hints[name]):
            raise InputError(f"{given}: {architecture} takes {_in_words(hints[name])} there.")
        if name == "dtype" and value not in DTYPES:
            raise InputError(f"{given}: SAELens knows {', '.join(DTYPES)}. Use one of them.")
        may_be_zero = name.endswith(_MAY_BE_ZERO)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                # Of NaN neither is true.
                if not (0 < number <= MOST or (may_be_zero and number == 0)):
                    low = "from 0" if may_be_zero else "above 0"
                    raise InputError(f"{given}: give a number {low} up to {MOST:g}.")
    check_active(sae_config(architecture, **{**sizes, **settings}))


def check_active(config: Any) -> None:
    """Refuse more active features, or nested ones, than an SAE has.

    Raises:
        InputError: there are.
    """
    k, widths = getattr(config, "k", 0), getattr(config, "matryoshka_widths", None)
    if k > config.d_sae:
        raise InputError(
            f"k={k} of d_sae={config.d_sae} features cannot be active. Lower k with --setting "
            "k=..., or raise --d-sae."
        )
    if widths is not None:
        is_nested = all(small < large for small, large in itertools.pairwise(widths))
        if not widths or not is_nested or widths[-1] > config.d_sae:
            raise InputError(
                f"matryoshka_widths={widths} do not nest within d_sae={config.d_sae} features. "
                "Give growing numbers up to it, such as --setting matryoshka_widths=[64,256]."
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, *get_args(hint)) for v in value)
    return type(value) in ((int, float) if hint is float else (hint,))


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return str(hint) if get_args(hint) else str(hint.__name__)
