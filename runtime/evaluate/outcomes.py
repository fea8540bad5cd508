"""Scoring the models of an evaluation: which are loaded together, what each is put through, and
what comes of it.

Models are scored in one pass beside the original where memory allows it, else group after group.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from qtool.progress import bar
from qtool.runtime.config import Device
from qtool.runtime.evaluate.agreement import passages
from qtool.runtime.evaluate.perplexity import (
    bits_per_byte,
)
from qtool.runtime.evaluate.reading import FirstRead, Reading, plan_reading, read_by_all
from qtool.runtime.evaluate.report import Speed
from qtool.runtime.evaluate.scorer import (
    DTYPES,
    RuntimeScorer,
    Scorer,
    open_scorer,
)
from qtool.runtime.evaluate.speed import measure_speed
from qtool.runtime.evaluate.stored import Recorder, StoredReference
from qtool.runtime.evaluate.stream import DIVERGENCE_PROTOCOL, Scored, plan_passes, score
from qtool.runtime.evaluate.subject import Subject
from qtool.runtime.evaluate.tasks.harness import HarnessRun, run_harness
from qtool.runtime.evaluate.tasks.results import Answers, HarnessResult, TaskResult
from qtool.runtime.evaluate.tasks.results import summarize as summarize_task
from qtool.runtime.evaluate.tasks.scoring import answer
from qtool.runtime.evaluate.tasks.tasks import Task
from qtool.runtime.evaluate.text import (
    EvaluationText,
    ScoringDtype,
)
from qtool.runtime.evaluate.worst import WorstToken, worst_tokens
from qtool.settings import Rounding

# Of the machine's memory, what the loaded models may take together.
MEMORY_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Outcome:
    """What scoring found of one model.

    bits_per_byte   None where there is no tokenizer to say what the bytes are
    """

    read: Reading
    scored: Scored
    bits_per_byte: float | None
    scored_by: str
    dtype: str
    tasks: tuple[TaskResult, ...]
    harness: tuple[HarnessResult, ...]
    worst: tuple[WorstToken, ...]


class Spoken(NamedTuple):
    """One model as the server would run it: how fast, and what it says."""

    speed: Speed
    texts: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Questions:
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
class Scoring:
    """What scoring found of all models, by name.

    num_tokens  of the whole text, as the first model reads it
    read        what the first model read of it
    """

    num_tokens: int
    read: Reading
    outcomes: Mapping[str, Outcome]


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


def score_models(
    subjects: Sequence[Subject],
    reference: Subject | None,
    text: EvaluationText,
    max_tokens: int | None,
    questions: Questions,
    *,
    stored: StoredReference | None = None,
    recorder: Recorder | None = None,
    dtype: ScoringDtype,
    device: Device,
    activations: Rounding | None = None,
    papers: bool = True,
) -> Scoring:
    """Each model over the text, or over the tokens of `stored` in place of it.

    papers   by the papers' protocol too
    """
    originals = [] if reference is None else [reference]
    context = min(subject.context for subject in [*originals, *subjects])
    groups = memory_groups(
        [_loaded_bytes(subject, dtype) for subject in subjects],
        beside=sum(_loaded_bytes(subject, dtype) for subject in originals),
        budget=int(MEMORY_SHARE * _memory_bytes(device)),
    )
    outcomes: dict[str, Outcome] = {}
    answered: dict[str, _Answered] = {}
    first: FirstRead | None = None
    may_differ = not originals and stored is None

    def score_group(present: Sequence[Subject]) -> None:
        """In a function, so that no name holds on to its models while the next are loaded."""
        nonlocal first, recorder
        scorers = [
            open_scorer(
                subject.source, subject.name, dtype=dtype, device=device, activations=activations
            )
            for subject in present
        ]
        for alike in read_by_all(scorers, text, max_tokens, stored, first, may_differ=may_differ):
            first = first or FirstRead.of(alike[0])
            own = alike[0].text
            read = plan_reading(own, context, stored, papers=papers)
            found = _score_alike(
                [opened.scorer for opened in alike],
                bool(originals),
                read,
                stored=stored,
                recorder=recorder,
            )
            recorder = None
            for (scorer, _, _), result in zip(alike, found, strict=True):
                original = None
                if reference is not None and scorer.name != reference.name:
                    original = answered[reference.name]
                if scorer.name not in answered:
                    answered[scorer.name] = _answer_all(scorer, questions, context, original)
                answers = answered[scorer.name]
                outcomes[scorer.name] = Outcome(
                    read,
                    result,
                    _bits_per_byte(scorer, result, read),
                    scorer.scored_by,
                    scorer.dtype,
                    _task_results(questions.tasks, answers, original),
                    answers.harness.results,
                    _worst(scorer, result, read),
                )

    for group in groups:
        score_group([*originals, *(subjects[index] for index in group)])
    assert first is not None
    return Scoring(first.num_tokens, outcomes[first.name].read, outcomes)


def _score_alike(
    scorers: Sequence[Scorer],
    has_original: bool,
    read: Reading,
    *,
    stored: StoredReference | None,
    recorder: Recorder | None,
) -> list[Scored]:
    """In one pass, the original first where there is one; the recorder's file is written."""
    passes = plan_passes(read.tokens, read.protocols)
    total = sum(len(run.windows) for run in passes) * len(scorers)
    names = ", ".join(scorer.name for scorer in scorers)
    with bar(f"scoring {names}", total=total) as shown:
        scored = score(
            scorers[1:] if has_original else scorers,
            scorers[0] if has_original else None,
            passes,
            shown.advance,
            stored=stored,
            recorder=recorder,
        )
    if recorder is not None:
        recorder.write(read.tokens, read.protocols[0].window)
    return scored


def _bits_per_byte(scorer: Scorer, scored: Scored, read: Reading) -> float | None:
    if scorer.tokenizer is None:
        return None
    protocol = read.protocols[-1]
    return bits_per_byte(scored.nll[protocol.name], read.tokens, protocol, scorer.tokenizer.decode)


def tokenizer_notes(scoring: Scoring) -> list[str]:
    """What must be said where the models do not read the same tokens."""
    outcomes = scoring.outcomes
    if all(torch.equal(found.read.tokens, scoring.read.tokens) for found in outcomes.values()):
        return []
    values = ", ".join(
        f"{name} {outcome.bits_per_byte:.4f} ({outcome.read.tokens.numel():,} tokens)"
        for name, outcome in outcomes.items()
        if outcome.bits_per_byte is not None
    )
    return [
        "The tokenizers differ, so perplexities of different models cannot be set side by side, "
        f"and there is no KL divergence between them. Bits per byte can be: {values}."
    ]


def _worst(scorer: Scorer, scored: Scored, read: Reading) -> tuple[WorstToken, ...]:
    if scored.divergence is None or scorer.tokenizer is None:
        return ()
    protocol = next(p for p in read.protocols if p.name == DIVERGENCE_PROTOCOL)
    return worst_tokens(scored.divergence, read.tokens, protocol, scorer.tokenizer.decode)


def _answer_all(
    scorer: Scorer, questions: Questions, context: int, original: _Answered | None
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


def let_speak(subjects: Sequence[Subject], scoring: Scoring, device: Device) -> dict[str, Spoken]:
    """Of the models that the runtime runs, by name."""
    context = min(subject.context for subject in subjects)
    spoken = {}
    for subject in subjects:
        outcome = scoring.outcomes[subject.name]
        if outcome.scored_by == "qtool runtime":
            prompts = passages(outcome.read.tokens, context)
            found = measure_speed(subject.source, subject.name, prompts, device=device)
            spoken[subject.name] = Spoken(*found)
    return spoken


def _loaded_bytes(subject: Subject, dtype: str) -> int:
    """At most: kernels that keep weights packed take less."""
    return subject.size.num_weights * DTYPES[dtype].itemsize


def _memory_bytes(device: str) -> int:
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
