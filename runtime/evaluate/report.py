"""What an evaluation found, as values; and as JSON, as a Markdown table and as lines of text.

The JSON is the record: every number with its protocol, window, stride, BOS rule and token count.
The Markdown and the page (`page.py`) are views of it. The verdict is in words because a KL
divergence alone says nothing to most readers; its steps are those of llama.cpp's published
scoreboard for an 8B model (`tools/quantize/README.md`): q6_K 0.005, q4_K_M 0.03, q3_K_M 0.10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

from qtool.artifact import LayerReport
from qtool.runtime.evaluate.agreement import Agreement
from qtool.runtime.evaluate.divergence import Divergence, Estimate
from qtool.runtime.evaluate.perplexity import Perplexity, Protocol
from qtool.runtime.evaluate.tasks.results import HarnessResult, TaskResult
from qtool.runtime.evaluate.worst import WorstToken
from qtool.units import size_text

REPORT_VERSION = 1


class Grade(NamedTuple):
    """Up to which mean KL divergence a model is called what."""

    limit: float
    words: str


GRADES = (
    Grade(0.01, "practically the same as the original"),
    Grade(0.05, "close to the original"),
    Grade(0.20, "noticeably different from the original"),
    Grade(float("inf"), "far from the original"),
)


@dataclass(frozen=True, slots=True)
class TextUsed:
    """The text, its hash, what was used of it, and whether calibration has seen it."""

    name: str
    sha256: str
    num_characters: int
    num_tokens: int
    num_tokens_used: int
    overlap: str

    @property
    def was_cut(self) -> bool:
        return self.num_tokens_used < self.num_tokens


@dataclass(frozen=True, slots=True)
class Speed:
    """Greedy generation of one sequence: by the median gap between one token and the next.

    load_seconds    from the files to an engine that is ready; the files may lie in the page cache
    weight_bytes    in memory, as the kernels hold them
    """

    tokens_per_second: float
    num_tokens: int
    dtype: str
    device: str
    threads: int
    load_seconds: float
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model.

    size_bytes                  of its weight files
    bits_per_weight             bits of all tensors over the weights that they stand for
    quantized_bits_per_weight   the same of the packed weights alone, scales and zeros included
    bits_per_byte               by the last of the protocols: comparable between tokenizers
    """

    name: str
    model: str
    format: str
    scored_by: str
    dtype: str
    size_bytes: int
    num_weights: int
    bits_per_weight: float
    quantized_bits_per_weight: float | None
    sha256: Mapping[str, str]
    perplexity: tuple[Perplexity, ...]
    bits_per_byte: float | None = None
    divergence: Divergence | None = None
    tasks: tuple[TaskResult, ...] = ()
    harness: tuple[HarnessResult, ...] = ()
    worst: tuple[WorstToken, ...] = ()
    agreement: Agreement | None = None
    speed: Speed | None = None
    layers: tuple[LayerReport, ...] = ()
    unquantized: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def perplexity_in(self, name: str) -> Perplexity:
        return next(result for result in self.perplexity if result.protocol.name == name)


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The whole evaluation; `reference` is the original that the models are compared with."""

    text: TextUsed
    reference: ModelReport | None
    models: tuple[ModelReport, ...]
    command: str
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The protocols used, the same for every model."""
        return tuple(result.protocol for result in self.models[0].perplexity)

    @property
    def rows(self) -> tuple[ModelReport, ...]:
        return (*(() if self.reference is None else (self.reference,)), *self.models)


def verdict(model: ModelReport, reference: ModelReport | None) -> str:
    """One line in plain words: "2.8x smaller, 94.1 % same top token, perplexity 46.0 -> 46.9"."""
    own = model.perplexity_in("llama.cpp").value
    if reference is None and model.divergence is not None:
        # Against a file of predictions: the original's size is not known.
        before = model.divergence.reference_perplexity.value
        return (
            f"{size_text(model.size_bytes)}, {100 * model.divergence.same_top.value:.1f} % same "
            f"top token, perplexity {before:#.4g} -> {own:#.4g}"
        )
    if reference is None or model.divergence is None:
        return (
            f"perplexity {own:#.4g}, {size_text(model.size_bytes)}, not compared with an original"
        )
    base = reference.perplexity_in("llama.cpp").value
    return (
        f"{_size_ratio(model.size_bytes, reference.size_bytes)}, "
        f"{100 * model.divergence.same_top.value:.1f} % same top token, "
        f"perplexity {base:#.4g} -> {own:#.4g}{_task_verdict(model)}"
    )


def _task_verdict(model: ModelReport) -> str:
    """ ", within noise on 4 of 5 tasks"; nothing where no task was compared."""
    compared = [task.compared for task in model.tasks if task.compared is not None]
    if not compared:
        return ""
    within = sum(found.is_noise for found in compared)
    return f", within noise on {within} of {len(compared)} task{'s' * (len(compared) > 1)}"


def grade(divergence: Divergence) -> str:
    return next(step.words for step in GRADES if divergence.kld.value <= step.limit)


def verdict_line(model: ModelReport, reference: ModelReport | None) -> str:
    """The verdict with its grade, as a sentence."""
    line = verdict(model, reference)
    return f"{line}: {grade(model.divergence)}." if model.divergence else f"{line}."


def to_json(report: EvaluationReport) -> dict[str, Any]:
    """report.json, as plain data."""
    return {
        "qtool_report": REPORT_VERSION,
        "verdict": {m.name: verdict_line(m, report.reference) for m in report.models},
        **_plain_fields(report),
    }


def _plain(value: Any) -> Any:
    """Dataclasses and estimates as dictionaries; a protocol with what it implies beside it."""
    if isinstance(value, Protocol):
        implied = {"stride": value.stride, "bos_rule": value.bos_rule, "label": value.label}
        return {**_plain_fields(value), **implied}
    if is_dataclass(value):
        return _plain_fields(value)
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _plain_fields(value: Any) -> dict[str, Any]:
    return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}


def _size_ratio(size: int, reference: int) -> str:
    if size <= reference:
        return f"{reference / size:.1f}x smaller" if reference > 1.04 * size else "same size"
    return f"{size / reference:.1f}x larger" if size > 1.04 * reference else "same size"
