"""`evaluate`: models and a text in, a report out, and its files if a folder is named.

    find the models -> load -> stream the text -> time generation -> report -> files

Models are loaded together and scored in one pass beside the original where memory allows it, else
one after another. The files appear under their name only when complete.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from qtool.artifact import tool_versions
from qtool.errors import UnknownName, UsageError
from qtool.json_files import write_json
from qtool.output import OutputFolder
from qtool.progress import bar
from qtool.runtime.config import Device
from qtool.runtime.evaluate.divergence import summarize
from qtool.runtime.evaluate.page import to_html
from qtool.runtime.evaluate.perplexity import (
    Protocol,
    llama_cpp_protocol,
    papers_protocol,
    perplexity,
)
from qtool.runtime.evaluate.report import (
    EvaluationReport,
    ModelReport,
    Speed,
    TextUsed,
    to_json,
    to_markdown,
)
from qtool.runtime.evaluate.scorer import (
    DTYPES,
    RuntimeScorer,
    Scorer,
    TokenizedText,
    open_scorer,
    require_same_tokens,
)
from qtool.runtime.evaluate.sizes import weight_hashes
from qtool.runtime.evaluate.speed import measure_speed
from qtool.runtime.evaluate.stream import Scored, plan_passes, score
from qtool.runtime.evaluate.subject import Subject, find_reference, open_subjects
from qtool.runtime.evaluate.tasks.harness import HarnessRun, run_harness
from qtool.runtime.evaluate.tasks.results import Answers, HarnessResult, TaskResult
from qtool.runtime.evaluate.tasks.results import summarize as summarize_task
from qtool.runtime.evaluate.tasks.scoring import answer
from qtool.runtime.evaluate.tasks.tasks import Task, open_task, require_different_names
from qtool.runtime.evaluate.text import (
    DEFAULT_MAX_TOKENS,
    EvaluationText,
    ScoringDtype,
    read_text,
)
from qtool.source import Source

# Of the machine's memory, what the loaded models may take together.
MEMORY_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What scoring found of one model."""

    scored: Scored
    scored_by: str
    dtype: str
    tasks: tuple[TaskResult, ...]
    harness: tuple[HarnessResult, ...]


@dataclass(frozen=True, slots=True)
class _Questions:
    """What is asked of every model."""

    tasks: tuple[Task, ...]
    lm_eval: tuple[str, ...]
    lm_eval_include: Path | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class _Answered:
    """One model's answers, task by task."""

    answers: tuple[Answers, ...]
    harness: HarnessRun


@dataclass(frozen=True, slots=True)
class _Scoring:
    """What scoring found of all models, by name."""

    num_tokens: int
    num_tokens_used: int
    protocols: tuple[Protocol, ...]
    outcomes: Mapping[str, _Outcome]


def evaluate(
    models: str | Source | Sequence[str | Source],
    against: str | Source | None = None,
    *,
    text: Path | None = None,
    out: Path | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    dtype: ScoringDtype = "float32",
    device: Device = "auto",
    force: bool = False,
    speed: bool = True,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    task_limit: int | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_include: Path | None = None,
    command: str | None = None,
) -> EvaluationReport:
    """Perplexity of each model, and its divergence from the original.

    models      one or several: folders, .gguf files, Hub ids or builtin:NAME
    against     the original; None: what qtool.json names as the source, if it is on this machine
    text        a UTF-8 file; None: the text that ships, disjoint from the calibration text
    out         a folder for report.json, report.md and report.html; None: no files
    max_tokens  of the text; None: all of it
    tasks       names of `tasks.TASKS`, or files of questions
    task_data   a folder that holds the files of named tasks; None: the Hub
    task_limit  questions of each task; None: all
    lm_eval     tasks of lm-evaluation-harness
    lm_eval_include  a folder of task files for it
    command     what the report names as the way to repeat it; by default `qtool eval ...`
    """
    wanted = [models] if isinstance(models, str | Source) else list(models)
    _check(wanted, dtype, max_tokens)
    stage = nullcontext() if out is None else OutputFolder(out, force=force)
    content = read_text(text)
    opened = tuple(open_task(task, folder=task_data, limit=task_limit) for task in tasks)
    require_different_names(opened)
    subjects = open_subjects(wanted)
    reference, note = find_reference(against, subjects)
    scoring = _score(
        subjects,
        reference,
        content,
        max_tokens,
        _Questions(opened, tuple(lm_eval), lm_eval_include, task_limit),
        dtype=dtype,
        device=device,
    )
    reports = {
        subject.name: _model_report(subject, scoring, device=device, with_speed=speed)
        for subject in [*subjects, *([] if reference is None else [reference])]
    }
    report = EvaluationReport(
        text=TextUsed(
            name=content.name,
            sha256=content.sha256,
            num_characters=len(content.content),
            num_tokens=scoring.num_tokens,
            num_tokens_used=scoring.num_tokens_used,
            overlap=content.overlap,
        ),
        reference=None if reference is None else reports[reference.name],
        models=tuple(reports[subject.name] for subject in subjects),
        command=command
        or as_command(
            wanted,
            against,
            text,
            max_tokens,
            dtype,
            tasks=tasks,
            task_data=task_data,
            task_limit=task_limit,
            lm_eval=lm_eval,
            lm_eval_include=lm_eval_include,
        ),
        environment=environment(),
        notes=() if note is None else (note,),
    )
    with stage as folder:
        if folder is not None:
            write_report(report, folder.path)
    return report


def write_report(report: EvaluationReport, folder: Path) -> None:
    """report.json, report.md and report.html."""
    write_json(folder / "report.json", to_json(report))
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(to_html(report), encoding="utf-8")


def as_command(
    models: Sequence[str | Source],
    against: str | Source | None,
    text: Path | None,
    max_tokens: int | None,
    dtype: str,
    *,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    task_limit: int | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_include: Path | None = None,
) -> str:
    """The command line that repeats an evaluation."""
    words = ["qtool", "eval", *map(_as_given, models)]
    words += [] if against is None else ["--against", _as_given(against)]
    words += [] if text is None else ["--text", str(text)]
    if max_tokens != DEFAULT_MAX_TOKENS:
        words += ["--max-tokens", str(max_tokens or 0)]
    words += [] if dtype == "float32" else ["--dtype", dtype]
    words += ["--tasks", ",".join(tasks)] if tasks else []
    words += [] if task_data is None else ["--task-data", str(task_data)]
    words += [] if task_limit is None else ["--task-limit", str(task_limit)]
    words += ["--lm-eval", ",".join(lm_eval)] if lm_eval else []
    words += [] if lm_eval_include is None else ["--lm-eval-include", str(lm_eval_include)]
    return shlex.join(words)


def environment() -> dict[str, str]:
    """Versions and machine, for the report."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **tool_versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": _cpu_name(),
        "torch threads": str(torch.get_num_threads()),
        **gpu,
    }


def memory_groups(needed: Sequence[int], *, beside: int, budget: int) -> list[list[int]]:
    """Which models to load together: indices in order, each group and `beside` bytes in the budget.

    A model that does not fit even alone is tried alone.

    >>> memory_groups([4, 4, 9], beside=2, budget=10)
    [[0, 1], [2]]
    """
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(needed):
        if not groups or size > room:
            groups.append([])
            room = budget - beside
        groups[-1].append(index)
        room -= size
    return groups


def _as_given(model: str | Source) -> str:
    return model if isinstance(model, str) else model.name


def _check(models: Sequence[str | Source], dtype: str, max_tokens: int | None) -> None:
    if not models:
        raise UsageError("no model to evaluate", "name one: qtool eval ./Qwen3-0.6B-int4")
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, must be at least 1, or None for all")


def _score(
    subjects: Sequence[Subject],
    reference: Subject | None,
    text: EvaluationText,
    max_tokens: int | None,
    questions: _Questions,
    *,
    dtype: ScoringDtype,
    device: Device,
) -> _Scoring:
    originals = [] if reference is None else [reference]
    context = min(subject.context for subject in [*originals, *subjects])
    groups = memory_groups(
        [_loaded_bytes(subject, dtype) for subject in subjects],
        beside=sum(_loaded_bytes(subject, dtype) for subject in originals),
        budget=int(MEMORY_SHARE * _memory_bytes(device)),
    )
    outcomes: dict[str, _Outcome] = {}
    answered: dict[str, _Answered] = {}
    read: TokenizedText | None = None
    protocols: tuple[Protocol, ...] = ()
    used = 0
    for group in groups:
        present = [*originals, *(subjects[index] for index in group)]
        scorers = [
            open_scorer(subject.source, subject.name, dtype=dtype, device=device)
            for subject in present
        ]
        for scorer in scorers:
            own = scorer.tokenize(text.content)
            if read is None:
                read, first = own, scorer
            require_same_tokens(first, read, scorer, own)
        assert read is not None
        tokens = read.ids if max_tokens is None else read.ids[:max_tokens]
        used = tokens.numel()
        protocols = (
            llama_cpp_protocol(context=context, num_tokens=used, bos_token_id=read.bos_token_id),
            papers_protocol(context=context, num_tokens=used),
        )
        passes = plan_passes(tokens, protocols)
        total = sum(len(run.windows) for run in passes) * len(scorers)
        names = ", ".join(subject.name for subject in present)
        with bar(f"scoring {names}", total=total) as shown:
            scored = score(
                scorers[len(originals) :],
                scorers[0] if originals else None,
                passes,
                shown.advance,
            )
        for scorer, result in zip(scorers, scored, strict=True):
            original = None
            if reference is not None and scorer.name != reference.name:
                original = answered[reference.name]
            if scorer.name not in answered:
                answered[scorer.name] = _answer_all(scorer, questions, context, original)
            found = answered[scorer.name]
            outcomes[scorer.name] = _Outcome(
                result,
                scorer.scored_by,
                scorer.dtype,
                _task_results(questions.tasks, found, original),
                found.harness.results,
            )
    assert read is not None
    return _Scoring(read.ids.numel(), used, protocols, outcomes)


def _answer_all(
    scorer: Scorer, questions: _Questions, context: int, original: _Answered | None
) -> _Answered:
    answers = []
    for task in questions.tasks:
        with bar(f"{task.name} by {scorer.name}", total=len(task.items)) as shown:
            answers.append(answer(scorer, task, shown.advance))
    harness = HarnessRun((), {})
    if questions.lm_eval:
        harness = run_harness(
            scorer,
            scorer.loaded if isinstance(scorer, RuntimeScorer) else None,
            questions.lm_eval,
            context=context,
            limit=questions.limit,
            include=questions.lm_eval_include,
            original=None if original is None else original.harness,
        )
    return _Answered(tuple(answers), harness)


def _task_results(
    tasks: Sequence[Task], own: _Answered, original: _Answered | None
) -> tuple[TaskResult, ...]:
    return tuple(
        summarize_task(task, answers, None if original is None else original.answers[index])
        for index, (task, answers) in enumerate(zip(tasks, own.answers, strict=True))
    )


def _model_report(
    subject: Subject, scoring: _Scoring, *, device: Device, with_speed: bool
) -> ModelReport:
    outcome = scoring.outcomes[subject.name]
    manifest = subject.manifest
    speed: Speed | None = None
    if with_speed and outcome.scored_by == "qtool runtime":
        speed = measure_speed(subject.source, subject.name, device=device)
    with bar(f"hashing {subject.name}"):
        hashes = weight_hashes(subject.source)
    return ModelReport(
        name=subject.name,
        model=subject.source.name,
        format=subject.reader.format,
        scored_by=outcome.scored_by,
        dtype=outcome.dtype,
        size_bytes=subject.size.file_bytes,
        num_weights=subject.size.num_weights,
        bits_per_weight=subject.size.bits_per_weight,
        quantized_bits_per_weight=subject.size.quantized_bits_per_weight,
        sha256=hashes,
        perplexity=tuple(
            perplexity(outcome.scored.nll[protocol.name], protocol)
            for protocol in scoring.protocols
        ),
        divergence=(
            None if outcome.scored.divergence is None else summarize(outcome.scored.divergence)
        ),
        tasks=outcome.tasks,
        harness=outcome.harness,
        speed=speed,
        layers=manifest.layers if manifest else (),
        unquantized=dict(manifest.unquantized) if manifest else {},
    )


def _loaded_bytes(subject: Subject, dtype: str) -> int:
    """At most: kernels that keep weights packed take less."""
    return subject.size.num_weights * DTYPES[dtype].itemsize


def _memory_bytes(device: str) -> int:
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    """The processor as Linux names it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
