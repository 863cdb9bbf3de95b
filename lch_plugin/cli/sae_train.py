"""``lch sae train``: an SAE on a hook point, or one on each of several layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lch_plugin.cli import settings
from lch_plugin.cli.interrupts import keeping, last_checkpoint
from lch_plugin.cli.options import (
    COUNT,
    COUNT_OR_NONE,
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
from lch_plugin.cli.sae_inputs import (
    Column,
    DryRun,
    Layers,
    SkipEmpty,
    TrainingText,
    check_text,
    model_and_text,
    read_text,
)
from lch_plugin.errors import InputError

# Minutes between checkpoints, of which the newest is kept, if nobody says how many there are to be.
_MINUTES = 10.0


def train(
    hook: Annotated[
        str,
        typer.Argument(help="Such as blocks.2.mlp.hook_centroid; with --layers, * for the layer."),
    ],
    layers: Layers = None,
    model: Model = "",
    text: TrainingText = "",
    column: Column = None,
    skip_empty: SkipEmpty = False,
    cache: Annotated[
        str,
        typer.Option(
            help="Directory of lch sae cache, in the place of model and text.", callback=source
        ),
    ] = "",
    architecture: Annotated[str, typer.Option(help="Any that SAELens trains.")] = "topk",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="Of SAELens' configuration of the SAE, such as k=32, or of its logging, such as "
            "wandb_project=mine. Repeatable."
        ),
    ] = None,
    d_sae: Annotated[
        int | None, typer.Option(help="Features; 8 times d_in by default.", **COUNT)
    ] = None,
    tokens: Annotated[int, typer.Option(help="To train on.", **COUNT)] = 300_000,
    context_size: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence; the cache's by default, or 128.", **COUNT),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens in a step.", **COUNT)] = 1024,
    lr: LearningRate = 1e-3,
    checkpoints: Annotated[
        int | None,
        typer.Option(
            help="How many on the way, 0 for none. By default every 10 minutes, of which the "
            "newest is kept.",
            **COUNT_OR_NONE,
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Directory of a checkpoint.")] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to wandb, as SAELens does.")] = False,
    dry_run: DryRun = False,
    ray: Ray = None,
    workers: Workers = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("sae"),
) -> None:
    """Train an SAE on a hook point, or on each of several layers, with SAELens' runners."""
    if cache and (model or text or column or skip_empty or dtype):
        raise InputError(
            f"--cache {cache} needs no --model, --text, --column, --skip-empty or --dtype. "
            "Leave them out."
        )
    check_text(model, text, column, skip_empty)
    from lch_plugin import saes
    from lch_plugin.files import check_new_directory
    from lch_plugin.progress import progress
    from lch_plugin.saes.sources.hook_points import attached, widths
    from lch_plugin.saes.sources.layers import (
        check_layers,
        hooks_in,
        hooks_of_layers,
        parse_layers,
    )
    from lch_plugin.saes.training.checkpoints import CHECKPOINT_FILE, is_checkpoint
    from lch_plugin.saes.training.configs import layers_config, sae_config

    on = cluster(ray, workers, device)
    if on is not None and not (cache and layers):
        raise InputError(
            "--ray and --workers train an SAE each on several layers of a cache: give --layers "
            "and --cache."
        )
    if on is not None and resume is not None:
        raise InputError(f"--resume {resume} needs no --ray or --workers. Leave them out.")
    chosen, logging = settings.split(settings.parse(setting), wandb=wandb)
    settings.check(architecture, chosen, chosen.get("d_sae", d_sae))
    of_layers = parse_layers(layers)
    check_layers([hook], of_layers)
    if resume is not None and not is_checkpoint(resume):
        raise InputError(
            f"--resume {resume} is no checkpoint, a directory with {CHECKPOINT_FILE}. Give "
            f"one of {out}-checkpoints, which is named after its number of tokens."
        )
    if resume is not None and cache and of_layers is not None:
        raise InputError(
            f"--resume {resume}: from a cache layers are trained one after another. Repeat the "
            "command for the layer alone, and then for those that are left."
        )
    values = saes.Cache(cache) if cache else None
    own_text, hooks = None, [hook]
    if values is None:
        own_text = read_text(model, text, column, skip_empty)
    else:
        hooks = hooks_in(values.hook_names, hook, of_layers)
        for name in hooks:
            values.check_hook(name)
    if not dry_run:
        check_new_directory(out)
    if values is not None:
        bridge, data = None, None
        context_size = context_size or values.context_size
        d_in = {name: values.d_in[name] for name in hooks}
    else:
        context_size = context_size or 128
        bridge, data = model_and_text(
            model, own_text, dtype, device, n_stories=6000, split="train", seed=seed
        )
        hooks = hooks_of_layers(hooks, of_layers, bridge.cfg.n_layers)
        with attached(bridge, hooks):
            d_in = widths(bridge, dict.fromkeys(hooks), context_size)
    of_hook = {}
    for name in hooks:
        defaults = {"d_in": d_in[name], "d_sae": d_sae or 8 * d_in[name], "device": device}
        of_hook[name] = sae_config(architecture, **{**defaults, **chosen})
        settings.check_active(of_hook[name])
    shared: dict[str, Any] = {
        "training_tokens": tokens,
        "context_size": context_size,
        "train_batch_size_tokens": batch_size,
        "lr": lr,
        "n_checkpoints": checkpoints or 0,
        "checkpoint_path": f"{out}-checkpoints",
        "resume_from_checkpoint": resume and str(resume),
        "logger": logging,
        "device": device,
        "seed": seed,
    }
    if cache:
        shared |= {"use_cached_activations": True, "cached_activations_path": cache}
    if dry_run:
        from lch_plugin.saes.estimates import training_estimate

        typer.echo(str(training_estimate(bridge, data, of_hook, shared, values)))
        return
    minutes = _MINUTES if checkpoints is None else None
    if bridge is not None and of_layers is not None:
        several = layers_config(of_hook, output_path=str(out), **shared)
        keeping(partial(last_checkpoint, Path(f"{several.checkpoint_path}"), resume))
        trained = saes.train(bridge, data, several, checkpoint_minutes=minutes)
        for name, sae in trained.items():
            _say(out / name, sae)
        return
    runners = {
        out if of_layers is None else out / name: (configuration, name)
        for name, configuration in of_hook.items()
    }
    if on is not None:
        configs = [
            saes.runner_config(*of, output_path=str(own), **shared) for own, of in runners.items()
        ]
        with progress("training", len(configs), "SAEs") as advance:
            for config, sae in saes.train_many(configs, on, checkpoint_minutes=minutes):
                _say(Path(str(config.output_path)), sae)
                advance(1)
        return
    for own, (configuration, name) in runners.items():
        runner = saes.runner_config(configuration, name, output_path=str(own), **shared)
        # SAELens has put a directory of the run's own below the one that it was given.
        keeping(partial(last_checkpoint, Path(f"{runner.checkpoint_path}"), resume))
        _say(own, saes.train(bridge, data, runner, checkpoint_minutes=minutes))


def _say(out: Path, sae: Any) -> None:
    typer.echo(f"{out}: {sae.cfg.d_sae} features, {sae.cfg.metadata.num_dead_features} dead")
