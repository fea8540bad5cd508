"""What a model got right, how sure that number is, and whether two models really differ.

acc        share of questions whose likeliest choice is the right one
acc_norm   the same with each ln p divided by the characters of its choice, so that long answers are
           not at a loss (lm-evaluation-harness's definition)

The standard error of a share over n questions is sqrt(p (1 - p) / (n - 1)). Two models answer the
same questions, so their difference is judged over the questions where they differ (McNemar's exact
test): if b were right only by the first and c only by the second, then under chance b is binomial
(b + c, 1/2). This sees differences that two separate standard errors would hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qtool.runtime.evaluate.divergence import Estimate
from qtool.runtime.evaluate.tasks.items import Item
from qtool.runtime.evaluate.tasks.likelihood import Likelihood
from qtool.runtime.evaluate.tasks.tasks import Metric, Task

# A difference that chance gives more often than this is called noise.
SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """Against the original on the same questions.

    difference   of the quoted metric, model minus original
    p_value      McNemar's exact test, two-sided
    """

    difference: Estimate
    num_only_model: int
    num_only_original: int
    p_value: float

    @property
    def is_noise(self) -> bool:
        return self.p_value > SIGNIFICANCE


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One model on one task.

    metric       which of the numbers is quoted
    perplexity   of the continuations, for cloze tasks: exp(-mean ln p)
    """

    task: str
    origin: str
    num_items: int
    num_items_in_all: int
    metric: Metric
    acc: Estimate
    acc_norm: Estimate | None
    perplexity: float | None = None
    compared: Comparison | None = None

    @property
    def quoted(self) -> Estimate:
        return self.acc_norm if self.metric == "acc_norm" and self.acc_norm else self.acc


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """One metric of one task, as the harness counts it ("acc", "exact_match,strict-match").

    compared   where each question is right or wrong, against the original
    """

    task: str
    metric: str
    version: str
    num_items: int
    value: float
    error: float | None
    compared: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model answered, question by question: right or not in each metric."""

    acc: tuple[bool, ...]
    acc_norm: tuple[bool, ...] | None
    logprobs: tuple[float, ...] | None

    def of(self, metric: Metric) -> tuple[bool, ...]:
        return self.acc_norm if metric == "acc_norm" and self.acc_norm is not None else self.acc


def judge(items: Sequence[Item], likelihoods: Sequence[Sequence[Likelihood]]) -> Answers:
    """Right or wrong, from the likelihood of every choice of every item."""
    if all(item.gold is None for item in items):
        only = [choices[0] for choices in likelihoods]
        return Answers(
            tuple(choice.is_greedy for choice in only), None, tuple(c.logprob for c in only)
        )
    acc, acc_norm = [], []
    for item, choices in zip(items, likelihoods, strict=True):
        logprobs = [choice.logprob for choice in choices]
        lengths = [len(choice.continuation.removeprefix(" ")) for choice in item.choices]
        normed = [value / length for value, length in zip(logprobs, lengths, strict=True)]
        acc.append(_likeliest(logprobs) == item.gold)
        acc_norm.append(_likeliest(normed) == item.gold)
    return Answers(tuple(acc), tuple(acc_norm), None)


def _likeliest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def summarize(task: Task, answers: Answers, original: Answers | None) -> TaskResult:
    logprobs = answers.logprobs
    return TaskResult(
        task=task.name,
        origin=task.origin,
        num_items=len(task.items),
        num_items_in_all=task.num_items,
        metric=task.metric if answers.acc_norm is not None else "acc",
        acc=share(answers.acc),
        acc_norm=None if answers.acc_norm is None else share(answers.acc_norm),
        perplexity=None if logprobs is None else math.exp(-math.fsum(logprobs) / len(logprobs)),
        compared=(
            None if original is None else compare(answers.of(task.metric), original.of(task.metric))
        ),
    )


def share(right: Sequence[bool]) -> Estimate:
    """The share of True with its standard error."""
    count = len(right)
    value = sum(right) / count
    error = math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else 0.0
    return Estimate(value, error)


def compare(model: Sequence[bool], original: Sequence[bool]) -> Comparison:
    """model, original: right or not, on the same questions in the same order."""
    pairs = list(zip(model, original, strict=True))
    only_model = sum(own and not other for own, other in pairs)
    only_original = sum(other and not own for own, other in pairs)
    count = len(pairs)
    mean = (only_model - only_original) / count
    variance = (only_model + only_original) / count - mean * mean
    error = math.sqrt(variance / (count - 1)) if count > 1 else 0.0
    p_value = mcnemar(only_model, only_original)
    return Comparison(Estimate(mean, error), only_model, only_original, p_value)


def mcnemar(first: int, second: int) -> float:
    """Two-sided exact p-value of `first` against `second` discordant answers.

    >>> mcnemar(1, 5)
    0.21875
    """
    count = first + second
    if count == 0:
        return 1.0
    # ln of binomial(count, k) / 2^count: the numbers themselves overflow at a thousand.
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        for k in range(min(first, second) + 1)
    ]
    tail = math.fsum(math.exp(value - count * math.log(2)) for value in logs)
    return min(1.0, 2 * tail)
