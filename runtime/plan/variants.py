"""What a model weighs in each form that qtool writes, from its shapes alone.

Integer and float schemes round the linears inside the blocks and leave embedding, head, routers,
norms and biases in bfloat16, as the recipes do. A GGUF file chooses a type for every tensor by
llama.cpp's rules (`convert.gguf.mix`), embedding and head among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qtool.arch import Role
from qtool.convert.gguf.mix import choose_types
from qtool.convert.gguf.mix_rules import MixModel
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.errors import UnknownName
from qtool.runtime.plan.paper import FLOAT_BYTES, Matrix, PaperModel
from qtool.scheme import QuantScheme, portable_group_size

GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
INTEGER_BITS = (8, 4, 3, 2)


@dataclass(frozen=True, slots=True)
class Variant:
    """A form of a model.

    num_bytes      of all its tensors
    linear_bits    stored bits of a weight of the linears in the blocks, scales counted
    head_bits      of a weight of the head, or of the embedding where it is the head
    multiplies_in  what a GPU's matrix units multiply: "bf16", "fp8" or "int8"
    """

    name: str
    num_bytes: int
    linear_bits: float
    head_bits: float
    multiplies_in: str = "bf16"


def variants(model: PaperModel) -> Iterator[Variant]:
    """Every form, largest kinds first; GGUF where the family has a name there."""
    yield _scheme(model, "bf16", 16.0)
    # One float32 scale a row; activations are rounded to 8 bits too.
    yield _scheme(model, "fp8", 8.0, scale_bits=32, multiplies_in="fp8")
    yield _scheme(model, "w8a8", 8.0, scale_bits=32, multiplies_in="int8")
    for bits in INTEGER_BITS:
        yield _integers(model, bits)
    yield _scheme(model, "nvfp4", 4.0, group=16, scale_bits=8)
    yield _scheme(model, "mxfp4", 4.0, group=32, scale_bits=8)
    for file_type in GGUF_TYPES:
        yield _gguf(model, file_type)


def find_variant(model: PaperModel, name: str) -> Variant:
    by_name = {variant.name.lower(): variant for variant in variants(model)}
    found = by_name.get(name.lower())
    if found is None:
        raise UnknownName("form of a model", name, [variant.name for variant in by_name.values()])
    return found


def _integers(model: PaperModel, bits: int) -> Variant:
    def stored(matrix: Matrix) -> float:
        group = portable_group_size(matrix.columns)
        return QuantScheme(bits, group).bits_per_weight(matrix.columns)

    linears = [matrix for matrix in model.matrices if matrix.is_linear]
    return _variant(model, f"int{bits}", sum(m.numel * stored(m) for m in linears), "bf16")


def _scheme(
    model: PaperModel,
    name: str,
    bits: float,
    *,
    group: int | None = None,
    scale_bits: int = 0,
    multiplies_in: str = "bf16",
) -> Variant:
    """group  weights that share a scale; None: a row does"""
    linears = [matrix for matrix in model.matrices if matrix.is_linear]
    stored = sum(m.numel * (bits + scale_bits / (group or m.columns)) for m in linears)
    return _variant(model, name, stored, multiplies_in)


def _variant(model: PaperModel, name: str, linear_bits: float, multiplies_in: str) -> Variant:
    """linear_bits  that all linears in the blocks take together"""
    num_linear = sum(matrix.numel for matrix in model.matrices if matrix.is_linear)
    others = (model.num_weights - num_linear) * FLOAT_BYTES
    return Variant(
        name, int(linear_bits / 8) + others, linear_bits / num_linear, 16.0, multiplies_in
    )


def _gguf(model: PaperModel, file_type: str) -> Variant:
    config, architecture = model.config, model.architecture
    shapes: dict[str, tuple[int, ...]] = {}
    roles: dict[str, Role] = {}
    for matrix in model.matrices:
        for block in _blocks(model, matrix):
            name = f"{architecture.gguf_tensor(matrix.role, block)}.weight"
            stacked = matrix.count // len(_blocks(model, matrix))
            stack = () if stacked == 1 else (stacked,)
            shapes[name] = (*stack, matrix.rows, matrix.columns)
            roles[name] = matrix.role
    mix = MixModel(
        architecture=architecture.gguf_name,
        num_blocks=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        num_experts=0 if config.experts is None else config.experts.count,
    )
    chosen = choose_types(file_type, shapes, mix)
    linears = {matrix.role for matrix in model.matrices if matrix.is_linear}
    total = model.num_vector * 4.0
    linear_bits = num_linear = 0.0
    head_bits = 16.0
    head = "embed" if config.tie_word_embeddings else "head"
    for name, shape in shapes.items():
        numel = math.prod(shape)
        # What is not to be quantized stays in float32: routers.
        bits = TENSOR_TYPES[chosen[name].type if name in chosen else "F32"].bits_per_weight
        total += numel * bits / 8
        if roles[name] in linears:
            linear_bits += numel * bits
            num_linear += numel
        if roles[name] == head:
            head_bits = bits
    return Variant(f"GGUF {file_type}", int(total), linear_bits / num_linear, head_bits)


def _blocks(model: PaperModel, matrix: Matrix) -> list[int | None]:
    """Where a role's matrices are, as far as the rules of types ask: how many blocks have them."""
    if matrix.role not in model.architecture.block_roles:
        return [None]
    sparse = matrix.role in ("experts_gate", "experts_up", "experts_down")
    experts = model.config.experts
    per_block = experts.count if sparse and experts is not None else 1
    count = matrix.count // per_block
    # Blocks without experts come first, where a model has both kinds.
    first = model.config.num_layers - count if _is_sparse_role(matrix.role) else 0
    return list(range(first, first + count))


def _is_sparse_role(role: Role) -> bool:
    return role.startswith(("experts", "shared", "router"))
