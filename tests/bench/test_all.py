"""`make bench`: what fails or cannot run is told, and the others go on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
GOOD = """
import json, sys
words = sys.argv[1:]
open(words[words.index("--out") + 1], "w").write(json.dumps(words))
print("measured")
"""
BAD = "print('half way'); raise SystemExit('no such model')"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """benchmarks/all.py with areas of its own, in an empty folder."""
    for name in ("all", "peers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("benchmark_all", FOLDER / "all.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name, text in (("good", GOOD), ("bad", BAD)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    def cannot(peers: Any) -> Any:
        raise OSError("no compiler")

    good, bad = str(tmp_path / "good.py"), str(tmp_path / "bad.py")
    areas = {
        "bad": module.Area(bad),
        "good": module.Area(good, options=("--rounds", "9"), quick=("--rounds", "1"), models=True),
        "alone": module.Area(good, peers=(cannot,)),
        "peerless": module.Area(good, needs=cannot),
        "left": module.Area(bad),
    }
    monkeypatch.setattr(module, "AREAS", areas)
    monkeypatch.chdir(tmp_path)
    return module


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["all.py", *words])
    return int(bench.main())


def test_all_run_and_the_table_tells_of_each(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "kept").mkdir()
    assert run(bench, monkeypatch, "--skip", "left", "--results", "kept") == 1
    table = capfd.readouterr().out.rpartition("\n\n")[2].splitlines()
    rows = [line.split(None, 2) for line in table]
    assert [row[:2] for row in rows] == [
        ["bad", "failed"],
        ["good", "ran"],
        ["alone", "ran"],
        ["peerless", "skipped"],
        ["left", "not"],
    ]
    assert "ended with 1: no such model" in rows[0][2]
    assert "no compiler" in rows[2][2]
    assert "no compiler" in rows[3][2]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "alone.json",
        "good.json",
    ]
    assert "half way" in (tmp_path / "build" / "benchmarks" / "bad.log").read_text(encoding="utf-8")


def test_quick_figures_do_not_replace_results(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    assert run(bench, monkeypatch, "--quick", "--only", "good", "--models", "here") == 0
    assert not (tmp_path / "results").exists()
    found = json.loads((tmp_path / "build" / "benchmarks" / "good.json").read_text("utf-8"))
    assert found[:6] == ["--rounds", "9", "--rounds", "1", "--models", "here"]


def test_nothing_fails_where_nothing_failed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(bench, monkeypatch, "--only", "peerless", "good", "--results", ".") == 0
