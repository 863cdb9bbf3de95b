"""Nonsense is refused by a message, before a model is loaded or anything is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.cli import COMMANDS, HOOK, NEEDED, run
from tests.cli.conftest import LOADED

pytestmark = pytest.mark.usefixtures("as_users_run")

NO_INT = ["", "x", "1.5", "nan", "inf", "-inf", "1e3", "9" * 40, "9" * 5000]
NO_FLOAT = ["", "x", "-1", "nan", "inf", "-inf", "1e999", "-1e999"]
MAY_BE_ZERO = {
    "--seed",
    "--random-cotangent",
    "--feature",
    "--skip",
    "--checkpoints",
    "--radius",
} | {"--sigma"}


def of_type(wanted: type) -> list[Any]:
    """Every option of every command whose values are of a type."""
    return [
        pytest.param(name, f"--{option.replace('_', '-')}", id=f"{name} {option}")
        for name, command in COMMANDS.items()
        for option, hint in get_type_hints(command.callback).items()
        if wanted in (hint, *get_args(hint), *(a for h in get_args(hint) for a in get_args(h)))
    ]


def refused(*arguments: str) -> str:
    before = sorted(Path.cwd().rglob("*"))
    code, said = run(*arguments)
    assert code in (1, 2), (arguments, said)
    assert LOADED not in said, arguments
    assert sorted(Path.cwd().rglob("*")) == before, arguments
    return " ".join(re.sub("[│╭╮╰╯─]", " ", said).split())


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_nonsense_gets_to_the_model(command: str, place: Path) -> None:
    code, said = run(*command.split(), *NEEDED[command])
    assert (code, LOADED in said) == (1, True), said


@pytest.mark.parametrize(("command", "option"), of_type(int))
def test_whole_numbers(command: str, option: str, place: Path) -> None:
    if (command, option) == ("lens", "--layer"):  # From the end, if negative.
        values = NO_INT
    elif option == "--layer":  # From the end, if negative; it has no meaning without a prompt.
        values = ["0", "-1", *NO_INT]
    else:
        zero = option in MAY_BE_ZERO or (command, option) == ("sae evaluate", "--n-features")
        values = ["-1", *NO_INT] + ([] if zero else ["0"])
    for value in values:
        said = refused(*command.split(), *NEEDED[command], option, value)
        assert option.strip("-").replace("-", "") in said.replace("-", "").replace("_", "")


@pytest.mark.parametrize(("command", "option"), of_type(float))
def test_numbers(command: str, option: str, place: Path) -> None:
    of_prompt = (command, option) == ("circuit", "--radius")
    needed = ["--prompt", "I", "--layer", "0"] if of_prompt else NEEDED[command]
    for value in NO_FLOAT + ([] if option in MAY_BE_ZERO else ["0"]):
        assert option.strip("-") in refused(*command.split(), *needed, option, value)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--device", ["", "x", "cpu:x", "meta", "cuda:99", "0", "[/bold]"]),
        ("--dtype", ["", "x", "int8", "bool", "float8_e4m3fn", "nn", "nan", "torch"]),
        ("--seed", [str(2**32)]),
        ("--model", ["x" * 300, "~nobody-of-that-name/model"]),
        ("--text", ["x" * 300, "~nobody-of-that-name/x", "nowhere.txt", "empty.json", "pipe"]),
        ("--dataset", ["x" * 300, "~nobody-of-that-name/x"]),
        ("--cache", ["x" * 300, "~nobody-of-that-name/x", "nowhere", "file.txt", "pipe"]),
        ("--resume", ["x" * 300, "nowhere", "file.txt", "pipe", "dictionary", ""]),
        ("--column", ["text"]),
        ("--store-as", ["", "bfloat16", "float64", "nan"]),
        ("--max-shard-size", ["", "0", "-1MB", "0MB", "nanMB", "1e999GB", "MB", "1" * 5000]),
        (
            "--out",
            ["/", "", "..", "file.txt", "pipe", "/dev/null", "dictionary/cfg.json/x", "x" * 300],
        ),
        ("--architecture", ["", "mlp"]),
        ("--ray", ["", "auto", "localhost", "ray://localhost:10001", "localhost:x", "x" * 300]),
        ("--token", [""]),
        ("--cotangent", ["", "x", "random:", "random:-1", f"random:{2**32}", "logit:", "ones:1"]),
        ("--rank-by", ["", "l1"]),
    ],
)
def test_other_values(option: str, values: list[str], place: Path) -> None:
    having = [
        name
        for name, command in COMMANDS.items()
        if option in [o for parameter in command.params for o in parameter.opts]
    ]
    assert having
    for name in having:
        for value in values:
            refused(*name.split(), *NEEDED[name], option, value)


@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5", "4,5", "9" * 5000])
def test_the_token_of_probes_is_last_mean_or_how_many(value: str, place: Path) -> None:
    refused("probe", *NEEDED["probe"], "--token", value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"sae train {HOOK} --setting k=0", "k=0: give a number above 0"),
        (f"sae train {HOOK} --setting k=-3", "k=-3: give a number above 0"),
        (f"sae train {HOOK} --setting k=NaN", "k=NaN: topk takes int there"),
        (f"sae train {HOOK} --setting k=2.5", "takes int"),
        (f"sae train {HOOK} --setting k=true", "takes int"),
        (f"sae train {HOOK} --setting k=[1]", "takes int"),
        (f"sae train {HOOK} --setting k=", "takes int"),
        (f"sae train {HOOK} --setting k={'1' * 5000}", "takes int"),
        (f"sae train {HOOK} --setting k={'[' * 5000}", "takes int"),
        (f"sae train {HOOK} --setting k={'9' * 30}", "above 0 up to"),
        (f"sae train {HOOK} --setting k", "no name=value"),
        (f"sae train {HOOK} --setting =3", "no name=value"),
        (f"sae train {HOOK} --setting q=3", "'q'"),
        (f"sae train {HOOK} --setting d_sae=0", "d_sae=0: give"),
        (f"sae train {HOOK} --setting d_in=3", "that of the hook point"),
        (f"sae train {HOOK} --setting device=cuda", "--device"),
        (f"sae train {HOOK} --setting dtype=int8", "float32"),
        (f"sae train {HOOK} --setting normalize_activations=twice", "'none' or"),
        (f"sae train {HOOK} --setting aux_loss_coefficient=Infinity", "from 0 up to"),
        (f"sae train {HOOK} --setting aux_loss_coefficient=-Infinity", "from 0 up to"),
        (f"sae train {HOOK} --setting aux_loss_coefficient=1e999", "from 0 up to"),
        (f"sae train {HOOK} --setting decoder_init_norm=NaN", "above 0 up to"),
        (f"sae train {HOOK} --setting use_sparse_activations=1", "takes bool"),
        (f"sae train {HOOK} --setting k=17 --d-sae 16", "k=17 of d_sae=16"),
        (f"sae train {HOOK} --setting k=17 --setting d_sae=16", "k=17 of d_sae=16"),
        (f"sae train {HOOK} --d-sae 16", "k=100 of d_sae=16"),
        (f"sae train {HOOK} --architecture matryoshka_batchtopk", "matryoshka_widths=[]"),
        (
            f"sae train {HOOK} --architecture matryoshka_batchtopk --d-sae 256 "
            "--setting matryoshka_widths=[64,32]",
            "do not nest",
        ),
        (
            f"sae train {HOOK} --architecture matryoshka_batchtopk --d-sae 256 "
            "--setting matryoshka_widths=[64,512]",
            "do not nest within d_sae=256",
        ),
        ("sae train x --cache c --column text", "needs no --model, --text, --column"),
        ("sae train x --model m --column text", "needs a --text"),
        ("sae cache x --column text", "--column text is one of a --text"),
        ("sae cache x --text file.txt --column nowhere", "nowhere"),
        ("sae features dictionary --feature 16", "features 0 to 15"),
        ("sae features nowhere", "holds no SAE"),
        ("sae evaluate dictionary --column text", "--column text is one of a --text"),
        ("sae compare --column text", "--column text is one of a --dataset"),
        ("sae compare --k 8 --d-sae 4", "k=8 of d_sae=4"),
        ("sae compare --k 8 --k 8", "different numbers"),
        ("sae compare --seed 4294967295", "the last seed"),
        ("sae compare --rows 100", "n_rows=100 must be at least 512"),
        ("circuit --prompt I --layer 0 --corrupt J", "--corrupt needs --answer"),
        ("circuit --task=", "no task or file of prompts is called ''"),
        (f"circuit --task {'x' * 5000}", "File name too long"),
        ("centroids a\udcff", "not in UTF-8"),
    ],
)
def test_what_is_wrong_is_said(arguments: str, message: str, place: Path) -> None:
    assert message in refused(*arguments.split(" "))


def test_an_empty_prompt_is_refused(place: Path) -> None:
    assert "an empty one" in refused("centroids", "I picked", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("can't allocate memory: you tried\nmore"), "out of memory"),
        (NotImplementedError("aten::view has no kernel\nmore"), "torch cannot do this on the"),
        (PermissionError(13, "Permission denied", "there"), "Permission denied: 'there'"),
    ],
)
def test_what_a_machine_cannot_do_is_said(
    error: Exception, message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("lch_plugin.loading.load", load)
    assert message in refused("centroids", "I picked")
    monkeypatch.setattr("lch_plugin.loading.load", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # A mistake of this package is no message.
        run("centroids", "I picked")


def test_a_column_is_what_is_read(place: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("story,text\nI climbed up.,\n")
    named = ["--text", str(tmp_path / "texts.csv"), "--column"]
    for command in ("sae train", "sae cache", "sae features", "sae evaluate"):
        said = run(*command.split(), *NEEDED[command], *named, "story")[1]
        assert LOADED in said
        assert "tale" in refused(*command.split(), *NEEDED[command], *named, "tale")


# --------------------------------------------------------------------------------- anything at all

WORDS = """
    -1 0 1 2.5 9999999999999999999999999999 nan -inf 1e999 1e400 null k=NaN k=-1 k=1e999 d_sae=0 =
    [/bold] [red] %s {} -- -x : :: file.txt empty.json pipe dictionary dictionary/cfg.json ../x .. .
    / ~ ~x /dev/null /dev/null/x /proc/self/mem /proc/x an mlp text cuda meta float32 int8 topk"""
ODD = ["", " ", "x" * 300, "x" * 5000, "9" * 5000, "\udcff", "é\u202e\x1b[31m", "𝟙", "١"]
VALUES = st.sampled_from([*WORDS.split(), *ODD]) | st.text(
    st.characters(exclude_characters="\0", codec="utf-8"), max_size=8
)


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, whatever they are, and with or without what it needs."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    parameters = [p for p in COMMANDS[name].params if p.param_type_name == "option"]
    line = [*name.split(), *draw(st.sampled_from([NEEDED[name], []]))]
    for parameter in draw(st.lists(st.sampled_from(parameters), max_size=4)):
        line.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
        if not getattr(parameter, "is_flag", False):
            line.append(draw(VALUES))
    return [*line, *draw(st.lists(VALUES, max_size=1))]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(line=lines())
@example(line=[])
@example(line=["sae"])
@example(line=["nowhere"])
@example(line=["circuit", "--prompts", "pipe"])
def test_no_argument_makes_a_traceback(line: list[str], place: Path) -> None:
    code, said = run(*line)
    assert code in (0, 1, 2)
    assert "Traceback" not in said
    assert said or code != 1  # Of no arguments at all, help is shown.


def test_options_are_found_by_their_types() -> None:
    """So that a new one is among those tested above."""
    found = {tuple(parameter.values) for parameter in of_type(int)}
    assert {("sae compare", "--k"), ("sae train", "--d-sae"), ("demo", "--seed")} <= found
