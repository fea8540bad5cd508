"""Other tools' loaders on this tool's files: what they compute, beside what the files hold.

    python benchmarks/quantize_loads.py
    python benchmarks/quantize_loads.py --loaders gptqmodel --out loads.json

The model that ships is rounded to every width that a format's loaders take and written in the
format. Each loader, in a virtual environment of its own under --venvs that is made when it is
missing, loads the file and computes logits; `difference` is their largest distance from those of
the same weights as this tool decodes them, as a share of the largest logit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# PYTHONSAFEPATH leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))

MODEL = "builtin:books-7m"
# Of the largest logit: bfloat16 products come to a third of it, a wrong zero point to fifty times.
TOLERANCE = 0.015
NUM_TOKENS = 64


class File(NamedTuple):
    format: str
    bits: int
    group_size: int
    symmetric: bool = True


# As far as transformers and each package promise.
FILES: dict[str, tuple[File, ...]] = {
    "gptqmodel": (
        *(File("gptq", bits, 128) for bits in (2, 3, 4, 8)),
        *(File("gptq", 4, group) for group in (32, 64)),
        File("awq", 4, 128),
        File("awq", 4, 128, symmetric=False),
    ),
    "llmcompressor": tuple(File("compressed-tensors", bits, 128) for bits in (2, 3, 4, 5, 6, 8)),
}


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] in FILES:
        load(*sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--loaders", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--venvs", type=Path, default=Path(".benchmark-venvs"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in options.loaders:
        for row in rows(name, options.venvs):
            print(json.dumps(row), file=sys.stderr, flush=True)
            found.append(row)
            if options.out is not None:
                text = json.dumps({"loads": found}, indent=1) + "\n"
                options.out.write_text(text, encoding="utf-8")
    print(json.dumps(found, indent=1))
    if any("failed" in row for row in found):
        raise SystemExit(1)


def rows(loader: str, venvs: Path) -> Iterator[dict[str, Any]]:
    """What became of each of a loader's files."""
    from quantize import peer_versions, python_of_package

    python = python_of_package(loader, venvs)
    if python is None:
        raise SystemExit(f"{loader} could not be installed under {venvs}")
    version = peer_versions(venvs).get(loader, "unknown")
    for file in FILES[loader]:
        about = {"loader": loader, "version": version, **file._asdict()}
        yield {**about, **loaded(python, loader, file)}


def loaded(python: str, loader: str, file: File) -> dict[str, Any]:
    """One file, written here, run there and compared."""
    import torch

    from qtool.api import quantize
    from qtool.recipe import load_recipe

    with tempfile.TemporaryDirectory(prefix="qtool-loads-") as name:
        folder = Path(name)
        recipe = load_recipe("rtn-int4").with_options(bits=file.bits, group_size=file.group_size)
        recipe = dataclasses.replace(recipe, symmetric=file.symmetric)
        quantize(MODEL, recipe, format=file.format, out=folder / "artifact")
        tokens = torch.randint(4096, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
        torch.save(tokens, folder / "tokens.pt")
        arguments = [loader, "artifact", "tokens.pt", "logits.pt"]
        done = subprocess.run(
            [python, str(Path(__file__).resolve()), *arguments],
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
        theirs = torch.load(folder / "logits.pt").float()
        expected = decoded_logits(folder / "artifact", tokens)
        difference = float((theirs - expected).abs().max() / expected.abs().max())
        row: dict[str, Any] = {"difference": round(difference, 6)}
        if difference > TOLERANCE:
            row["failed"] = f"its logits are not those of the file's weights within {TOLERANCE}"
        return row


def decoded_logits(artifact: Path, tokens: Any) -> Any:
    """transformers' code in float32, with the weights as this tool decodes them."""
    import torch
    from transformers import AutoModelForCausalLM

    from qtool.convert.formats import open_weights
    from qtool.source import Source, resolve

    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL).path, dtype=torch.float32).eval()
    reader = open_weights(Source("artifact", artifact))
    state = model.state_dict()
    with torch.no_grad():
        for module in reader.modules():
            state[f"{module}.weight"].copy_(reader.weight(module).dequantize())
        logits: torch.Tensor = model(tokens).logits
    return logits


def load(loader: str, artifact: str, tokens: str, logits: str) -> None:
    """In the loader's own environment."""
    import torch

    model: Any
    if loader == "gptqmodel":
        # It refuses to start where it would make itself fewer than two.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(artifact, device="cpu", backend=BACKEND.TORCH).model
    else:
        import llmcompressor  # noqa: F401
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    with torch.no_grad():
        torch.save(model.eval()(input_ids=torch.load(tokens)).logits, logits)


if __name__ == "__main__":
    main()
