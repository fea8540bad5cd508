"""Which tile a product takes on which GPU: a table, tiles.json, and before it what was measured.

A row says for which products it is, and the tile:

    bits, max_rows       codes of so many bits, up to so many rows of activations
    out, in              of this matrix alone; left out: any
    strips, rows         the tile: 64 * strips outputs by so many rows
    warps, stages        how the compiler is to spread it
    split                parts of the inputs; or
    programs_per_sm, max_split
                         so many parts that each multiprocessor gets so many programs, at the most

Rows are looked up in order: what `qtool bench kernels --tune` wrote for this GPU, the rows of the
architecture ("sm_90"), "default". The first that matches counts. So a measured figure beats a rule,
and a new architecture runs by the rules before anybody has measured it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qtool.errors import FormatError
from qtool.kernels.cuda.launch import architecture, num_multiprocessors
from qtool.settings import settings

TABLE = Path(__file__).with_name("tiles.json")
# Blocks of inputs that a part has at the least, for the pipeline to fill.
LEAST_BLOCKS = 2
# Rows that are measured and looked up: the next above.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class LinearShape(NamedTuple):
    """rows of activations by a weight [out_features, in_features], in blocks of `block` inputs."""

    rows: int
    out_features: int
    in_features: int
    bits: int
    block: int


@dataclass(frozen=True, slots=True)
class LinearTile:
    """strips * 64 outputs by `rows` rows, over one of `split` parts of the inputs."""

    strips: int
    rows: int
    split: int
    warps: int
    stages: int


def linear_tile(shape: LinearShape, device: torch.device) -> LinearTile:
    """The tile that the table names, fitted to the matrix."""
    return _linear_tile(shape, architecture(device), num_multiprocessors(device), _name(device))


@functools.lru_cache(maxsize=4096)
def _linear_tile(shape: LinearShape, arch: str, num_sms: int, name: str) -> LinearTile:
    return tile_of(_first_match(_linear_rows(arch, name), shape), shape, num_sms)


def tile_of(row: Mapping[str, int], shape: LinearShape, num_sms: int) -> LinearTile:
    """A row of the table as a tile of this matrix: fewer strips where they do not divide it."""
    strips = row["strips"]
    while shape.out_features % (64 * strips):
        strips //= 2
    # A group of four warps has a strip at least.
    warps = min(row["warps"], 4 * strips)
    blocks = shape.in_features // shape.block
    if "split" in row:
        split = row["split"]
    else:
        programs = shape.out_features // (64 * strips) * -(-shape.rows // row["rows"])
        wanted = row["programs_per_sm"] * num_sms // programs
        split = min(wanted, row["max_split"], blocks // LEAST_BLOCKS)
    split = max(1, min(split, blocks))
    # No part without a block.
    split = -(-blocks // -(-blocks // split))
    return LinearTile(strips, row["rows"], split, warps, row["stages"])


def rows_to_unpack_at(shape: LinearShape, device: torch.device) -> int:
    """From so many rows on, unpacking the weight and a dense product take less time."""
    found = _parts(architecture(device), _name(device))
    return next(int(part["unpack_at_rows"]) for part in found if "unpack_at_rows" in part)


def _first_match(rows: Sequence[Mapping[str, int]], shape: LinearShape) -> Mapping[str, int]:
    for row in rows:
        if (
            row["bits"] == shape.bits
            and shape.rows <= row["max_rows"]
            and row.get("out", shape.out_features) == shape.out_features
            and row.get("in", shape.in_features) == shape.in_features
        ):
            return row
    # More rows than the table knows: as the most that it knows.
    return max((row for row in rows if row["bits"] == shape.bits and "out" not in row), key=_reach)


def _reach(row: Mapping[str, int]) -> int:
    return row["max_rows"]


@functools.cache
def _linear_rows(arch: str, name: str) -> tuple[Mapping[str, int], ...]:
    return tuple(row for part in _parts(arch, name) for row in part.get("linear", ()))


@functools.cache
def _parts(arch: str, name: str) -> tuple[Mapping[str, Any], ...]:
    """The table's parts that hold for a GPU, the nearest first."""
    shipped = read_table(TABLE)
    measured = tuned_path(name)
    found: Iterator[Mapping[str, Any] | None] = iter(
        (
            read_table(measured).get(arch) if measured.is_file() else None,
            shipped.get(arch),
            shipped["default"],
        )
    )
    return tuple(part for part in found if part is not None)


def read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path} is no JSON: {error}", hint="delete it, and tune again if you did"
        ) from None
    if not isinstance(table, dict):
        raise FormatError(f"{path} is no table of tiles", hint="delete it, and tune again")
    return table


def tuned_path(name: str) -> Path:
    """Where the tiles measured on a GPU of this name are kept."""
    word = "".join(letter if letter.isalnum() else "-" for letter in name).strip("-").lower()
    return settings().cache_dir / "tiles" / f"{word}.json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write_tuned(
    device: torch.device,
    rows: Sequence[Mapping[str, int]],
    *,
    unpack_at_rows: int | None = None,
) -> Path:
    """Keep measured rows for this GPU, in place of those of the same matrices; they count from now
    on. unpack_at_rows: None: as before.
    """
    path, arch = tuned_path(_name(device)), architecture(device)
    table = read_table(path) if path.is_file() else {}
    keys = ("bits", "max_rows", "out", "in")
    new = {tuple(row.get(key) for key in keys) for row in rows}
    held = table.get(arch, {}).get("linear", ())
    kept = [row for row in held if tuple(row.get(key) for key in keys) not in new]
    # The fewest rows first: the first match is the nearest above.
    merged = sorted((*rows, *kept), key=_reach)
    table[arch] = {**table.get(arch, {}), "linear": merged}
    if unpack_at_rows is not None:
        table[arch]["unpack_at_rows"] = unpack_at_rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    forget()
    return path


def forget() -> None:
    """Read the tables again when they are next asked."""
    for cached in (_linear_tile, _linear_rows, _parts):
        cached.cache_clear()
