"""lm-evaluation-harness through our model gives what it gives through its own `hf` backend."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import QtoolError, UsageError
from qtool.runtime.evaluate.scorer import RuntimeScorer, open_scorer
from qtool.source import Source

TASK = """
task: two_words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LONGER = """
task: go_on
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
WHOLE = """
task: whole_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}}"
metric_list:
  - {metric: word_perplexity}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [
        {"query": f"The {noun} was", "choices": ["very old", "of it", "gone"], "gold": number % 3}
        for number, noun in enumerate(["king", "house", "old man", "sea", "door", "child"])
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, text in enumerate((TASK, LONGER, WHOLE)):
        (folder / f"{number}.yaml").write_text(text.replace("FILE", str(file)), encoding="utf-8")
    return folder


def test_every_kind_of_request_gives_what_the_hf_backend_gives(books_7m: Path, tasks: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    from lm_eval.tasks import TaskManager

    from qtool.runtime.evaluate.tasks.harness import run_harness

    names = ["two_words", "go_on", "whole_texts"]
    scorer = open_scorer(Source(str(books_7m), books_7m), "own", dtype="float32", device="cpu")
    assert isinstance(scorer, RuntimeScorer)
    own = run_harness(scorer, scorer.loaded, names, context=512, limit=None, include=tasks)
    theirs: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(books_7m), "dtype": "float32", "device": "cpu"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
    )
    values = {(result.task, result.metric): result.value for result in own.results}
    assert values["two_words", "acc"] == theirs["results"]["two_words"]["acc,none"]
    assert values["two_words", "acc_norm"] == theirs["results"]["two_words"]["acc_norm,none"]
    perplexity = theirs["results"]["whole_texts"]["word_perplexity,none"]
    assert math.log(values["whole_texts", "word_perplexity"]) == pytest.approx(
        math.log(perplexity), abs=1e-3
    )
    assert own.right["two_words", "acc,none"] == tuple(
        bool(row["acc"]) for row in theirs["samples"]["two_words"]
    )
    assert values["go_on", "exact_match"] == theirs["results"]["go_on"]["exact_match,none"]
    again = run_harness(
        scorer, None, ["two_words"], context=512, limit=None, include=tasks, original=own
    )
    assert again.results[0].num_items == 6
    assert again.results[0].compared is not None
    assert again.results[0].compared.p_value == 1.0


def test_an_unknown_task_and_a_missing_package_say_what_to_do(
    books_7m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.runtime.evaluate.tasks import harness

    scorer = open_scorer(Source(str(books_7m), books_7m), "own", dtype="float32", device="cpu")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "lm_eval", None)
        with pytest.raises(QtoolError, match="need the lm-eval package") as caught:
            harness.run_harness(scorer, None, ["arc_easy"], context=512, limit=1)
        assert "qtool[eval]" in str(caught.value.hint)
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    with pytest.raises(UsageError, match="no task arc_hrad"):
        harness.run_harness(scorer, None, ["arc_hrad"], context=512, limit=1)
