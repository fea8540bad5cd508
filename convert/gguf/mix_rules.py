"""llama-quantize's mixes (Q4_K_M and the rest), as tables.

A file type names a default tensor type and a set of exceptions, by what a tensor does, how deep it
sits and how the model is built. The exceptions are `RULES`; the first rule that fits decides. The
words are those of llama.cpp's llama-quant.cpp (llama_tensor_get_type), whose own snapshots these
tables are tested against. Falcon's exceptions are left out with Falcon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qtool.convert.gguf.types import FILE_TYPES, TENSOR_TYPES

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
IQ1_IQ2 = (*_IQ1, *_IQ2_SMALL, *_IQ2_LARGE)
_FIVE_BIT_OUTPUT = (  # of attention, where there are 8 experts
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
)

RULES: dict[Category, tuple[Rule, ...]] = {
    "output": (
        Rule(("Q8_0", "MXFP4_MOE"), "Q8_0"),
        Rule((*IQ1_IQ2, "IQ3_XXS"), "Q5_K"),
        Rule(tuple(DEFAULT_TYPES), "Q6_K"),
    ),
    "embedding": (
        Rule((*_IQ1, *_IQ2_SMALL), "Q2_K"),
        Rule((*_IQ2_LARGE, "IQ3_XXS"), "IQ3_S"),
        Rule(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
    ),
    "v": (
        Rule(IQ1_IQ2, "Q4_K", lambda p: _shared_kv(p) or p.model.num_experts >= 4),
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
        Rule(IQ1_IQ2, "Q4_K", _mixtral),
        Rule(tuple(DEFAULT_TYPES), "Q8_0", _mixtral),
        Rule(("IQ3_XS",), "IQ3_XXS"),
        Rule(("IQ3_XXS",), "IQ2_S"),
    ),
    "q": (
        Rule(("IQ3_XS",), "IQ3_XXS"),
        Rule(("IQ3_XXS",), "IQ2_S"),
    ),
    "attn_output": (
        Rule(IQ1_IQ2, "Q5_K", _mixtral),
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
NEED_IMPORTANCE = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"}


def type_by_rules(file_type: str, kind: Category, place: Place, shape: tuple[int, ...]) -> str:
    """The type of a tensor that nothing else decides."""
    default = DEFAULT_TYPES[file_type]
    if kind == "output" and shape[-1] % TENSOR_TYPES[default].block_size:
        return "Q8_0"
    if file_type == "MXFP4_MOE":
        return "MXFP4" if len(shape) == 3 else "Q8_0"
    wanted = next(
        (rule.type for rule in RULES[kind] if file_type in rule.file_types and rule.when(place)),
        default,
    )
    if kind == "v" and file_type not in IQ1_IQ2:
        if place.model.is_70b and wanted in ("Q3_K", "Q4_K"):
            wanted = "Q5_K"
        if _mixtral(place):
            wanted = "Q8_0"
    return wanted
