"""What the compiled kernels are built from, and for which instruction sets.

Building is `qtool/native_build.py`; what the functions mean is in `native.py`.
"""

from __future__ import annotations

from pathlib import Path

from qtool.native_build import InstructionSet

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3",)

_AVX512 = InstructionSet(
    "avx512-vnni",
    frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c")),
    (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
        *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ),
)
# Best first. The first is the second for Intel's servers from 2023 on, known by their matrix unit,
# which wait for memory otherwise (`ask_ahead` in isa_avx512.h).
INSTRUCTION_SETS = (
    InstructionSet(
        "avx512-vnni-intel",
        _AVX512.needs | {"amx_tile"},
        (*_AVX512.flags, "-DQTOOL_INTEL_SERVER"),
    ),
    _AVX512,
    InstructionSet("avx2", frozenset(("avx2", "fma", "f16c")), ("-mavx2", "-mfma", "-mf16c")),
)
