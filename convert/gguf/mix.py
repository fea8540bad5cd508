"""Which type each tensor of a file gets: llama-quantize's mixes (Q4_K_M and the rest), as tables.

A file type names a default tensor type and a set of exceptions, by what a tensor does, how deep it
sits and how the model is built. The exceptions are `RULES`; the first rule that fits decides. The
words are those of llama.cpp's llama-quant.cpp (llama_tensor_get_type), whose own snapshots these
tables are tested against.

    order of decision   1. an explicit type for the output or the token embedding
                        2. an explicit type by a pattern on names
                        3. `pure`: the default type for all
                        4. RULES, else the default type
    then                a type whose block does not divide the row falls back (FALLBACKS), but in 1.

Some rules count: `index` is the position among tensors of that category in the file's order, which
is therefore part of the result (see `file_order`). Falcon's exceptions are left out with Falcon.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qtool.convert.gguf.types import FILE_TYPES, TENSOR_TYPES
from qtool.errors import QtoolError, UnknownName, UsageError

Category = Literal[
    "output", "embedding", "v", "k", "q", "attn_output", "up", "gate", "down", "other"
]

DEFAULT_TYPES: dict[str, str] = {name: name for name in FILE_TYPES if name in TENSOR_TYPES} | {
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "MXFP4_MOE": "MXFP4",
}

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
class MixModel:
    """What the rules ask of a model.

    has_importance  whether an importance matrix goes with it
    """

    architecture: str
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    num_experts: int = 0
    has_importance: bool = False

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // max(1, self.num_kv_heads)

    @property
    def is_70b(self) -> bool:
        """As llama.cpp tells: 80 blocks of these families; Llama 1's 65B had no shared kv heads."""
        if self.architecture == "llama":
            return self.num_blocks == 80 and self.num_heads != self.num_kv_heads
        return self.num_blocks == 80 and self.architecture in ("qwen2", "deci", "olmo")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: `index` of `count` of its category."""

    model: MixModel
    index: int
    count: int

    @property
    def in_first_eighth(self) -> bool:
        return self.index < self.count // 8

    @property
    def more_bits(self) -> bool:
        """The first and the last eighth, and every third between."""
        eighth = self.count // 8
        last = self.index >= 7 * self.count // 8
        return self.index < eighth or last or (self.index - eighth) % 3 == 2


class Rule(NamedTuple):
    """In these file types, where `when` holds, the tensor gets `type`."""

    file_types: tuple[str, ...]
    type: str
    when: Callable[[Place], bool] = lambda place: True


def _shared_kv(place: Place) -> bool:
    return place.model.queries_per_kv >= 4


def _mixtral(place: Place) -> bool:
    return place.model.num_experts == 8


def _no_importance(place: Place) -> bool:
    return not place.model.has_importance


_IQ1 = ("IQ1_S", "IQ1_M")
_IQ2_SMALL = ("IQ2_XXS", "IQ2_XS")
_IQ2_LARGE = ("IQ2_S", "IQ2_M")
_IQ1_IQ2 = (*_IQ1, *_IQ2_SMALL, *_IQ2_LARGE)
_FIVE_BIT_OUTPUT = (  # of attention, where there are 8 experts
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
)

RULES: dict[Category, tuple[Rule, ...]] = {
    "output": (
        Rule(("Q8_0", "MXFP4_MOE"), "Q8_0"),
        Rule((*_IQ1_IQ2, "IQ3_XXS"), "Q5_K"),
        Rule(tuple(DEFAULT_TYPES), "Q6_K"),
    ),
    "embedding": (
        Rule((*_IQ1, *_IQ2_SMALL), "Q2_K"),
        Rule((*_IQ2_LARGE, "IQ3_XXS"), "IQ3_S"),
        Rule(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
    ),
    "v": (
        Rule(_IQ1_IQ2, "Q4_K", lambda p: _shared_kv(p) or p.model.num_experts >= 4),
        Rule(_IQ2_LARGE, "IQ3_S"),
        Rule((*_IQ1, *_IQ2_SMALL), "Q2_K"),
        Rule(("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"), "Q4_K", _shared_kv),
        Rule(("Q2_K",), "Q3_K"),
        Rule(("Q3_K_M",), "Q5_K", lambda p: p.index < 2),
        Rule(("Q3_K_M", "IQ3_M"), "Q4_K"),
        Rule(("Q3_K_L",), "Q5_K"),
        Rule(("IQ3_XXS",), "IQ3_S", _no_importance),
        Rule(("IQ4_NL", "IQ4_XS"), "Q5_K", _shared_kv),
        Rule(("Q4_K_M", "Q5_K_M"), "Q6_K", lambda p: p.more_bits),
        Rule(("Q4_K_S",), "Q5_K", lambda p: p.index < 4),
    ),
    "k": (
        Rule(_IQ1_IQ2, "Q4_K", _mixtral),
        Rule(tuple(DEFAULT_TYPES), "Q8_0", _mixtral),
        Rule(("IQ3_XS",), "IQ3_XXS"),
        Rule(("IQ3_XXS",), "IQ2_S"),
    ),
    "q": (
        Rule(("IQ3_XS",), "IQ3_XXS"),
        Rule(("IQ3_XXS",), "IQ2_S"),
    ),
    "attn_output": (
        Rule(_IQ1_IQ2, "Q5_K", _mixtral),
        Rule(
            _FIVE_BIT_OUTPUT,
            "Q5_K",
            _mixtral,
        ),
        Rule(_IQ1, "IQ2_XXS"),
        Rule(_IQ2_LARGE, "IQ3_S"),
        Rule(("Q2_K",), "Q3_K", lambda p: not _mixtral(p)),
        Rule(("Q3_K_M", "IQ3_M"), "Q4_K", lambda p: not _mixtral(p)),
        Rule(("Q3_K_L",), "Q5_K", lambda p: not _mixtral(p)),
        Rule(("IQ3_XXS",), "IQ3_S", lambda p: not _mixtral(p)),
    ),
    "down": (
        Rule(_IQ2_LARGE, "IQ3_S", lambda p: p.in_first_eighth),
        Rule((*_IQ1, *_IQ2_SMALL), "Q2_K", lambda p: p.in_first_eighth),
        Rule(("Q2_K",), "Q3_K"),
        Rule(("Q2_K_S",), "Q4_K", lambda p: p.in_first_eighth),
        Rule(("Q3_K_M",), "Q5_K", lambda p: p.index < p.count // 16),
        Rule(("Q3_K_M",), "Q4_K"),
        Rule(("Q3_K_L",), "Q5_K"),
        Rule(("Q4_K_M", "Q5_K_M"), "Q6_K", lambda p: p.more_bits),
        Rule(("Q4_K_S",), "Q5_K", lambda p: p.in_first_eighth),
        Rule(("IQ4_NL", "IQ4_XS"), "Q5_K", lambda p: _no_importance(p) and p.in_first_eighth),
        Rule(("IQ3_XXS",), "Q4_K", lambda p: _no_importance(p) and p.in_first_eighth),
        Rule(("IQ3_XXS",), "Q3_K", _no_importance),
        Rule(("IQ3_M",), "Q4_K", lambda p: p.in_first_eighth or (_mixtral(p) and p.more_bits)),
        Rule(("Q4_0",), "Q4_1", lambda p: not _no_importance(p) and p.in_first_eighth),
        Rule(("Q5_0",), "Q5_1", lambda p: not _no_importance(p) and p.in_first_eighth),
    ),
    "up": (Rule(("IQ3_XS",), "IQ3_XXS", lambda p: p.count // 8 <= p.index < 7 * p.count // 8),),
    "gate": (Rule(("IQ3_XS",), "IQ3_XXS", lambda p: p.count // 8 <= p.index < 7 * p.count // 8),),
    "other": (),
}

# Types that only an importance matrix makes usable; the reference refuses them without one.
_NEED_IMPORTANCE = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"}


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


def find_file_type(name: str) -> str:
    """The canonical spelling of a file type the user named."""
    found = next((known for known in FILE_TYPES if known.lower() == name.lower()), None)
    if found is None:
        raise UnknownName("GGUF type", name, FILE_TYPES)
    return found


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
            if model.num_experts > 1 and file_type not in _IQ1_IQ2:
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
            wanted = _by_rules(file_type, kind, place, shapes[name])
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


def _by_rules(file_type: str, kind: Category, place: Place, shape: tuple[int, ...]) -> str:
    default = DEFAULT_TYPES[file_type]
    if kind == "output" and shape[-1] % TENSOR_TYPES[default].block_size:
        return "Q8_0"
    if file_type == "MXFP4_MOE":
        return "MXFP4" if len(shape) == 3 else "Q8_0"
    wanted = next(
        (rule.type for rule in RULES[kind] if file_type in rule.file_types and rule.when(place)),
        default,
    )
    if kind == "v" and file_type not in _IQ1_IQ2:
        if place.model.is_70b and wanted in ("Q3_K", "Q4_K"):
            wanted = "Q5_K"
        if _mixtral(place):
            wanted = "Q8_0"
    return wanted


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
        if choice.type in _NEED_IMPORTANCE or (file_type == "Q2_K_S" and choice.type == "Q2_K"):
            raise QtoolError(
                f"{file_type} gives {name} the type {choice.type}, which is useless without an "
                "importance matrix",
                "give one with --imatrix, or choose a type of 3 bits or more, such as Q3_K_M",
            )
