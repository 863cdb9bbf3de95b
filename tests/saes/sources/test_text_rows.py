"""Rows that hold no text: refused with their number, or left out and counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sae_lens import TopKTrainingSAEConfig

import lch_plugin as lch
from lch_plugin.saes import Labelled, load_labelled, load_text, runner_config
from lch_plugin.saes.sources.texts import check_dataset, check_inputs
from tests import models

HOOK = "blocks.1.mlp.hook_centroid"
TEXTS = [" ".join(f"w{(i * j) % 50}" for j in range(20)) for i in range(60)]
IDS = models.tokens(60, 16).tolist()
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "w1 w2"}] for text in TEXTS
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it reads; not of tests, in the user's own directory."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def with_row(rows: list[Any], row: Any, at: int = 40) -> list[Any]:
    return [*rows[:at], row, *rows[at:]]


def stream(rows: list[Any], column: str = "text") -> IterableDataset:
    """Of rows that need not have one type: arrow would not hold them."""

    def generate() -> Iterator[dict[str, Any]]:
        for row in rows:
            yield {column: row} if column else row

    return IterableDataset.from_generator(generate)


def train(model: Any, data: Any, **kw: Any) -> Any:
    options: dict[str, Any] = {"context_size": 16, "training_tokens": 512, "lr": 1e-2}
    options |= {"train_batch_size_tokens": 128, "n_batches_for_norm_estimate": 2, **kw}
    sae = TopKTrainingSAEConfig(d_in=models.D_MODEL, d_sae=64, k=4)
    return lch.saes.train(model, data, runner_config(sae, HOOK, **options))


def cached(model: Any, data: Any, path: Path, **kw: Any) -> list[Any]:
    cache = lch.saes.cache(model, data, path, hook_names=HOOK, context_size=16, **kw)
    return cache.token_ids(slice(0, cache.n_sequences)).tolist()


BAD = [
    (with_row(TEXTS, None), "row 40 missing in column 'text': None is no text"),
    (with_row(TEXTS, ""), "row 40 empty in column 'text': '' is no text"),
    (with_row(TEXTS, " \n"), "row 40 empty"),
    (list(range(60)), "row 0 wrong in column 'text': 0 is no text"),
    ([[text] for text in TEXTS], "row 0 wrong"),
    ([None] * 60, "row 0 missing"),
    (CHATS, "row 0 wrong"),
]
BAD_IDS = [
    (with_row(IDS, None), "row 40 missing in column 'tokens': None is no list of integers"),
    (with_row(IDS, []), "row 40 empty"),
    (with_row(IDS, [*IDS[0][:15], None]), "row 40 wrong"),
    (with_row(IDS, IDS[0][:9]), "row 40 of the dataset has 9 tokens"),
    (with_row(IDS, [*IDS[0][:15], -1]), "row 40 of the dataset: token ids"),
    ([[0.5] * 16] * 60, "row 0 wrong"),
    ([["w1"] * 16] * 60, "row 0 wrong"),
    (list(range(60)), "row 0 wrong"),
]


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("column", "rows", "match"),
    [*(("text", *case) for case in BAD), *(("tokens", *case) for case in BAD_IDS)],
)
def test_rows_that_cannot_be_read_are_refused_at_the_start(
    column: str, rows: list[Any], match: str, tmp_path: Path
) -> None:
    model, data = models.bridge("gpt2"), Dataset.from_dict({column: rows})
    # How many tokens and which is the model's to say, and what is named may be conversations.
    if "token" not in match.replace("'tokens'", "") and rows is not CHATS:
        with pytest.raises(lch.InputError, match=match):
            load_text(data, column=column)
    for order in (data, data.select(range(60))):  # Beside arrow's own tables, with indices.
        with pytest.raises(lch.InputError, match=match) as caught:
            train(model, order)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        with pytest.raises(lch.InputError, match=match):
            cached(model, order, tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("at", [0, 40])
@pytest.mark.parametrize("row", [None, "", " ", 5, 0.5, ["w1"], [1, 2], {"a": 1}, CHATS[0]])
def test_a_stream_is_refused_at_the_row(row: Any, at: int, tmp_path: Path) -> None:
    model, data = models.bridge("gpt2"), stream(with_row(TEXTS, row, at))
    # If it is the first row of a column that is named, it says what the others have to be.
    named = f"row {at or '[01]'} (missing|empty|wrong) in column 'text'"
    with pytest.raises(lch.InputError, match=named):
        list(load_text(data, column="text"))
    match = f"row {at} (missing|empty|wrong) in column 'text'"
    if at == 0:
        with pytest.raises(lch.InputError, match=match):
            check_dataset(model, data, 16)
        return
    checked = check_dataset(model, data, 16)
    with pytest.raises(lch.InputError, match=match):
        list(checked)
    with pytest.raises(lch.InputError, match=match):
        train(model, load_text(data, column="text"), training_tokens=100_000)
    with pytest.raises(lch.InputError, match=match):
        cached(model, load_text(data, column="text"), tmp_path / "c")


@pytest.mark.usefixtures("as_users_run")
def test_a_stream_of_tokens_is_refused_at_the_row() -> None:
    model = models.bridge("gpt2")
    for rows, match in BAD_IDS[:5]:
        with pytest.raises(lch.InputError, match=match):
            list(check_dataset(model, stream(rows, "tokens"), 16))
    rows = [{"text": "w1"}, {"txt": "w2"}]
    with pytest.raises(lch.InputError, match="row 1 of the dataset has no column 'text'"):
        list(check_dataset(model, stream(rows, ""), 16))
    good = Dataset.from_dict({"input_ids": IDS}).with_format("torch").to_iterable_dataset()
    assert len(list(check_dataset(model, good, 16))) == 60


def test_a_column_of_any_name_is_read(tmp_path: Path) -> None:
    model = models.bridge("gpt2")
    model.tokenizer.chat_template = TEMPLATE
    for kind, rows in {"text": TEXTS, "tokens": IDS, "messages": CHATS}.items():
        options = {"use_chat_formatting": True} if kind == "messages" else {}
        expected = cached(model, Dataset.from_dict({kind: rows}), tmp_path / kind, **options)
        for i, name in enumerate((kind, "story")):
            # Beside it a column that SAELens would take, and cannot read.
            data = Dataset.from_dict({name: rows, "problem": [None] * 60, "label": [0] * 60})
            for j, source in enumerate((data, data.to_iterable_dataset())):
                read = load_text(source, column=name)
                assert list(next(iter(read))) == [kind]
                assert cached(model, read, tmp_path / f"{kind}{i}{j}", **options) == expected
    train(model, load_text(Dataset.from_dict({"story": TEXTS}), column="story"))
    (tmp_path / "texts.csv").write_text("story\n" + "\n".join(TEXTS))
    assert load_text(tmp_path / "texts.csv", column="story")["text"][:] == TEXTS


def test_a_column_that_is_not_there() -> None:
    data = Dataset.from_dict({"story": TEXTS})
    for source in (data, data.to_iterable_dataset()):
        with pytest.raises(
            lch.InputError, match=r"columns \['story'\], of which none is 'stories'"
        ):
            load_text(source, column="stories")
        with pytest.raises(lch.InputError, match="--column"):
            load_text(source, skip_empty=True)
        with pytest.raises(lch.InputError, match="--column"):
            check_dataset(models.bridge("gpt2"), source, 16)
    with pytest.raises(lch.InputError, match="none is 'story'"):
        load_text(TEXTS, column="story")


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [text for each in TEXTS for text in (each, None, " ", "")]
    for column in (None, "text"):
        data = Dataset.from_dict({"text": rows, "label": list(range(240))})
        with pytest.warns(UserWarning, match="180 of 240 rows have no text in column 'text'"):
            read = load_text(data, column=column, skip_empty=True)
        assert read["text"][:] == TEXTS
        assert ("label" in read.column_names) == (column is None)
    with pytest.warns(UserWarning, match="180 of 240 rows"):
        assert load_text(rows, skip_empty=True)["text"][:] == TEXTS
    read = load_text(stream(rows), skip_empty=True)
    with pytest.warns(UserWarning, match="no text") as warned:
        assert [row["text"] for row in read] == TEXTS
    said = [str(w.message).split(" rows")[0] for w in warned]
    assert said == ["1 of the first 2", "10 of the first 14", "100 of the first 134"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_text(TEXTS, skip_empty=True)["text"][:] == TEXTS
    with pytest.warns(UserWarning, match="1 of 61 rows"):
        ids = load_text(Dataset.from_dict({"tokens": with_row(IDS, None)}), skip_empty=True)
    model = models.bridge("gpt2")
    assert cached(model, ids, tmp_path / "c") == IDS
    # What is left out are empty rows, and no others; these keep their numbers.
    mixed = Dataset.from_dict({"tokens": [None, [1, None], IDS[0]]})
    with pytest.raises(lch.InputError, match="row 1 wrong"):
        load_text(mixed, skip_empty=True)
    with pytest.raises(lch.InputError, match="row 2 wrong in column 'text': 5"):
        list(load_text(stream([None, "w1", 5]), skip_empty=True))
    with pytest.raises(lch.InputError, match="none of the 2 rows"):
        load_text(Dataset.from_dict({"text": ["", None]}), skip_empty=True)


@pytest.mark.usefixtures("as_users_run")
def test_lists_and_lines(tmp_path: Path) -> None:
    for bad, match in ((None, "row 1 missing: None"), ("", "row 1 empty"), (3, "row 1 wrong: 3")):
        with pytest.raises(lch.InputError, match=match):
            load_text(["w1", bad])
    (tmp_path / "texts.txt").write_text("w1\n\n  \nw2\n")
    assert load_text(tmp_path / "texts.txt")["text"][:] == ["w1", "w2"]
    lines = load_text(tmp_path / "texts.txt", streaming=True)
    assert [row["text"] for row in lines] == ["w1", "w2"]
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(lch.InputError, match="no text in any line"):
        load_text(tmp_path / "blank.txt")


def test_the_hint_for_conversations_works_when_it_is_followed(tmp_path: Path) -> None:
    model, data = models.bridge("gpt2"), Dataset.from_dict({"messages": CHATS})
    with pytest.raises(lch.InputError) as hint:
        train(model, data)
    for word in ("use_chat_formatting=True", "is_dataset_tokenized=False", "chat template"):
        assert word in str(hint.value)
    chat = {"use_chat_formatting": True, "is_dataset_tokenized": False}
    with pytest.raises(lch.InputError, match="has no chat template"):
        train(model, data, **chat)
    model.tokenizer.chat_template = TEMPLATE
    assert train(model, data, **chat).cfg.metadata.lch_centroid
    assert cached(model, data, tmp_path / "c", use_chat_formatting=True)
    streamed = data.to_iterable_dataset()
    assert cached(model, streamed, tmp_path / "d", use_chat_formatting=True)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        [{"role": "user", "content": None}],
        [{"role": None, "content": "w1"}],
        [{"role": "user"}],
    ],
)
def test_conversations_that_no_template_can_read(bad: Any) -> None:
    model = models.bridge("gpt2")
    model.tokenizer.chat_template = TEMPLATE
    rows = with_row(CHATS, bad)
    for data in (Dataset.from_dict({"messages": rows}), stream(rows, "messages")):
        with pytest.raises(
            lch.InputError, match=r"row 40 (missing|empty|wrong).* role and content"
        ):
            list(check_dataset(model, data, 16, use_chat_formatting=True))
    other = [[{"from": "human", "value": "w1"}]]
    with pytest.raises(lch.InputError, match="row 0 wrong in column 'conversations'"):
        check_dataset(
            model, Dataset.from_dict({"conversations": other}), 16, use_chat_formatting=True
        )
    calls = [*CHATS[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    check_dataset(model, Dataset.from_dict({"messages": [calls]}), 16, use_chat_formatting=True)


texts = st.lists(st.one_of(st.none(), st.text(" \n\u2003aä", max_size=3)), min_size=1, max_size=30)
ids = st.integers(-1, 52)
tokens = st.lists(
    st.one_of(st.none(), st.lists(st.one_of(st.none(), ids), min_size=3, max_size=5)),
    min_size=1,
    max_size=20,
)


def first_bad(rows: Any) -> int | None:
    """By the rules, in the plainest form."""
    for i, row in enumerate(rows):
        if row is None or (isinstance(row, str) and not row.strip()):
            return i
        is_list = not isinstance(row, str)
        if is_list and (len(row) < 4 or None in row or not 0 <= min(row) <= max(row) < 50):
            return i
    return None


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.one_of(texts, tokens), st.booleans(), st.integers(1, 7))
def test_memory_and_streams_agree_with_the_rules(rows: Any, is_fixed: bool, at_once: int) -> None:
    column = "text" if any(isinstance(row, str) for row in rows) else "tokens"
    kind: Any = Value("string") if column == "text" else Sequence(Value("int64"))
    if is_fixed and column == "tokens":
        rows = [row if row is None else [*row, 0, 0][:5] for row in rows]
        kind = Sequence(Value("int64"), length=5)
    data = Dataset.from_dict({column: rows}, features=Features({column: kind}))
    bad, model = first_bad(rows), models.bridge("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lch_plugin.saes.sources.texts._ROWS_AT_ONCE", at_once)
        for source in (data, data.to_iterable_dataset(), stream(rows, column)):
            if bad is None:
                read = check_dataset(model, source, 4)
                assert [row[column] for row in read] == rows
            else:
                with pytest.raises(lch.InputError, match=f"row {bad}\\b"):
                    list(check_dataset(model, source, 4))
        kept = [row for row in rows if row is not None and (row.strip() if column == "text" else 1)]
        is_readable = all(column == "text" or None not in row for row in kept)
        if kept and is_readable:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for source in (data, stream(rows, column)):
                    read = load_text(source, column=column, skip_empty=True)
                    assert [row[column] for row in read] == kept


def test_labelled_inputs(tmp_path: Path) -> None:
    for bad in (None, "", " ", 3, ["a"]):
        with pytest.raises(lch.InputError, match=r"input 1 of stories is .* no text"):
            Labelled(["a", bad, "b"], {"x": [0, 1, 0]}, "stories")
    picture = Image.new("L", (4, 4))
    with pytest.raises(lch.InputError, match="input 2 of pictures is None, which is no image"):
        Labelled([picture, picture, None], {"x": [0, 1, 0]}, "pictures")
    for rows, match in (
        (["a", None], "row 1 missing"),
        (["a", ""], "row 1 empty"),
        ([["a"], ["b", None]], "row 1 wrong"),
        ([["a"], []], "row 1 empty"),
        ([1, 2], "row 0 wrong"),
    ):
        with pytest.raises(lch.InputError, match=match):
            check_inputs(Dataset.from_dict({"x": rows}), "x")
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert check_inputs(Dataset.from_dict({"x": ["a", None, "b"]}), "x", True)["x"][:] == [
            *"ab"
        ]
    images = Dataset.from_dict({"x": [picture, None]})
    with pytest.raises(lch.InputError, match="row 1 missing in column 'x': None is no image"):
        check_inputs(images, "x")
    check_inputs(images.select([0]), "x")
    arrays = Dataset.from_dict({"x": [[[0, 1], [1, 0]]]})
    check_inputs(arrays, "x")


@pytest.mark.usefixtures("as_users_run")
def test_readers_refuse_a_stream_at_the_row(tmp_path: Path) -> None:
    model = models.bridge("gpt2")
    sae = train(model, Dataset.from_dict({"text": TEXTS}))
    for rows in (with_row(TEXTS, None), with_row(TEXTS, 5)):
        data, match = stream(rows), "row 40 (missing|wrong) in column 'text'"
        for read in (
            lambda data=data: train(model, data, training_tokens=100_000),
            lambda data=data: cached(model, data, tmp_path / "c"),
            lambda data=data: lch.saes.features(model, sae, data, n_features=2),
        ):
            with pytest.raises(lch.InputError, match=match):
                read()
    with pytest.raises(lch.InputError, match="row 40 missing"):
        lch.saes.features(model, sae, Dataset.from_dict({"text": with_row(TEXTS, None)}))
    problems = Dataset.from_dict({"problem": TEXTS})
    assert lch.saes.features(model, sae, problems, n_features=2).n_tokens


@pytest.mark.usefixtures("as_users_run")
def test_labelled_rows(tmp_path: Path) -> None:
    for texts, match in ((with_row(TEXTS, None), "row 40 missing"), ([*range(61)], "row 0 wrong")):
        data = Dataset.from_dict({"text": texts, "label": [0, 1] * 30 + [1]})
        with pytest.raises(lch.InputError, match=match):
            load_labelled(data, "label")
    data = Dataset.from_dict({"text": with_row(TEXTS, " "), "label": [0, None] * 30 + [1]})
    with pytest.warns(UserWarning, match="1 of 61 rows"):
        train_set, test_set = load_labelled(data, "label", skip_empty=True)
    assert sorted([*train_set.inputs, *test_set.inputs]) == sorted(TEXTS)
    data = Dataset.from_dict({"text": TEXTS, "label": [None] * 60})
    with pytest.raises(lch.InputError, match="labels no row"):
        load_labelled(data, "label")
    # Words under a name that SAELens takes for token ids, as data sets of names come.
    words = Dataset.from_dict({"tokens": [t.split() for t in TEXTS], "label": [[0] * 20] * 60})
    assert len(load_labelled(words, "label", column="tokens")[0].inputs) > 40
