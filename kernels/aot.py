"""Compile Triton kernels with no GPU, and read from the machine code what they will cost.

Triton carries its compilers and NVIDIA's assembler, so that the figures that decide a kernel's
speed can be read anywhere: registers, spills, shared memory, whether tensor cores are used, and how
many instructions the innermost loop has. `kernels/cuda/budgets.py` lists the kernels and what they
may cost:

    python -m qtool.kernels.aot                 a table of all
    python -m qtool.kernels.aot --arch sm_80    of one architecture
    python -m qtool.kernels.aot --json linear   as JSON, of the kernels with this word in their name

A process in which TRITON_INTERPRET is set cannot compile: Triton decides at import.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A compiled kernel's argument: "*bf16", "i32", or a value known when it is compiled.
Argument = str | int | float | bool

# sm_90 code that uses wgmma is made for sm_90a.
_ASSEMBLER_SUFFIX = {"sm_90": "a", "sm_100": "a", "sm_120": "a"}
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_JUMP = re.compile(r"(\.L_x_\d+)")
MATRIX_INSTRUCTIONS = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiler made of a kernel.

    registers     a thread
    spilled       bytes a thread that did not fit into them
    shared        bytes of shared memory a program
    matrix        matrix instructions in all of the kernel, by name
    loop          instructions of the innermost loop that has the most matrix instructions, or the
                  most instructions where none has any; empty without loops and on AMD
    notes         what the assembler says of products that wait for each other (C75xx)
    """

    arch: str
    registers: int
    spilled: int
    shared: int
    matrix: Mapping[str, int]
    loop: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def loop_instructions(self) -> int:
        return sum(self.loop.values())

    def in_loop(self, *prefixes: str) -> int:
        return sum(count for name, count in self.loop.items() if name.startswith(prefixes))


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Argument],
    arch: str,
    *,
    warps: int = 4,
    stages: int = 3,
) -> Compiled:
    """Compile for "sm_80" .. "sm_120" or "gfx942" and inspect.

    arguments  of every parameter. Pointers and the integers "i32/16" are multiples of 16, as they
               are when PyTorch's tensors are passed; a number that is no constant of the kernel
               becomes one, as Triton does with every 1
    """
    binary = _compile(kernel, arguments, arch, warps, stages)
    if arch.startswith("gfx"):
        return _read_amd(arch, binary.asm["amdgcn"], int(binary.metadata.shared))
    return _read_nvidia(arch, binary.asm, int(binary.metadata.shared))


def _compile(
    kernel: Any, arguments: Mapping[str, Argument], arch: str, warps: int, stages: int
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    missing = [name for name in names if name not in arguments]
    assert not missing, f"{kernel.__name__}: no argument for {missing}"
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, attributes, values = {}, {}, {}
    for place, name in enumerate(names):
        given = arguments[name]
        if name in constant or not isinstance(given, str):
            signature[name] = "constexpr"
            values[name] = given
        else:
            signature[name] = given.removesuffix("/16")
            if given.startswith("*") or given.endswith("/16"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def wants_inputs_by_thread(capability: tuple[int, int]) -> bool:
    """Which order of inputs lets Marlin tiles stay where they are (`device.words.weight_tile`).

    Compiled both ways: what has to be moved between threads shows as instructions (Triton 3.6 for
    sm_80: 26 a word by thread and 41 in order; Triton 3.9: 31 and 20).
    """
    from qtool.kernels.cuda.budgets import linear_case

    def instructions(by_thread: bool) -> int:
        case = linear_case(f"sm_{capability[0]}{capability[1]}", by_thread=by_thread)
        found = compile_kernel(
            case.kernel(), case.arguments, case.arch, warps=case.warps, stages=case.stages
        )
        return found.loop_instructions

    return instructions(True) < instructions(False)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _assembler(arch: str) -> str:
    """The one of Triton's two that it uses for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(int(arch.removeprefix("sm_"))).path)


def _read_nvidia(arch: str, code: Mapping[str, Any], shared: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code["cubin"])
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", str(cubin))
        listing = _run(_tool("nvdisasm"), "-c", str(cubin))
        notes: tuple[str, ...] = ()
        if arch in _ASSEMBLER_SUFFIX:
            ptx = Path(folder, "kernel.ptx")
            ptx.write_text(code["ptx"], encoding="utf-8")
            target = arch + _ASSEMBLER_SUFFIX[arch]
            said = _run(
                _assembler(arch),
                f"-arch={target}",
                "-v",
                str(ptx),
                "-o",
                str(Path(folder, "again")),
            )
            notes = tuple(line.strip() for line in said.splitlines() if "C75" in line)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    program = read_listing(listing)
    everything = Counter(name for name, _ in program.instructions)
    return Compiled(
        arch=arch,
        registers=registers,
        spilled=stack + local,
        shared=shared,
        matrix=_matrix(everything),
        loop=hot_loop(program),
        notes=notes,
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _matrix(instructions: Mapping[str, int]) -> dict[str, int]:
    return {
        name: count for name, count in instructions.items() if name.startswith(MATRIX_INSTRUCTIONS)
    }


@dataclass(frozen=True, slots=True)
class Listing:
    """A disassembled kernel: instructions (name, operands) and where labels point."""

    instructions: tuple[tuple[str, str], ...]
    labels: Mapping[str, int]


def read_listing(text: str) -> Listing:
    """nvdisasm's output."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = len(instructions)
            continue
        found = _INSTRUCTION.match(line)
        if found is not None:
            instructions.append((found[1], found[2]))
    return Listing(tuple(instructions), labels)


def hot_loop(listing: Listing) -> dict[str, int]:
    """Instructions, by name, between a jump back and where it goes: of all such loops the one with
    the most matrix instructions, and of several with as many the shortest.
    """
    best: tuple[int, int, Counter[str]] | None = None
    for place, (name, operands) in enumerate(listing.instructions):
        jump = _JUMP.search(operands) if name.startswith("BRA") else None
        target = None if jump is None else listing.labels.get(jump[1])
        if target is None or target >= place:
            continue
        body = Counter(one for one, _ in listing.instructions[target : place + 1])
        rank = (sum(_matrix(body).values()), -sum(body.values()))
        if best is None or rank > best[:2]:
            best = (*rank, body)
    return {} if best is None else dict(best[2])


def _read_amd(arch: str, text: str, shared: int) -> Compiled:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        assert found is not None, key
        return int(found[1])

    matrix = Counter(re.findall(r"\b(v_mfma_\w+)", text))
    return Compiled(
        arch=arch,
        registers=number("vgpr_count"),
        spilled=4 * number("vgpr_spill_count"),
        shared=shared,
        matrix=dict(matrix),
        loop={},
        notes=(),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    import argparse
    import dataclasses
    import json

    from qtool.kernels.cuda.budgets import CASES, excess

    parser = argparse.ArgumentParser(prog="python -m qtool.kernels.aot", description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="of the kernels' names")
    parser.add_argument("--arch", help="for example sm_90; default: all of each kernel's")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    rows = []
    for case in CASES:
        if asked.word not in case.name or asked.arch not in (None, case.arch):
            continue
        found = compile_kernel(
            case.kernel(), case.arguments, case.arch, warps=case.warps, stages=case.stages
        )
        over = excess(case, found)
        row = {"name": case.name, **dataclasses.asdict(found), "excess": over}
        rows.append(row)
        if not asked.json:
            per_word = f"{found.loop_instructions / case.units:6.1f}" if case.units else " " * 6
            verdict = "ok" if not over else "; ".join(over)
            print(
                f"{case.name:34} {case.arch:7} registers {found.registers:3} "
                f"spilled {found.spilled:3} shared {found.shared:6} "
                f"loop {found.loop_instructions:5} a unit {per_word}  {verdict}"
            )
    if asked.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
