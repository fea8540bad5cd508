"""What the kernels may cost, read from their machine code (`kernels/aot.py`), case by case.

An H200 gives a multiprocessor 16.4 bytes of memory a clock, and issues four instructions: 31
instructions a word of eight weights at best, 22 at the rate that kernels get. So a kernel for few
rows that needs more than 20 a word is slower than memory, whatever else is right about it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qtool.kernels.aot import Argument, Compiled
from qtool.kernels.cuda.paged_attention import (
    LARGE_ROWS,
    LEAST_KEYS,
    SMALL_ROWS,
    choose_form,
)

DEVICE_CODE = "qtool.kernels.cuda.device"


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel compiled one way.

    function    module and name under kernels/cuda/device
    units       what the loop's instructions are counted by (words a thread, kilobytes a warp)
    registers   a thread, at the most
    per_unit    instructions of the loop a unit, at the most; None: not counted
    matrix      a matrix instruction that must be there
    no_shuffle  the loop must not exchange values between threads
    """

    name: str
    function: str
    arguments: Mapping[str, Argument]
    arch: str
    warps: int = 4
    stages: int = 3
    units: float = 0.0
    registers: int = 255
    per_unit: float | None = None
    matrix: str | None = None
    no_shuffle: bool = False
    forbidden: tuple[str, ...] = field(default=())

    def kernel(self) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"{DEVICE_CODE}.{module}"), name)


def excess(case: Case, found: Compiled) -> list[str]:
    """Where a kernel costs more than it may, or lacks what it must have."""
    over = []
    if found.spilled:
        over.append(f"spills {found.spilled} bytes")
    if found.registers > case.registers:
        over.append(f"{found.registers} registers, may have {case.registers}")
    if found.notes:
        over.append(found.notes[0])
    if case.matrix is not None and not any(name.startswith(case.matrix) for name in found.matrix):
        over.append(f"no {case.matrix}, has {sorted(found.matrix)}")
    if case.per_unit is not None and found.loop_instructions / case.units > case.per_unit:
        each = found.loop_instructions / case.units
        over.append(f"{each:.1f} instructions a unit, may have {case.per_unit}")
    if case.no_shuffle and found.in_loop("SHFL"):
        over.append(f"{found.in_loop('SHFL')} exchanges in the loop")
    for name in case.forbidden:
        if found.in_loop(name):
            over.append(f"{found.in_loop(name)} {name} in the loop")
    return over


def linear_case(
    arch: str,
    *,
    bits: int = 4,
    rows: int = 16,
    strips: int = 2,
    warps: int = 4,
    stages: int = 4,
    block: int = 128,
    dtype: str = "bf16",
    zeros: bool = False,
    routed: bool = False,
    by_thread: bool = False,
    **limits: Any,
) -> Case:
    """A Marlin product of an 8B model's shape."""
    words = block // 16 * strips * 32 * bits
    amd = arch.startswith("gfx")
    arguments: dict[str, Argument] = {
        "x_ptr": f"*{dtype}",
        "words_ptr": "*i32",
        "scales_ptr": f"*{dtype}",
        "zeros_ptr": "*u8",
        "sums_ptr": "*fp32",
        "bias_ptr": f"*{dtype}",
        "rows_ptr": "*i32",
        "experts_ptr": "*i32",
        "out_ptr": "*fp32",
        "num_rows": "i32/16",
        "out_rows": "i32/16",
        "N": 4096,
        "K": 4096,
        "x_stride": "i32/16",
        "BITS": bits,
        "BK": block,
        "STRIPS": strips,
        "BM": rows,
        "SPLIT": 4,
        "STAGES": stages,
        "BIAS": 128 if dtype == "bf16" else 1024,
        "WHOLE_ROW": False,
        "HAS_ZEROS": zeros,
        "HAS_BIAS": False,
        "ROUTED": routed,
        "ASM": not amd,
        "K_BY_THREAD": by_thread,
    }
    kind = f"{bits}bit{'-zeros' if zeros else ''}{'-experts' if routed else ''}"
    return Case(
        name=f"linear-{kind}-g{block}-{dtype}-{rows}x{64 * strips}",
        function="linear:marlin_matmul",
        arguments=arguments,
        arch=arch,
        warps=warps,
        stages=stages,
        units=words / (warps * (64 if amd else 32)),
        **limits,
    )


_HOPPER: Mapping[str, Any] = {"matrix": "HGMMA", "no_shuffle": True}
_AMPERE: Mapping[str, Any] = {"matrix": "HMMA", "no_shuffle": True}
# Four programs a multiprocessor have 128 registers a thread.
_FOUR_PROGRAMS: Mapping[str, Any] = {**_HOPPER, "registers": 128}

LINEAR = (
    linear_case("sm_90", per_unit=20, **_FOUR_PROGRAMS),
    linear_case("sm_90", dtype="fp16", per_unit=20, **_FOUR_PROGRAMS),
    linear_case("sm_90", zeros=True, per_unit=20, **_FOUR_PROGRAMS),
    linear_case("sm_90", routed=True, per_unit=20, **_FOUR_PROGRAMS),
    linear_case("sm_90", rows=32, strips=4, warps=8, stages=3, per_unit=23, **_HOPPER),
    linear_case("sm_90", rows=64, strips=4, warps=8, stages=3, per_unit=32, **_HOPPER),
    # Small groups pay for scaling their sums: two and four times as often.
    linear_case("sm_90", block=64, per_unit=25, **_FOUR_PROGRAMS),
    linear_case("sm_90", block=32, per_unit=44, **_FOUR_PROGRAMS),
    # A word has four weights of 8 bits: half as many instructions each.
    linear_case("sm_90", bits=8, stages=3, per_unit=13, **_FOUR_PROGRAMS),
    linear_case("sm_90", bits=8, stages=3, dtype="fp16", per_unit=11, **_FOUR_PROGRAMS),
    linear_case("sm_90", bits=8, rows=64, strips=4, warps=8, stages=2, per_unit=16, **_HOPPER),
    linear_case("sm_80", per_unit=24, **_AMPERE),
    linear_case("sm_89", per_unit=24, **_AMPERE),
    linear_case("sm_80", bits=8, stages=3, per_unit=14, **_AMPERE),
    linear_case("gfx942", stages=2, matrix="v_mfma"),
    linear_case("gfx942", bits=8, stages=2, matrix="v_mfma"),
)


def attention_case(
    arch: str,
    rows: int,
    *,
    channels: int = 128,
    dtype: str = "bf16",
    cache: str | None = None,
    window: int = 0,
    parts: int = 1,
    **limits: Any,
) -> Case:
    """Four heads to a KV head, pages of 16 tokens; a unit is a kilobyte of keys and values."""
    form = choose_form(rows, channels, has_wgmma=arch == "sm_90")
    cache = cache or dtype
    bytes_each = {"bf16": 2, "fp16": 2}.get(cache, 1)
    arguments: dict[str, Argument] = {
        "query_ptr": f"*{dtype}",
        "keys_ptr": f"*{cache}",
        "values_ptr": f"*{cache}",
        "key_scales_ptr": "*fp32",
        "value_scales_ptr": "*fp32",
        "sinks_ptr": "*fp32",
        "tables_ptr": "*i32",
        "first_rows_ptr": "*i32",
        "lengths_ptr": "*i32",
        "tile_sequences_ptr": "*i32",
        "tile_firsts_ptr": "*i32",
        "out_ptr": f"*{dtype}",
        "parts_ptr": "*fp32",
        "weights_ptr": "*fp32",
        "scale": "fp32",
        "softcap": "fp32",
        "slots": "i32/16",
        "table_width": "i32",
        "query_row": "i32/16",
        "HEADS": 32,
        "KV_HEADS": 8,
        "KEY_DIM": channels,
        "VALUE_DIM": channels,
        "KEY_BLOCK": channels,
        "VALUE_BLOCK": channels,
        "KEY_ROW": channels,
        "VALUE_ROW": channels,
        "PAGE": 16,
        "TILE": form.keys,
        "BM": rows,
        "SPLIT": parts,
        "LEAST": LEAST_KEYS,
        "WINDOW": window,
        "HAS_SOFTCAP": False,
        "HAS_SINKS": False,
        "SCALED": cache == "i8",
        "STAGES": form.stages,
    }
    kind = "decode" if rows == SMALL_ROWS else "prefill"
    return Case(
        name=f"attention-{kind}-{channels}-{dtype}-{cache}{'-window' if window else ''}",
        function="attention:paged_attention",
        arguments=arguments,
        arch=arch,
        warps=form.warps,
        stages=form.stages,
        units=form.keys * channels * 2 * bytes_each / 1024 / form.warps,
        **limits,
    )


# A kilobyte of the cache comes from an H200's memory while 249 instructions are issued, 174 at the
# rate that kernels get.
ATTENTION = (
    attention_case("sm_90", SMALL_ROWS, parts=8, per_unit=60, matrix="HMMA"),
    attention_case("sm_90", SMALL_ROWS, parts=8, per_unit=70, channels=64, matrix="HMMA"),
    attention_case("sm_90", SMALL_ROWS, parts=8, per_unit=60, channels=256, matrix="HMMA"),
    attention_case("sm_90", SMALL_ROWS, parts=8, per_unit=60, window=4096, matrix="HMMA"),
    attention_case("sm_90", SMALL_ROWS, parts=8, per_unit=160, dtype="fp16", cache="fp8e4nv"),
    attention_case("sm_90", SMALL_ROWS, parts=8, per_unit=210, cache="fp8e4nv"),
    attention_case("sm_90", SMALL_ROWS, parts=8, per_unit=230, cache="i8"),
    attention_case("sm_90", LARGE_ROWS, registers=224, matrix="HGMMA"),
    attention_case("sm_90", LARGE_ROWS, registers=168, channels=64, matrix="HGMMA"),
    attention_case("sm_90", LARGE_ROWS, channels=256, matrix="HGMMA"),
    attention_case("sm_80", SMALL_ROWS, parts=8, per_unit=60, matrix="HMMA"),
    attention_case("sm_80", LARGE_ROWS, registers=224, matrix="HMMA"),
    attention_case("gfx942", SMALL_ROWS, parts=8, matrix="v_mfma"),
)


def of_one(case: Case) -> Case:
    """The same for one row, one page: Triton makes a constant of every 1 that it is given."""
    ones = {"num_rows", "out_rows", "table_width", "row_stride"} & set(case.arguments)
    arguments = {**case.arguments, **dict.fromkeys(ones, 1)}
    return replace(case, name=f"{case.name}-of-one", arguments=arguments)


def _plain(
    function: str, pointers: Mapping[str, str], values: Mapping[str, Argument], **limits: Any
) -> Case:
    """A kernel with nothing to count but registers: it must not spill."""
    arguments: dict[str, Argument] = {f"{name}_ptr": kind for name, kind in pointers.items()}
    name = function.partition(":")[2].replace("_", "-")
    return Case(name, function, {**arguments, **values}, "sm_90", **limits)


_WRITES: Mapping[str, str] = {
    "slots": "*i64",
    "keys": "*bf16",
    "values": "*bf16",
    "key_scales": "*fp32",
    "value_scales": "*fp32",
}
# Of an 8B model: 4096 channels, 14336 in its MLP, 32 heads of 128 on 8.
FUSED = (
    _plain(
        "fused:add_norm",
        dict(residual="*bf16", parts="*fp32", post_weight="*bf16", weight="*bf16", out="*bf16",
             sums="*fp32"),
        dict(num_rows="i32", parts_stride="i32/16", eps="fp32", residual_scale="fp32",
             CHANNELS=4096, BLOCK=4096, SPLIT=8, HAS_POST=False, HAS_NORM=True, SUM_BLOCK=128),
        warps=8, registers=64,
    ),
    _plain(
        "fused:gate_mul",
        dict(parts="*fp32", out="*bf16", sums="*fp32"),
        dict(num_rows="i32", parts_stride="i32/16", CHANNELS=14336, BLOCK=512, SPLIT=2,
             ACTIVATION="silu", SUM_BLOCK=128),
        warps=2, registers=64,
    ),
    _plain(
        "fused:rope_and_write",
        dict(parts="*fp32", norm="*bf16", cos="*fp32", sin="*fp32", query="*bf16", **_WRITES),
        dict(parts_stride="i32/16", slots_per_head="i32/16", eps="fp32", HEADS=32, KV_HEADS=8,
             CHANNELS=128, BLOCK=128, ROTATED=128, SPLIT=8, HAS_NORM=True, SCALED=False),
        warps=1, registers=128,
    ),
    _plain(
        "fused:write_cache",
        dict(key="*bf16", value="*bf16", **{**_WRITES, "keys": "*i8", "values": "*i8"}),
        dict(slots_per_head="i32/16", key_row="i32/16", value_row="i32/16", KEY_DIM=128,
             VALUE_DIM=128, BLOCK=128, SCALED=True),
        warps=1, registers=64,
    ),
    _plain(
        "fused:quantize_rows",
        dict(x="*bf16", codes="*fp8e4nv", scales="*fp32"),
        dict(x_stride="i32/16", CHANNELS=4096, BLOCK=4096, LARGEST=448.0, WHOLE=False),
        registers=128,
    ),
    _plain(
        "sampling:draw_tokens",
        dict(logits="*fp32", temperatures="*fp32", top_ks="*i32", top_ps="*fp32", min_ps="*fp32",
             typical_ps="*fp32", numbers="*fp32", tokens="*i64", finite="*i32"),
        dict(row_stride="i32", VOCAB=151936, BLOCK=4096),
        warps=16, registers=128,
    ),
    _plain(
        "sampling_rules:apply_rules",
        dict(logits="*fp32", mask_rows="*i32", masks="*i32", slots="*i32", counts="*i32",
             counted="*i64", repetitions="*fp32", frequencies="*fp32", presences="*fp32"),
        dict(row_stride="i32", VOCAB=151936, WORDS=4748, BLOCK=4096),
        warps=8, registers=128,
    ),
    _plain(
        "attention:merge_parts",
        dict(parts="*fp32", weights="*fp32", first_rows="*i32", lengths="*i32",
             tile_sequences="*i32", tile_firsts="*i32", out="*bf16"),
        dict(HEADS=32, GROUP=4, VALUE_DIM=128, VALUE_BLOCK=128, TILE=64, BM=16, SPLIT=16,
             LEAST=LEAST_KEYS, WINDOW=0),
        warps=2, registers=64,
    ),
    _plain(
        "linear:unpack_words",
        dict(words="*i32", scales="*bf16", zeros="*u8", out="*bf16"),
        dict(N=4096, K=4096, BITS=4, BK=128, WHOLE_ROW=False, HAS_ZEROS=True),
        registers=255,
    ),
    _plain(
        "linear:block_sums",
        dict(x="*bf16", sums="*fp32"),
        dict(num_rows="i32", x_stride="i32/16", K=4096, BK=128, BM=16),
        registers=64,
    ),
    _plain(
        "linear:add_parts",
        dict(parts="*fp32", out="*bf16"),
        dict(num_elements="i32/16", SPLIT=8, BLOCK=1024),
        registers=64,
    ),
)  # fmt: skip
CASES: tuple[Case, ...] = (
    *LINEAR,
    *ATTENTION,
    *FUSED,
    *(of_one(case) for case in (LINEAR[0], LINEAR[3], ATTENTION[0], *FUSED[:2])),
)
