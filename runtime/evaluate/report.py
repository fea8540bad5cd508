"""What an evaluation found, as values; and as JSON, as a Markdown table and as lines of text.

The JSON is the record: every number with its protocol, window, stride, BOS rule and token count.
The Markdown and the page (`page.py`) are views of it. The verdict is in words because a KL
divergence alone says nothing to most readers; its steps are those of llama.cpp's published
scoreboard for an 8B model (`tools/quantize/README.md`): q6_K 0.005, q4_K_M 0.03, q3_K_M 0.10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

from qtool.artifact import LayerReport
from qtool.runtime.evaluate.divergence import Divergence, Estimate
from qtool.runtime.evaluate.perplexity import Perplexity, Protocol
from qtool.runtime.evaluate.tasks.results import Comparison, HarnessResult, TaskResult

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
    """Greedy generation of one sequence: by the median gap between one token and the next."""

    tokens_per_second: float
    num_tokens: int
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model.

    size_bytes                  of its weight files
    bits_per_weight             bits of all tensors over the weights that they stand for
    quantized_bits_per_weight   the same of the packed weights alone, scales and zeros included
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
    divergence: Divergence | None = None
    tasks: tuple[TaskResult, ...] = ()
    harness: tuple[HarnessResult, ...] = ()
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


def size_text(size: int) -> str:
    """Decimal units, as disks and hubs count: 14.7 MB."""
    for limit, divisor, unit in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if size < limit:
            return f"{size / divisor:.3g} {unit}"
    return f"{size / 1e12:.3g} TB"


def estimate_text(estimate: Estimate, digits: int, scale: float = 1.0) -> str:
    return f"{scale * estimate.value:.{digits}f} ± {scale * estimate.error:.{digits}f}"


TABLE_HEADER = (
    "model",
    "format",
    "size",
    "bits/weight",
    "PPL (llama.cpp)",
    "PPL (papers)",
    "KL divergence",
    "same top token",
    "tokens/s",
)


def table_rows(report: EvaluationReport) -> list[tuple[str, ...]]:
    """The summary table, the original first: what the terminal, Markdown and the page all show."""
    return [_row(row, is_reference=row is report.reference) for row in report.rows]


def _row(model: ModelReport, *, is_reference: bool) -> tuple[str, ...]:
    perplexities = (model.perplexity_in(name) for name in ("llama.cpp", "papers"))
    divergence = model.divergence
    return (
        model.name,
        f"{model.format}, original" if is_reference else model.format,
        size_text(model.size_bytes),
        f"{model.bits_per_weight:.2f}",
        *(f"{result.value:.3f} ± {result.error:.3f}" for result in perplexities),
        estimate_text(divergence.kld, 5) if divergence else "-",
        f"{estimate_text(divergence.same_top, 2, 100)} %" if divergence else "-",
        f"{model.speed.tokens_per_second:.1f}" if model.speed else "-",
    )


TASK_HEADER = ("task", "metric")


def task_rows(report: EvaluationReport) -> list[tuple[str, ...]]:
    """A row a task, a column a model: "41.20 ± 0.49 %, -0.30 (p 0.41)"."""
    rows = [
        (results[0].task, results[0].metric, *map(_task_cell, results))
        for results in zip(*(row.tasks for row in report.rows), strict=True)
    ]
    rows += [
        (f"lm-eval {results[0].task}", results[0].metric, *map(_harness_cell, results))
        for results in zip(*(row.harness for row in report.rows), strict=True)
    ]
    return rows


def _task_cell(result: TaskResult) -> str:
    return f"{estimate_text(result.quoted, 2, 100)} %{_change(result.compared)}"


def _harness_cell(result: HarnessResult) -> str:
    """Shares in percent; perplexities and counts as they are."""
    if result.compared is not None or 0 <= result.value <= 1:
        value = Estimate(result.value, result.error or 0.0)
        return f"{estimate_text(value, 2, 100)} %{_change(result.compared)}"
    return f"{result.value:.4f}" + ("" if result.error is None else f" ± {result.error:.4f}")


def _change(found: Comparison | None) -> str:
    if found is None:
        return ""
    # + 0.0: a difference of -0.0 is none.
    return f", {100 * found.difference.value + 0.0:+.2f} (p {found.p_value:.2g})"


def task_notes(report: EvaluationReport) -> list[str]:
    """What must be said beside the tasks."""
    first = report.models[0]
    tasks = first.tasks
    lines = [
        f"lm-eval {result.task} ({result.metric}): {result.num_items:,} questions, version "
        f"{result.version}."
        for result in first.harness
    ]
    if not tasks:
        return lines
    lines += [
        f"{task.task}: {task.num_items:,} "
        + (f"of {task.num_items_in_all:,} " if task.num_items < task.num_items_in_all else "")
        + f"questions, {task.origin}, no examples before them."
        for task in tasks
    ]
    lines.append(
        "acc: share of questions whose likeliest answer is right; acc_norm: the same, ln p divided "
        "by the answer's characters; ± is one standard error."
    )
    if any(row.tasks and row.tasks[0].compared for row in report.models):
        lines.append(
            "The difference is in percentage points against the original on the same questions, "
            "p that of McNemar's exact test: above 0.05 the difference is called noise."
        )
    for task in tasks:
        if task.perplexity is not None:
            values = ", ".join(
                f"{row.name} {result.perplexity:.3f}"
                for row in report.rows
                for result in row.tasks
                if result.task == task.task and result.perplexity is not None
            )
            lines.append(f"{task.task}, perplexity of the last word: {values}.")
    return lines


def footnotes(report: EvaluationReport) -> list[str]:
    """What must be said beside the table: protocols, text, arithmetic."""
    text = report.text
    used = f"{text.num_tokens_used:,} of {text.num_tokens:,}" if text.was_cut else "all"
    lines = [
        f"PPL ({result.protocol.name}): {result.protocol.windows}; "
        f"stride {result.protocol.stride}; BOS: {result.protocol.bos_rule}; "
        f"{result.num_scored:,} tokens scored in {result.num_windows} windows."
        for result in report.models[0].perplexity
    ]
    if report.reference is not None and (divergence := report.models[0].divergence):
        lines.append(
            f"KL divergence (nats) and same top token: against {report.reference.name}, over the "
            f"{divergence.num_scored:,} tokens that the llama.cpp protocol scores."
        )
    dtypes = sorted({row.dtype for row in report.rows})
    lines.append(
        f"Text: {text.name} ({used} {'tokens' if text.was_cut else f'{text.num_tokens:,} tokens'}, "
        f"sha256 {text.sha256[:12]}); {text.overlap}. "
        f"Computed in {', '.join(dtypes)}; ± is one standard error."
    )
    speeds = [row.speed for row in report.rows if row.speed]
    if speeds:
        dtypes = sorted({speed.dtype for speed in speeds})
        counts = sorted({speed.num_tokens for speed in speeds})
        lines.append(
            f"tokens/s: greedy generation of one sequence, median over "
            f"{' to '.join(str(count) for count in (counts[0], counts[-1])[: len(counts)])} tokens "
            f"after a warm-up, {', '.join(dtypes)}, {speeds[0].device}, "
            f"{speeds[0].threads} thread{'s' * (speeds[0].threads > 1)}."
        )
    return [*lines, *report.notes, *(note for row in report.rows for note in row.notes)]


def to_markdown(report: EvaluationReport) -> str:
    """report.md: verdicts, the table, what stands beside it, the divergence block, the command."""
    parts = ["# qtool evaluation", ""]
    parts += [
        f"- **{_escape(model.name)}**: {verdict_line(model, report.reference)}"
        for model in report.models
    ]
    parts += ["", *_markdown_table(TABLE_HEADER, table_rows(report)), ""]
    parts += [f"- {_escape(line)}" for line in footnotes(report)]
    if task_rows(report):
        task_header = (*TASK_HEADER, *(row.name for row in report.rows))
        parts += ["", "## Tasks", "", *_markdown_table(task_header, task_rows(report)), ""]
        parts += [f"- {_escape(line)}" for line in task_notes(report)]
    compared = [model for model in report.models if model.divergence is not None]
    if compared:
        header = ("", *(model.name for model in compared))
        columns = [divergence_rows(model.divergence) for model in compared if model.divergence]
        rows = [
            (cells[0][0], *(value for _, value in cells)) for cells in zip(*columns, strict=True)
        ]
        parts += ["", "## Against the original", "", *_markdown_table(header, rows)]
    parts += ["", "## How to reproduce", "", "```", report.command, "```", ""]
    parts += [f"- {name}: {value}" for name, value in report.environment.items()]
    return "\n".join(parts) + "\n"


def verdict_line(model: ModelReport, reference: ModelReport | None) -> str:
    """The verdict with its grade, as a sentence."""
    line = verdict(model, reference)
    return f"{line}: {grade(model.divergence)}." if model.divergence else f"{line}."


def divergence_rows(divergence: Divergence) -> list[tuple[str, str]]:
    """llama-perplexity's statistics block, line by line."""
    rows = [
        ("PPL", estimate_text(divergence.perplexity, 4)),
        ("PPL of the original", estimate_text(divergence.reference_perplexity, 4)),
        ("ln PPL ratio", estimate_text(divergence.ln_perplexity_ratio, 5)),
        ("PPL ratio", estimate_text(divergence.perplexity_ratio, 5)),
        ("PPL difference", estimate_text(divergence.perplexity_difference, 4)),
        ("correlation of ln PPL", f"{100 * divergence.ln_perplexity_correlation:.2f} %"),
        ("KLD mean", estimate_text(divergence.kld, 6)),
        ("KLD max", f"{divergence.kld_max:.6f}"),
        *((f"KLD {_rank(p)}", f"{v:.6f}") for p, v in divergence.kld_percentiles.items()),
        ("KLD min", f"{divergence.kld_min:.6f}"),
        ("mean Δp", f"{estimate_text(divergence.delta_p, 3, 100)} %"),
        ("RMS Δp", f"{estimate_text(divergence.delta_p_rms, 3, 100)} %"),
        ("Δp max", f"{100 * divergence.delta_p_max:.3f} %"),
        *(
            (f"Δp {_rank(p)}", f"{100 * v:.3f} %")
            for p, v in divergence.delta_p_percentiles.items()
        ),
        ("Δp min", f"{100 * divergence.delta_p_min:.3f} %"),
        ("same top token", f"{estimate_text(divergence.same_top, 3, 100)} %"),
    ]
    return rows


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


def _rank(percent: float) -> str:
    return "median" if percent == 50 else f"{percent:g} %"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_escape, header)) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
