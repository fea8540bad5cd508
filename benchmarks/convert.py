"""A Hugging Face checkpoint to Q4_K_M: one step here, two in llama.cpp, in one run.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python
    tar xf llama_cpp_python-*.tar.gz
    python benchmarks/convert.py --llama-cpp llama_cpp_python-*/vendor/llama.cpp --json convert.json

The model has the shape of Qwen2.5-0.5B and random bfloat16 weights; its tokenizer is that of
--tokenizer: a folder, a Hub id, or a GGUF file, from which it is rebuilt. The peer is

    convert     convert_hf_to_gguf.py of the checkout --llama-cpp, to bfloat16
    quantize    llama-quantize, by --llama-quantize or from the path, else the same function in the
                package llama-cpp-python

both run by --llama-python, which has what they need (requirements/ of that checkout). A peer that
is not there is said to be absent, and nothing is compared with it. Of each step:

    CPU seconds     user and system time of the process and of all that it started
    wall seconds
    peak RSS        of its largest process, as the kernel counts it: pages of mapped files too
    peak disk       the most that the folder of its output held, sampled; a step's input counts
                    where an earlier step made it. The checkpoint itself is not counted.

Compiled quantizers are built before, once for a machine; what that takes has a line of its own. At
the end the two files are compared: names, shapes and types of tensors, then every byte of data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SAMPLE_SECONDS = 0.02
# What this project holds itself to, as ratios to the peer; and bytes.
MOST_CPU, MOST_DISK, MOST_RSS = 1.0, 1 / 3, 1e9

# The function that the program llama-quantize calls, with its threads.
QUANTIZE_BY_PACKAGE = """
import ctypes, sys
import llama_cpp
source, out, type, threads = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type}")
parameters.nthread = int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))
"""


@dataclass(frozen=True, slots=True)
class Step:
    """What one process cost."""

    name: str
    cpu_seconds: float
    wall_seconds: float
    peak_rss_bytes: int
    peak_disk_bytes: int


@dataclass(frozen=True, slots=True)
class Total:
    """Steps that run one after another."""

    steps: tuple[Step, ...]
    out: Path

    def facts(self) -> dict[str, Any]:
        return {
            "cpu_seconds": round(sum(step.cpu_seconds for step in self.steps), 2),
            "wall_seconds": round(sum(step.wall_seconds for step in self.steps), 2),
            "peak_rss_bytes": max(step.peak_rss_bytes for step in self.steps),
            "peak_disk_bytes": max(step.peak_disk_bytes for step in self.steps),
            "out_bytes": self.out.stat().st_size,
            "steps": [asdict(step) for step in self.steps],
        }


# -- the model ------------------------------------------------------------------------------------


def make_model(folder: Path, tokenizer: str) -> None:
    """Runs in a process of its own: what a process has held counts in its children's peak RSS."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    write_tokenizer(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    narrow = hidden * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    linears = {
        **{"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)},
        **{"self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden)},
        **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)},
        "mlp.down_proj": (hidden, inner),
    }

    def normal(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(CONFIG["vocab_size"], hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in linears.items():
            tensors[f"{at}{name}.weight"] = normal(*shape)
            if name[10:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{at}{name}.bias"] = normal(shape[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = 1 + normal(hidden)
    tensors["model.norm.weight"] = 1 + normal(hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, tokenizer: str) -> None:
    path = Path(tokenizer)
    if path.is_dir():
        for name in TOKENIZER_FILES:
            shutil.copyfile(path / name, folder / name)
    elif path.is_file():
        from qtool.convert.gguf.container import GgufFile
        from qtool.convert.gguf.vocab import tokenizer_from_gguf

        found = tokenizer_from_gguf(GgufFile.open(path).metadata)
        found.tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": found.token("eos")}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    else:
        from huggingface_hub import hf_hub_download

        for name in TOKENIZER_FILES:
            shutil.copyfile(hf_hub_download(tokenizer, name), folder / name)


# -- measuring ------------------------------------------------------------------------------------


def bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed or removed since it was listed
            continue
    return total


class DiskWatch:
    """The most that a folder held while this was open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, bytes_in(self.folder))

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, bytes_in(self.folder))


def run(name: str, command: Sequence[str | Path], folder: Path, **environment: str) -> Step:
    """One process, to its end. Its temporary files go where the disk is watched."""
    env = {**os.environ, "TMPDIR": str(folder), **environment}
    log = folder.parent / f"{name}.log"
    began = time.monotonic()
    with log.open("wb") as output, DiskWatch(folder) as disk:
        process = subprocess.Popen(
            list(map(str, command)), env=env, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - began
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{name} failed with status {process.returncode}:\n{tail}")
    step = Step(
        name,
        round(usage.ru_utime + usage.ru_stime, 2),
        round(wall, 2),
        usage.ru_maxrss * 1024,
        disk.peak,
    )
    print(show(step), file=sys.stderr, flush=True)
    return step


def show(step: Step) -> str:
    return (
        f"{step.name:20} CPU {step.cpu_seconds:7.2f} s   wall {step.wall_seconds:7.2f} s   "
        f"RSS {step.peak_rss_bytes / 1e6:7.0f} MB   disk {step.peak_disk_bytes / 1e6:7.0f} MB"
    )


# -- the two ways ---------------------------------------------------------------------------------


def by_qtool(model: Path, folder: Path, cache: Path, options: argparse.Namespace) -> Total:
    out = folder / "model.gguf"
    command: list[str | Path] = [sys.executable, "-m", "qtool", "convert", model, "--to", "gguf"]
    command += ["--type", options.type, "--out", out]
    threads = str(options.threads)
    step = run("qtool convert", command, folder, OMP_NUM_THREADS=threads, XDG_CACHE_HOME=str(cache))
    return Total((step,), out)


def build_quantizers(cache: Path) -> tuple[Step, str]:
    """The first use on a machine, with a cache that holds nothing yet; and what came of it."""
    code = "from qtool.convert.gguf.blocks import native; print(native.backend())"
    step = run("build", [sys.executable, "-c", code], cache, XDG_CACHE_HOME=str(cache))
    return step, (cache.parent / "build.log").read_text(encoding="utf-8").splitlines()[-1]


def by_llama_cpp(model: Path, folder: Path, options: argparse.Namespace) -> Total | str:
    """What the two steps cost, or why they could not be run."""
    if options.llama_cpp is None:
        return "no checkout of llama.cpp was given (--llama-cpp)"
    script = options.llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        return f"there is no {script}"
    program = options.llama_quantize or shutil.which("llama-quantize")
    half_way, out = folder / "bf16.gguf", folder / "model.gguf"
    if program is not None:
        quantize: list[str | Path] = [program, half_way, out, options.type, str(options.threads)]
    elif has_package(options.llama_python):
        quantize = [options.llama_python, "-c", QUANTIZE_BY_PACKAGE]
        quantize += [half_way, out, options.type, str(options.threads)]
    else:
        return "neither llama-quantize nor the package llama-cpp-python is installed"
    convert = [options.llama_python, script, model, "--outtype", "bf16", "--outfile", half_way]
    threads = {"OMP_NUM_THREADS": str(options.threads), "PYTHONSAFEPATH": ""}
    steps = (
        run("convert_hf_to_gguf", convert, folder, **threads),
        run("llama-quantize", quantize, folder, **threads),
    )
    return Total(steps, out)


def has_package(python: str) -> bool:
    found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
    return found.returncode == 0


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """Whether two GGUF files hold the same tensors, and the same bytes of them."""
    from qtool.convert.gguf.container import GgufFile

    one, other = GgufFile.open(ours), GgufFile.open(theirs)

    def infos(file: GgufFile) -> list[tuple[str, tuple[int, ...], str]]:
        return [(info.name, info.shape, info.type.name) for info in file.tensors.values()]

    if infos(one) != infos(other):
        return {"same_tensors": False, "same_data": False, "tensors_unlike": None}
    unlike = [name for name in one.tensors if not one.data(name).equal(other.data(name))]
    return {"same_tensors": True, "same_data": not unlike, "tensors_unlike": unlike}


def header_seconds(path: Path) -> float:
    """Time to open a file whose vocabulary is that of the model: the best of five."""
    from qtool.convert.gguf.container import GgufFile

    samples = []
    for _ in range(5):
        began = time.process_time()
        GgufFile.open(path)
        samples.append(time.process_time() - began)
    return round(min(samples), 3)


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    keys = ("cpu_seconds", "wall_seconds", "peak_rss_bytes", "peak_disk_bytes", "out_bytes")
    found = {key.rpartition("_")[0]: round(ours[key] / theirs[key], 3) for key in keys}
    reached = (
        found["cpu"] <= MOST_CPU
        and found["peak_disk"] <= MOST_DISK
        and ours["peak_rss_bytes"] < MOST_RSS
    )
    return {**found, "reached": reached}


def peer_versions(options: argparse.Namespace) -> dict[str, str]:
    code = "import llama_cpp; print(llama_cpp.__version__)"
    found = subprocess.run(
        [options.llama_python, "-c", code], capture_output=True, text=True, check=False
    )
    return {"llama_cpp_python": found.stdout.strip() or "absent"}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    model = options.model
    if model is None:
        model = folder / "checkpoint"
        making = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(model, options.tokenizer)
        )
        making.start()
        making.join()
        if making.exitcode:
            raise SystemExit("the model could not be made")
    places = {name: folder / name / "files" for name in ("build", "qtool", "llama.cpp")}
    for place in places.values():
        place.mkdir(parents=True)
    build, quantizers = build_quantizers(places["build"])
    ours = by_qtool(model, places["qtool"], places["build"], options)
    theirs = by_llama_cpp(model, places["llama.cpp"], options)
    facts: dict[str, Any] = {"quantizers": quantizers, "build": asdict(build)}
    facts["qtool"] = ours.facts()
    if isinstance(theirs, str):
        facts["llama_cpp_absent"] = theirs
        print(f"not compared: {theirs}", file=sys.stderr)
    else:
        facts["llama_cpp"] = theirs.facts()
        facts["ratios"] = ratios(facts["qtool"], facts["llama_cpp"])
        facts |= compare(ours.out, theirs.out)
    return {**facts, "header_seconds": header_seconds(ours.out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint, in place of the random one")
    parser.add_argument("--tokenizer", default="Qwen/Qwen2.5-0.5B", help="folder, Hub id, .gguf")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--llama-cpp", type=Path, help="a checkout, for convert_hf_to_gguf.py")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--llama-quantize", type=Path, help="the program")
    parser.add_argument("--folder", type=Path, help="for all files; kept. A temporary one else")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    if importlib.util.find_spec("qtool") is None:
        raise SystemExit("qtool is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        facts = measure(options.folder or Path(temporary), options)
    facts = {"type": options.type, "threads": options.threads, **facts}
    if options.json is not None:
        # Only now: torch in this process would be in what is measured.
        from qtool.runtime.bench.conditions import write_result

        write_result(options.json, facts, load_before=load_before, versions=peer_versions(options))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
