"""Which type each tensor of a file gets.

    order of decision   1. an explicit type for the output or the token embedding
                        2. an explicit type by a pattern on names
                        3. `pure`: the default type for all
                        4. the file type's rules, else its default type (mix_rules.py)
    then                a type whose block does not divide the row falls back (FALLBACKS), but in 1.

Some rules count: `index` is the position among tensors of that category in the file's order, which
is therefore part of the result (see `file_order`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qtool.convert.gguf.mix_rules import (
    DEFAULT_TYPES,
    IQ1_IQ2,
    NEED_IMPORTANCE,
    Category,
    MixModel,
    Place,
    type_by_rules,
)
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.errors import QtoolError, UnknownName, UsageError

# By substring of the name, the first that is found; fused qkv and MLA's kv_b count as v.
_CATEGORY_BY_PART: tuple[tuple[str, Category], ...] = (
    ("attn_qkv.weight", "v"),
    ("attn_kv_b.weight", "v"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)

# Never quantized, whatever their shape.
_KEPT_PARTS = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid", "altup", "laurel"),
    *("per_layer_model_proj", "position_embd", "token_types", "ssm_conv1d", "shortconv.conv"),
    *("indexer.k_proj", "indexer.q_proj", "time_mix_", "attn_rel_b", "sam.", ".rel_pos"),
    *(".patch_embd", ".patch_merger", "codebook"),
)

# Where a row is not whole blocks, the type that is tried instead; after it, F16.
FALLBACKS: dict[str, str] = {
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
    ),
}


@dataclass(frozen=True, slots=True)
class MixOverrides:
    """What the user fixed by hand.

    by_pattern  (regular expression searched in the tensor's name, type); the first that fits
    """

    output: str | None = None
    embedding: str | None = None
    by_pattern: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    leave_output: bool = False

    def __post_init__(self) -> None:
        for type in (self.output, self.embedding, *(type for _, type in self.by_pattern)):
            if type is not None and type not in TENSOR_TYPES:
                raise UnknownName("GGUF tensor type", type, TENSOR_TYPES)
        for pattern, _ in self.by_pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"{pattern!r} is no regular expression: {error}") from error


class TypeChoice(NamedTuple):
    """The type of a tensor, and what it would have been if its rows had been whole blocks."""

    type: str
    wanted: str

    @property
    def fell_back(self) -> bool:
        return self.type != self.wanted


def category(name: str, *, tied: bool) -> Category:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "output" if tied and name == "token_embd.weight" else "embedding"
    return next((kind for part, kind in _CATEGORY_BY_PART if part in name), "other")


def is_quantizable(name: str, shape: tuple[int, ...], *, leave_output: bool = False) -> bool:
    """Whether llama-quantize touches a tensor at all: weight matrices, bar a few by name."""
    matrix = sum(size > 1 for size in shape) >= 2
    kept = any(part in name for part in _KEPT_PARTS) or (leave_output and name == "output.weight")
    return name.endswith("weight") and matrix and not kept


def block_number(name: str) -> int:
    """The block of "blk.12.attn_q.weight"; -1 for tensors outside the blocks."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def file_order(names: Iterable[str]) -> list[str]:
    """llama-quantize's order of tensors: by block, those without one first, then by name."""
    return sorted(names, key=lambda name: (block_number(name), name.encode()))


def choose_types(
    file_type: str,
    shapes: Mapping[str, tuple[int, ...]],
    model: MixModel,
    overrides: MixOverrides | None = None,
) -> dict[str, TypeChoice]:
    """The type of every tensor that is to be quantized, in the file's order.

    shapes  torch shapes of all tensors of the file by GGUF name; those not in the result keep the
            type they have
    """
    overrides = overrides or MixOverrides()
    default = DEFAULT_TYPES[file_type]
    names = [
        name
        for name in file_order(shapes)
        if is_quantizable(name, shapes[name], leave_output=overrides.leave_output)
    ]
    if not TENSOR_TYPES[default].is_quantized:
        return {name: TypeChoice(default, default) for name in names}
    tied = "output.weight" not in shapes
    categories = {name: category(name, tied=tied) for name in names}
    totals = Counter(categories.values())
    seen: Counter[Category] = Counter()
    choices: dict[str, TypeChoice] = {}
    for name in names:
        kind = categories[name]
        index, count = seen[kind], totals[kind]
        seen[kind] += 1
        if kind in ("up", "gate", "down"):
            # Several tensors a block: the name says which block, but for types that count tensors.
            if model.num_experts > 1 and file_type not in IQ1_IQ2:
                index = block_number(name)
            count = model.num_blocks
        place = Place(model, index, count)
        fixed = _fixed(name, overrides, tied=tied)
        if fixed is not None:
            choices[name] = TypeChoice(fixed, fixed)
            continue
        wanted = _by_pattern(name, overrides)
        if wanted is None and overrides.pure:
            wanted = default
        if wanted is None:
            wanted = type_by_rules(file_type, kind, place, shapes[name])
        choices[name] = TypeChoice(fitting_type(wanted, shapes[name][-1]), wanted)
    return choices


def explain(
    file_type: str, name: str, choice: TypeChoice, overrides: MixOverrides, *, tied: bool
) -> str:
    """Why a tensor that is to be quantized gets its type, in a few words."""
    default = DEFAULT_TYPES[file_type]
    if _fixed(name, overrides, tied=tied) is not None:
        return "asked for by kind"
    pattern = next((p for p, _ in overrides.by_pattern if re.search(p, name)), None)
    if pattern is not None and TENSOR_TYPES[default].is_quantized:
        why = f"asked for by {pattern}"
    elif overrides.pure:
        why = f"{file_type}, pure"
    elif choice.wanted == default:
        why = f"default of {file_type}"
    else:
        why = f"{file_type}'s rule for {category(name, tied=tied)}"
    return f"{why}; {choice.wanted} does not fit its rows" if choice.fell_back else why


def _fixed(name: str, overrides: MixOverrides, *, tied: bool) -> str | None:
    if name == "token_embd.weight":
        return overrides.embedding or (overrides.output if tied else None)
    return overrides.output if name == "output.weight" else None


def fixed_by_hand(name: str, overrides: MixOverrides, *, tied: bool) -> bool:
    """Whether the user named this tensor's type."""
    fixed = _fixed(name, overrides, tied=tied)
    return fixed is not None or _by_pattern(name, overrides) is not None


def _by_pattern(name: str, overrides: MixOverrides) -> str | None:
    patterns = overrides.by_pattern
    return next((type for pattern, type in patterns if re.search(pattern, name)), None)


def fitting_type(wanted: str, columns: int) -> str:
    """`wanted`, or what replaces it where `columns` are not whole blocks of it."""
    if columns % TENSOR_TYPES[wanted].block_size == 0:
        return wanted
    replacement = FALLBACKS.get(wanted, "F16")
    return replacement if columns % TENSOR_TYPES[replacement].block_size == 0 else "F16"


def require_importance(
    file_type: str, choices: Mapping[str, TypeChoice], known: Container[str] = ()
) -> None:
    """Refuse types that are useless without an importance matrix.

    known  tensors that have importance
    """
    for name, choice in choices.items():
        if name in ("token_embd.weight", "output.weight") or name in known:
            continue
        if choice.type in NEED_IMPORTANCE or (file_type == "Q2_K_S" and choice.type == "Q2_K"):
            raise QtoolError(
                f"{file_type} gives {name} the type {choice.type}, which is useless without an "
                "importance matrix",
                "give one with --imatrix, or choose a type of 3 bits or more, such as Q3_K_M",
            )
