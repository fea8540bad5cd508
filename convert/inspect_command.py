"""`qtool inspect`: what a model file or folder holds."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qtool.convert.inspection import Inspection

EPILOG = """\b
Examples:
  qtool inspect ./Qwen3-0.6B-int4                     # format, size, bits a weight, tokenizer
  qtool inspect qwen3-Q4_K_M.gguf --tensors           # and every tensor with its type
  qtool inspect model-00001-of-00002.safetensors      # one shard
  qtool inspect qwen3.gguf --json | jq .metadata"""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="FILE|DIR")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, tensors included.")
def inspect(model: str, tensors: bool, as_json: bool) -> None:
    """Tell what a model holds: format, architecture, sizes, real bits per weight, metadata and
    tokenizer.

    FILE is a .gguf or .safetensors file, DIR a model folder; a Hub id or builtin:books-7m will do
    too. Headers are read, and a few small tensors that tell how others are packed.
    """
    from qtool.convert.inspection import inspect_path
    from qtool.source import resolve

    path = Path(model).expanduser()
    found = inspect_path(path if path.exists() else resolve(model).path)
    if as_json:
        click.echo(json.dumps(_finite(_facts(found)), indent=2))
    else:
        _print(found, tensors)


def _facts(found: Inspection) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "format": found.format,
        "architecture": found.architecture,
        "sizes": dict(found.sizes),
        "file_bytes": found.file_bytes,
        "num_weights": found.num_weights,
        "tensor_bytes": found.tensor_bytes,
        "bits_per_weight": found.bits_per_weight,
        "kinds": {
            kind: {
                "tensors": len(rows),
                "weights": sum(row.num_weights for row in rows),
                "bytes": sum(row.nbytes for row in rows),
            }
            for kind, rows in found.by_kind()
        },
        "tokenizer": dict(found.tokenizer),
        "origin": dict(found.origin),
        "notes": list(found.notes),
        "metadata": dict(found.metadata),
        "tensors": [
            {"name": row.name, "shape": list(row.shape), "kind": row.kind, "bytes": row.nbytes}
            for row in found.tensors
        ],
    }


def _finite(value: Any) -> Any:
    """The same with infinities and NaN as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print(found: Inspection, tensors: bool) -> None:
    headline = f"{found.path.name}: {found.format}"
    if found.architecture:
        headline += f", {found.architecture}"
    lines = [shown(headline)]
    lines += [f"  {name:<11} {value}" for name, value in _lines(found).items()]
    lines += [f"  note        {shown(note)}" for note in found.notes]
    if found.tensors:
        lines += ["", *_table(_kinds(found), right=(1, 2, 3, 4))]
    if tensors and found.tensors:
        lines += ["", *_table(_tensors(found), right=(3, 4))]
    if found.metadata:
        rows = [(shown(key), _value(value)) for key, value in found.metadata.items()]
        lines += ["", *_table([("metadata", "value"), *rows])]
    # On a screen a line is a row; a pipe gets it whole.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        click.echo(line if width is None or len(line) <= width else f"{line[: width - 1]}…")


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Columns of their own width; those in `right` are numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _lines(found: Inspection) -> dict[str, str]:
    lines = {}
    if found.sizes:
        lines["sizes"] = ", ".join(f"{name} {_number(v)}" for name, v in found.sizes.items())
    bits = found.bits_per_weight
    if bits is not None:
        lines["weights"] = (
            f"{_count(found.num_weights)} in {len(found.tensors)} tensors, "
            f"{found.file_bytes / 1e6:,.1f} MB, {bits:.2f} bits a weight"
        )
    if found.tokenizer:
        lines["tokenizer"] = ", ".join(_tokenizer_parts(found))
    if found.origin:
        lines["made by"] = ", ".join(
            f"{name} {shown(value)}" for name, value in found.origin.items() if name != "warnings"
        )
    return lines


def _tokenizer_parts(found: Inspection) -> list[str]:
    facts = found.tokenizer
    parts = [shown(facts["kind"])]
    if "pre" in facts:
        parts.append(f"pre {shown(facts['pre'])}")
    if "tokens" in facts:
        parts.append(f"{facts['tokens']:,} tokens")
    parts += [f"{n} {shown(facts[n])}" for n in ("bos", "eos") if facts.get(n) is not None]
    return [*parts, "with chat template" if facts.get("chat template") else "no chat template"]


def _kinds(found: Inspection) -> list[tuple[str, ...]]:
    """What is stored how, and how many bits that takes."""
    rows = [("stored as", "tensors", "weights", "MB", "bits", "which")]
    for kind, held in found.by_kind():
        weights, nbytes = sum(row.num_weights for row in held), sum(row.nbytes for row in held)
        bits = f"{8 * nbytes / max(1, weights):.2f}"
        which = shown(", ".join(sorted({_role(row.name) for row in held})))
        size = f"{nbytes / 1e6:,.2f}"
        rows.append((shown(kind), str(len(held)), _count(weights), size, bits, which))
    return [*rows]


def _role(name: str) -> str:
    """What a tensor is in every block: "q_proj", "attn_q", "embed_tokens"."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


def _tensors(found: Inspection) -> list[tuple[str, ...]]:
    rows = [("tensor", "shape", "stored as", "bytes", "bits")]
    for row in found.tensors:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        rows.append((shown(row.name), shape, row.kind, f"{row.nbytes:,}", f"{row.bits:.2f}"))
    return [*rows]


def _value(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"array_of", "length", "begins"}:
        begins = ", ".join(shown(item) for item in value["begins"])
        return f"{value['length']:,} {value['array_of']}: {begins}, ..."
    if isinstance(value, str):
        return shown(value)
    return shown(json.dumps(value))


def shown(value: object) -> str:
    """Text of a file with what a terminal would act on made visible."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(number: int) -> str:
    """Weights in words: 7.34 M, 0.49 B."""
    for size, unit in ((1e8, "B"), (1e5, "M")):
        if number >= size:
            return f"{number / (size * 10):.2f} {unit}"
    return str(number)
