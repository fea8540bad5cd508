"""The numbers of a finished run in few lines, for the console and the model card alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtool.artifact import LayerReport

KIND_COLUMNS = ("layers", "scheme", "method", "lost", "by rounding", "ratio")


def lost_by_kind(reports: Sequence[LayerReport]) -> list[tuple[str, ...]]:
    """A row of KIND_COLUMNS for the linears of each name, scheme and method, means over them."""
    rows: list[tuple[str, ...]] = []
    for (leaf, scheme, method), found in _by_kind(reports).items():
        ours = mean([report.error for report in found])
        plain = mean([report.rtn_error for report in found])
        ratio = "" if not ours or not plain else f"{ours / plain:.2f}"
        rows.append(
            (f"{len(found)} x {leaf}", scheme, method, percent(ours), percent(plain), ratio)
        )
    return rows


def grouped_reasons(left: Mapping[str, str], head: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in left.items():
        groups.setdefault(reason, []).append(name)
    if head:
        groups.setdefault("outside the decoder blocks", []).extend(head)
    return groups


def shortened(names: Sequence[str]) -> str:
    """Names that differ only in numbers, written once.

    >>> shortened(["layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "lm_head"])
    'layers.{0,1}.mlp.down_proj, lm_head'
    """
    numbers: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        template = name if at is None else ".".join([*parts[:at], "{}", *parts[at + 1 :]])
        numbers.setdefault(template, []).extend([] if at is None else [parts[at]])
    return ", ".join(
        template.replace("{}", _ranges(found)) if found else template
        for template, found in numbers.items()
    )


def _ranges(numbers: Sequence[str]) -> str:
    """["0", "1", "2", "5"] -> "{0..2,5}"; one number alone stands without braces."""
    values = sorted(map(int, numbers))
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = []
    for run in runs:
        texts += [f"{run[0]}..{run[-1]}"] if len(run) > 2 else [str(value) for value in run]
    return texts[0] if len(values) == 1 else "{" + ",".join(texts) + "}"


def _by_kind(
    reports: Sequence[LayerReport],
) -> dict[tuple[str, str, str], list[LayerReport]]:
    kinds: dict[tuple[str, str, str], list[LayerReport]] = {}
    for report in reports:
        leaf = report.module.rpartition(".")[2]
        kinds.setdefault((leaf, str(report.scheme), report.method), []).append(report)
    return kinds


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3f} %"
