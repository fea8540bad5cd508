"""`qtool eval` beside llama-perplexity: the same numbers on the same files, and the time it takes.

    python benchmarks/evaluate.py --out FILE.json
    python benchmarks/evaluate.py --llama-python PATH --llama-perplexity PATH --out FILE.json

numbers   the bundled model as GGUF, each type against the F32 file, over the same windows of 512
          tokens: perplexity and mean KL divergence of both programs. Both round the inputs of
          packed layers to 8 bits, so three times: as that program does (--activations llama.cpp),
          which is what must agree; as qtool serves, by scales of 32 inputs where K-quants have 256
          there; and of the weights alone, for which llama.cpp runs the type's values as an F32 file
logits    llama.cpp's own logits of the first of these files, and its file of the original's
          predictions, through our arithmetic: every line of the block that llama-perplexity prints
speed     a model of Qwen2.5-0.5B's shape in Q4_0: whole processes, from the start to the printed
          perplexity. They take turns; what counts is the least of each, by CPU time and by wall

Where they are not named, peers.py builds them.
`ratio` is the peer's time by ours: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtool.builtin import builtin_model, evaluation_text
from qtool.convert.run import convert_model
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.evaluate.divergence import Divergence, TokenDivergence, join, summarize
from qtool.runtime.evaluate.stored import LlamaCppLogits
from qtool.runtime.random_model import QWEN_05B, RandomReader

# PYTHONSAFEPATH leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))
from llama_perplexity import WINDOW, Cost, Peer, Printed, run
from peers import build_llama_cpp, find_library

PARTS = ("numbers", "speed")
MODEL = "builtin:books-7m"
TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
AS_SERVED = "8 bits, as served"
# What this project holds itself to.
MOST_PERPLEXITY, MOST_KLD, STANDARD_ERRORS = 0.005, 0.05, 2.0
# The attention whose sums are those of separate operations, in the program and in the package.
PLAIN = ("-fa", "off")

# The rows that llama-perplexity scores, as it computes them: windows one by one, logits of the
# second half.
LOGITS = """
import sys
import llama_cpp, numpy
model, base, out, threads = sys.argv[1:]
raw = open(base, "rb")
assert raw.read(8) == b"_logits_"
window, vocab, count = numpy.fromfile(raw, "<i4", 3)
tokens = numpy.fromfile(raw, "<i4", count * window).reshape(count, window)
llm = llama_cpp.Llama(model, n_ctx=int(window), n_batch=int(window), n_ubatch=512,
                      n_threads=int(threads), n_threads_batch=int(threads), logits_all=True,
                      verbose=False, flash_attn=False)
bos = llm.token_bos() if llama_cpp.llama_vocab_get_add_bos(llm._model.vocab) else None
half = int(window) // 2
shape = (int(count), int(window) - 1 - half, int(vocab))
rows = numpy.lib.format.open_memmap(out, "w+", "float32", shape)
for number, row in enumerate(tokens):
    row = row.tolist()
    if bos is not None:
        row[0] = bos
    llm.reset()
    llm.eval(row)
    rows[number] = llm.scores[half : int(window) - 1]
rows.flush()
print(llama_cpp.__version__)
"""

# Line of llama-perplexity's block -> the number of ours; percentages are fractions here.
BLOCK = {
    "Mean PPL(Q)": lambda d: d.perplexity,
    "Mean PPL(base)": lambda d: d.reference_perplexity,
    "Cor(ln(PPL(Q)), ln(PPL(base)))": lambda d: 100 * d.ln_perplexity_correlation,
    "Mean ln(PPL(Q)/PPL(base))": lambda d: d.ln_perplexity_ratio,
    "Mean PPL(Q)/PPL(base)": lambda d: d.perplexity_ratio,
    "Mean PPL(Q)-PPL(base)": lambda d: d.perplexity_difference,
    "Mean    KLD": lambda d: d.kld,
    "Maximum KLD": lambda d: d.kld_max,
    "Median  KLD": lambda d: d.kld_percentiles[50.0],
    "Minimum KLD": lambda d: d.kld_min,
    "Mean    Δp": lambda d: _percent(d.delta_p),
    "Maximum Δp": lambda d: 100 * d.delta_p_max,
    "Median  Δp": lambda d: 100 * d.delta_p_percentiles[50.0],
    "Minimum Δp": lambda d: 100 * d.delta_p_min,
    "RMS Δp": lambda d: _percent(d.delta_p_rms),
    "Same top p": lambda d: _percent(d.same_top),
}
PERCENTILE = re.compile(r"^([\d.]+)% +(KLD|Δp)$")


def find_peer(options: argparse.Namespace) -> Peer:
    if options.llama_python is None or options.llama_perplexity is None:
        built = build_llama_cpp()
        return Peer(built.program, built.python, built.library)
    return Peer(options.llama_perplexity, options.llama_python, find_library(options.llama_python))


def evaluate(model: Path, threads: int, out: Path, *more: str) -> Cost:
    words = ("eval", str(model), "--no-papers", "--no-speed", "--device", "cpu", "--force")
    command = [sys.executable, "-m", "qtool", *words, "--out", str(out), *more]
    return run(command, threads)


# -- numbers --------------------------------------------------------------------------------------


def compare_numbers(
    peer: Peer, folder: Path, scratch: Path, windows: int, threads: int
) -> dict[str, Any]:
    """folder: of models, which may be kept and shared; scratch: this run's own."""
    text = evaluation_text()
    base, predictions = folder / "F32.gguf", scratch / "base.kld"
    convert(base, "F32")
    peer.perplexity(base, text, windows, threads, "--kl-divergence-base", str(predictions), *PLAIN)
    rows = []
    for name in TYPES:
        packed, plain = folder / f"{name}.gguf", folder / f"{name}-F32.gguf"
        convert(packed, name)
        if not plain.exists():
            convert_model(str(packed), to="gguf", type="F32", out=plain)
        theirs_of = {
            model: peer.divergence(model, text, windows, threads, predictions, *PLAIN)
            for model in (packed, plain)
        }
        for model, inputs, activations in (
            (packed, "8 bits, as llama.cpp", "llama.cpp"),
            (packed, AS_SERVED, "int8"),
            (plain, "as they are", "bf16"),
        ):
            theirs = theirs_of[model]
            more = ("--max-tokens", str(windows * WINDOW), "--activations", activations)
            evaluate(packed, threads, scratch / "report", "--against", str(base), *more)
            report = json.loads((scratch / "report" / "report.json").read_text(encoding="utf-8"))
            ours = report["models"][0]["divergence"]
            rows.append({"type": name, "inputs": inputs, **_number_row(ours, theirs)})
    return {
        "windows": windows,
        "types": rows,
        "same_logits": compare_blocks(peer, folder / f"{TYPES[0]}.gguf", predictions, threads),
    }


def _number_row(ours: dict[str, Any], theirs: dict[str, Printed]) -> dict[str, Any]:
    perplexity, kld = theirs["Mean PPL(Q)"].numbers[0], theirs["Mean    KLD"].numbers
    away = abs(ours["kld"]["value"] - kld[0])
    error = max(ours["kld"]["error"], kld[1])
    row = {
        "perplexity": ours["perplexity"]["value"],
        "llama_cpp_perplexity": perplexity,
        "perplexity_relative": ours["perplexity"]["value"] / perplexity - 1,
        "kld": ours["kld"]["value"],
        "llama_cpp_kld": kld[0],
        "kld_relative": ours["kld"]["value"] / kld[0] - 1,
        "kld_standard_errors": away / error,
    }
    row["holds"] = abs(row["perplexity_relative"]) <= MOST_PERPLEXITY and (
        abs(row["kld_relative"]) <= MOST_KLD or row["kld_standard_errors"] <= STANDARD_ERRORS
    )
    return row


def convert(path: Path, type: str) -> None:
    if not path.exists():
        convert_model(MODEL, to="gguf", type=type, out=path)


def compare_blocks(peer: Peer, packed: Path, predictions: Path, threads: int) -> dict[str, Any]:
    """Line by line, the block that they print and ours of their logits."""
    logits = predictions.with_name("logits.npy")
    command = [peer.python, "-c", LOGITS, str(packed), str(predictions), str(logits), str(threads)]
    version = run(command, threads, peer.library).text.strip().splitlines()[-1]
    stored = LlamaCppLogits(predictions)
    rows = np.load(logits, mmap_mode="r")
    half = stored.window // 2
    parts: list[TokenDivergence] = []
    for number, window in enumerate(rows):
        targets = stored.tokens.view(-1, stored.window)[number, half + 1 :]
        parts.append(stored.compare(number, 0, torch.from_numpy(window.copy()), targets))
    ours = summarize(join(parts))
    printed = peer.divergence(packed, evaluation_text(), len(rows), threads, predictions, *PLAIN)
    lines = []
    for line, (numbers, digits) in printed.items():
        found = our_line(line, ours)
        if found is None:
            continue
        # Half a unit of the last digit is what printing rounds away.
        unit = 10.0**-digits
        apart = max(abs(a - b) for a, b in zip(found, numbers, strict=True)) / unit
        lines.append({"line": line, "ours": found, "printed": numbers, "last_digits": apart})
    unequal = [line["line"] for line in lines if line["last_digits"] > 0.5 + 1e-6]
    return {"type": packed.stem, "llama_cpp_python": version, "lines": lines, "unequal": unequal}


def _percent(estimate: Any) -> tuple[float, float]:
    return 100 * estimate.value, 100 * estimate.error


def our_line(line: str, ours: Divergence) -> list[float] | None:
    if line in BLOCK:
        value = BLOCK[line](ours)
        return [float(part) for part in (value if isinstance(value, tuple) else (value,))]
    match = PERCENTILE.match(line)
    if match is None:
        return None
    percentiles, scale = (
        (ours.kld_percentiles, 1.0) if match[2] == "KLD" else (ours.delta_p_percentiles, 100.0)
    )
    return [scale * percentiles[float(match[1])]]


# -- speed ----------------------------------------------------------------------------------------


def make_model(folder: Path) -> Path:
    """Random weights of the real shape; the bundled model's tokenizer, whose tokens are in it."""
    packed = folder / "qwen2.5-0.5b-random-q4_0.gguf"
    if not packed.exists():
        from safetensors.torch import save_file

        plain = folder / "plain"
        plain.mkdir(parents=True, exist_ok=True)
        reader = RandomReader(QWEN_05B, None, 0)
        tensors = {name: reader.tensor(name) for name in reader.tensor_names()}
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        (plain / "config.json").write_text(json.dumps(dict(QWEN_05B)), encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (plain / name).write_bytes((builtin_model("books-7m") / name).read_bytes())
        convert_model(str(plain), to="gguf", type="Q4_0", out=packed)
    return packed


def compare_speed(
    peer: Peer, folder: Path, scratch: Path, windows: int, threads: int, rounds: int
) -> dict[str, Any]:
    model = make_model(folder)
    limit = ("--max-tokens", str(windows * WINDOW))
    costs: dict[str, list[Cost]] = {"qtool": [], "llama-perplexity": []}
    for turn in range(rounds):
        costs["qtool"].append(evaluate(model, threads, scratch / "speed", *limit))
        costs["llama-perplexity"].append(
            peer.perplexity(model, evaluation_text(), windows, threads)
        )
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    report = json.loads((scratch / "speed" / "report.json").read_text(encoding="utf-8"))
    said = re.search(r"Final estimate: PPL = ([\d.]+)", costs["llama-perplexity"][0].text)
    least = {
        name: {
            "cpu_seconds": min(cost.cpu_seconds for cost in found),
            "wall_seconds": min(cost.wall_seconds for cost in found),
        }
        for name, found in costs.items()
    }
    ours, theirs = least["qtool"], least["llama-perplexity"]
    built = re.search(r"system_info: (.*)", costs["llama-perplexity"][0].text)
    return {
        "model": "Qwen2.5-0.5B's shape, random weights, Q4_0",
        "tokens": windows * WINDOW,
        "threads": threads,
        "rounds": rounds,
        **least,
        "ratio": {name: theirs[name] / ours[name] for name in ours},
        "perplexity": report["models"][0]["perplexity"][0]["value"],
        "llama_cpp_perplexity": float(said[1]) if said else None,
        "llama_cpp_built_with": built[1].strip() if built else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama-python", help="has llama_cpp")
    parser.add_argument("--llama-perplexity", type=Path, help="the program")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, for the numbers")
    parser.add_argument("--speed-windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", type=Path, help="folder for models; kept")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="of the other, --out keeps its own"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    peer = find_peer(options)
    facts = kept(options.out, options.parts)

    def save() -> None:
        if options.out is not None:
            versions = {"llama_cpp_python": facts["numbers"]["same_logits"]["llama_cpp_python"]}
            write_result(options.out, facts, load_before=load_before, versions=versions)

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = options.models or scratch / "models"
        folder.mkdir(parents=True, exist_ok=True)
        if "numbers" in options.parts:
            facts["numbers"] = compare_numbers(
                peer, folder, scratch, options.windows, options.threads[0]
            )
            show_numbers(facts["numbers"])
            save()
        if "speed" in options.parts:
            facts["speed"] = []
            for threads in options.threads:
                found = compare_speed(
                    peer, folder, scratch, options.speed_windows, threads, options.rounds
                )
                show_speed(found)
                facts["speed"].append(found)
                save()
    # As it serves, qtool rounds otherwise, which need not agree.
    rows = facts["numbers"]["types"]
    apart = [row for row in rows if row["inputs"] != AS_SERVED and not row["holds"]]
    for row in apart:
        print(f"{row['type']}, inputs {row['inputs']}: farther apart than it may be")
    if apart:
        raise SystemExit(1)


def kept(out: Path | None, parts: Sequence[str]) -> dict[str, Any]:
    """What the file has of the parts that are not measured now, with when and how it was."""
    left = [name for name in PARTS if name not in parts]
    if not left:
        return {}
    if out is None or not out.is_file():
        raise SystemExit(f"--parts {' '.join(parts)}: --out names no file that has the others")
    before = json.loads(out.read_text(encoding="utf-8"))
    how = {name: before[name] for name in ("command", "date", "load_average")}
    found = {name: before["kept"][name] for name in left if name in before.get("kept", {})}
    return {
        "kept": {name: found.get(name, how) for name in left},
        **{name: before[name] for name in left},
    }


def show_numbers(numbers: dict[str, Any]) -> None:
    for row in numbers["types"]:
        print(
            f"{row['type']:7} inputs {row['inputs']:20} perplexity {row['perplexity']:9.4f}, "
            f"llama.cpp {row['llama_cpp_perplexity']:9.4f} "
            f"({100 * row['perplexity_relative']:+.3f} %); "
            f"KLD {row['kld']:.6f}, {row['llama_cpp_kld']:.6f} ({100 * row['kld_relative']:+.2f} "
            f"%, {row['kld_standard_errors']:.2f} standard errors)"
        )
    same = numbers["same_logits"]
    equal = len(same["lines"]) - len(same["unequal"])
    print(f"same logits: {equal} of {len(same['lines'])} lines equal to the last printed digit")
    for name in same["unequal"]:
        line = next(line for line in same["lines"] if line["line"] == name)
        print(f"  {name}: {line['ours']}, printed {line['printed']}")


def show_speed(speed: dict[str, Any]) -> None:
    for name in ("qtool", "llama-perplexity"):
        cost = speed[name]
        print(
            f"{speed['tokens']} tokens, {speed['threads']} thread(s), {name:16} "
            f"{cost['cpu_seconds']:6.1f} s CPU, {cost['wall_seconds']:6.1f} s"
        )
    ratio = speed["ratio"]
    print(f"ratio: {ratio['cpu_seconds']:.2f} by CPU time, {ratio['wall_seconds']:.2f} by wall")


if __name__ == "__main__":
    main()
