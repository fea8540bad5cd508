"""A report's numbers as rows of text, which the terminal, the Markdown and the page all show, and
what must be said beside them.
"""

from __future__ import annotations

from typing import get_args

from qtool.runtime.evaluate.divergence import Divergence, Estimate
from qtool.runtime.evaluate.perplexity import ProtocolName
from qtool.runtime.evaluate.report import EvaluationReport, ModelReport
from qtool.runtime.evaluate.tasks.results import Comparison, HarnessResult, TaskResult
from qtool.units import size_text

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
TASK_HEADER = ("task", "metric")


def table_rows(report: EvaluationReport) -> list[tuple[str, ...]]:
    """The summary table, the original first: what the terminal, Markdown and the page all show."""
    return [_row(row, is_reference=row is report.reference) for row in report.rows]


def _row(model: ModelReport, *, is_reference: bool) -> tuple[str, ...]:
    found = {result.protocol.name: result for result in model.perplexity}
    perplexities = (found.get(name) for name in get_args(ProtocolName))
    divergence = model.divergence
    return (
        model.name,
        f"{model.format}, original" if is_reference else model.format,
        size_text(model.size_bytes),
        f"{model.bits_per_weight:.2f}",
        *(f"{one.value:.3f} ± {one.error:.3f}" if one else "-" for one in perplexities),
        estimate_text(divergence.kld, 5) if divergence else "-",
        f"{estimate_text(divergence.same_top, 2, 100)} %" if divergence else "-",
        f"{model.speed.tokens_per_second:.1f}" if model.speed else "-",
    )


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
    if divergence := report.models[0].divergence:
        original = report.reference.name if report.reference else "stored predictions"
        lines.append(
            f"KL divergence (nats) and same top token: against {original}, over the "
            f"{divergence.num_scored:,} tokens that the llama.cpp protocol scores."
        )
    dtypes = sorted({row.dtype for row in report.rows})
    lines.append(
        f"Text: {text.name} ({used} {'tokens' if text.was_cut else f'{text.num_tokens:,} tokens'}, "
        f"sha256 {text.sha256[:12]}); {text.overlap}. "
        f"Computed in {', or in '.join(dtypes)}; ± is one standard error."
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
        loaded = ", ".join(
            f"{row.name} {row.speed.load_seconds:.1f} s, {size_text(row.speed.weight_bytes)}"
            for row in report.rows
            if row.speed
        )
        lines.append(f"Loading, and weights in memory as they are served: {loaded}.")
    lines += [
        f"Greedy text of {row.name}: {row.agreement.num_identical} of {row.agreement.num_prompts} "
        f"continuations of {row.agreement.num_tokens} tokens are the original's; the median one "
        f"is alike for {row.agreement.median_common_tokens:g} tokens."
        for row in report.models
        if row.agreement is not None
    ]
    return [*lines, *report.notes, *(note for row in report.rows for note in row.notes)]


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


def _rank(percent: float) -> str:
    return "median" if percent == 50 else f"{percent:g} %"


def worst_rows(model: ModelReport) -> list[tuple[str, ...]]:
    """The tokens furthest from the original's, the worst first."""
    return [
        (
            f"{worst.kld:.3f}",
            "\N{HORIZONTAL ELLIPSIS}"
            + worst.before.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"),
            visible(worst.token),
            f"{100 * worst.p:.2g} %",
            f"{100 * worst.original_p:.2g} %",
            visible(worst.top),
            visible(worst.original_top),
        )
        for worst in model.worst
    ]


def visible(token: str) -> str:
    """A token with its white space as signs."""
    signs = {
        " ": "\N{OPEN BOX}",
        "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
        "\t": "\N{RIGHTWARDS ARROW TO BAR}",
    }
    return "".join(signs.get(letter, letter) for letter in token)


def estimate_text(estimate: Estimate, digits: int, scale: float = 1.0) -> str:
    return f"{scale * estimate.value:.{digits}f} ± {scale * estimate.error:.{digits}f}"
