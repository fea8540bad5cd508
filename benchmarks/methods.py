"""Every method on one model: size, KL divergence from the original, time; README's table of them.

    python benchmarks/methods.py                    a few minutes of one core
    python benchmarks/methods.py --only nf4 best    these rows again, the others stay
    python benchmarks/methods.py --table            README's table from the file alone

The rows are every recipe that ships, int4's widths from 2 to 8 bits, its efforts and its rotations.
The divergence is that of `qtool eval`, on text that no calibration saw: recipes that round
activations are scored with rounded ones. Seconds are CPU seconds of the quantization, with its data
and its writing and without Python's start. Rows are kept in --out as they are made, and not made
again unless --only names them.

Calibration is a quarter of the default's data, so that all rows take minutes; quantize.py compares
with other tools on all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# PYTHONSAFEPATH leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))

HERE = Path(__file__).parent
RESULT = HERE.resolve() / "results" / "methods.json"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/methods.py -->", "<!-- end -->"
MODEL = "builtin:books-7m"
HELD_OUT_TOKENS = 16384
NUM_SAMPLES = 32
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class Row(NamedTuple):
    """options  of the recipe, as `Recipe.with_options` takes them"""

    name: str
    recipe: str
    options: Mapping[str, Any] = {}


def rows() -> list[Row]:
    """Recipes that ship but int4's other widths, which come as a row each."""
    from qtool.recipe import recipe_names

    widths = {f"int{bits}" for bits in WIDTHS}
    return [
        *(Row(name, name) for name in recipe_names() if name not in widths),
        *(Row(f"int{bits}", "int4", {"bits": bits}) for bits in WIDTHS),
        *(Row(f"int4 --effort {name}", "int4", {"effort": name}) for name in ("fast", "best")),
        *(
            Row(f"int{bits} --effort best", "int4", {"bits": bits, "effort": "best"})
            for bits in (3, 2)
        ),
        *(
            Row(f"int{bits} --rotations R1,R2", "int4", {"bits": bits, "rotations": ("R1", "R2")})
            for bits in (4, 3)
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--only", nargs="+", default=[], help="these rows alone, made again")
    parser.add_argument("--held-out-tokens", type=int, default=HELD_OUT_TOKENS)
    parser.add_argument("--num-samples", type=int, default=NUM_SAMPLES, help="of 512 tokens")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--readme", type=Path, help="default: README.md, with the default --out")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    results = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {"rows": []}
    if not options.table:
        for so_far in measured(options, results):
            results = so_far
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    readme = options.readme or (README if options.out.resolve() == RESULT else None)
    if readme is not None:
        readme.write_text(inserted(readme.read_text("utf-8"), table(results)), encoding="utf-8")
    print(table(results))


def measured(options: argparse.Namespace, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results after every row that is not there yet."""
    from qtool.artifact import tool_versions
    from qtool.runtime.bench.conditions import cpu_name

    wanted = rows()
    unknown = set(options.only) - {row.name for row in wanted}
    if unknown:
        raise SystemExit(f"no row {', '.join(unknown)}; rows: {', '.join(r.name for r in wanted)}")
    found = {row["method"]: row for row in results["rows"]}
    for row in wanted:
        if row.name not in options.only if options.only else row.name in found:
            continue
        found[row.name] = {"method": row.name, **measure(row, options)}
        print(json.dumps(found[row.name]), file=sys.stderr, flush=True)
        yield {
            "model": options.model,
            "calibration_samples": options.num_samples,
            "held_out_tokens": options.held_out_tokens,
            "processor": cpu_name(),
            "versions": tool_versions(),
            "rows": [found[row.name] for row in wanted if row.name in found],
        }


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """One artifact: made, weighed, compared with the model that it was made from."""
    from qtool.api import evaluate, quantize
    from qtool.recipe import load_recipe

    recipe = load_recipe(row.recipe).with_options(num_samples=options.num_samples, **row.options)
    with tempfile.TemporaryDirectory(prefix="qtool-methods-") as name:
        target = Path(name) / "artifact"
        load = os.getloadavg()[0]
        started = time.process_time()
        quantize(options.model, recipe, out=target)
        seconds = time.process_time() - started
        report = evaluate(
            str(target),
            options.model,
            max_tokens=options.held_out_tokens,
            papers=False,
            speed=False,
        )
        (model,) = report.models
        assert model.divergence is not None
        return {
            "bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
            "kld": round(model.divergence.kld.value, 6),
            "same_top": round(model.divergence.same_top.value, 4),
            "cpu_seconds": round(seconds, 1),
            "load": round(load, 1),
        }


def table(results: Mapping[str, Any]) -> str:
    """Markdown, the closest to the original first among those of one size."""
    lines = ["| method | MB | KL divergence | same top token | CPU s |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row['method']}` | {row['bytes'] / 1e6:.2f} | {row['kld']:.5f} | "
        f"{100 * row['same_top']:.1f} % | {row['cpu_seconds']:.0f} |"
        for row in by_size(results["rows"])
    ]
    return "\n".join(lines)


def by_size(found: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(found, key=lambda row: (-round(row["bytes"] / 1e5), row["kld"]))


def inserted(text: str, made: str) -> str:
    """A text with everything between its two marks made anew."""
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise SystemExit(f"the readme has no place for the table: {BEGIN} and {END}, once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


if __name__ == "__main__":
    main()
