"""What a benchmark says of its measurements: requests as times, times as spreads.

    TTFT   time to first token: from sending a request to its first token
    ITL    inter-token latency: each gap between two tokens of one answer
    TPOT   time per output token: (end - first token) / (tokens - 1), one number a request
    E2E    from sending to the last token

The words are those of vLLM's and NVIDIA's benchmarks. Percentiles interpolate linearly between
order statistics (numpy's default), so a few runs give a percentile too; the count beside it says
how much to believe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

PERCENTILES = (50, 95, 99)


class Spread(NamedTuple):
    """Of n measurements, in their own unit."""

    n: int
    mean: float
    std: float
    smallest: float
    p50: float
    p95: float
    p99: float
    largest: float


def spread(values: Sequence[float]) -> Spread | None:
    """None of nothing."""
    if not values:
        return None
    found = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = np.percentile(found, PERCENTILES)
    std = found.std(ddof=1) if len(found) > 1 else 0.0
    return Spread(
        len(found),
        float(found.mean()),
        float(std),
        float(found.min()),
        float(p50),
        float(p95),
        float(p99),
        float(found.max()),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's life, in seconds of one clock.

    token_times         when each piece of the answer arrived; a piece is a token, or several that
                        came together
    num_output_tokens   as counted by whoever generated
    error               what went wrong, if something did
    """

    sent: float
    token_times: tuple[float, ...]
    end: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        return self.token_times[0] - self.sent if self.token_times else None

    @property
    def tpot(self) -> float | None:
        if len(self.token_times) < 2 or self.num_output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_output_tokens - 1)

    @property
    def gaps(self) -> tuple[float, ...]:
        return tuple(after - before for before, after in pairwise(self.token_times))


@dataclass(frozen=True, slots=True)
class Load:
    """What a number of requests came to; spreads in milliseconds.

    tokens_per_second   output tokens over the whole time, first request sent to last token
    """

    num_requests: int
    num_failed: int
    seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    requests_per_second: float
    tokens_per_second: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    errors: tuple[str, ...]


def load_of(answers: Sequence[Answer]) -> Load:
    """At least one answer; failed ones count as failed and in no spread."""
    good = [answer for answer in answers if answer.error is None]
    seconds = max(answer.end for answer in answers) - min(answer.sent for answer in answers)
    num_output = sum(answer.num_output_tokens for answer in good)

    def milliseconds(values: Sequence[float | None]) -> Spread | None:
        return spread([1e3 * value for value in values if value is not None])

    return Load(
        num_requests=len(answers),
        num_failed=len(answers) - len(good),
        seconds=seconds,
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in good),
        num_cached_tokens=sum(answer.num_cached_tokens for answer in good),
        num_output_tokens=num_output,
        requests_per_second=len(good) / seconds if seconds else 0.0,
        tokens_per_second=num_output / seconds if seconds else 0.0,
        ttft_ms=milliseconds([answer.ttft for answer in good]),
        tpot_ms=milliseconds([answer.tpot for answer in good]),
        itl_ms=milliseconds([gap for answer in good for gap in answer.gaps]),
        e2e_ms=milliseconds([answer.end - answer.sent for answer in good]),
        errors=tuple(dict.fromkeys(answer.error for answer in answers if answer.error)),
    )
