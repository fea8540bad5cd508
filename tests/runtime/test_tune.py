"""Tuning tries tiles that fit and keeps the fastest; on a GPU, of real products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from qtool.errors import UsageError
from qtool.kernels.cuda import marlin_linear, tuning
from qtool.kernels.cuda.marlin_linear import MarlinPacked
from qtool.kernels.cuda.tuning import LinearShape, LinearTile
from qtool.runtime.bench import tune
from qtool.runtime.bench.command import bench

SHAPE = LinearShape(1, 192, 512, bits=4, block=64)


def words(out: int, inputs: int) -> MarlinPacked:
    return MarlinPacked(
        words=torch.zeros(inputs // 16, 2 * out, dtype=torch.int32),
        scales=torch.ones(inputs // 64, out),
        zeros=None,
        bits=4,
        block=64,
        out_features=out,
        in_features=inputs,
    )


@pytest.mark.parametrize("rows", [1, 16, 17, 200])
@pytest.mark.parametrize("out", [64, 192, 256])
def test_candidates_fit_the_matrix(rows: int, out: int) -> None:
    shape = SHAPE._replace(rows=rows, out_features=out)
    found = list(tune.candidates(shape))
    assert len(found) == len(set(found)) > 0
    for tile in found:
        assert out % (64 * tile.strips) == 0
        assert tile.split <= 4
        assert tile.rows == 16 or tile.rows < 2 * rows
        assert tile.warps <= 4 * tile.strips


def test_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With products that take no time, and times by the tile they were asked for."""
    asked: list[LinearTile] = []
    wanted = LinearTile(1, 16, 4, warps=4, stages=3)

    def parts(x: object, packed: object, sums: object, config: LinearTile) -> str:
        asked.append(config)
        return ""

    def seconds(work: Callable[[int], object]) -> float:
        work(0)
        return 1e-6 if asked[-1] == wanted else 2e-6

    monkeypatch.setattr(marlin_linear, "matmul_parts", parts)
    monkeypatch.setattr(marlin_linear, "add_parts", lambda found, dtype: found)
    monkeypatch.setattr(marlin_linear, "block_sums", lambda x, packed: None)
    (found,) = tune.tune(words(192, 512), torch.float32, rows=(1,), seconds=seconds)
    assert found.tile == wanted
    assert found.microseconds == pytest.approx(1.0)
    assert found.before_microseconds == pytest.approx(2.0)
    assert tuning.tile_of(found.row, SHAPE, 132) == wanted


def test_tuning_without_a_gpu_says_so(books_7m: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(bench, ["kernels", str(books_7m), "--tune"])
    assert isinstance(done.exception, UsageError)
    assert "--tune measures kernels of a GPU" in done.exception.message
