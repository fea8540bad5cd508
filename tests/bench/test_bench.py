"""Measurements are counted as they are defined, and each benchmark runs as a user starts it."""

import asyncio
import json
import math
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from qtool.cli import qtool
from qtool.errors import QtoolError, UsageError
from qtool.runtime.bench.client import Work, arrivals, prompts, send_all, served_model
from qtool.runtime.bench.conditions import cpu_name, write_result
from qtool.runtime.bench.machine import Roofs, arithmetic_use, bandwidth_use
from qtool.runtime.bench.plots import plot
from qtool.runtime.bench.timing import Answer, load_of, spread
from qtool.runtime.server.process import running_server


def test_a_spread_by_hand() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert found is not None
    assert (found.n, found.mean, found.smallest, found.largest) == (4, 2.5, 1.0, 4.0)
    assert found.std == pytest.approx(math.sqrt(5 / 3))
    # Between the order statistics 1 2 3 4: at 0.5 * 3 and 0.95 * 3.
    assert (found.p50, found.p95) == pytest.approx((2.5, 3.85))
    assert spread([]) is None


def test_a_load_by_hand() -> None:
    answers = [
        # Sent at 0, tokens at 1, 1.5 and 2.5.
        Answer(0.0, (1.0, 1.5, 2.5), 2.5, 10, 3),
        # Two tokens came in one piece: TPOT counts tokens, ITL gaps.
        Answer(1.0, (3.0, 5.0), 5.0, 20, 3, 8),
        Answer(1.0, (), 6.0, 0, 0, error="HTTP 503"),
    ]
    load = load_of(answers)
    assert (load.num_requests, load.num_failed, load.errors) == (3, 1, ("HTTP 503",))
    assert (load.num_prompt_tokens, load.num_cached_tokens, load.num_output_tokens) == (30, 8, 6)
    assert load.seconds == 6.0
    assert load.tokens_per_second == 1.0
    assert load.ttft_ms is not None
    assert load.ttft_ms.mean == 1500.0
    assert load.tpot_ms is not None
    assert load.tpot_ms.mean == pytest.approx((750 + 1000) / 2)
    assert load.itl_ms is not None
    assert (load.itl_ms.n, load.itl_ms.smallest, load.itl_ms.largest) == (3, 500.0, 2000.0)
    assert load.e2e_ms is not None
    assert load.e2e_ms.largest == 4000.0


def test_use_of_the_machine_by_hand() -> None:
    roofs = Roofs(1e9, 1e12, "bfloat16", 2)
    # 8 MB of weights and 2 sequences of 100 tokens of 1 kB, in 20 ms of a bus of 1 GB/s.
    assert bandwidth_use(
        weight_bytes=8_000_000,
        cache_bytes_per_token=1000,
        batch=2,
        context=100,
        step_seconds=0.02,
        roofs=roofs,
    ) == pytest.approx(0.41)
    assert arithmetic_use(num_weights=10**9, tokens=50, seconds=1, roofs=roofs) == 0.1


def test_arrivals_are_poisson_and_repeatable() -> None:
    times = arrivals(4.0, 4001, seed=1)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    # Exponential: mean and standard deviation 1/4, each within 5 standard errors.
    assert mean == pytest.approx(0.25, abs=5 * 0.25 / math.sqrt(4000))
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert math.sqrt(variance) == pytest.approx(0.25, rel=0.1)
    assert times[0] == 0.0
    assert times == arrivals(4.0, 4001, seed=1)
    assert arrivals(float("inf"), 3, seed=1) == [0.0] * 3


def test_prompts_share_just_the_prefix_that_is_asked_for() -> None:
    plain = prompts(6, 40, seed=0)
    assert len(set(plain)) == 6
    shared = prompts(6, 40, seed=0, prefix_len=60, num_prefixes=2)
    beginnings = {text.split(" (")[0] for text in shared}
    assert len(beginnings) == 2
    assert all(len(text.split()) >= 40 for text in beginnings)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(qtool, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_latency_reports_every_field_that_others_look_for(books_7m: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    text = run(
        *("latency", str(books_7m), "--batch-sizes", "1,2", "--num-runs", "2"),
        *("--input-len", "16", "--output-len", "4", "--out", str(out)),
    )
    assert "TTFT" in text
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [row["batch_size"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        assert row["n_runs"] == 2
        assert row["ttft_ms"]["n"] == 2 * row["batch_size"]
        assert row["itl_ms"]["n"] == 2 * 3 * row["batch_size"]
        for name in ("p50_latency_ms", "p95_latency_ms", "avg_tokens_per_sec", "mbu", "mfu"):
            assert row[name] > 0, name
    assert not list(tmp_path.glob(".*.partial"))
    drawn = ElementTree.fromstring((tmp_path / "latency.svg").read_text(encoding="utf-8"))
    titles = [title.text or "" for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 4  # two batch sizes in two panels
    assert f"decode, 2: {found['rows'][1]['decode_tokens_per_second']:.4g}" in titles[1]


def test_throughput_counts_every_token(books_7m: Path) -> None:
    text = run(
        *("throughput", str(books_7m), "--num-prompts", "5", "--json"),
        *("--input-len", "8,20", "--output-len", "3"),
    )
    (load,) = json.loads(text)["rows"]
    assert (load["num_requests"], load["num_failed"], load["num_output_tokens"]) == (5, 0, 15)
    assert 5 * 8 <= load["num_prompt_tokens"] <= 5 * 20


def test_lengths_that_do_not_fit_are_refused(books_7m: Path) -> None:
    for arguments, words in (
        (("--input-len", "600", "--output-len", "4"), "fit the context of 512"),
        (("--input-len", "20,10"), "neither a length nor a range"),
    ):
        with pytest.raises(UsageError, match=words):
            run("throughput", str(books_7m), *arguments)


def test_a_server_under_load(books_7m: Path) -> None:
    with running_server(str(books_7m)) as server:
        text = run(
            *("serve", "--url", server.url, "--num-prompts", "4", "--request-rate", "50,inf"),
            *("--input-len", "10", "--output-len", "5", "--shared-prefix-len", "80", "--json"),
        )
        found = json.loads(text)
        assert [row["request_rate"] for row in found["rows"]] == ["50", "inf"]
        for row in found["rows"]:
            load = row["load"]
            assert (load["num_requests"], load["num_failed"]) == (4, 0)
            assert load["num_output_tokens"] == 20
            assert load["num_prompt_tokens"] > 4 * 60
        refused = asyncio.run(
            send_all(
                server.url,
                "no-such-model",
                [Work(0.0, "It was", 3)],
                api_key=None,
                max_concurrency=1,
                timeout=30,
                advance=lambda count: None,
            )
        )
    assert refused[0].error is not None
    assert refused[0].error.startswith("HTTP 404")
    with pytest.raises(QtoolError, match="no models could be had"):
        served_model(server.url, None)


def test_every_kind_of_linear_is_a_row(books_7m: Path) -> None:
    rows = json.loads(run("kernels", str(books_7m), "--tokens", "2", "--json"))["rows"]
    shapes = {(row["out_features"], row["in_features"]): row["modules"] for row in rows}
    assert shapes[768, 256] == 16
    assert all(row["microseconds"] > 0 for row in rows)


@pytest.mark.slow
def test_startup_adds_up(books_7m: Path) -> None:
    (row,) = json.loads(run("startup", str(books_7m), "--num-runs", "1", "--json"))["rows"]
    parts = [row[name] for name in ("python", "imports", "loading", "first_token")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(row["total"])
    with pytest.raises(QtoolError, match="failed"):
        run("startup", "/no/such/model", "--num-runs", "1")


def test_points_stand_where_their_values_are() -> None:
    spreads = {"p50": 100.0, "smallest": 50.0, "p95": 200.0}
    rows = [
        {
            "request_rate": rate,
            "load": {"tokens_per_second": 10.0 * (n + 1), "ttft_ms": spreads, "tpot_ms": None},
        }
        for n, rate in enumerate(("1", "inf"))
    ]
    drawn = plot("serve", rows)
    assert drawn is not None
    tree = ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    marks = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in tree.iter(f"{space}circle")]
    assert len(marks) == 4
    # Twice the speed stands higher, equal medians level, a later rate to the right.
    assert marks[1][1] < marks[0][1]
    assert marks[2][1] == marks[3][1]
    assert marks[0][0] < marks[1][0]
    ranges = [found for found in tree.iter(f"{space}line") if "range" in found.get("class", "")]
    assert [found.get("class") for found in ranges] == ["c0 range", "c0 range"]
    assert plot("throughput", rows) is None


def test_a_result_has_the_conditions_it_was_measured_under(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speed.json"
    write_result(path, {"ratio": 2.0}, load_before=0.5, versions={"peer": "1.2"})
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["ratio"], found["load_average"]["before"]) == (2.0, 0.5)
    assert found["environment"]["peer"] == "1.2"
    assert found["environment"]["cpu"] == cpu_name()
    assert {"command", "date"} <= set(found)
    assert [file.name for file in path.parent.iterdir()] == ["speed.json"]
