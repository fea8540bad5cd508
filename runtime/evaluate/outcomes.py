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
from torch import Tensor

from qtool.errors import QtoolError
from qtool.progress import bar
from qtool.runtime.config import Device
from qtool.runtime.evaluate.agreement import passages
from qtool.runtime.evaluate.perplexity import (
    Protocol,
    llama_cpp_protocol,
    papers_protocol,
)
from qtool.runtime.evaluate.report import Speed
from qtool.runtime.evaluate.scorer import (
    DTYPES,
    RuntimeScorer,
    Scorer,
    TokenizedText,
    open_scorer,
    require_same_tokens,
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
from qtool.settings import Activations

# Of the machine's memory, what the loaded models may take together.
MEMORY_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Outcome:
    """What scoring found of one model."""

    scored: Scored
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
    """What scoring found of all models, by name.  used [tokens]: what was used of the text."""

    num_tokens: int
    used: Tensor
    protocols: tuple[Protocol, ...]
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
    activations: Activations | None = None,
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
    read: TokenizedText | None = None
    protocols: tuple[Protocol, ...] = ()
    tokens = torch.empty(0, dtype=torch.long)
    for group in groups:
        present = [*originals, *(subjects[index] for index in group)]
        scorers = [
            open_scorer(
                subject.source, subject.name, dtype=dtype, device=device, activations=activations
            )
            for subject in present
        ]
        for scorer in scorers:
            own = scorer.tokenize(text.content)
            if stored is not None:
                own = _as_stored(stored, own, scorer)
            if read is None:
                read, first = own, scorer
            require_same_tokens(first, read, scorer, own)
        assert read is not None
        tokens = read.ids if max_tokens is None else read.ids[:max_tokens]
        count = tokens.numel()
        llama_cpp = llama_cpp_protocol(
            context=context if stored is None else stored.window,
            num_tokens=count,
            bos_token_id=read.bos_token_id,
        )
        others = (papers_protocol(context=context, num_tokens=count),) if papers else ()
        protocols = (llama_cpp, *others)
        passes = plan_passes(tokens, protocols)
        total = sum(len(run.windows) for run in passes) * len(scorers)
        names = ", ".join(subject.name for subject in present)
        with bar(f"scoring {names}", total=total) as shown:
            scored = score(
                scorers[len(originals) :],
                scorers[0] if originals else None,
                passes,
                shown.advance,
                stored=stored,
                recorder=recorder,
            )
        if recorder is not None:
            recorder.write(tokens, protocols[0].window)
            recorder = None
        for scorer, result in zip(scorers, scored, strict=True):
            original = None
            if reference is not None and scorer.name != reference.name:
                original = answered[reference.name]
            if scorer.name not in answered:
                answered[scorer.name] = _answer_all(scorer, questions, context, original)
            found = answered[scorer.name]
            outcomes[scorer.name] = Outcome(
                result,
                scorer.scored_by,
                scorer.dtype,
                _task_results(questions.tasks, found, original),
                found.harness.results,
                _worst(scorer, result, tokens, protocols),
            )
    assert read is not None
    return Scoring(read.ids.numel(), tokens, protocols, outcomes)


def _as_stored(stored: StoredReference, own: TokenizedText, scorer: Scorer) -> TokenizedText:
    """The tokens of the file, with BOS where this model's tokenizer puts one."""
    if scorer.vocab_size != stored.vocab_size:
        raise QtoolError(
            f"{scorer.name} predicts {scorer.vocab_size} tokens, {stored.name} holds predictions "
            f"of {stored.vocab_size}",
            "compare a model with the one that it was made from",
        )
    return TokenizedText(stored.tokens, own.bos_token_id)


def _worst(
    scorer: Scorer, scored: Scored, tokens: Tensor, protocols: Sequence[Protocol]
) -> tuple[WorstToken, ...]:
    if scored.divergence is None or scorer.tokenizer is None:
        return ()
    protocol = next(p for p in protocols if p.name == DIVERGENCE_PROTOCOL)
    return worst_tokens(scored.divergence, tokens, protocol, scorer.tokenizer.decode)


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
    prompts = passages(scoring.used, context)
    return {
        subject.name: Spoken(*measure_speed(subject.source, subject.name, prompts, device=device))
        for subject in subjects
        if scoring.outcomes[subject.name].scored_by == "qtool runtime"
    }


def _loaded_bytes(subject: Subject, dtype: str) -> int:
    """At most: kernels that keep weights packed take less."""
    return subject.size.num_weights * DTYPES[dtype].itemsize


def _memory_bytes(device: str) -> int:
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
