"""README's figures are those of benchmarks/results: each one, at the digits it is written with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ENGINES = ("qtool", "llama_cpp", "vllm, int4", "transformers")
CELL = r" ([-+\d.]+) \|"


class Figures(NamedTuple):
    """text: a pattern of README, its line breaks taken for spaces, whose groups are figures;
    values: what the result has for them.
    """

    result: str
    text: str
    values: Callable[[dict[str, Any]], Sequence[float]]


def engines(task: str) -> Callable[[dict[str, Any]], Sequence[float]]:
    def values(result: dict[str, Any]) -> Sequence[float]:
        best = {(row["task"], row["engine"]): row["best"] for row in result["rows"]}
        return [best[task, engine] for engine in ENGINES]

    return values


def numbers(inputs: str) -> Callable[[dict[str, Any]], Sequence[float]]:
    """Of Q4_K_M: perplexity and divergence of both programs."""

    def values(result: dict[str, Any]) -> Sequence[float]:
        (row,) = (
            row
            for row in result["numbers"]["types"]
            if (row["type"], row["inputs"]) == ("Q4_K_M", inputs)
        )
        names = ("perplexity", "kld", "llama_cpp_perplexity", "llama_cpp_kld")
        return [row[name] for name in names]

    return values


def one_thread(result: dict[str, Any]) -> Sequence[float]:
    (speed,) = (speed for speed in result["speed"] if speed["threads"] == 1)
    seconds = [speed[name]["wall_seconds"] for name in ("qtool", "llama-perplexity")]
    return [speed["tokens"], *seconds, speed["ratio"]["wall_seconds"]]


BOTH = r" ([\d.]+); ([\d.]+) \| ([\d.]+); ([\d.]+) \|"
TABLE = (
    *(
        Figures("engine.json", rf"\| {name} \|{CELL * 4}", engines(task))
        for name, task in (
            ("decode, batch 1", "decode, batch 1"),
            ("decode, batch 4", "decode, batch 4"),
            ("decode, batch 16", "decode, batch 16"),
            ("prefill, 512 tokens", "prefill 512"),
            ("process start to first token, seconds", "load to first token"),
        )
    ),
    Figures(
        "evaluate.json",
        rf"\| Q4_K_M, perplexity; mean KL divergence, `--activations llama.cpp` \|{BOTH}",
        numbers("8 bits, as llama.cpp"),
    ),
    Figures(
        "evaluate.json",
        rf"\| the same of the weights alone, `--activations bf16` \|{BOTH}",
        numbers("as they are"),
    ),
    Figures("evaluate.json", rf"\| the same as served here \|{BOTH}", numbers("8 bits, as served")),
    Figures(
        "evaluate.json",
        rf"\| ([\d,]+) tokens, `--no-papers`, seconds of the whole process \|{CELL * 2} ([\d.]+) x",
        one_thread,
    ),
    Figures(
        "serve_one_thread.json",
        r"took ([\d.]+) % of the engine's tokens a second in CPU time and ([\d.]+) % by the clock",
        lambda result: [100 * result["added"][name] for name in ("added_by_cpu", "added_by_clock")],
    ),
    Figures(
        "serve_one_thread.json",
        r"added (\d+) ms to the first byte of a short prompt",
        lambda result: [result["first"]["added_ms"]],
    ),
    Figures(
        "engine_load.json",
        r"stretches the gap between their tokens to (\d+) ms at the 99th percentile",
        lambda result: [result["arrival"][0]["p99_ms"]],
    ),
    Figures(
        "plan.json",
        r"and ([\d,]+) replicas took (\d+) s",
        lambda result: [result["fleet_replicas"], result["fleet_seconds"]],
    ),
)


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


def readme() -> str:
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def is_rounded(shown: str, value: float) -> bool:
    """Whether `shown` is `value` at its digits; 4.45 may stand as 4.4 and as 4.5."""
    plain = shown.replace(",", "")
    unit = 10.0 ** -len(plain.partition(".")[2])
    return abs(float(plain) - value) <= unit * (0.5 + 1e-6)


@pytest.mark.parametrize("figures", TABLE, ids=[figures.text[:40] for figures in TABLE])
def test_a_figure_is_that_of_its_result(figures: Figures) -> None:
    match = re.search(figures.text, readme())
    assert match is not None, "README says it otherwise now: write here how"
    values = figures.values(read(figures.result))
    assert len(values) == len(match.groups())
    for shown, value in zip(match.groups(), values, strict=True):
        assert is_rounded(shown, value), f"README has {shown}, {figures.result} {value}"


def test_bounds_that_are_told_hold() -> None:
    text = readme()
    assert "divergences of Q4_0, Q5_K_M, Q6_K and Q8_0 are within 1.1 %" in text
    rows = read("evaluate.json")["numbers"]["types"]
    alike = [row for row in rows if row["inputs"] == "8 bits, as llama.cpp"]
    assert {row["type"] for row in alike} == {"Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"}
    assert all(abs(row["kld_relative"]) <= 0.011 for row in alike)
    assert all(abs(row["perplexity_relative"]) <= 0.0006 for row in alike)
    assert "all 34 lines of its statistics come out equal" in text
    same = read("evaluate.json")["numbers"]["same_logits"]
    assert (len(same["lines"]), same["unequal"]) == (34, [])
    assert "`hf` backend within 0.00002" in text
    assert all(way["most_apart"] <= 2e-5 for way in read("tasks.json")["ways"])
    assert "of a 0.5B model at two loads were within 10 %" in text
    assert all(abs(figure["off"]) <= 0.1 for figure in read("plan.json")["figures"])
    assert "64 streams of Qwen2.5-0.5B's shape in int4 were held for nine minutes" in text
    held = read("serve.json")["hold"]
    assert (held["streams"], held["num_failed"], held["errors"]) == (64, 0, [])
    assert held["seconds"] >= 9 * 60
    assert held["pool_after"]["usage"] == 0
    assert "32 requests with 1,000 tokens in common cost one prefill" in text
    prefix = read("engine_load.json")["prefix"]
    assert prefix["requests"] == 32
    assert prefix["computed_tokens"] < 2 * prefix["prompt_tokens"] / prefix["requests"]


@pytest.mark.parametrize(
    ("shown", "value", "is_so"),
    [
        ("4.4", 4.351, True),
        ("4.4", 4.349, False),
        ("230", 230.49, True),
        ("230", 229.4, False),
        ("1,011", 1011.0, True),
        ("-8.5", -8.48, True),
    ],
)
def test_rounding_by_hand(shown: str, value: float, is_so: bool) -> None:
    assert is_rounded(shown, value) is is_so


def test_every_result_says_what_it_ran_on() -> None:
    for path in RESULTS.glob("*.json"):
        result = read(path.name)
        conditions = result.get("environment") or result
        assert conditions.get("machine") or conditions.get("processor"), path.name
        assert "torch" in {**conditions, **result.get("versions", {})}, path.name
