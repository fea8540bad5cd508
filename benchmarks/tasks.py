"""Questions by log-likelihood: qtool beside lm-evaluation-harness's own `hf` backend.

    pip install 'qtool[eval]'
    python benchmarks/tasks.py --out FILE.json
    python benchmarks/tasks.py --data arc_easy.jsonl --limit 200 --model Qwen/Qwen3-0.6B

The same questions, made into a task of the harness, go four ways, in float32:

hf          lm-eval's own backend on transformers
harness     lm-eval through qtool's model, in this process: the contexts that choices share are
            computed once
server      lm-eval's local-completions against `qtool serve`
qtool       what qtool's own tasks do with the same texts, without the harness

Of each the largest difference of a log-likelihood to hf's, and the CPU time of the answers on one
thread, loading not counted (the server's is another process: its time by the clock). `ratio` is
hf's time by that way's. Without --data, questions are made of the text that ships: a passage, what
follows it and what follows others.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qtool.builtin import evaluation_text
from qtool.runtime.bench.client import served_model
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.evaluate.scorer import RuntimeScorer, open_scorer
from qtool.runtime.evaluate.tasks import harness
from qtool.runtime.evaluate.tasks.scoring import encode_pair
from qtool.runtime.server.process import running_server
from qtool.source import resolve

NAME = "benchmark_questions"
TASK = """
task: benchmark_questions
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
BATCH = 16
MOST_APART = 1e-3
CHOICES = 4


@dataclass(frozen=True, slots=True)
class Way:
    name: str
    seconds: float
    clock: str
    ratio: float
    most_apart: float
    holds: bool


def questions(data: Path | None, limit: int) -> list[dict[str, Any]]:
    """Rows of query, choices and gold."""
    if data is not None:
        lines = data.read_text(encoding="utf-8").splitlines()[:limit]
        return [json.loads(line) for line in lines]
    words = evaluation_text().read_text(encoding="utf-8").split()
    draw = random.Random(0)
    rows = []
    for _ in range(limit):
        places = [draw.randrange(64, len(words) - 8) for _ in range(CHOICES)]
        gold = draw.randrange(CHOICES)
        before = words[places[gold] - 64 : places[gold]]
        choices = [" ".join(words[place : place + 8]) for place in places]
        rows.append({"query": " ".join(before), "choices": choices, "gold": gold})
    return rows


class Answered(NamedTuple):
    """Log-likelihoods of all choices, in order, and the seconds that they took."""

    logprobs: list[float]
    seconds: float


def by_harness(
    model: Any, folder: Path, clock: Callable[[], float], limit: int | None = None
) -> Answered:
    """What is timed is the model: the harness's own work is the same for all."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    seconds = []
    answer = model.loglikelihood

    def timed(*arguments: Any, **more: Any) -> Any:
        began = clock()
        answers = answer(*arguments, **more)
        seconds.append(clock() - began)
        return answers

    model.loglikelihood = timed
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[NAME],
            task_manager=TaskManager(include_path=str(folder)),
            bootstrap_iters=0,
            log_samples=True,
            limit=limit,
        )
    finally:
        model.loglikelihood = answer
    assert found is not None
    rows = sorted(found["samples"][NAME], key=lambda row: int(row["doc_id"]))
    return Answered([float(answer[0][0]) for row in rows for answer in row["resps"]], sum(seconds))


def by_qtool(
    scorer: RuntimeScorer, rows: Sequence[dict[str, Any]], clock: Callable[[], float]
) -> Answered:
    began = clock()
    pairs = [
        [encode_pair(scorer, row["query"], f" {choice}") for choice in row["choices"]]
        for row in rows
    ]
    found = scorer.likelihoods(pairs, lambda count: None)
    seconds = clock() - began
    return Answered([one.logprob for choices in found for one in choices], seconds)


def measure(options: argparse.Namespace, folder: Path) -> list[Way]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    rows = questions(options.data, options.limit)
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.replace("FILE", str(file)), encoding="utf-8")
    source = resolve(options.model)
    theirs = HFLM(
        pretrained=str(source.path), dtype="float32", device="cpu", batch_size=options.batch
    )
    scorer = open_scorer(source, "qtool", dtype="float32", device="cpu")
    assert isinstance(scorer, RuntimeScorer)
    own = harness._model_class()(scorer, scorer.loaded, scorer.loaded.max_position_embeddings)
    cpu, wall = time.process_time, time.perf_counter
    for model in (theirs, own):
        by_harness(model, folder, cpu, limit=2)
    expected = by_harness(theirs, folder, cpu)
    results = {
        "harness": ("cpu", by_harness(own, folder, cpu)),
        "qtool": ("cpu", by_qtool(scorer, rows, cpu)),
    }
    by_the_clock = by_harness(theirs, folder, wall).seconds
    with running_server(str(source.path), "--dtype", "float32") as server:
        remote = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=served_model(server.url, None),
            tokenizer_backend="remote",
            num_concurrent=1,
            batch_size=options.batch,
        )
        results["server"] = ("wall", by_harness(remote, folder, wall))
    ways = [Way("hf", expected.seconds, "cpu", 1.0, 0.0, True)]
    for name, (clock, found) in results.items():
        pairs = zip(found.logprobs, expected.logprobs, strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        against = expected.seconds if clock == "cpu" else by_the_clock
        holds = apart <= MOST_APART
        ways.append(Way(name, found.seconds, clock, against / found.seconds, apart, holds))
    return ways


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="builtin:books-7m", help="unquantized")
    parser.add_argument("--data", type=Path, help="JSON lines of query, choices and gold")
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--batch", type=int, default=BATCH, help="of the hf backend")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        import lm_eval
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'qtool[eval]'") from None
    with tempfile.TemporaryDirectory() as temporary:
        ways = measure(options, Path(temporary))
    for way in ways:
        print(
            f"{way.name:8} {way.seconds:7.2f} s ({way.clock}), {way.ratio:5.2f} x; log-likelihoods "
            f"within {way.most_apart:.1e}"
        )
    if options.out is not None:
        facts = {
            "model": options.model,
            "questions": options.limit,
            "data": "made of the text that ships" if options.data is None else options.data.name,
            "hf_batch_size": options.batch,
            "ways": [asdict(way) for way in ways],
        }
        versions = {"lm_eval": lm_eval.__version__}
        write_result(options.out, facts, load_before=load_before, versions=versions)
    return not all(way.holds for way in ways)


if __name__ == "__main__":
    raise SystemExit(main())
