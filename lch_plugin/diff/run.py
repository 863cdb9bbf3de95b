"""What ``lch diff`` does: two checkpoints on prompts of a file, as a page and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lch_plugin.diff.comparing import compare
from lch_plugin.diff.differences import Differences
from lch_plugin.errors import InputError
from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure
from lch_plugin.files import claimed, portable, write_directory
from lch_plugin.loading import LoadedModel
from lch_plugin.records import check_plain, reason
from lch_plugin.report import write_report

# Each with a colour and how it is called.
_SHOWN = {
    "jacobian": (CENTROIDS, "Jacobian, same inputs"),
    "outputs": ("#f59e0b", "outputs, same inputs"),
    "activations": (ACTIVATIONS, "activations, own inputs"),
    "weights": (GREY, "weights"),
}
# Of how many components inputs are listed.
_N_LISTED = 3
# Of a prompt up to a token, so many characters are shown.
_N_CHARACTERS = 70


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        InputError: it cannot be read, or has none.
    """
    cure = "Give a text file with a prompt on each line."
    check_plain(path, cure)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}. {cure}") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise InputError(f"{path} has no prompt. {cure}")
    return found


def run(
    before: LoadedModel,
    after: LoadedModel,
    prompts: list[str],
    out: str | Path,
    *,
    n_random: int = 8,
    seed: int = 0,
    k: int = 10,
) -> None:
    """Compare attention and MLPs of two checkpoints, and write a report.

    Args:
        before, after: checkpoints of one language model.
        prompts: texts.
        out: directory to make.
        n_random, seed: as `compare`.
        k: inputs listed for each component.

    Raises:
        InputError, SiteError, VanishingCentroidError: as `compare`.
        OutputError: ``out`` holds other content or cannot be written.
    """
    with claimed(out) as out:
        found = compare(before.bridge(), after.bridge(), prompts, n_random=n_random, seed=seed)
        results = found.record()
        for name, loaded in (("before", before), ("after", after)):
            results["run"][name] = portable(loaded.name)
            results["run"][f"{name}_revision"] = loaded.revision
        results["top"] = [
            {"component": name, "inputs": [_input(one) for one in found.top(k, name)]}
            for name in found.ranked()[:_N_LISTED]
        ]
        figures = {"components": bars(found)}
        write_directory(out, lambda it: write_report(it, "diff.html", results, figures))


def bars(found: Differences) -> Figure:
    """A bar for each component and measure, on one scale."""
    components = found.components
    places = np.arange(len(components))
    figure, (axis,) = new_figure(8.0, 0.9 + 0.42 * len(components))
    height = 0.8 / len(_SHOWN)
    for i, (measure, (colour, label)) in enumerate(_SHOWN.items()):
        values = [getattr(c, measure) or 0.0 for c in components]
        axis.barh(places + (i - 1.5) * height, values, height, color=colour, label=label)
    axis.set_yticks(places, [c.name.removeprefix("blocks.") for c in components])
    axis.invert_yaxis()
    axis.set_xlabel("relative difference")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _input(one: Any) -> dict[str, Any]:
    text = one.text.removesuffix(one.token)
    shown = text if len(text) <= _N_CHARACTERS else f"...{text[-_N_CHARACTERS:]}"
    return {
        "prompt": one.prompt,
        "position": one.position,
        "before": shown,
        "token": one.token,
        "value": one.value,
    }
