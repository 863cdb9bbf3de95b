"""The comparison at matched sites: its data, its values, its report, and taking up again."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from PIL import Image
from sae_lens import SAE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, ViTImageProcessor
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin.cli import app
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR
from lch_plugin.files import resumable_directory
from lch_plugin.loading import LoadedModel
from lch_plugin.saes import ComparisonSettings, Labelled, Rows, compare, evaluate, load_labelled
from lch_plugin.saes.comparison import data as preparing
from lch_plugin.saes.comparison import stored_component
from lch_plugin.saes.comparison.components import make_component
from lch_plugin.saes.comparison.data import Split, prepare
from lch_plugin.saes.comparison.embedded import labelled_digits, labelled_stories
from lch_plugin.saes.comparison.scores import label_agreement, probe_scores
from lch_plugin.saes.comparison.settings import SITES
from lch_plugin.saes.comparison.stored_values import StoredValues, item_means, store_values
from lch_plugin.statistics import holm
from tests import families

# One comparison serves many tests, in one process of pytest.
pytestmark = pytest.mark.xdist_group("comparison")

MLP = "transformer.h.2.mlp"
VISION_MLP = "encoder.layer.2.mlp"
SMALL = ComparisonSettings(
    k=(2, 4),
    n_seeds=2,
    d_sae=16,
    n_rows=4096,
    n_test_rows=2000,
    n_items=60,
    n_neighbours=3,
    batch_size=128,
)


@pytest.fixture(scope="module")
def gpt2() -> LoadedModel:
    return lch.load(DEMO_MODEL_DIR)


@pytest.fixture(scope="module")
def vit() -> LoadedModel:
    return lch.load(DEMO_VISION_MODEL_DIR)


@pytest.fixture(scope="module")
def other_words(gpt2: LoadedModel) -> LoadedModel:
    """The same model with a tokenizer that has whole words, and one more token at either end."""
    tokenizer = Tokenizer(WordLevel({"[B]": 0, "[E]": 1, "a": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[B] $A [E]", special_tokens=[("[B]", 0), ("[E]", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[B]", eos_token="[E]")
    return LoadedModel(gpt2.model, fast, "words", gpt2.path, None)


def ready(loaded: LoadedModel, data: Labelled, module: str = MLP, **changes: Any) -> Split:
    settings = {"skip": 1, "n_rows": None, "n_items": 1000, "seed": 0}
    return prepare(loaded, data, module=module, **(settings | changes))


def texts_of_items(loaded: LoadedModel, split: Split, name: str) -> list[tuple[str, str]]:
    """Of each item the text of its tokens, and its label."""
    ids = torch.cat([b["input_ids"][:, 1:][b["attention_mask"][:, 1:] > 0] for b in split.batches])
    items = split.items[name]
    assert len(ids) == len(items.of_row) == split.n_rows
    return [
        (loaded.processor.decode(ids[items.of_row == i]).strip(), label)
        for i, label in enumerate(items.labels)
    ]


# --- items ---------------------------------------------------------------------------------------


def test_items_are_the_words_and_passages_that_are_labelled(gpt2: LoadedModel) -> None:
    data = labelled_stories(20, seed=3)
    split = ready(gpt2, data)
    for name, entries in data.labels.items():
        expected = [
            (text[start:end], label)
            for text, spans in zip(data.inputs, entries, strict=True)
            for start, end, label in spans
        ]
        assert texts_of_items(gpt2, split, name) == expected


def test_one_long_text_does_not_make_padding_of_a_batch(
    other_words: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a " * 10] * 40 + ["a " * 120] * 40  # And a token at either end.
    labelled = Labelled(texts, {"kind": ["x", "y"] * 40}, "")
    found = {}
    for limit in (4096, 1000):
        monkeypatch.setattr(preparing, "_BATCH_TOKENS", limit)
        split = ready(other_words, labelled)
        found[limit] = [tuple(batch["input_ids"].shape) for batch in split.batches]
        texts_of_items(other_words, split, "kind")
    assert found[4096] == [(32, 12), (32, 122), (16, 122)]
    assert found[1000] == [(32, 12), (8, 12), *[(8, 122)] * 5]


def test_tokens_that_the_tokenizer_added_belong_to_no_word(other_words: LoadedModel) -> None:
    data = Labelled(["b a cc", "a a"], {"kind": [[(0, 1, "x"), (4, 6, "y")], [(0, 1, "x")]]}, "")
    split = ready(other_words, data, skip=0)
    assert split.n_rows == 3 + 2 + 2 + 2
    assert split.items["kind"].of_row.tolist() == [-1, 0, -1, 1, -1, -1, 2, -1, -1]
    assert split.items["kind"].labels.tolist() == ["x", "y", "x"]


def test_one_label_a_token(gpt2: LoadedModel) -> None:
    """Those of the tokenizer's own tokens only; None and -100 are no labels."""
    data = Labelled(["Mary ate 1732.", "Tom"], {"kind": [[1, None, 2, -100, 3], [1]]}, "")
    assert texts_of_items(gpt2, ready(gpt2, data), "kind") == [
        ("Mary", "1"),
        ("17", "2"),
        (".", "3"),
        ("Tom", "1"),
    ]


def test_one_label_a_text(gpt2: LoadedModel) -> None:
    data = Labelled(["Mary ate.", "Tom slept.", "Anna"], {"kind": ["x", None, "y"]}, "")
    found = texts_of_items(gpt2, ready(gpt2, data), "kind")
    assert found == [("Mary ate.", "x"), ("Anna", "y")]


def test_texts_are_cut_at_the_context(gpt2: LoadedModel) -> None:
    words = ["Mary"] * 200
    ends = list(itertools.accumulate([5] * 200))
    spans = [(end - 5, end - 1, str(i)) for i, end in enumerate(ends)]
    for labels in (spans, list(range(200))):
        split = ready(gpt2, Labelled([" ".join(words)], {"which": [labels]}, ""))
        assert split.n_rows == 127
        assert split.items["which"].labels.tolist() == [str(i) for i in range(127)]


def test_no_more_inputs_than_the_rows_need(gpt2: LoadedModel, vit: LoadedModel) -> None:
    split = ready(gpt2, labelled_stories(600), n_rows=5000)
    lengths = [int(n) for b in split.batches for n in b["attention_mask"].sum(1) - 1]
    assert sum(lengths) == split.n_rows >= 5000 > sum(lengths[:-1])
    assert split.n_inputs == len(lengths)
    split = ready(vit, labelled_digits("test"), VISION_MLP, n_rows=65)
    assert (split.n_inputs, split.n_rows) == (2, 128)
    assert split.items["digit"].of_row.tolist() == [0] * 64 + [1] * 64
    assert sum(len(batch["pixel_values"]) for batch in split.batches) == 2


def test_items_are_chosen_by_the_seed_alone(gpt2: LoadedModel, other_words: LoadedModel) -> None:
    """The same ones for every model, whatever its tokens."""
    data = labelled_stories(40, seed=5)
    whole = ready(gpt2, data).items["part of speech"]
    some = [ready(m, data, n_items=50).items["part of speech"] for m in (gpt2, other_words)]
    assert len(whole.keys) > 500
    assert len(some[0].keys) == len(some[1].keys) == 50
    assert some[0].keys.tolist() == some[1].keys.tolist()
    assert some[0].labels.tolist() == some[1].labels.tolist()
    assert set(some[0].keys) < set(whole.keys)
    again = ready(gpt2, data, n_items=50, seed=1).items["part of speech"]
    assert set(again.keys) != set(some[0].keys)
    # Rows of items that were not chosen are of none.
    assert set(some[0].of_row) == {-1, *range(50)}


# --- values --------------------------------------------------------------------------------------


def test_values_on_disk_are_the_rows(vit: LoadedModel, tmp_path: Path) -> None:
    split = ready(vit, labelled_digits("test"), VISION_MLP)
    rows = Rows(vit.model, split.batches, VISION_MLP, positions=slice(1, None))
    store_values(rows, tmp_path / "x.npy", split.n_rows)
    expected = torch.cat(list(rows))
    assert torch.cat(list(StoredValues(tmp_path / "x.npy"))).equal(expected)

    items = split.items["digit"]
    means = item_means(StoredValues(tmp_path / "x.npy"), items, lambda x: 2 * x)
    assert means == pytest.approx(2 * expected.unflatten(0, (-1, 64)).mean(1).numpy(), abs=1e-5)

    shuffled = StoredValues(tmp_path / "x.npy", seed=3)
    first, second = torch.cat(list(shuffled)), torch.cat(list(shuffled))
    assert not first.equal(second)
    assert first.sort(0).values.equal(expected.sort(0).values)
    assert torch.cat(list(StoredValues(tmp_path / "x.npy", seed=3))).equal(first)
    assert not torch.cat(list(StoredValues(tmp_path / "x.npy", seed=4))).equal(first)


def test_words_have_the_mean_of_their_tokens(gpt2: LoadedModel, tmp_path: Path) -> None:
    data = Labelled(
        ["1732 Mary", "Tom 17"], {"kind": [[(0, 4, "x"), (5, 9, "y")], [(0, 3, "y")]]}, ""
    )
    split = ready(gpt2, data)
    rows = Rows(gpt2.model, split.batches, MLP, positions=slice(1, None))
    store_values(rows, tmp_path / "x.npy", split.n_rows)
    x = torch.cat(list(rows))
    means = item_means(StoredValues(tmp_path / "x.npy"), split.items["kind"], lambda x: x)
    expected = torch.stack([x[:2].mean(0), x[2], x[3]]).numpy()
    assert means == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("n_rows", [100, 10_000])
def test_another_number_of_rows_is_refused(n_rows: int, vit: LoadedModel, tmp_path: Path) -> None:
    batches = labelled_digits("test").inputs[:64].split(32)
    with pytest.raises(lch.InputError, match=f"{n_rows} were expected"):
        store_values(Rows(vit.model, batches, VISION_MLP), tmp_path / "x.npy", n_rows)


# --- the comparison ------------------------------------------------------------------------------


def three_digits(split: str) -> Labelled:
    data = labelled_digits(split)
    chosen = torch.tensor(data.labels["digit"]) < 3
    return Labelled(
        data.inputs[chosen], {"digit": [x for x in data.labels["digit"] if x < 3]}, "three digits"
    )


@pytest.fixture(scope="module")
def done(vit: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, compare(vit, VISION_MLP, three_digits("train"), three_digits("test"), out, SMALL)


def test_every_sae_is_there_and_scored(done: tuple[Path, Any]) -> None:
    out, results = done
    assert json.loads((out / "results.json").read_text()) == results
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert not list(out.rglob("*.npy"))
    scores = results["comparisons"][0]["scores"]
    combinations = [(s["of"], s["k"], s["seed"]) for s in scores]
    assert sorted(combinations) == sorted(itertools.product(SITES, (2, 4), (0, 1)))
    for score in scores:
        sae = SAE.load_from_disk(str(out / "saes" / "{of}-k{k}-seed{seed}".format(**score)))
        assert (sae.cfg.d_sae, sae.cfg.k) == (16, score["k"])
        assert sae.cfg.metadata.lch_centroid["of"] == score["of"]
        assert sae.cfg.metadata.lch_centroid["seed"] == score["seed"]
        assert score["l0"] == pytest.approx(score["k"], abs=0.5)
    assert len({score["explained_variance"] for score in scores}) == 12


@pytest.mark.parametrize("of", SITES)
def test_scores_are_of_what_is_held_out(of: Any, done: tuple[Path, Any], vit: LoadedModel) -> None:
    """Computed again from the saved SAE and the images themselves."""
    out, results = done
    scores = results["comparisons"][0]["scores"]
    (score,) = (s for s in scores if (s["of"], s["k"], s["seed"]) == (of, 4, 1))
    sae = SAE.load_from_disk(str(out / "saes" / f"{of}-k4-seed1"))
    codes_and_labels = []
    for split, n_rows in (("train", SMALL.n_rows), ("test", SMALL.n_test_rows)):
        data = three_digits(split).first(-(-n_rows // 64))
        batches = data.inputs.split(32)
        rows = list(Rows(vit.model, batches, VISION_MLP, of=of, positions=slice(1, None)))
        with torch.no_grad():
            feature_acts = sae.encode(torch.cat(rows)).unflatten(0, (-1, 64)).mean(1).numpy()
        n = len(data.inputs)
        kept = np.sort(np.random.default_rng(0).permutation(n)[: SMALL.n_items])
        codes_and_labels += [
            feature_acts[kept],
            np.array([str(x) for x in data.labels["digit"]])[kept],
        ]
    evaluation = evaluate(sae, rows)
    assert score["explained_variance"] == pytest.approx(evaluation.explained_variance, abs=1e-5)
    assert score["n_fired"] == evaluation.n_fired
    found = score["labels"]["digit"]
    probes = probe_scores(*codes_and_labels)
    assert {name: found[name] for name in probes} == pytest.approx(probes, abs=1e-6)
    agreement = label_agreement(codes_and_labels[2], codes_and_labels[3], 3)
    assert found["neighbours"] == pytest.approx(agreement, abs=1e-6)


def test_summaries_are_of_the_scores(done: tuple[Path, Any]) -> None:
    _, results = done
    found = results["comparisons"][0]

    def values(of: str, k: int) -> list[float]:
        chosen = [s for s in found["scores"] if (s["of"], s["k"]) == (of, k)]
        return [s["explained_variance"] for s in sorted(chosen, key=lambda s: s["seed"])]

    assert len(found["summary"]) == 6
    for line in found["summary"]:
        expected = values(line["of"], line["k"])
        shown = line["scores"]["explained_variance"]
        assert shown["mean"] == pytest.approx(np.mean(expected))
        assert shown["sd"] == pytest.approx(np.std(expected, ddof=1))
        assert 0 < line["cosine_with_random"] < line["cosine"] <= 1
    tests = [t for t in found["tests"] if t["score"] == "explained_variance"]
    expected_tests = list(itertools.product((2, 4), ("input", "output")))
    assert [(t["k"], t["against"]) for t in tests] == expected_tests
    for t in tests:
        difference = np.mean(values("centroid", t["k"])) - np.mean(values(t["against"], t["k"]))
        assert t["difference"] == pytest.approx(difference)
        assert t["n"] == 2
    assert {t["score"] for t in found["tests"]} >= {"digit: probe", "digit: sparse_probe_1"}
    made = [t for t in found["tests"] if t["reason"] is None]
    assert 0 < len(made) == results["n_tests"] < len(found["tests"])
    assert [t["p_corrected"] for t in made] == pytest.approx(holm([t["p_value"] for t in made]))
    for t in found["tests"]:
        assert (t["reason"] is None) == (t["p_value"] is not None) == (t["low"] is not None)


def test_the_report_shows_the_scores(done: tuple[Path, Any]) -> None:
    out, results = done
    page = (out / "report.html").read_text()
    for line in results["comparisons"][0]["summary"]:
        assert f"{line['scores']['digit: probe']['mean']:.3f}" in page
    for of in SITES:
        assert f"<code>{VISION_MLP}</code>" in page
        assert f"{of} 64" in page
    assert "the power is low" in page
    assert f"This page has {results['n_tests']} such tests" in page
    for test in results["comparisons"][0]["tests"]:
        if test["score"] != "l0":
            p = test["p_corrected"]
            assert ("<small>no test</small>" if p is None else f"corrected {p:.2g}") in page
    assert "Where no test is made, the difference is the same for every seed" in page
    assert "left out" not in page.split("Held out")[1].split("</tr>")[0]
    assert 'src="http' not in page
    assert page.count("<img") == len(list(out.glob("*.png"))) == 3
    with (out / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    expected = [s["explained_variance"] for s in results["comparisons"][0]["scores"]]
    assert [float(line["explained_variance"]) for line in lines] == expected


def test_the_same_seed_gives_the_same_numbers_after_an_interruption(
    done: tuple[Path, Any], vit: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the fourth SAE, and taken up again: what was done is kept.

    One k of the two: what an SAE scores does not depend on the others.
    """
    trained: list[Any] = []
    settings = ComparisonSettings(**{**vars(SMALL), "k": (4,)})

    def train_on(*args: Any, **kwargs: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(original(*args, **kwargs))
        return trained[-1]

    original: Callable[..., Any] = stored_component.train_on
    data = three_digits("train"), three_digits("test")
    monkeypatch.setattr(stored_component, "train_on", train_on)
    with pytest.raises(KeyboardInterrupt):
        compare(vit, VISION_MLP, *data, tmp_path / "out", settings)
    monkeypatch.undo()
    partial = tmp_path / ".out.partial"
    assert [p.name for p in tmp_path.iterdir()] == [partial.name]
    finished = list((partial / "saes").glob("*-seed*"))
    assert len(finished) == 3
    written = {p.name: (p / "scores.json").stat().st_mtime_ns for p in finished}

    other = ComparisonSettings(**{**vars(settings), "lr": 2e-3})
    with pytest.raises(lch.OutputError, match="settings differ"):
        compare(vit, VISION_MLP, *data, tmp_path / "out", other)
    # A part that was under way when the process was killed.
    (partial / "saes" / ".input-k4-seed1-ab12_cd3.tmp").mkdir()

    again = compare(vit, VISION_MLP, *data, tmp_path / "out", settings)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for name, time in written.items():
        assert (tmp_path / "out" / "saes" / name / "scores.json").stat().st_mtime_ns == time
    (found,), (expected,) = again["comparisons"], done[1]["comparisons"]
    assert len(found["scores"]) == 6
    for key in ("scores", "summary"):
        assert found[key] == [line for line in expected[key] if line["k"] == 4]
    assert again["components"] == done[1]["components"]
    assert not list((tmp_path / "out").rglob(".*"))
    with pytest.raises(lch.OutputError, match="other content"):
        compare(vit, VISION_MLP, *data, tmp_path / "out", settings)


def test_unfinished_work_is_known_by_its_content(gpt2: LoadedModel, tmp_path: Path) -> None:
    """A model under another path is the same; other texts, labels or rows are not."""
    data = labelled_stories(60, seed=3)

    def identity(loaded: LoadedModel = gpt2, test: Labelled = data, **changes: Any) -> Any:
        settings = ComparisonSettings(**(vars(SMALL) | changes))
        return make_component(loaded, MLP, data, test, settings).identity()

    shutil.copytree(DEMO_MODEL_DIR, tmp_path / "copy")
    assert identity(lch.load(tmp_path / "copy")) == identity()
    texts = [text.replace("Mary", "Anna") for text in data.inputs]
    labels = {name: entries[::-1] for name, entries in data.labels.items()}
    for other in (Labelled(texts, data.labels, ""), Labelled(data.inputs[::-1], labels, "")):
        assert identity(test=other) != identity()
    assert identity(n_items=30) != identity()


# --- from the command line -----------------------------------------------------------------------

TINY = "--k 2 --seeds 2 --d-sae 8 --rows 512 --test-rows 256 --batch-size 64 --neighbours 2"


def lch_sae_compare(*arguments: str) -> Any:
    command = ["sae", "compare", *TINY.split(), *arguments]
    return CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.slow
def test_a_file_of_texts_and_two_components(tmp_path: Path) -> None:
    """One label a text; a fifth is held out. A component's features are its own, in each SAE."""
    texts = labelled_stories(120).inputs
    lines = [
        json.dumps({"story": f"{text} {['Owl', 'Fox'][i % 2]}", "about": ["owl", "fox"][i % 2]})
        for i, text in enumerate(texts)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    paths = f"--model {DEMO_MODEL_DIR} --dataset {tmp_path}/texts.jsonl --out {tmp_path}/out"
    options = f"--module {MLP} --label about --column story"
    others = f"--against :{MLP} --against :transformer.h.1.attn"
    result = lch_sae_compare(*paths.split(), *options.split(), *others.split())
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    modules = [component["module"] for component in results["components"]]
    assert modules == [MLP, MLP, "transformer.h.1.attn"]
    for part in results["components"]:
        assert set(part["test"]["items"]["about"]) == {"owl", "fox"}
        assert part["test"]["n_inputs"] <= 24
    assert results["settings"]["d_sae"] == 8
    assert [len(found["scores"]) for found in results["comparisons"]] == [6, 6, 6]
    assert len(results["similarity"]) == 2 * 3 * 2
    for line in results["similarity"]:
        assert line["n_items"] == sum(results["components"][0]["test"]["items"]["about"].values())
        assert 0 < line["chance"] < 1
        same = line["against"] == "against-1"
        assert line["correlation"] == pytest.approx(1) if same else line["correlation"] < 0.99
    assert len(results["similarities"]) == 2 * 3
    assert "Dictionaries of two components" in (tmp_path / "out" / "report.html").read_text()


def test_a_directory_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.huggingface("vit_base", torch.float32).save_pretrained(tmp_path / "model")
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for i in range(160):
        split = "train" if i < 130 else "test"
        directory = tmp_path / "images" / split / "ab"[i % 2]
        directory.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 127 + 128 * (i % 2), (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    paths = f"--model {tmp_path}/model --dataset {tmp_path}/images --out {tmp_path}/out"
    result = lch_sae_compare(*paths.split(), "--module", "layers.1.mlp", "--test-split", "test")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (component,) = results["components"]
    assert component["train"]["items"]["label"].keys() == {"a", "b"}
    assert component["test"]["n_inputs"] == 30


@pytest.mark.slow
def test_an_embedded_task(tmp_path: Path) -> None:
    """BatchTopK on stories, another seed, two tokens left out; words and passages are labelled."""
    options = "--task stories --architecture batchtopk --seed 7 --skip 2 --items 40 --lr 2e-3"
    result = lch_sae_compare(*options.split(), "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    sae = SAE.load_from_disk(str(tmp_path / "out" / "saes" / "output-k2-seed8"))
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.metadata.lch_centroid["positions"] == [2, None, None]
    (component,) = results["components"]
    assert component["module"] == MLP
    assert sum(component["test"]["items"]["part of speech"].values()) == 40
    kinds = ["part of speech", "behaviour", "behaviour, by word"]
    assert list(results["comparisons"][0]["chance"]) == kinds


# --- sources -------------------------------------------------------------------------------------


def test_words_with_labels_of_their_own() -> None:
    """As data sets of parts of speech or of names come: lists of words, and of their labels."""
    names = ["noun", "verb"]
    features = {"words": Sequence(Value("string")), "pos": Sequence(ClassLabel(names=names))}
    content = {"words": [["Mary", "ate"], ["Tom"]], "pos": [[0, 1], [0]]}
    data = Dataset.from_dict(content, features=Features(features))
    splits = load_labelled(data, "pos", column="words")
    pairs = {split.inputs[0]: split.labels["pos"][0] for split in splits}
    assert pairs == {"Mary ate": [(0, 4, "noun"), (5, 8, "verb")], "Tom": [(0, 3, "noun")]}


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": [f"text {i}" for i in range(50)], "label": [0, 1] * 25})
    data.save_to_disk(str(tmp_path / "data"))
    train, test = load_labelled(tmp_path / "data", "label")
    assert len(test.inputs) == 10
    assert {*train.inputs, *test.inputs} == set(data["text"])
    assert train.inputs != sorted(train.inputs, key=data["text"].index)
    again, _ = load_labelled(tmp_path / "data", "label")
    other, _ = load_labelled(tmp_path / "data", "label", seed=1)
    assert again.inputs == train.inputs != other.inputs
    for text, label in zip(train.inputs, train.labels["label"], strict=True):
        assert label == int(text.split()[1]) % 2


def test_rows_that_are_trained_on_are_not_taken_for_held_out(tmp_path: Path) -> None:
    """Of a file or a data set at hand there is one split, whatever it is called."""
    data = Dataset.from_dict({"text": [f"text {i}" for i in range(50)], "label": [0, 1] * 25})
    data.save_to_disk(str(tmp_path / "data"))
    data.to_csv(str(tmp_path / "data.csv"))
    for source in (data, tmp_path / "data", tmp_path / "data.csv"):
        with pytest.raises(lch.InputError, match="nothing would be held out"):
            load_labelled(source, "label", test_split="test")
    splits = data.train_test_split(0.4, seed=0)
    splits.save_to_disk(str(tmp_path / "splits"))
    train, test = load_labelled(tmp_path / "splits", "label", test_split="test")
    assert {*train.inputs} == {*splits["train"]["text"]}
    assert {*test.inputs} == {*splits["test"]["text"]}


def repeated(texts: list[str], times: int = 2) -> Dataset:
    """Each text several times, with white space around it and other labels."""
    rows = [f"{' ' * i}{text}" for text in texts for i in range(times)]
    return Dataset.from_dict({"text": rows, "label": [i % times for i in range(len(rows))]})


def stripped(data: Labelled) -> list[str]:
    return [text.strip() for text in data.inputs]


@pytest.mark.parametrize("seed", range(5))
def test_a_text_is_on_one_side_only(seed: int) -> None:
    """Every row is kept, those whose labels disagree too."""
    texts = [f"text {i}" for i in range(50)]
    train, test = load_labelled(repeated(texts), "label", seed=seed)
    assert not {*stripped(train)} & {*stripped(test)}
    assert len({*stripped(test)}) == 10
    assert sorted(stripped(train) + stripped(test)) == sorted(texts * 2)
    for text, label in zip(train.inputs, train.labels["label"], strict=True):
        assert label == text.startswith(" ")
    assert train.left_out == test.left_out == 0
    assert "50 repeat another" in test.name
    assert "repeat" not in load_labelled(repeated(texts, 1), "label")[1].name


def test_texts_of_a_named_split_that_training_has_are_left_out(tmp_path: Path) -> None:
    splits = DatasetDict(
        train=repeated([f"text {i}" for i in range(40)]),
        test=repeated([f"text {i}" for i in range(30, 60)], 3),
        same=repeated([f" text {i}" for i in range(20)]),
    )
    splits.save_to_disk(str(tmp_path / "data"))
    train, test = load_labelled(tmp_path / "data", "label", test_split="test")
    assert len(train.inputs) == 80
    assert sorted(stripped(test)) == sorted([f"text {i}" for i in range(40, 60)] * 3)
    assert (train.left_out, test.left_out) == (0, 30)
    assert test.first(5).left_out == 30
    with pytest.raises(lch.InputError, match=r"40 inputs of .*same.* nothing would be held out"):
        load_labelled(tmp_path / "data", "label", test_split="same")


def test_images_are_the_same_by_their_pixels(tmp_path: Path) -> None:
    """Whatever the file, its name or how it keeps its colours."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 8, 8), dtype=np.uint8)
    grey = [Image.fromarray(one) for one in pixels]
    kept = [image.convert("RGB") if i % 2 else image for i, image in enumerate(grey)]
    kinds = Features({"image": datasets.Image(), "label": Value("int64")})
    train, test = (
        Dataset.from_dict({"image": images, "label": [0, 1] * (len(images) // 2)}, features=kinds)
        for images in (grey[:8], kept[6:])
    )
    DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "data"))
    train, test = load_labelled(tmp_path / "data", "label", test_split="test")
    assert (len(train.inputs), len(test.inputs), test.left_out) == (8, 4, 2)
    twice = datasets.concatenate_datasets([datasets.load_from_disk(tmp_path / "data")["train"]] * 2)
    train, test = load_labelled(twice, "label")
    assert not {*train.contents()} & {*test.contents()}
    assert (len(train.inputs), len(test.inputs)) == (12, 4)
    tensors = torch.tensor(pixels)[:, None].float()
    data = Labelled(tensors, {"x": [0, 1] * 6}, "")
    assert data.without(data.select([0, 3])).inputs.equal(tensors[[1, 2, *range(4, 12)]])
    arrays = Labelled(list(pixels), {"x": [0, 1] * 6}, "")
    assert arrays.without(arrays.first(5)).labels["x"] == [1, 0, 1, 0, 1, 0, 1]


def test_what_is_left_out_is_told(gpt2: LoadedModel, tmp_path: Path, capsys: Any) -> None:
    stories = labelled_stories(130, seed=1)
    data = repeated(list(stories.inputs), 1).map(lambda row, i: {"label": i % 2}, with_indices=True)
    parts = DatasetDict(train=data.select(range(100)), test=data.select(range(90, 130)))
    parts.save_to_disk(str(tmp_path / "data"))
    train, test = load_labelled(tmp_path / "data", "label", test_split="test")
    settings = ComparisonSettings(**{**vars(SMALL), "k": (2,), "n_rows": 512, "n_test_rows": 256})
    results = compare(gpt2, MLP, train, test, tmp_path / "out", settings)
    assert results["left_out"] == 10
    assert "10 inputs left out" in (tmp_path / "out" / "report.html").read_text()
    assert "10 inputs are not held out" in capsys.readouterr().out


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (32,)}, "k=32 of d_sae=16"),
        ({"k": ()}, "k="),
        ({"k": (2, 2)}, "different numbers"),
        ({"k": (0,)}, "at least 1"),
        ({"n_seeds": 1}, "n_seeds=1"),
        ({"architecture": "relu"}, "architecture='relu'"),
        ({"n_rows": 100}, "n_rows=100 must be at least 128"),
        ({"n_items": 1}, "n_items=1"),
        ({"skip": -1}, "skip=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_settings_out_of_range(changes: Any, message: str, as_users_run: None) -> None:
    with pytest.raises(lch.InputError, match=message):
        ComparisonSettings(**(vars(SMALL) | changes))


def test_data_that_cannot_be_compared(
    gpt2: LoadedModel, vit: LoadedModel, tmp_path: Path, as_users_run: None
) -> None:
    """All refused before anything is written."""
    stories, digits = labelled_stories(120), labelled_digits("test")
    one_label = Labelled(stories.inputs, {"x": ["a"] * 120}, "")
    few = Labelled(stories.inputs, {"x": ["a", "b", *[None] * 118]}, "")
    overlapping = Labelled(["Mary ate"], {"x": [[(0, 4, "a"), (2, 6, "b")]]}, "")
    too_short = Labelled(["Mary ate"], {"x": [[1]]}, "")
    for loaded, module, data, message in (
        (gpt2, "transformer.h.9.mlp", stories, "fits no module"),
        (gpt2, "transformer.h.*.mlp", stories, "choose one"),
        (gpt2, MLP, one_label, "1 label"),
        (gpt2, MLP, few, "2 items"),
        (gpt2, MLP, overlapping, "overlap"),
        (gpt2, MLP, too_short, "1 labels for 2 tokens"),
        (vit, VISION_MLP, stories, "fast tokenizer"),
        (gpt2, MLP, digits, "no texts"),
        (vit, "embeddings.patch_embeddings.projection", digits, "shape"),
    ):
        with pytest.raises(lch.LCHError, match=message):
            compare(loaded, module, data, data, tmp_path / "out", SMALL)
    for inputs, labels in (([], {"x": []}), (["a"], {}), (["a"], {"x": ["b", "c"]})):
        with pytest.raises(lch.InputError):
            Labelled(inputs, labels, "")
    assert not list(tmp_path.iterdir())


def test_inputs_that_are_trained_on_are_not_held_out(gpt2: LoadedModel, tmp_path: Path) -> None:
    stories = labelled_stories(130, seed=1)
    train, test = stories.select(range(100)), stories.select(range(97, 130))
    settings = ComparisonSettings(**{**vars(SMALL), "n_test_rows": 1000})
    with pytest.raises(lch.InputError, match=r"3 of the .* held-out inputs are among the 100"):
        compare(gpt2, MLP, train, test, tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(lch.InputError, match="no column 'kind'"):
        load_labelled(data, "kind")
    with pytest.raises(lch.InputError, match="no column 'image'"):
        load_labelled(data, "label", column="image")
    with pytest.raises(lch.InputError, match="1 rows with 1 different inputs, of which none can"):
        load_labelled(data.select([0]), "label")
    with pytest.raises(lch.InputError, match="6 rows with 1 different inputs, of which none can"):
        load_labelled(repeated(["a"], 6), "label")
    with pytest.raises(lch.InputError, match="no rows"):
        load_labelled(data.select([]), "label")
    (tmp_path / "empty").mkdir()
    with pytest.raises(lch.InputError, match="cannot be read"):
        load_labelled(tmp_path / "empty", "label")
    for arguments, message in (
        (["--model", "m", "--module", "x"], "--dataset"),
        (["--dataset", "d"], "--model"),
        (["--task", "letters"], "digits, stories"),
    ):
        with pytest.raises(lch.InputError, match=message):
            lch_sae_compare(*arguments, "--out", str(tmp_path / "out"))


def test_work_in_parts(tmp_path: Path) -> None:
    """A directory that outlives an exception, for the same settings only."""
    path = tmp_path / "out"

    def interrupted() -> None:
        with resumable_directory(path, {"a": (1, 2)}) as directory:
            (directory / "part").write_text("done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not path.exists()
    with (
        pytest.raises(lch.OutputError, match="a, b differ"),
        resumable_directory(path, {"a": 1, "b": 2}),
    ):
        pass
    with resumable_directory(path, {"a": [1, 2]}) as directory:
        assert (directory / "part").read_text() == "done"
    assert {p.name for p in path.iterdir()} == {"part", "settings.json", "files.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(lch.OutputError, match="other content"), resumable_directory(path, {}):
        pass
