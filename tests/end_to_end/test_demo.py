"""`qtool demo`: it works whole, and replaces nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.runtime.demo import MARKER


def test_a_folder_that_the_demo_did_not_make_is_left_alone(
    qtool: Callable[..., Any], tmp_path: Path
) -> None:
    own = tmp_path / "thesis"
    own.mkdir()
    (own / "config.json").write_text("{}", encoding="utf-8")
    ended = qtool("demo", "--out", own)
    assert ended.code == 2
    assert "is not an earlier demo" in ended.err
    assert "--out" in ended.err
    assert [path.name for path in own.iterdir()] == ["config.json"]
    ended = qtool("demo", "--out", own / "config.json")
    assert ended.code == 2


@pytest.mark.slow
def test_the_demo_runs_twice_and_leaves_models_and_a_report(
    done: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "qtool-demo"
    shown = done("demo", "--out", out, "--json")
    results = json.loads(shown.out)
    assert [model["name"] for model in results["models"]] == [
        "books-7m",
        "books-7m-int4",
        "books-7m-int4-marlin",
        "books-7m-Q4_K_M.gguf",
    ]
    assert len(results["answer"]) > 40
    original, *others = results["models"]
    for model in others:
        assert model["size_bytes"] < original["size_bytes"] / 2
        assert 0 < model["kl_divergence"] < 0.1
        assert model["tokens_per_second"] > 0
    assert {path.name for path in out.iterdir()} == {
        "books-7m-int4",
        "books-7m-int4-marlin",
        "books-7m-Q4_K_M.gguf",
        "report.html",
        "report.json",
        "report.md",
        MARKER,
    }
    assert ".partial" not in (out / "report.json").read_text(encoding="utf-8")
    assert ".partial" not in (out / "books-7m-int4-marlin" / "qtool.json").read_text("utf-8")
    again = done("demo", "--out", out)
    assert "report.html" in again.out
    assert "divergence" in again.out
    assert [path.name for path in tmp_path.iterdir()] == ["qtool-demo"]
