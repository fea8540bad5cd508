"""Tiles come from the table: what was measured here first, then the architecture's, then any."""

import json
from pathlib import Path

import pytest
import torch

from qtool.errors import FormatError
from qtool.kernels.cuda import tuning
from qtool.kernels.cuda.tuning import LinearShape, LinearTile

CPU = torch.device("cpu")
# Of an 8B model.
DOWN = LinearShape(1, 4096, 14336, bits=4, block=128)
GATE_UP = LinearShape(1, 28672, 4096, bits=4, block=128)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    return tmp_path


@pytest.fixture(autouse=True)
def _forget_after() -> object:
    yield
    tuning.forget()


def test_small_products_are_cut_until_the_gpu_is_full() -> None:
    # 32 tiles of 128 outputs: 132 multiprocessors with four programs each have room for 16 parts.
    assert tuning.linear_tile(DOWN, CPU) == LinearTile(2, 16, 16, warps=4, stages=4)
    # 224 tiles: two parts are enough.
    assert tuning.linear_tile(GATE_UP, CPU).split == 2
    assert tuning.linear_tile(GATE_UP._replace(rows=128), CPU).split == 1


@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 33, 200, 1000])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("out", "inputs", "block"), [(64, 64, 64), (192, 96, 32), (4096, 14336, 128)]
)
def test_tiles_fit_the_matrix(rows: int, bits: int, out: int, inputs: int, block: int) -> None:
    shape = LinearShape(rows, out, inputs, bits, block)
    tile = tuning.linear_tile(shape, CPU)
    assert out % (64 * tile.strips) == 0
    assert tile.warps <= 4 * tile.strips
    blocks = inputs // block
    per_part = -(-blocks // tile.split)
    # Every part has a block.
    assert (tile.split - 1) * per_part < blocks


def test_what_was_measured_here_counts_first(cache: Path) -> None:
    row = {"bits": 4, "max_rows": 2, "out": 4096, "in": 14336, "strips": 1, "rows": 16}
    row |= {"warps": 4, "stages": 3, "split": 7}
    path = tuning.write_tuned(CPU, [row])
    assert path.is_relative_to(cache)
    assert tuning.linear_tile(DOWN, CPU) == LinearTile(1, 16, 7, warps=4, stages=3)
    assert tuning.linear_tile(DOWN._replace(rows=2), CPU).split == 7
    # Others keep the rules.
    assert tuning.linear_tile(DOWN._replace(rows=3), CPU).split == 16
    assert tuning.linear_tile(GATE_UP, CPU).split == 2
    # Measured again: the new row takes the old one's place.
    again = [{**row, "split": 4}, {**row, "max_rows": 1, "split": 8}]
    tuning.write_tuned(CPU, again, unpack_at_rows=128)
    assert tuning.rows_to_unpack_at(DOWN, CPU) == 128
    assert len(json.loads(path.read_text())["cpu"]["linear"]) == 2
    assert tuning.linear_tile(DOWN, CPU).split == 8
    assert tuning.linear_tile(DOWN._replace(rows=2), CPU).split == 4


def test_a_table_that_cannot_be_read_is_named(cache: Path) -> None:
    path = tuning.tuned_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match=r"cpu\.json is no JSON"):
        tuning.linear_tile(DOWN, CPU)


def test_every_row_of_the_shipped_table_is_a_tile() -> None:
    table = tuning.read_table(tuning.TABLE)
    for arch, part in table.items():
        for row in part["linear"]:
            shape = LinearShape(row["max_rows"], 8192, 8192, row["bits"], 128)
            tile = tuning.tile_of(row, shape, 132)
            assert tile.rows in (16, 32, 64, 128), (arch, row)
            assert tile.warps in (4, 8), (arch, row)
