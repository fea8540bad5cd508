"""Tables of quantizers: README's is the file's, and who beats whom is counted as it is said."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qtool.recipe import load_recipe, recipe_names

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    def load(name: str) -> ModuleType:
        monkeypatch.setattr(sys, "path", list(sys.path))
        for sibling in ("quantize_child",):
            monkeypatch.delitem(sys.modules, sibling, raising=False)
        spec = importlib.util.spec_from_file_location(f"table_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_readmes_table_is_that_of_the_committed_results(script: Any) -> None:
    methods = script("methods")
    readme = methods.README.read_text(encoding="utf-8")
    results = json.loads(methods.RESULT.read_text(encoding="utf-8"))
    assert methods.inserted(readme, methods.table(results)) == readme
    assert len(results["rows"]) > 10


def test_every_recipe_is_a_row_and_every_row_a_recipe(script: Any) -> None:
    methods = script("methods")
    rows = methods.rows()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.recipe for row in rows} | {"int3", "int2"} == set(recipe_names())
    for row in rows:
        load_recipe(row.recipe).with_options(**row.options)


def test_a_table_by_hand(script: Any) -> None:
    methods = script("methods")
    rows = [
        {"method": "a", "bytes": 5_370_000, "kld": 0.02, "same_top": 0.9, "cpu_seconds": 1.4},
        {"method": "b", "bytes": 5_380_000, "kld": 0.01, "same_top": 0.95, "cpu_seconds": 12.0},
        {"method": "c", "bytes": 8_400_000, "kld": 0.001, "same_top": 0.999, "cpu_seconds": 0.4},
    ]
    assert methods.table({"rows": rows}).splitlines()[2:] == [
        "| `c` | 8.40 | 0.00100 | 99.9 % | 0 |",
        "| `b` | 5.38 | 0.01000 | 95.0 % | 12 |",
        "| `a` | 5.37 | 0.02000 | 90.0 % | 1 |",
    ]
    text = f"before\n{methods.BEGIN}\nold\n{methods.END}\nafter\n"
    assert methods.inserted(text, "new") == f"before\n{methods.BEGIN}\nnew\n{methods.END}\nafter\n"
    with pytest.raises(SystemExit, match="no place for the table"):
        methods.inserted("nothing", "new")


def test_who_beats_a_peer_by_hand(script: Any) -> None:
    quantize = script("quantize")

    def run(method: str, kld: float, cpu_seconds: float, bits: int = 3) -> dict[str, Any]:
        about = {"model": "m", "bits": bits, "seed": 0, "method": method, "peak_rss": 1, "bytes": 1}
        return {**about, "kld": kld, "cpu_seconds": cpu_seconds}

    found = quantize.means(
        [
            run("default", 0.009, 30.0),
            run("best", 0.008, 120.0),
            run("rtn", 0.04, 2.0),
            run("best", 0.001, 120.0, bits=4),
            run("llm-compressor", 0.02, 44.0),
            run("auto-round-200", 0.0085, 290.0),
        ]
    )
    peers = {row["method"]: row for row in found if "beaten_by" in row}
    assert set(peers) == {"llm-compressor", "auto-round-200"}
    assert peers["llm-compressor"]["beaten_by"] == ["default", "best"]
    assert peers["llm-compressor"]["in_no_more_cpu_time_by"] == ["default"]
    assert peers["auto-round-200"]["beaten_by"] == ["best"]
    assert peers["auto-round-200"]["in_no_more_cpu_time_by"] == ["best"]
