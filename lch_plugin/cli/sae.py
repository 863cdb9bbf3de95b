"""The ``lch sae`` commands: dictionaries on centroids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lch_plugin.cli.options import Device, Dtype, Model, Out, Seed

app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders on centroids.")

TrainingText = Annotated[
    str, typer.Option(help="File, directory or name on the hub; the demo's stories.")
]
# Options of the commands that look at an SAE.
HeldOutText = Annotated[
    str, typer.Option(help="File, directory or name on the hub; the demo's held-out stories.")
]
Hook = Annotated[
    str | None, typer.Option(help="What the SAE reads; what its metadata say by default.")
]
TextTokens = Annotated[int | None, typer.Option(help="Of text at most; all by default.")]
Rows = Annotated[int, typer.Option(help="Rows of text that run together.")]


@app.command()
def train(
    hook: Annotated[str, typer.Argument(help="Such as blocks.2.mlp.hook_centroid.")],
    model: Model = "",
    text: TrainingText = "",
    cache: Annotated[
        str, typer.Option(help="Directory of lch sae cache, in the place of model and text.")
    ] = "",
    architecture: Annotated[str, typer.Option(help="Any that SAELens trains.")] = "topk",
    setting: Annotated[
        list[str] | None,
        typer.Option(help="Of SAELens' configuration of the SAE, such as k=32. Repeatable."),
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="Features; 8 times d_in by default.")] = None,
    tokens: Annotated[int, typer.Option(help="To train on.")] = 300_000,
    context_size: Annotated[
        int | None, typer.Option(help="Tokens in a sequence; the cache's by default, or 128.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens in a step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    checkpoints: Annotated[int, typer.Option(help="How many on the way, beside the output.")] = 0,
    resume: Annotated[str | None, typer.Option(help="Directory of a checkpoint.")] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("sae"),
) -> None:
    """Train an SAE on a hook point with SAELens' runner."""
    from lch_plugin import saes
    from lch_plugin.errors import InputError
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes.sources.hooks import attached, width
    from lch_plugin.saes.training.configs import sae_config

    check_new_directory(out)
    if cache and (model or text or dtype):
        raise InputError(f"--cache {cache} needs no --model, --text or --dtype. Leave them out.")
    if cache:
        values = saes.Cache(cache)
        values.check_hook(hook)
        bridge, data, d_in = None, None, values.d_in[hook]
        context_size = context_size or values.context_size
    else:
        context_size = context_size or 128
        bridge, data = _model_and_text(
            model, text, dtype, device, n_stories=6000, split="train", seed=seed
        )
        with attached(bridge, [hook]):
            d_in = width(bridge, hook, context_size)
    config = saes.runner_config(
        sae_config(
            architecture,
            **{"d_in": d_in, "d_sae": d_sae or 8 * d_in, "device": device, **_parse(setting)},
        ),
        hook,
        training_tokens=tokens,
        context_size=context_size,
        train_batch_size_tokens=batch_size,
        lr=lr,
        n_checkpoints=checkpoints,
        checkpoint_path=f"{out}-checkpoints",
        resume_from_checkpoint=resume,
        use_cached_activations=bool(cache),
        cached_activations_path=cache or None,
        device=device,
        seed=seed,
        output_path=str(out),
    )
    sae = saes.train(bridge, data, config)
    typer.echo(f"{out}: {sae.cfg.d_sae} features, {sae.cfg.metadata.num_dead_features} dead")


@app.command()
def cache(
    hooks: Annotated[list[str], typer.Argument(help="Such as blocks.2.mlp.hook_centroid.")],
    model: Model = "",
    text: TrainingText = "",
    streaming: Annotated[bool, typer.Option(help="Read the text as it is needed.")] = False,
    n_tokens: Annotated[int | None, typer.Option(help="All of the text by default.")] = None,
    context_size: Annotated[
        int | None, typer.Option(help="Tokens in a sequence; the model's context by default.")
    ] = None,
    store_as: Annotated[str, typer.Option(help="float32, or float16 for half the space.")] = (
        "float32"
    ),
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 32,
    max_shard_size: Annotated[str, typer.Option(help="Of the files.")] = "500MB",
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("cache"),
) -> None:
    """Store what hook points have on a text, to train on. Interrupted, it goes on when repeated."""
    from lch_plugin import saes

    bridge, data = _model_and_text(
        model, text, dtype, device, n_stories=6000, split="train", seed=seed, streaming=streaming
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
    )
    typer.echo(f"{out}: {made.n_tokens:,} tokens at {len(made.hook_names)} hook points")


def _parse(settings: list[str] | None) -> dict[str, Any]:
    """Of ``name=value`` pairs, numbers, lists and truth values as JSON has them."""
    from lch_plugin.errors import InputError

    parsed: dict[str, Any] = {}
    for pair in settings or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--setting {pair} is no name=value, such as k=32.")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


def _model_and_text(
    model: str,
    text: str,
    dtype: str | None,
    device: str,
    *,
    n_stories: int,
    split: str,
    seed: int,
    streaming: bool = False,
) -> tuple[Any, Any]:
    """A model in TransformerLens and a text for it; the embedded model and its stories if none."""
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.demo.corpus import describe, write_stories
    from lch_plugin.errors import InputError
    from lch_plugin.loading import load
    from lch_plugin.saes import load_text

    if model and not text:
        raise InputError(f"--model {model} needs a --text: the demo's stories are for its own.")
    bridge = load(model or DEMO_MODEL_DIR, dtype=dtype, device=device).bridge()
    if not text:
        own = list(write_stories(n_stories, split=split, seed=seed))
        typer.echo(f"text: {describe(own, split, seed)}")
        return bridge, load_text([story.text for story in own])
    return bridge, load_text(text, streaming=streaming)


@app.command()
def features(
    sae_dir: Annotated[Path, typer.Argument(help="Directory that SAELens wrote an SAE to.")],
    model: Model = "",
    text: HeldOutText = "",
    n_features: Annotated[int, typer.Option(help="How many; the strongest sparse ones.")] = 24,
    feature: Annotated[
        list[int] | None, typer.Option(help="One to look at in place of these. Repeatable.")
    ] = None,
    hook: Hook = None,
    n_tokens: TextTokens = None,
    batch_size: Rows = 16,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("features"),
) -> None:
    """Features of an SAE as a page: excerpts, logits, neurons, neighbours."""
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes import features as describe
    from lch_plugin.saes.evaluation.codes import load_sae

    check_new_directory(out)
    bridge, data = _model_and_text(
        model, text, dtype, device, n_stories=1000, split="test", seed=seed
    )
    sae = load_sae(sae_dir, device)
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
    n_features: Annotated[int, typer.Option(help="How many to steer along.")] = 12,
    hook: Hook = None,
    n_tokens: TextTokens = None,
    batch_size: Rows = 16,
    skip: Annotated[int, typer.Option(help="First tokens of each row that do not count.")] = 1,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("evaluation"),
) -> None:
    """Reconstruction, predicted responses and steering of an SAE, as a page."""
    from lch_plugin.files import check_new_directory
    from lch_plugin.saes.evaluation.codes import load_sae
    from lch_plugin.saes.evaluation.report import evaluation_report

    check_new_directory(out)
    bridge, data = _model_and_text(
        model, text, dtype, device, n_stories=400, split="test", seed=seed
    )
    sae = load_sae(sae_dir, device)
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
        typer.Option(help="Labelled texts or images: name[:config] on the hub, file or directory."),
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
    k: Annotated[list[int] | None, typer.Option(help="8, 16, 32 and 64 by default.")] = None,
    seeds: Annotated[int, typer.Option(help="SAEs of each k and site.")] = 3,
    d_sae: Annotated[int, typer.Option(help="Features of an SAE.")] = 512,
    architecture: Annotated[str, typer.Option(help="topk or batchtopk.")] = "topk",
    rows: Annotated[int, typer.Option(help="Tokens or patches an SAE is trained on.")] = 300_000,
    test_rows: Annotated[int, typer.Option(help="Held-out tokens or patches.")] = 50_000,
    items: Annotated[int, typer.Option(help="Labelled items to train and test probes on.")] = 4_000,
    neighbours: Annotated[int, typer.Option(help="Nearest ones whose labels are looked at.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Rows of a training step.")] = 512,
    skip: Annotated[int, typer.Option(help="First tokens of each input that do not count.")] = 1,
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

    check_new_directory(out)
    settings = ComparisonSettings(
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
        from lch_plugin.demo.labels import embedded_task

        if dataset:
            raise InputError(f"--dataset {dataset} needs a --model to read it, and its --module.")
        embedded = embedded_task(task, rows, test_rows, seed=seed)
        model, module = str(embedded.model), module or embedded.module
        train, test = embedded.train, embedded.test
    elif not module or not dataset:
        raise InputError(f"--model {model} needs a --module of it and a labelled --dataset.")
    else:
        train, test = load_labelled(
            dataset, label, column=column, split=split, test_split=test_split, seed=seed
        )
    loaded = load(model, dtype=dtype, device=device)
    others = []
    for other in against or []:
        name, _, component = other.partition(":")
        same = not name or name == model
        of = loaded if same else load(name, dtype=dtype, device=device)
        others.append((of, component or module))
    run(loaded, module, train, test, out, settings, against=others)
