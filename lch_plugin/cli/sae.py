"""The ``lch sae`` commands: dictionaries on centroids."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lch_plugin.cli import sae_compare, sae_train
from lch_plugin.cli.config_files import CommandWithConfig
from lch_plugin.cli.interrupts import finished_parts, keeping
from lch_plugin.cli.options import (
    COUNT,
    COUNT_OR_NONE,
    SHARD_SIZE,
    Device,
    Dtype,
    Model,
    Out,
    Ray,
    Seed,
    Workers,
    cluster,
    n_bytes,
    one_of,
    source,
)
from lch_plugin.cli.sae_inputs import (
    Column,
    DryRun,
    Layers,
    SkipEmpty,
    TrainingText,
    check_text,
    load_bridge,
    model_and_text,
    read_text,
)

app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders on centroids.")

# Options of the commands that look at an SAE.
HeldOutText = Annotated[
    str,
    typer.Option(
        help="File, directory or name on the hub; the demo's held-out stories.", callback=source
    ),
]
Hook = Annotated[
    str | None, typer.Option(help="What the SAE reads; what its metadata say by default.")
]
TextTokens = Annotated[int | None, typer.Option(help="Of text at most; all by default.", **COUNT)]
Rows = Annotated[int, typer.Option(help="Rows of text that run together.", **COUNT)]


app.command(cls=CommandWithConfig)(sae_train.train)


@app.command(cls=CommandWithConfig)
def cache(
    hooks: Annotated[
        list[str],
        typer.Argument(help="Such as blocks.2.mlp.hook_centroid; with --layers, * for the layer."),
    ],
    layers: Layers = None,
    model: Model = "",
    text: TrainingText = "",
    column: Column = None,
    skip_empty: SkipEmpty = False,
    streaming: Annotated[bool, typer.Option(help="Read the text as it is needed.")] = False,
    n_tokens: Annotated[
        int | None, typer.Option(help="All of the text by default.", **COUNT)
    ] = None,
    context_size: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence; the model's context by default.", **COUNT),
    ] = None,
    store_as: Annotated[
        str,
        typer.Option(
            help="float32, or float16 for half the space.", callback=one_of("float32", "float16")
        ),
    ] = "float32",
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.", **COUNT)] = 32,
    max_shard_size: Annotated[
        str, typer.Option(help="Of the files.", callback=n_bytes)
    ] = SHARD_SIZE,
    ray: Ray = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("cache"),
) -> None:
    """Store what hook points have on a text, to train on. Interrupted, it goes on when repeated."""
    check_text(model, text, column, skip_empty)
    from lch_plugin import saes
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes.caching.shards import MANIFEST
    from lch_plugin.saes.sources.layers import check_layers, hooks_of_layers, parse_layers

    on = cluster(ray, workers, device)
    of_layers = parse_layers(layers)
    check_layers(hooks, of_layers)
    if not (dry_run or (out / MANIFEST).is_file()):  # As of a cache that is checked, or goes on.
        check_new_directory(out)
    keeping(lambda: finished_parts(out))
    bridge, data = model_and_text(
        model,
        read_text(model, text, column, skip_empty, streaming=streaming),
        dtype,
        device,
        n_stories=6000,
        split="train",
        seed=seed,
    )
    hooks = hooks_of_layers(hooks, of_layers, bridge.cfg.n_layers)
    if dry_run:
        from lch_plugin.saes.estimates import caching_estimate

        estimate = caching_estimate(
            bridge,
            data,
            hooks,
            n_tokens=n_tokens,
            context_size=context_size,
            dtype=store_as,
            batch_size=batch_size,
        )
        typer.echo(str(estimate))
        return
    made = saes.cache(
        bridge,
        data,
        out,
        hook_names=hooks,
        n_tokens=n_tokens,
        context_size=context_size,
        dtype=store_as,
        seed=seed,
        batch_size=batch_size,
        max_shard_size=max_shard_size,
        cluster=on,
        load=None if on is None else partial(load_bridge, model, dtype, device),
    )
    typer.echo(f"{out}: {made.n_tokens:,} tokens at {len(made.hook_names)} hook points")


@app.command(cls=CommandWithConfig)
def features(
    sae_dir: Annotated[Path, typer.Argument(help="Directory that SAELens wrote an SAE to.")],
    model: Model = "",
    text: HeldOutText = "",
    column: Column = None,
    skip_empty: SkipEmpty = False,
    n_features: Annotated[
        int, typer.Option(help="How many; the strongest sparse ones.", **COUNT)
    ] = 24,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="One to look at in place of these. Repeatable.", **COUNT_OR_NONE),
    ] = None,
    hook: Hook = None,
    n_tokens: TextTokens = None,
    batch_size: Rows = 16,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("features"),
) -> None:
    """Features of an SAE as a page: examples, logits, neurons, neighbours."""
    own_text = read_text(model, text, column, skip_empty)
    from lch_plugin.errors import InputError
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes import features as describe
    from lch_plugin.saes.evaluation.feature_acts import load_sae

    sae = load_sae(sae_dir, device)
    if feature and max(feature) >= sae.cfg.d_sae:
        raise InputError(
            f"--feature {max(feature)}: the SAE has features 0 to {sae.cfg.d_sae - 1}. Give one."
        )
    check_new_directory(out)
    bridge, data = model_and_text(
        model, own_text, dtype, device, n_stories=1000, split="test", seed=seed
    )
    report = describe(
        bridge,
        sae,
        data,
        hook_name=hook,
        indices=feature,
        n_features=n_features,
        n_tokens=n_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    report.save(out)
    typer.echo(f"Open {out / 'report.html'}")


@app.command(cls=CommandWithConfig)
def evaluate(
    sae_dir: Annotated[Path, typer.Argument(help="Directory that SAELens wrote an SAE to.")],
    model: Model = "",
    text: HeldOutText = "",
    column: Column = None,
    skip_empty: SkipEmpty = False,
    n_features: Annotated[
        int, typer.Option(help="How many to steer along, 0 for no steering.", **COUNT_OR_NONE)
    ] = 12,
    hook: Hook = None,
    n_tokens: TextTokens = None,
    batch_size: Rows = 16,
    skip: Annotated[
        int, typer.Option(help="First tokens of each row that do not count.", **COUNT_OR_NONE)
    ] = 1,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("evaluation"),
) -> None:
    """Reconstruction, predicted responses and steering of an SAE, as a page."""
    own_text = read_text(model, text, column, skip_empty)
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes.evaluation.feature_acts import load_sae
    from lch_plugin.saes.evaluation.report import evaluation_report

    sae = load_sae(sae_dir, device)
    check_new_directory(out)
    bridge, data = model_and_text(
        model, own_text, dtype, device, n_stories=400, split="test", seed=seed
    )
    evaluation_report(
        bridge,
        sae,
        data,
        out,
        hook_name=hook,
        n_tokens=n_tokens,
        n_features=n_features,
        skip=skip,
        batch_size=batch_size,
        seed=seed,
    )
    typer.echo(f"Open {out / 'report.html'}")


app.command(cls=CommandWithConfig)(sae_compare.compare)
