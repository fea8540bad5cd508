"""Quantizers on the same calibration tokens, by KL divergence on text that none of them saw.

    python benchmarks/quantize.py --bits 4 3 2 --seeds 0 1 2 --out quantize.json
    python benchmarks/quantize.py --bits 3 --methods gptq default llm-compressor
    python benchmarks/quantize.py --outliers --bits 4
    python benchmarks/quantize.py --layers 8 48 --methods default llm-compressor --bits 4

Methods of this tool are `rtn`, `gptq` (as the paper has it), and `fast`, `default`, `best`, the
efforts of int4. Peers are those of quantize_child.py; each runs in a virtual environment of its own
under --venvs, which is made when it is missing and in which pip installs it, beside the same torch
as here. One that cannot be installed is reported as not run.

Every method is one process with one thread: weights are symmetric in groups of 128, the calibration
tokens are the same tensor, and seconds, CPU seconds and peak memory are the process's own, imports
and writing with them. On a machine that others use, CPU seconds are the figure to read, beside the
load that each run names. `ratio` is the divergence over llm-compressor's; a peer's row says which
efforts of this tool lose less than it, and which of these in no more CPU time.

With --outliers the model is first rewritten so that a few channels of every norm's output are 32
times as loud and the columns after them as much smaller: the same function, with activations like a
large model's. With --layers the model is one of Qwen2.5-0.5B's shapes and that many layers, of
random weights: only time and memory are measured. Rows that --out holds already are kept, and not
run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# PYTHONSAFEPATH leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))
from quantize_child import OURS, PEERS

CHILD = Path(__file__).with_name("quantize_child.py")
BASELINE = "llm-compressor"
OUTLIER_FACTOR = 32.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
# What makes two runs the same run.
KEY = ("model", "method", "bits", "seed")
# Qwen2.5-0.5B, but for its number of layers.
SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="builtin:books-7m")
    parser.add_argument("--methods", nargs="+", default=["rtn", "default", "best", *PEERS])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--layers", nargs="+", type=int, help="a 0.5B-shaped model of so many")
    parser.add_argument("--venvs", type=Path, default=Path(".benchmark-venvs"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = compare(options)
    print(json.dumps(results["means"], indent=2))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All runs that were asked for, and those of the file."""
    pythons = {name: python_of(name, options.venvs) for name in options.methods}
    results: dict[str, Any] = {"runs": []}
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    runs: list[dict[str, Any]] = results["runs"]
    with tempfile.TemporaryDirectory(prefix="qtool-benchmark-") as name:
        folder = Path(name)
        for label, model in models(options, folder):
            divergence = None
            if not options.layers:
                divergence = Divergence(model, options.windows, options.sequence_length)
            for seed in options.seeds:
                tokens = folder / f"tokens-{seed}.pt"
                save_tokens(model, tokens, options, seed)
                for bits in options.bits:
                    for method in options.methods:
                        row = {"model": label, "method": method, "bits": bits, "seed": seed}
                        if any(all(old[key] == row[key] for key in KEY) for old in runs):
                            continue
                        target = folder / "out"
                        row |= measured(pythons[method], method, model, tokens, target, bits)
                        if "not_run" not in row:
                            files = target.rglob("*.safetensors")
                            row["bytes"] = sum(path.stat().st_size for path in files)
                            if divergence is not None:
                                row["kld"] = divergence.of(target)
                        shutil.rmtree(target, ignore_errors=True)
                        print(json.dumps(row), file=sys.stderr, flush=True)
                        runs.append(row)
                        save(options, results)
    results["means"] = means(runs)
    return results


def save(options: argparse.Namespace, results: dict[str, Any]) -> None:
    from qtool.artifact import tool_versions

    if options.out is None:
        return
    about = {
        "calibration": [options.num_samples, options.sequence_length],
        "held_out_tokens": options.windows * options.sequence_length,
        "processor": processor(),
        "versions": {**tool_versions(), **peer_versions(options.venvs)},
        "means": means(results["runs"]),
    }
    text = json.dumps({**about, "runs": results["runs"]}, indent=1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")


def models(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """Each model by the name it has in the results."""
    from qtool.source import resolve

    given = resolve(options.model).path
    if options.layers:
        for layers in options.layers:
            target = folder / "model"
            yield f"0.5b-shaped, {layers} layers", of_shape(given, target, layers)
            shutil.rmtree(target)
    elif options.outliers:
        yield f"{options.model} with outliers", with_outliers(given, folder / "outliers")
    else:
        yield options.model, given


def of_shape(given: Path, target: Path, layers: int) -> Path:
    """A model of random weights on disk, with the tokenizer of `given`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **SHAPE))
    model.to(torch.bfloat16).save_pretrained(target)
    for file in given.glob("tokenizer*"):
        shutil.copy(file, target)
    return target


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds, with the ratios to the baseline's means."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "not_run" not in row:
            found.setdefault((row["model"], row["bits"], row["method"]), []).append(row)
    table = []
    for (model, bits, method), group in found.items():
        base = found.get((model, bits, BASELINE), [])
        mean = averages(group)
        theirs = averages(base) if base else {}
        ratios = {
            f"{key}_ratio": round(mean[key] / theirs[key], 4)
            for key in ("kld", "cpu_seconds")
            if theirs.get(key) and key in mean
        }
        about = {"model": model, "bits": bits, "method": method, "seeds": len(group)}
        table.append({**about, **mean, **ratios})
    return [{**row, **beaten_by(row, table)} if row["method"] in PEERS else row for row in table]


def beaten_by(peer: dict[str, Any], table: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Efforts of this tool with less divergence than a peer's at as many bits, and those of them
    that took no more CPU time.
    """
    if "kld" not in peer:
        return {}
    lower = [
        row
        for row in table
        if row["method"] in OURS
        and all(row[key] == peer[key] for key in ("model", "bits"))
        and row["kld"] < peer["kld"]
    ]
    cheaper = [row for row in lower if row["cpu_seconds"] <= peer["cpu_seconds"]]
    return {
        "beaten_by": [row["method"] for row in lower],
        "in_no_more_cpu_time_by": [row["method"] for row in cheaper],
    }


def averages(rows: list[dict[str, Any]]) -> dict[str, float]:
    keys = [key for key in ("kld", "bytes", "cpu_seconds", "peak_rss") if key in rows[0]]
    return {key: round(sum(row[key] for row in rows) / len(rows), 6) for key in keys}


def measured(
    python: str | None, method: str, model: Path, tokens: Path, target: Path, bits: int
) -> dict[str, Any]:
    """Run one method as a process and take its resources."""
    if python is None:
        return {"not_run": "could not be installed"}
    command = [python, str(CHILD), method, str(model), str(tokens), str(target), str(bits)]
    log = target.with_suffix(".log")
    load = os.getloadavg()[0]
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"not_run": lines[-1][:300] if lines else f"exit code {process.returncode}"}
    return {
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss": usage.ru_maxrss * 1024,
        "load": round(load, 1),
    }


def python_of(method: str, venvs: Path) -> str | None:
    """The interpreter that a method runs in; None where its peer cannot be installed."""
    return sys.executable if method in OURS else python_of_package(PEERS[method], venvs)


def python_of_package(package: str, venvs: Path) -> str | None:
    """The interpreter of a package's own environment, which is made where it is missing."""
    import torch

    folder = venvs.resolve() / package
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            wanted = [f"torch=={torch.__version__}", package]
            subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
        module = package.replace("-", "_")
        subprocess.run([python, "-c", f"import {module}"], check=True, capture_output=True)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"{package}: {error}", file=sys.stderr)
        return None
    return str(python)


def peer_versions(venvs: Path) -> dict[str, str]:
    """What pip put there."""
    found = {}
    for package in dict.fromkeys(PEERS.values()):
        name = package.replace("-", "_")
        for path in venvs.glob(f"{package}/lib/python*/site-packages/{name}-*.dist-info"):
            found[package] = path.name.removesuffix(".dist-info").rpartition("-")[2]
    return found


def save_tokens(model: Path, path: Path, options: argparse.Namespace, seed: int) -> None:
    import torch

    from qtool.calibration.dataset import load_calibration, load_tokenizer
    from qtool.json_files import read_json
    from qtool.recipe import Calibration

    wanted = Calibration(None, options.num_samples, options.sequence_length, seed)
    vocabulary = read_json(model / "config.json")["vocab_size"]
    found = load_calibration(wanted, load_tokenizer(model), vocab_size=vocabulary)
    torch.save(found.tokens, path)


def with_outliers(model: Path, target: Path) -> Path:
    """A copy with loud channels: powers of two, so that nothing is rounded on the way."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    pairs = {
        "input_layernorm": [f"self_attn.{leaf}_proj" for leaf in "qkv"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    }
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        prefix, _, norm = name.removesuffix(".weight").rpartition(".")
        width = tensors[name].shape[0]
        generator = torch.Generator().manual_seed(width + len(name))
        loud = torch.randperm(width, generator=generator)[: max(1, width // 64)]
        tensors[name][loud] *= OUTLIER_FACTOR
        for linear in pairs[norm]:
            tensors[f"{prefix}.{linear}.weight"][:, loud] /= OUTLIER_FACTOR
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


class Divergence:
    """Mean KL divergence from a model over held-out windows, nats a token."""

    def __init__(self, model: Path, windows: int, length: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from qtool.builtin import evaluation_text
        from qtool.calibration.dataset import load_tokenizer

        tokenizer = load_tokenizer(model)
        ids = tokenizer(evaluation_text().read_text(encoding="utf-8"))["input_ids"]
        if len(ids) < windows * length:
            raise SystemExit(f"the evaluation text has {len(ids)} tokens, fewer than asked for")
        self._tokens = torch.tensor(ids[: windows * length]).view(windows, length)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._original = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._reference = self._predictions()

    def of(self, artifact: Path) -> float:
        import torch

        from qtool.convert.formats import open_weights
        from qtool.source import Source

        folder = next(iter(artifact.rglob("config.json"))).parent
        reader = open_weights(Source(folder.name, folder))
        state = self._model.state_dict()
        with torch.no_grad():
            for name, value in self._original.items():
                state[name].copy_(value)
            for module in reader.modules():
                state[f"{module}.weight"].copy_(reader.weight(module).dequantize())
            for name in reader.tensor_names():
                if name in state:
                    state[name].copy_(reader.tensor(name))
            total = 0.0
            for batch, reference in zip(self._tokens.split(4), self._reference, strict=True):
                ours = self._model(batch).logits.log_softmax(-1)
                known = reference.float()
                total += float((known.exp() * (known - ours)).double().sum())
        return total / self._tokens.numel()

    def _predictions(self) -> list[Any]:
        import torch

        with torch.no_grad():
            return [self._model(batch).logits.log_softmax(-1) for batch in self._tokens.split(4)]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


if __name__ == "__main__":
    main()
