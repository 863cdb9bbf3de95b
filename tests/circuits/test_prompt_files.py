"""Prompts from files: what is read, and which file, row and reason a refusal names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lch_plugin as lch
from lch_plugin.circuits import log_odds, prompts, read_prompts

CLEAN = ["The keys to the cabinet", "The dog near the tables"]
CORRUPT = ["The key to the cabinet", "The dogs near the tables"]
HEADER = "clean,corrupt,answer,foil"
ROW = "The keys to the cabinet,The key to the cabinet, are| were, is| was"


@pytest.fixture(scope="module")
def model():
    return lch.load_demo_model()


def written(directory: Path, text: str, name: str = "prompts.csv") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_both_kinds_of_file_give_what_the_texts_do(model, tmp_path: Path) -> None:
    answers, foils = [[" are", " were"], [" is"]], [[" is", " was"], [" are"]]
    table = written(
        tmp_path, f"\ufeff{HEADER}\n{ROW}\n{CLEAN[1]},{CORRUPT[1]},{answers[1][0]},{foils[1][0]}\n"
    )
    rows = [
        {"clean": c, "corrupt": t, "answer": a if len(a) > 1 else a[0], "foil": f}
        for c, t, a, f in zip(CLEAN, CORRUPT, answers, foils, strict=True)
    ]
    listed = written(tmp_path, json.dumps(rows), "prompts.json")
    for metric in (lch.circuits.logit_difference, log_odds):
        expected = prompts(model, CLEAN, answers, foils, CORRUPT, metric=metric)
        for path in (table, listed):
            found = read_prompts(model, path, metric=metric)
            assert [one.texts for one in found] == [one.texts for one in expected]
            for one, other in zip(found, expected, strict=True):
                logits = torch.randn(*one.clean.shape, model.cfg.d_vocab)
                assert torch.equal(one.clean, other.clean)
                assert torch.equal(one.corrupt, other.corrupt)
                assert torch.equal(one.measure(logits), other.measure(logits))


def test_twins_may_be_left_out_and_fields_quoted(model, tmp_path: Path) -> None:
    (batch,) = read_prompts(
        model, written(tmp_path, 'foil,clean,answer\n is,"The keys to the cabinet"," are"\n')
    )
    assert batch.corrupt is None
    assert batch.texts == ((CLEAN[0], None),)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("p.txt", ROW, "no .csv or .json file"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", HEADER, "holds no prompts"),
        ("p.csv", "clean,answer\na, b", r"\['foil'\] are missing and \[\] are unknown"),
        ("p.csv", f"{HEADER},note\n{ROW},x", r"\['note'\] are unknown"),
        ("p.csv", f"{HEADER}\n{ROW}, more", "row 1 has more or fewer .* in double quotes"),
        ("p.csv", f"{HEADER}\n{ROW}\nThe dog, is", "row 2 has more or fewer"),
        ("p.csv", f"clean,{HEADER}\nThe dog,{ROW}", "names a field twice: clean, clean"),
        ("p.csv", f"{HEADER}\n{ROW}\nThe dog,,, is", r"row 2: prompts \['The dog', ''\]"),
        ("p.csv", f"{HEADER}\n{ROW}\n{ROW}", "row 2: the prompts of row 1 again"),
        ("p.csv", f"{HEADER}\nThe dog,The old dog, is, are", "row 1: .* equal lengths"),
        ("p.csv", f"{HEADER}\nThe dog,The dogs, is not, are", "row 1: ' is not' is 2 tokens"),
        ("p.csv", f'{HEADER}\n"The dog,The dogs, is, are', "cannot be read"),
        ("p.csv", "\n".join([HEADER, *(f"The dog,The old dog, is{i}, are" for i in range(5))]),
         "5 of 5 rows cannot be used: row 1: .*; row 2: .*; row 3: .*; and 2 more"),
        ("p.json", "{}", "holds no prompts"),
        ("p.json", "[1]", "holds no prompts"),
        ("p.json", "[{]", "cannot be read"),
        ("p.json", "1" * 5000, "cannot be read"),
        ("p.json", "[" * 100_000, "cannot be read"),
        ("p.json", '[{"clean": "a", "answer": 3, "foil": "b"}]', r"answers and foils \[3, 'b'\]"),
        ("p.json", '[{"clean": "a", "answer": [], "foil": []}]', "row 1: answers and foils"),
        ("p.json", '[{"clean": "a", "answer": "b", "foil": "c"}, {"clean": "a"}]', "row 2 has"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(model, tmp_path: Path, name: str, text: str, match: str) -> None:
    with pytest.raises(lch.InputError, match=match) as caught:
        read_prompts(model, written(tmp_path, text, name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_what_is_no_text_file_is_refused(model, tmp_path: Path) -> None:
    for path in (tmp_path / "absent.csv", tmp_path):
        with pytest.raises(lch.InputError, match="is no"):
            read_prompts(model, path)
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"clean\xe9")
    with pytest.raises(lch.InputError, match="It has to be UTF-8"):
        read_prompts(model, latin)
    large = tmp_path / "large.csv"
    with large.open("wb") as file:
        file.truncate(60_000_000)
    with pytest.raises(lch.InputError, match="more than 50 MB"):
        read_prompts(model, large)
