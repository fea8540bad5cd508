"""Task files become questions, and questions that make no sense are refused by row."""

import bz2
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qtool.errors import FormatError, QtoolError, UsageError
from qtool.runtime.evaluate.tasks.items import Choice, Item, read_row
from qtool.runtime.evaluate.tasks.tasks import TASKS, open_task, require_different_names

ARC = {
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
    "answerKey": "B",
}


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "contexts", "continuations", "gold"),
    [
        (
            {"query": "Question: Hot?\n", "choices": ["ice", "fire"], "gold": 1},
            ["Question: Hot?\nAnswer:"] * 2,
            [" ice", " fire"],
            1,
        ),
        (
            {"query": "Frogs eat", "choices": ["flies", "cars"], "gold": 0},
            ["Frogs eat"] * 2,
            [" flies", " cars"],
            0,
        ),
        (
            {"context_options": ["so Ann", "so Sue"], "continuation": "won.", "gold": 0},
            ["so Ann", "so Sue"],
            [" won.", " won."],
            0,
        ),
        ({"context": "once upon a", "continuation": "time"}, ["once upon a"], [" time"], None),
        (ARC, ["Question: Which is hot?\nAnswer:"] * 2, [" ice", " fire"], 1),
        (
            {
                "question_stem": "Hot is",
                "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
                "answerKey": "A",
            },
            ["Hot is"] * 2,
            [" ice", " fire"],
            0,
        ),
        (
            {"question": " 1+1? ", "choices": ["1", "2"], "answer": 1, "subject": "hard_sums"},
            [
                "The following are multiple choice questions (with answers) about hard sums.\n\n"
                "1+1?\nA. 1\nB. 2\nAnswer:"
            ]
            * 2,
            [" A", " B"],
            1,
        ),
        (
            {"goal": "cut", "sol1": "knife", "sol2": "spoon", "label": 0},
            ["Question: cut\nAnswer:"] * 2,
            [" knife", " spoon"],
            0,
        ),
        (
            {
                "activity_label": "Baking",
                "ctx_a": "A man [step] stirs.",
                "ctx_b": "he",
                "endings": ["[title] eats", "sleeps", "x", "y"],
                "label": "1",
            },
            ["Baking: A man stirs. He"] * 4,
            # Its marks go before the space, as in lm-evaluation-harness.
            ["  eats", " sleeps", " x", " y"],
            1,
        ),
        (
            {"sentence": "so _ won.", "option1": "Ann", "option2": "Sue", "answer": "2"},
            ["so Ann", "so Sue"],
            [" won.", " won."],
            1,
        ),
        ({"text": "once upon a time"}, ["once upon a"], [" time"], None),
    ],
)
def test_each_known_set_of_keys_gives_the_harness_prompt(
    row: dict[str, object], contexts: list[str], continuations: list[str], gold: int | None
) -> None:
    choices = tuple(Choice(*pair) for pair in zip(contexts, continuations, strict=True))
    assert read_row(row) == Item(choices, gold)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["a"], "not an object"),
        ({"prompt": "x"}, "its keys are prompt"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "the right answer is 2 of 2"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "fewer than two"),
        ({"query": "q", "choices": ["a", " "], "gold": 0}, "a choice is empty"),
        ({"query": "q", "choices": "ab", "gold": 0}, "no list of texts"),
        ({"query": 3, "choices": ["a", "b"], "gold": 0}, "3 is no text"),
        ({"query": "q", "choices": ["a", "b"], "gold": "x"}, "invalid literal"),
        ({**ARC, "answerKey": "C"}, "C"),
        ({"sentence": "so won", "option1": "a", "option2": "b", "answer": "1"}, "no _ in"),
    ],
)
def test_a_row_that_makes_no_question_says_why(row: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_row(row)


def test_every_kind_of_file_is_read_packed_or_not(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "choices": ["a\u2028b", "c"], "gold": 0} for n in range(3)]
    jsonl = write_rows(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl.bz2").write_bytes(bz2.compress(jsonl.read_bytes()))
    expected = open_task(str(jsonl)).items
    assert len(expected) == 3
    assert expected[0].choices[0].continuation == " a\u2028b"
    for name in ("b.json", "c.parquet", "d.jsonl.bz2"):
        assert open_task(str(tmp_path / name)).items == expected, name


def test_mmlu_and_winogrande_as_csv(tmp_path: Path) -> None:
    mmlu = tmp_path / "abstract_algebra_test.csv"
    mmlu.write_text('"Find, say, 1+1",1,2,3,4,B\n', encoding="utf-8")
    (item,) = open_task(str(mmlu)).items
    assert item.gold == 1
    assert item.choices[0].context == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find, say, 1+1\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    winogrande = tmp_path / "winogrande-debiased.csv"
    winogrande.write_text("0,so _ won.,Ann,Sue,2\n", encoding="utf-8")
    (item,) = open_task(str(winogrande)).items
    assert (item.choices[1], item.gold) == (Choice("so Sue", " won."), 1)


def test_llama_cpps_hellaswag_file(tmp_path: Path) -> None:
    file = tmp_path / "hellaswag_val.txt"
    file.write_text("Baking: a man\n2\nruns.\nflies.\nstirs.\nswims.\n", encoding="utf-8")
    task = open_task(str(file))
    assert (task.metric, task.num_items) == ("acc_norm", 1)
    assert task.items[0].choices[2] == Choice("Baking: a man", " stirs.")
    file.write_text("Baking: a man\n2\nruns.\n", encoding="utf-8")
    with pytest.raises(FormatError, match="line 1: the last question has fewer"):
        open_task(str(file))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "holds no questions"),
        ("a.jsonl", b'{"text": "once upon"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"nothing": 1}\n', "row 1: its keys are nothing"),
        ("a.jsonl", b"\xff\xfe\n", "cannot be read as text"),
        ("a.json", b'{"text": "a b"}', "not a list"),
        ("a.parquet", b"PAR1 but no", "not readable Parquet"),
        ("a.csv", b"question,only\n", "row 1: 2 columns"),
        ("a.jsonl.gz", b"not packed", "cannot be read as text"),
        ("a.jsonl", b'{"text": "a b"}\n' + json.dumps(ARC).encode(), "mixes questions"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=words) as caught:
        open_task(str(tmp_path / name))
    assert name in str(caught.value)


def test_names_are_found_in_a_folder_whatever_their_underscores(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "openbook_qa.jsonl", ARC, ARC, ARC)
    task = open_task("openbookqa", folder=tmp_path, limit=2)
    assert (task.origin, len(task.items), task.num_items) == (str(file), 2, 3)


def test_what_is_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hellaswga"):
        open_task("hellaswga")
    with pytest.raises(UsageError, match="no file of questions"):
        open_task(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UsageError, match="at least 1"):
        open_task("hellaswag", folder=tmp_path, limit=0)
    file = open_task(str(write_rows(tmp_path / "arc.jsonl", ARC)))
    with pytest.raises(UsageError, match="two tasks are called arc"):
        require_different_names([file, file])


def test_without_a_network_the_error_says_where_to_put_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(QtoolError, match="could not be had") as caught:
        open_task("piqa")
    assert "--task-data" in str(caught.value.hint)


def test_real_sets_are_read_whole(shared_data: Path) -> None:
    counts = {
        name: open_task(name, folder=shared_data / "eval").num_items
        for name in TASKS
        if name not in ("arc_challenge", "mmlu")
    }
    assert counts == {
        "hellaswag": 10_042,
        "arc_easy": 2_376,
        "piqa": 1_838,
        "winogrande": 1_267,
        "lambada": 5_153,
        "openbookqa": 500,
    }
