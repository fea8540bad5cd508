"""Mutate model files, read each whole, and insist on a model or a QtoolError: a program of its own.

    python fuzz_readers.py FOLDER COUNT SEED

FOLDER holds a folder "model": a model or a tokenizer, or one file of a model or of an importance
matrix. Every mutant must be read or refused by a
QtoolError, within SECONDS, and without any one allocation that is not in proportion to its size:

    tensors       every result of a torch operation, seen by a dispatch mode
    Python        peak of tracemalloc, in every TRACED-th case
    the process   its address space may grow by GROWTH in all, so that a huge allocation fails

Prints a JSON line of counts; a mutant that breaks a rule is kept beside "model" with its number,
which reproduces it, and the exit status is 1. It runs by itself so that the limits are its own.
"""

from __future__ import annotations

import copy
import io
import json
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtool.convert.formats import WeightReader, open_weights
from qtool.convert.gguf.imatrix import read_imatrix
from qtool.convert.gguf.import_ import GgufWeights
from qtool.convert.gguf.vocab import tokenizer_from_gguf
from qtool.convert.gguf.vocab_write import tokenizer_metadata
from qtool.errors import QtoolError
from qtool.source import Source

SECONDS = 60
GROWTH = 1 << 30
TRACED = 25
VOCABULARY = 320  # rows of the embedding that a tokenizer is for
# A byte holds four codes of two bits, and a code becomes a float32, by way of an int64 in places.
TENSOR_FACTOR, PYTHON_FACTOR = 64, 200
SLACK = 1 << 18
PYTHON_SLACK = 1 << 21

Mutation = Callable[[random.Random, dict[str, bytes]], None]


class TooLarge(Exception):
    """An allocation out of proportion to the file."""


class AllocationWatch(TorchDispatchMode):
    """Raises where an operation makes a tensor of more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is nothing to compile here, and its import takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                nbytes = tensor.untyped_storage().nbytes()
                if nbytes > self.limit:
                    raise TooLarge(f"{func} made {nbytes:,} bytes, more than {self.limit:,}")
        return result


def read_everything(place: Path, name: str) -> None:
    """What a command would read: a folder, or the file `name` in it."""
    if name.startswith("imatrix."):
        read_imatrix(place / name)
    elif name.startswith("tokenizer."):
        tokenizer_metadata(place, {"vocab_size": VOCABULARY})
    else:
        path = place / name if name.endswith(".gguf") else place
        read_model(open_weights(Source("mutant", path)))


def read_model(reader: WeightReader) -> None:
    if isinstance(reader, GgufWeights):
        tokenizer_from_gguf(reader.metadata)
    for module in reader.modules():
        reader.describe(module)
        weight = reader.weight(module)
        weight.dequantize()
    for name in reader.tensor_names():
        reader.describe(name)
        reader.tensor(name)


# -- mutations ------------------------------------------------------------------------------------

HOSTILE_NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    127,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
)
HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", [], {}, [[]], [None], 0.5, -1.5, 1e308, [1, 2, 3]),
    *(2**70, -(2**70), "F16", "I32", "BF16", "F8_E4M3", "F8_E8M0", "U8", "F4", "gptq", "gptq_v2"),
    *("group", "channel", "tensor", "block", "token", "re:.*", "re:(", "re:(a|aa)+$", "Linear"),
    *("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mxfp8-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "int4-g32-sym", "int", "float", "nf4", "fp4"),
)


CONFIGS = ("config.json", "tokenizer_config.json")


def main_file(files: dict[str, bytes]) -> str:
    return next(name for name in files if name not in CONFIGS)


def cut_short(rng: random.Random, files: dict[str, bytes]) -> None:
    name = main_file(files)
    files[name] = files[name][: rng.randrange(len(files[name]))]


def header_end(name: str, data: bytes) -> int:
    """Where the data of tensors begins, or about there; the end of a file that mixes both."""
    if name.endswith(".safetensors") and len(data) >= 8:
        return min(len(data), 8 + struct.unpack("<Q", data[:8])[0])
    last = data.rfind(b".weight")
    if name.endswith(".gguf") and last > 0:
        return min(len(data), last + 64)  # after a name come a shape, a type and an offset
    return len(data)


def change_bytes(rng: random.Random, files: dict[str, bytes]) -> None:
    name = main_file(files)
    data = bytearray(files[name])
    end = header_end(name, data) if rng.random() < 0.7 else len(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(end)] = rng.choice((rng.randrange(256), 0, 255, 0x7F, 0x80))
    files[name] = bytes(data)


def change_numbers(rng: random.Random, files: dict[str, bytes]) -> None:
    """Write a hostile integer over any four or eight bytes."""
    name = main_file(files)
    data = bytearray(files[name])
    end = header_end(name, data)
    for _ in range(rng.choice((1, 1, 2))):
        number, width = rng.choice(HOSTILE_NUMBERS), rng.choice((4, 8))
        at = rng.randrange(max(1, end - width))
        data[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    files[name] = bytes(data)


def move_bytes(rng: random.Random, files: dict[str, bytes]) -> None:
    """Take a run of bytes out, put one in twice, or put in some that mean nothing."""
    name = main_file(files)
    data = files[name]
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    b = min(b, a + 4096)
    files[name] = rng.choice(
        (data[:a] + data[b:], data[:b] + data[a:], data[:a] + rng.randbytes(b - a) + data[a:])
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))


def changed_json(rng: random.Random, value: Any) -> Any:
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        known = list(places(value))
        if not known:
            break
        *parents, last = rng.choice(known)
        holder = value
        for key in parents:
            holder = holder[key]
        choice = rng.random()
        if choice < 0.15:
            del holder[last]
        elif choice < 0.5:
            holder[last] = rng.choice(HOSTILE_NUMBERS)
        elif choice < 0.6 and isinstance(holder, dict):
            holder[f"{last}x"] = holder.pop(last)
        else:
            holder[last] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    return value


def change_config(rng: random.Random, files: dict[str, bytes]) -> None:
    name = next(name for name in CONFIGS if name in files)
    config = json.loads(files[name])
    if rng.random() < 0.8 and "quantization_config" in config:
        config["quantization_config"] = changed_json(rng, config["quantization_config"])
    else:
        config = changed_json(rng, config)
    text = json.dumps(config)
    if rng.random() < 0.05:
        text = text.replace("64", "9" * 5000, 1)  # more digits than Python turns into a number
    files[name] = text.encode()


def change_tokenizer(rng: random.Random, files: dict[str, bytes]) -> None:
    """Its entries, less often those of the vocabulary, of which there are the most."""
    tokenizer = json.loads(files["tokenizer.json"])
    part = rng.choice(("added_tokens", "pre_tokenizer", "decoder", "model", None))
    if part is None or part not in tokenizer:
        tokenizer = changed_json(rng, tokenizer)
    else:
        tokenizer[part] = changed_json(rng, tokenizer[part])
    files["tokenizer.json"] = json.dumps(tokenizer).encode()


def change_safetensors_header(rng: random.Random, files: dict[str, bytes]) -> None:
    name = main_file(files)
    end = header_end(name, files[name])
    header = changed_json(rng, json.loads(files[name][8:end]))
    text = json.dumps(header).encode()
    if rng.random() < 0.03:
        text = text.replace(b"64", b"9" * 5000, 1)
    if rng.random() < 0.1:
        text += b" " * rng.randrange(64)
    files[name] = struct.pack("<Q", len(text)) + text + files[name][end:]


def change_state_text(rng: random.Random, files: dict[str, bytes]) -> None:
    """bitsandbytes' JSON inside a tensor, at the length that it has."""
    name = main_file(files)
    data = files[name]
    at = data.find(b'{"quant_type"')
    if at < 0:
        return change_bytes(rng, files)
    end = data.index(b"}", at) + 1
    text = json.dumps(changed_json(rng, json.loads(data[at:end]))).encode()
    text = text[: end - at].ljust(end - at)
    files[name] = data[:at] + text + data[end:]


def change_pickle(rng: random.Random, files: dict[str, bytes]) -> None:
    """Another data.pkl in a sound archive, so that what it says is believed."""
    name = main_file(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files[name])) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            data = bytearray(old.read(entry))
            if entry.filename.endswith("data.pkl"):
                for _ in range(rng.choice((1, 1, 2, 4))):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                if rng.random() < 0.3:
                    at = rng.randrange(len(data))
                    data[at:at] = rng.choice(PICKLE_BITS)
            new.writestr(entry.filename, bytes(data))
    files[name] = buffer.getvalue()


PICKLE_BITS = (
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    b"cos\nsystem\nX\x04\x00\x00\x00true\x85R",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"J\xff\xff\xff\x7f",
    b"K\x00\x85",
    b"((((((((",
    b"2\x86",
    b"0",
)


def mutations_of(files: dict[str, bytes]) -> list[Mutation]:
    name = main_file(files)
    common: list[Mutation] = [cut_short, change_bytes, change_numbers, move_bytes]
    if any(config in files for config in CONFIGS):
        common += [change_config, change_config]
    if name == "tokenizer.json":
        return [*common, *[change_tokenizer] * 4]
    if name.endswith(".bin"):
        return [*common, change_pickle, change_pickle, change_pickle]
    if name.endswith(".safetensors"):
        common += [change_safetensors_header] * 3
    return [*common, change_state_text] if b'{"quant_type"' in files[name] else common


# -- the loop -------------------------------------------------------------------------------------


def out_of_time(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def size_of(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def write_anew(file: Path, data: bytes) -> None:
    """A new file under the name. To cut the old one would take its pages from under a reader that
    still maps it, and file systems write to disk at once what replaces a file in that way.
    """
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def read_mutant(place: Path, name: str, nbytes: int) -> bool:
    """Whether it was read. Whatever else happens is raised."""
    try:
        with AllocationWatch(TENSOR_FACTOR * nbytes + SLACK), torch.no_grad():
            read_everything(place, name)
    except QtoolError:
        return False
    return True


def check(place: Path, name: str, nbytes: int, traced: bool) -> bool:
    if not traced:
        return read_mutant(place, name, nbytes)
    tracemalloc.start()
    try:
        done = read_mutant(place, name, nbytes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > PYTHON_FACTOR * nbytes + PYTHON_SLACK:
        raise TooLarge(f"Python took {peak:,} bytes for a file of {nbytes:,}")
    return done


def limit_memory() -> None:
    """No more address space than now and GROWTH."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(root: Path, count: int, seed: int) -> int:
    originals = {file.name: file.read_bytes() for file in sorted((root / "model").iterdir())}
    place = root / "mutant"
    place.mkdir(exist_ok=True)
    for name, data in originals.items():
        write_anew(place / name, data)
    read = main_file(originals)
    assert read_mutant(place, read, size_of(originals)), "the original is refused"
    mutations = mutations_of(originals)
    limit_memory()
    signal.signal(signal.SIGALRM, out_of_time)
    counts = {"read": 0, "refused": 0}
    changed: set[str] = set()
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        files = dict(originals)
        rng.choice(mutations)(rng, files)
        for name, data in files.items():
            if data is not originals[name] or name in changed:
                write_anew(place / name, data)
        changed = {name for name, data in files.items() if data is not originals[name]}
        signal.alarm(SECONDS)
        try:
            done = check(place, read, size_of(files), traced=number % TRACED == 0)
        except BaseException:  # a panic of a Rust library is not an Exception
            traceback.print_exc()
            kept = root / f"broken-{number}"
            shutil.copytree(place, kept)
            print(f"mutant {number} of seed {seed}, kept in {kept}", file=sys.stderr)
            return 1
        finally:
            signal.alarm(0)
        counts["read" if done else "refused"] += 1
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
