"""Quantizers on the same calibration tokens, by KL divergence on text that none of them saw.

    python benchmarks/quantize.py --bits 4 3 2 --seeds 0 1 2 --out quantize.json
    python benchmarks/quantize.py --bits 3 --methods gptq default llm-compressor
    python benchmarks/quantize.py --outliers --bits 4

Methods of this tool are `rtn`, `gptq` (as the paper has it), and `fast`, `default`, `best`, the
efforts of int4. Peers are llm-compressor's GPTQ (and with its imatrix_mse observer), GPTQModel and
AutoRound; each runs in a virtual environment of its own under --venvs, which is made when it is
missing and in which pip installs it. One that cannot be installed is reported as not run.

Every method is one process with one thread: weights are symmetric in groups of 128, the calibration
tokens are the same tensor, and seconds, CPU seconds and peak memory are the process's own, imports
and writing with them. `ratio` is the divergence over llm-compressor's. With --outliers the model is
first rewritten so that a few channels of every norm's output are 32 times as loud and the columns
after them as much smaller: the same function, with activations like a large model's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OURS = ("rtn", "gptq", "fast", "default", "best")
# What pip installs, and what of the peer's is run.
PEERS: dict[str, tuple[str, ...]] = {
    "llm-compressor": ("llmcompressor",),
    "llm-compressor-imatrix": ("llmcompressor",),
    "gptqmodel": ("gptqmodel",),
    "auto-round": ("auto-round",),
    "auto-round-light": ("auto-round",),
}
BASELINE = "llm-compressor"
GROUP_SIZE = 128
OUTLIER_FACTOR = 32.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="builtin:books-7m")
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--venvs", type=Path, default=Path(".benchmark-venvs"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=4, metavar=("METHOD", "MODEL", "TOKENS", "TARGET"))
    options = parser.parse_args()
    if options.child:
        method, model, tokens, target = options.child
        run_child(method, model, tokens, target, options.bits[0])
        return
    results = compare(options)
    text = json.dumps(results, indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    from qtool.artifact import tool_versions
    from qtool.source import resolve

    pythons = {name: python_of(name, options.venvs) for name in options.methods}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qtool-benchmark-") as name:
        folder = Path(name)
        model = resolve(options.model).path
        if options.outliers:
            model = with_outliers(model, folder / "outliers")
        divergence = Divergence(model, options.windows, options.sequence_length)
        for seed in options.seeds:
            tokens = folder / f"tokens-{seed}.pt"
            save_tokens(model, tokens, options, seed)
            for bits in options.bits:
                for method in options.methods:
                    row: dict[str, Any] = {"method": method, "bits": bits, "seed": seed}
                    python = pythons[method]
                    if python is None:
                        rows.append({**row, "not_run": "could not be installed"})
                        continue
                    target = folder / f"{method}-{bits}-{seed}"
                    row |= measured(python, method, model, tokens, target, bits)
                    if "not_run" not in row:
                        row["bytes"] = sum(p.stat().st_size for p in target.rglob("*.safetensors"))
                        row["kld"] = divergence.of(target)
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    rows.append(row)
    return {
        "model": options.model,
        "outliers": options.outliers,
        "calibration": [options.num_samples, options.sequence_length],
        "held_out_tokens": options.windows * options.sequence_length,
        "versions": tool_versions(),
        "processor": processor(),
        "runs": rows,
        "means": means(rows),
    }


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds, with the ratio to the baseline's mean."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "kld" in row:
            found.setdefault((row["bits"], row["method"]), []).append(row)
    table = []
    for (bits, method), group in found.items():
        mean = {
            key: sum(row[key] for row in group) / len(group)
            for key in ("kld", "bytes", "seconds", "cpu_seconds", "peak_rss")
        }
        base = found.get((bits, BASELINE))
        ratio = None
        if base is not None:
            ratio = mean["kld"] / (sum(row["kld"] for row in base) / len(base))
        table.append({"bits": bits, "method": method, "seeds": len(group), **mean, "ratio": ratio})
    return table


def measured(
    python: str, method: str, model: Path, tokens: Path, target: Path, bits: int
) -> dict[str, Any]:
    """Run one method as a process and take its resources."""
    child = [method, str(model), str(tokens), str(target)]
    command = [python, __file__, "--bits", str(bits), "--child", *child]
    log = target.with_suffix(".log")
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
    }


def python_of(method: str, venvs: Path) -> str | None:
    """The interpreter that a method runs in; None where its peer cannot be installed."""
    if method in OURS:
        return sys.executable
    packages = PEERS[method]
    folder = venvs.resolve() / packages[0]
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        module = packages[0].replace("-", "_")
        subprocess.run([python, "-c", f"import {module}"], check=True, capture_output=True)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"{method}: {error}", file=sys.stderr)
        return None
    return str(python)


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
    import shutil

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


def run_child(method: str, model: str, tokens: str, target: str, bits: int) -> None:
    """One quantization in this process."""
    import torch

    torch.set_num_threads(1)
    if method in OURS:
        run_ours(method, model, tokens, target, bits)
    elif method.startswith("llm-compressor"):
        run_llm_compressor(method, model, torch.load(tokens), target, bits)
    elif method == "gptqmodel":
        run_gptqmodel(model, torch.load(tokens), target, bits)
    else:
        run_auto_round(method, model, torch.load(tokens), target, bits)


def run_ours(method: str, model: str, tokens: str, target: str, bits: int) -> None:
    """The tokens are drawn again by their seed: the same tensor, and the time it takes counts."""
    import torch

    from qtool.quantize.pipeline import quantize_model
    from qtool.recipe import load_recipe

    shape = torch.load(tokens).shape
    seed = int(Path(tokens).stem.rpartition("-")[2])
    name = {"rtn": "rtn-int4", "gptq": "gptq"}.get(method, "int4")
    recipe = load_recipe(name).with_options(
        effort=method if name == "int4" else None,
        bits=bits,
        group_size=GROUP_SIZE,
        num_samples=shape[0],
        sequence_length=shape[1],
        seed=seed,
    )
    quantize_model(model, recipe, out=target)


def run_llm_compressor(method: str, model: str, tokens: Any, target: str, bits: int) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP_SIZE,
    }
    if method.endswith("imatrix"):
        weights["observer"] = "imatrix_mse"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict(rows),
        recipe=[GPTQModifier(ignore=["lm_head"], config_groups=groups)],
        num_calibration_samples=tokens.shape[0],
        max_seq_length=tokens.shape[1],
    )
    loaded.save_pretrained(target, save_compressed=True)


def run_gptqmodel(model: str, tokens: Any, target: str, bits: int) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=True, desc_act=False)
    loaded = GPTQModel.load(model, config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    loaded.quantize(rows, batch_size=8)
    loaded.save(target)


def run_auto_round(method: str, model: str, tokens: Any, target: str, bits: int) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(model),
        bits=bits,
        group_size=GROUP_SIZE,
        sym=True,
        iters=50 if method.endswith("light") else 200,
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": row.unsqueeze(0)} for row in tokens],
        enable_torch_compile=False,
        device_map="cpu",
    ).quantize_and_save(target, format="auto_gptq")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


if __name__ == "__main__":
    main()
