"""What two checkpoints differ in: by component, and by input."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lch_plugin.errors import InputError
from lch_plugin.files import write_file

#: What is known of every input.
Measure = Literal["jacobian", "centroids", "outputs", "activations"]


@dataclass(frozen=True)
class ComponentDifference:
    """How much one component changed, relative to what it was: 0 is not at all.

    Attributes:
        name: such as ``blocks.2.mlp``.
        layer: of a span its last.
        jacobian: ``|dJ|_F / |J|_F`` on the same inputs, estimated from random cotangents.
        jacobian_error: its standard error.
        centroids: of the centroids through the one cotangent, on the same inputs.
        outputs: of the outputs on the same inputs.
        activations: of the outputs, each model on its own inputs.
        weights: of the parameters; None of heads, neurons and spans.
    """

    name: str
    layer: int
    jacobian: float
    jacobian_error: float
    centroids: float
    outputs: float
    activations: float
    weights: float | None


@dataclass(frozen=True)
class InputDifference:
    """How much one component changed at one token.

    Attributes:
        prompt: its number.
        position: of the token in it, from 0.
        token: its text.
        text: of the prompt, up to the token.
        value: difference at this token, over the root mean square over all tokens of what it was.
    """

    prompt: int
    position: int
    token: str
    text: str
    value: float


@dataclass(frozen=True, eq=False, repr=False)
class Differences:
    """What two checkpoints of one model differ in.

    Attributes:
        components: in the order of layers, and in each of the sites.
        tokens: texts of the tokens of each prompt.
        by_input: by `Measure`, the difference of each component at each token, those of all prompts
            one after another, over the root mean square over all tokens of what it was: the root
            mean square of a row is the component's own number.
        elsewhere: by module, the relative difference of parameters that belong to none of the
            components and are not equal.
        run: models, sites, cotangents, seed, versions.
    """

    components: Sequence[ComponentDifference]
    tokens: Sequence[Sequence[str]]
    by_input: Mapping[Measure, Float[Tensor, "component token"]]
    elsewhere: Mapping[str, float]
    run: Mapping[str, Any]

    def ranked(self, measure: Measure | Literal["weights"] = "jacobian") -> list[str]:
        """Names of the components that changed, the most changed first; equal ones in order."""
        if measure != "weights":
            _check(measure)
        sizes = {c.name: getattr(c, measure) or 0.0 for c in self.components}
        return sorted((name for name, size in sizes.items() if size > 0), key=lambda n: -sizes[n])

    def top(
        self, k: int = 10, component: str | None = None, measure: Measure = "jacobian"
    ) -> list[InputDifference]:
        """The inputs on which a component changed most; fewer if it changed on fewer.

        Args:
            k: how many.
            component: name; the most changed one if None.
            measure: by which of `Measure`.

        Raises:
            InputError: no such component or measure, or ``k`` below 1.
        """
        _check(measure)
        if k < 1:
            raise InputError(f"k={k} must be at least 1.")
        names = [c.name for c in self.components]
        component = component or next(iter(self.ranked(measure)), names[0])
        if component not in names:
            raise InputError(f"component={component!r} was not compared: give one of {names}.")
        values = self.by_input[measure][names.index(component)]
        places = [(p, t) for p, words in enumerate(self.tokens) for t in range(len(words))]
        order = values.argsort(descending=True, stable=True)[:k].tolist()
        found = []
        for at in order:
            (prompt, position), value = places[at], float(values[at])
            words = self.tokens[prompt]
            if value > 0:
                text = "".join(words[: position + 1])
                found.append(InputDifference(prompt, position, words[position], text, value))
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each component."""
        return pd.DataFrame([asdict(c) for c in self.components]).set_index("name")

    def record(self) -> dict[str, Any]:
        """All of it, in terms of JSON."""
        return {
            "run": dict(self.run),
            "components": [{k: _finite(v) for k, v in asdict(c).items()} for c in self.components],
            "elsewhere": {name: _finite(value) for name, value in self.elsewhere.items()},
            "tokens": [list(words) for words in self.tokens],
            "by_input": {measure: v.tolist() for measure, v in self.by_input.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write `record` as JSON, in place of what is there.

        Raises:
            OutputError: the file cannot be written.
        """
        write_file(path, json.dumps(self.record(), allow_nan=False) + "\n")

    def __repr__(self) -> str:
        return f"{self._said()}\n{self.to_dataframe().to_string(float_format='{:.3g}'.format)}"

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(self._said())}</p>"]
        parts.append(self.to_dataframe().to_html(float_format="{:.3g}".format))
        if found := self.top(5):
            parts.append(f"<p>{escape(self.ranked()[0])} changed most at</p>")
            parts.append(pd.DataFrame([asdict(one) for one in found]).to_html(index=False))
        return "".join(parts)

    def _said(self) -> str:
        n_tokens, changed = sum(map(len, self.tokens)), self.ranked()
        said = (
            f"{len(changed)} of {len(self.components)} components changed, on "
            f"{len(self.tokens)} prompts of {n_tokens} tokens"
        )
        if self.elsewhere:
            said += f"; parameters of {len(self.elsewhere)} other modules did, too"
        return f"{said}."


def _check(measure: str) -> None:
    if measure not in get_args(Measure):
        raise InputError(f"measure={measure!r} is not known: give one of {get_args(Measure)}.")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value
