"""Names of components: a module, or the stretch from one module to another, with wildcards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lch_plugin.adapters.structure import recognise
from lch_plugin.errors import InputError, SiteError
from lch_plugin.names import did_you_mean

# Between the first and the last module of a stretch.
SEPARATOR = ":"
_WILDCARD = re.compile(r"\*|\?|\[!?[^\]]+\]")
# Where BERT and its relatives keep the two halves of an MLP.
_HALVES = ("intermediate", "output.dense")


@dataclass(frozen=True)
class Target:
    """A component of a model: what lies between the input of ``first`` and the output of ``last``.

    Attributes:
        first, last: names of modules; the same for a single one. The empty name is the model.
    """

    first: str
    last: str

    @property
    def name(self) -> str:
        """As the user writes it."""
        return self.first if self.first == self.last else f"{self.first}{SEPARATOR}{self.last}"


def resolve(model: nn.Module, patterns: Iterable[str]) -> list[Target]:
    """The components that names with wildcards stand for, in the order of the model.

    ``*`` and ``?`` stand for a part of a name without dots, ``[0-3]`` for one character. In
    ``first:last`` what the wildcards of ``first`` stand for is put in place of those of ``last``;
    the empty name is the model, so ``first:`` reaches to its end.

    Raises:
        InputError: a pattern that is no string, or no pattern.
        SiteError: a pattern that fits no module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    order = {name: i for i, name in enumerate(modules)}
    found: dict[Target, None] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InputError(f"modules holds {pattern!r}; names of modules are strings.")
        found |= dict.fromkeys(_matches(pattern, modules))
    return sorted(found, key=lambda t: (order[t.last], order[t.first]))


def mlp_names(model: nn.Module) -> list[str]:
    """Names of every MLP with a closed form, those in two modules included (BERT)."""
    names: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        first, last = (_get(module, half) for half in _HALVES)
        if first is not None and last is not None and recognise(first, last) is not None:
            names.append(f"{prefix}{_HALVES[0]}{SEPARATOR}{prefix}{_HALVES[1]}")
        # Within an MLP there is no other.
        elif not any(_is_within(name, n) for n in names) and recognise(module) is not None:
            names.append(name)
    return names


def _matches(pattern: str, modules: dict[str, nn.Module]) -> list[Target]:
    first, separator, last = pattern.partition(SEPARATOR)
    try:
        expression = re.compile(_regex(first))
    except re.error as error:
        raise InputError(f"{first!r} is no pattern of names: {error}.") from error
    targets: list[Target] = []
    for name in modules:
        match = expression.fullmatch(name)
        if match is None or (first and not name):  # The model itself goes by no wildcard.
            continue
        end = _substitute(last, list(match.groups())) if separator else name
        if end not in modules:
            raise SiteError(
                f"{pattern!r}: {name!r} exists and {end!r} does not.{_hint(end, modules)}"
            )
        targets.append(Target(name, end))
    if not targets:
        raise SiteError(f"{pattern!r} fits no module of this model.{_hint(first, modules)}")
    return targets


def _regex(pattern: str) -> str:
    parts, end = [], 0
    for match in _WILDCARD.finditer(pattern):
        wildcard = {"*": "[^.]*", "?": "[^.]"}.get(match[0], match[0].replace("[!", "[^"))
        parts += [re.escape(pattern[end : match.start()]), f"({wildcard})"]
        end = match.end()
    return "".join((*parts, re.escape(pattern[end:])))


def _substitute(pattern: str, values: list[str]) -> str:
    wildcards = _WILDCARD.findall(pattern)
    if len(wildcards) > len(values):
        raise SiteError(f"{pattern!r} has more wildcards than the name before it.")
    return _WILDCARD.sub(lambda _: values.pop(0), pattern)


def _hint(name: str, modules: dict[str, nn.Module]) -> str:
    plain = _WILDCARD.sub("0", name)
    return f" {did_you_mean(plain, filter(None, modules))} model.named_modules() lists all."


def _is_within(name: str, other: str) -> bool:
    return name.startswith(f"{other}." if other else "")


def _get(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
