"""The ``lch circuit`` command: a task's circuit, or the neurons behind one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lch_plugin.cli.interrupts import keeping, scores_alone
from lch_plugin.cli.options import (
    COUNT,
    MOST,
    Device,
    Dtype,
    Model,
    Out,
    Seed,
    source,
    zero_or_more,
)
from lch_plugin.errors import InputError


def circuit(
    task: Annotated[
        str | None,
        typer.Option(
            help="Find and test its circuit: an, ioi, greater_than, agreement, induction, pronoun "
            "or capitals."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="In place of a task: prompts of your own, a .csv or .json file with clean, "
            "corrupt, answer and foil.",
            callback=source,
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            help="Prompts of the task to find it on, and as many to test it; 60.", max=MOST
        ),
    ] = None,
    recover: Annotated[
        float | None,
        typer.Option(
            help="The smallest circuit that recovers this share of the metric, and not more than "
            "as far above 1; 0.8."
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Or a circuit of so many heads and neurons.", max=MOST)
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Or of this share of all heads and neurons.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Scored by: integrated (the default), blended, jacobian, detached or patterns."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Found and tested by: logit_difference (of means, in logits; the default) or "
            "log_odds (in nats)."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="In place of a task: score the neurons of one layer on it.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Whose neurons; with --prompt.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="Right after the prompt, such as ' an'; with --foil.")
    ] = None,
    foil: Annotated[str | None, typer.Option(help="What to compare the answer with.")] = None,
    corrupt: Annotated[
        str | None, typer.Option(help="Twin of the prompt to patch neurons into; with --answer.")
    ] = None,
    radius: Annotated[
        float | None, typer.Option(help="Of the neighbourhood; 0.25.", callback=zero_or_more)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="In the neighbourhood; 256.", **COUNT)] = None,
    model: Model = "",
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("circuit"),
) -> None:
    """The circuit of a task, tested and drawn; or the neurons that a prompt rests on."""
    of_task: dict[str, Any] = {
        "n": n,
        "recover": recover,
        "nodes": nodes,
        "share": share,
        "method": method,
        "metric": metric,
    }
    of_prompt: dict[str, Any] = {
        "layer": layer,
        "answer": answer,
        "foil": foil,
        "corrupt": corrupt,
        "radius": radius,
        "n_samples": samples,
    }
    if [task, prompts, prompt].count(None) != 2:
        raise InputError(
            "give one of --task or --prompts, to find and test a circuit, and --prompt with "
            "--layer, to score neurons."
        )
    if prompts is not None and n is not None:
        raise InputError("--n has no meaning with --prompts: all of the file are used.")
    own, other = (of_task, of_prompt) if prompt is None else (of_prompt, of_task)
    stray = [name.removeprefix("n_") for name, value in other.items() if value is not None]
    if stray:
        chosen = "--prompt" if prompt is not None else "--task" if task else "--prompts"
        raise InputError(f"--{stray[0]} has no meaning with {chosen}. Leave it out.")
    settings = {name: value for name, value in own.items() if value is not None}
    asked = prompts if task is None else task
    if asked is not None:
        from lch_plugin.circuits.reports import task_run

        task_run.check(asked, **settings)
    elif layer is None:
        raise InputError("--prompt needs a --layer, whose neurons are scored.")
    elif not prompt or not prompt.strip():
        raise InputError("--prompt is empty: there is no token to score neurons at.")
    elif (answer is None) != (foil is None):
        raise InputError("--answer and --foil go together: their logits are compared.")
    elif corrupt is not None and answer is None:
        raise InputError("--corrupt needs --answer and --foil, whose logits are compared on both.")
    from lch_plugin.files import check_new_directory

    check_new_directory(out)
    from lch_plugin.circuits.reports import neuron_run, task_run
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.loading import load

    if asked is not None:
        keeping(lambda: scores_alone(out))
    bridge = load(model or DEMO_MODEL_DIR, dtype=dtype, device=device).bridge()
    if asked is not None:
        task_run.run(bridge, asked, out, **settings, seed=seed)
    else:
        assert prompt is not None
        neuron_run.run(bridge, prompt, out=out, **settings, seed=seed)
    typer.echo(f"Open {out / 'report.html'}")
