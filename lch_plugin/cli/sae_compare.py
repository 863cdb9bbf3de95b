"""``lch sae compare``: the same SAEs on centroids, inputs and outputs of a component."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lch_plugin.cli.interrupts import finished_parts, keeping
from lch_plugin.cli.options import (
    COUNT,
    COUNT_OR_NONE,
    MOST,
    Device,
    Dtype,
    LearningRate,
    Model,
    Out,
    Ray,
    Seed,
    Workers,
    cluster,
    source,
)
from lch_plugin.errors import InputError


def compare(
    task: Annotated[
        str, typer.Option(help="If no model is named: digits or stories, both embedded.")
    ] = "digits",
    model: Model = "",
    module: Annotated[str, typer.Option(help="Component, such as transformer.h.2.mlp.")] = "",
    dataset: Annotated[
        str,
        typer.Option(
            help="Labelled texts or images: name[:config] on the hub, file or directory.",
            callback=source,
        ),
    ] = "",
    label: Annotated[str, typer.Option(help="Column of labels.")] = "label",
    column: Annotated[
        str | None, typer.Option(help="Column of texts or images; image or text by default.")
    ] = None,
    split: Annotated[str, typer.Option(help="To train on.")] = "train",
    test_split: Annotated[
        str | None, typer.Option(help="Held out; a fifth of the other by default.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL[:MODULE]",
            help="Another model or, as :MODULE, component, to compare features with. Repeatable.",
        ),
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option(help="8, 16, 32 and 64 by default.", **COUNT)
    ] = None,
    seeds: Annotated[int, typer.Option(help="SAEs of each k and site.", min=2, max=MOST)] = 3,
    d_sae: Annotated[int, typer.Option(help="Features of an SAE.", **COUNT)] = 512,
    architecture: Annotated[str, typer.Option(help="topk or batchtopk.")] = "topk",
    rows: Annotated[
        int, typer.Option(help="Tokens or patches an SAE is trained on.", **COUNT)
    ] = 300_000,
    test_rows: Annotated[int, typer.Option(help="Held-out tokens or patches.", **COUNT)] = 50_000,
    items: Annotated[
        int, typer.Option(help="Labelled items to train and test probes on.", min=4, max=MOST)
    ] = 4_000,
    neighbours: Annotated[
        int, typer.Option(help="Nearest ones whose labels are looked at.", **COUNT)
    ] = 10,
    lr: LearningRate = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Rows of a training step.", **COUNT)] = 512,
    skip: Annotated[
        int, typer.Option(help="First tokens of each input that do not count.", **COUNT_OR_NONE)
    ] = 1,
    ray: Ray = None,
    workers: Workers = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("comparison"),
) -> None:
    """The same SAEs on centroids, input and output of a component, scored side by side."""
    if not model and dataset:
        raise InputError(f"--dataset {dataset} needs a --model to read it, and its --module.")
    if not model and column is not None:
        raise InputError(f"--column {column} is one of a --dataset, and none is given.")
    if model and not (module and dataset):
        raise InputError(f"--model {model} needs a --module of it and a labelled --dataset.")
    from lch_plugin.files import check_new_directory
    from lch_plugin.loading import load
    from lch_plugin.saes.comparison import ComparisonSettings, load_labelled
    from lch_plugin.saes.comparison import compare as run

    on = cluster(ray, workers, device)
    chosen = ComparisonSettings(
        k=tuple(k or (8, 16, 32, 64)),
        n_seeds=seeds,
        d_sae=d_sae,
        architecture=architecture,  # type: ignore[arg-type]
        n_rows=rows,
        n_test_rows=test_rows,
        n_items=items,
        n_neighbours=neighbours,
        lr=lr,
        batch_size=batch_size,
        skip=skip,
        seed=seed,
    )
    if not model:
        from lch_plugin.saes.comparison.embedded import embedded_task

        check_new_directory(out)
        embedded = embedded_task(task, rows, test_rows, seed=seed)
        model, module = str(embedded.model), module or embedded.module
        train, test = embedded.train, embedded.test
    else:
        check_new_directory(out)
        train, test = load_labelled(
            dataset, label, column=column, split=split, test_split=test_split, seed=seed
        )
    keeping(lambda: finished_parts(out))
    loaded = load(model, dtype=dtype, device=device)
    others = []
    for other in against or []:
        name, _, component = other.partition(":")
        same = not name or name == model
        of = loaded if same else load(name, dtype=dtype, device=device)
        others.append((of, component or module))
    run(loaded, module, train, test, out, chosen, against=others, cluster=on)
