"""The ``lch sae`` commands: dictionaries on centroids."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lch_plugin.cli import settings
from lch_plugin.cli.interrupts import finished_parts, keeping, last_checkpoint
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
    n_bytes,
    one_of,
    source,
)

app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders on centroids.")

TrainingText = Annotated[
    str,
    typer.Option(help="File, directory or name on the hub; the demo's stories.", callback=source),
]
Column = Annotated[
    str | None, typer.Option(help="Of the text; the first that SAELens reads by default.")
]
SkipEmpty = Annotated[
    bool, typer.Option("--skip-empty", help="Leave out rows without text, and say how many.")
]
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


@app.command()
def train(
    hook: Annotated[str, typer.Argument(help="Such as blocks.2.mlp.hook_centroid.")],
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
        typer.Option(help="Of SAELens' configuration of the SAE, such as k=32. Repeatable."),
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
        int, typer.Option(help="How many on the way, beside the output.", **COUNT_OR_NONE)
    ] = 0,
    resume: Annotated[Path | None, typer.Option(help="Directory of a checkpoint.")] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("sae"),
) -> None:
    """Train an SAE on a hook point with SAELens' runner."""
    from lch_plugin import saes
    from lch_plugin.errors import InputError
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes.sources.hook_points import attached, width
    from lch_plugin.saes.training.checkpoints import CHECKPOINT_FILE
    from lch_plugin.saes.training.configs import sae_config

    chosen = settings.parse(setting)
    settings.check(architecture, chosen, chosen.get("d_sae", d_sae))
    if cache and (model or text or column or skip_empty or dtype):
        raise InputError(
            f"--cache {cache} needs no --model, --text, --column, --skip-empty or --dtype. "
            "Leave them out."
        )
    if resume is not None and not (resume / CHECKPOINT_FILE).is_file():
        raise InputError(
            f"--resume {resume} is no checkpoint, a directory with {CHECKPOINT_FILE}. Give "
            f"one of {out}-checkpoints, which is named after its number of tokens."
        )
    if cache:
        values = saes.Cache(cache)
        values.check_hook(hook)
        check_new_directory(out)
        bridge, data, d_in = None, None, values.d_in[hook]
        context_size = context_size or values.context_size
    else:
        own_text = _text(model, text, column, skip_empty)
        check_new_directory(out)
        context_size = context_size or 128
        bridge, data = _model_and_text(
            model, own_text, dtype, device, n_stories=6000, split="train", seed=seed
        )
        with attached(bridge, [hook]):
            d_in = width(bridge, hook, context_size)
    sae_settings = {"d_in": d_in, "d_sae": d_sae or 8 * d_in, "device": device, **chosen}
    sae_configuration = sae_config(architecture, **sae_settings)
    settings.check_active(sae_configuration)
    config = saes.runner_config(
        sae_configuration,
        hook,
        training_tokens=tokens,
        context_size=context_size,
        train_batch_size_tokens=batch_size,
        lr=lr,
        n_checkpoints=checkpoints,
        checkpoint_path=f"{out}-checkpoints",
        resume_from_checkpoint=resume and str(resume),
        use_cached_activations=bool(cache),
        cached_activations_path=cache or None,
        device=device,
        seed=seed,
        output_path=str(out),
    )
    keeping(lambda: last_checkpoint(Path(config.checkpoint_path), resume))
    sae = saes.train(bridge, data, config)
    typer.echo(f"{out}: {sae.cfg.d_sae} features, {sae.cfg.metadata.num_dead_features} dead")


@app.command()
def cache(
    hooks: Annotated[list[str], typer.Argument(help="Such as blocks.2.mlp.hook_centroid.")],
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
    max_shard_size: Annotated[str, typer.Option(help="Of the files.", callback=n_bytes)] = "500MB",
    ray: Ray = None,
    workers: Workers = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("cache"),
) -> None:
    """Store what hook points have on a text, to train on. Interrupted, it goes on when repeated."""
    from lch_plugin import saes
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes.caching.shards import MANIFEST

    on = cluster(ray, workers, device)
    if not (out / MANIFEST).is_file():  # As of a cache that is checked, or goes on.
        check_new_directory(out)
    keeping(lambda: finished_parts(out))
    bridge, data = _model_and_text(
        model,
        _text(model, text, column, skip_empty, streaming=streaming),
        dtype,
        device,
        n_stories=6000,
        split="train",
        seed=seed,
    )
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
        load=None if on is None else partial(_bridge, model, dtype, device),
    )
    typer.echo(f"{out}: {made.n_tokens:,} tokens at {len(made.hook_names)} hook points")


def _text(
    model: str, text: str, column: str | None, skip_empty: bool, *, streaming: bool = False
) -> Any:
    """The text that is named, or None. It is read before a model is loaded for it."""
    from lch_plugin.errors import InputError
    from lch_plugin.saes import load_text

    if model and not text:
        raise InputError(f"--model {model} needs a --text: the demo's stories are for its own.")
    if column is not None and not text:
        raise InputError(f"--column {column} is one of a --text, and none is given. Give one.")
    if skip_empty and not text:
        raise InputError("--skip-empty is about the rows of a --text, and none is given.")
    if not text:
        return None
    return load_text(text, streaming=streaming, column=column, skip_empty=skip_empty)


def _model_and_text(
    model: str,
    text: Any,
    dtype: str | None,
    device: str,
    *,
    n_stories: int,
    split: str,
    seed: int,
) -> tuple[Any, Any]:
    """A model in TransformerLens and a text for it; the embedded model and its stories if none."""
    from lch_plugin.demo.corpus import describe, write_stories
    from lch_plugin.saes import load_text

    bridge = _bridge(model, dtype, device)
    if text is None:
        own = list(write_stories(n_stories, split=split, seed=seed))
        typer.echo(f"text: {describe(own, split, seed)}")
        text = load_text([story.text for story in own])
    return bridge, text


def _bridge(model: str, dtype: str | None, device: str) -> Any:
    """A model in TransformerLens, the embedded one if none is named; here or on a worker."""
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.loading import load

    return load(model or DEMO_MODEL_DIR, dtype=dtype, device=device).bridge()


@app.command()
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
    from lch_plugin.errors import InputError
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes import features as describe
    from lch_plugin.saes.evaluation.feature_acts import load_sae

    own_text = _text(model, text, column, skip_empty)
    sae = load_sae(sae_dir, device)
    if feature and max(feature) >= sae.cfg.d_sae:
        raise InputError(
            f"--feature {max(feature)}: the SAE has features 0 to {sae.cfg.d_sae - 1}. Give one."
        )
    check_new_directory(out)
    bridge, data = _model_and_text(
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


@app.command()
def evaluate(
    sae_dir: Annotated[Path, typer.Argument(help="Directory that SAELens wrote an SAE to.")],
    model: Model = "",
    text: HeldOutText = "",
    column: Column = None,
    skip_empty: SkipEmpty = False,
    n_features: Annotated[int, typer.Option(help="How many to steer along.", **COUNT)] = 12,
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
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes.evaluation.feature_acts import load_sae
    from lch_plugin.saes.evaluation.report import evaluation_report

    own_text = _text(model, text, column, skip_empty)
    sae = load_sae(sae_dir, device)
    check_new_directory(out)
    bridge, data = _model_and_text(
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


@app.command()
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
    from lch_plugin.errors import InputError
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

        if dataset:
            raise InputError(f"--dataset {dataset} needs a --model to read it, and its --module.")
        if column is not None:
            raise InputError(f"--column {column} is one of a --dataset, and none is given.")
        check_new_directory(out)
        embedded = embedded_task(task, rows, test_rows, seed=seed)
        model, module = str(embedded.model), module or embedded.module
        train, test = embedded.train, embedded.test
    elif not module or not dataset:
        raise InputError(f"--model {model} needs a --module of it and a labelled --dataset.")
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
