"""Hugging Face names to GGUF's and back, for the families of qtool/arch.py.

Names come from the table of families. Where the two differ in more than names:

    q and k      llama.cpp rotates adjacent pairs in some architectures (x0 with x1) where Hugging
                 Face rotates halves (x0 with x[d/2]). Files hold the rows in another order:
                     HF    row (head, half, j)     half in 0..1, j in 0..d/2-1
                     GGUF  row (head, j, half)     d = 4: rows 0 1 2 3 of a head become 0 2 1 3
                 A permutation of rows: it applies to dense values, to codes with their scales and
                 to the bytes of blocks alike.
    experts      a matrix each, one stack [experts, out, in] in GGUF
    kv_b         one matrix, of each head's keys and then its values; two stacks by head in GGUF:
                 attn_k_b [heads, latent, keys] (transposed) and attn_v_b [heads, values, latent]
    Conv1D       stored [in, out], transposed in GGUF
    norms        GGUF stores 1 + weight where the model multiplies by that
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.arch import Architecture, Role
from qtool.convert.gguf.sizes import STACKED, Sizes
from qtool.errors import UnsupportedModel

# Buffers that old checkpoints carry along; they follow from the config.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
# Tensors whose names are whole: neither ".weight" nor ".bias" is added.
_WHOLE: tuple[Role, ...] = ("router_bias",)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module is.

    gguf    GGUF's name of it, without ".weight"
    expert  its index in a stack, or None
    """

    gguf: str
    role: Role
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class NameMap:
    """Module names of one model, both ways; a tensor's name adds ".weight" or ".bias"."""

    architecture: Architecture
    config: Sizes
    _places: Mapping[str, Place]
    _modules: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, architecture: Architecture, config: Sizes) -> NameMap:
        places: dict[str, Place] = {}
        modules: dict[str, tuple[str, ...]] = {}
        in_blocks = set(architecture.block_roles)
        for role in architecture.tensors:
            blocks = range(config.num_layers) if role in in_blocks else (None,)
            experts = range(config.num_experts) if role in STACKED else (None,)
            for block in blocks:
                # a head that is tied may still be stored
                if role != "head" and not config.has(architecture, role, block):
                    continue
                gguf = architecture.gguf_tensor(role, block)
                hf = [architecture.hf_name(role, block, expert) for expert in experts]
                modules[gguf] = tuple(hf)
                if role == "kv_b":
                    modules |= {gguf.replace("kv_b", half): tuple(hf) for half in ("k_b", "v_b")}
                for name, expert in zip(hf, experts, strict=True):
                    places[name] = Place(gguf, role, expert)
        return cls(architecture, config, places, modules)

    def to_gguf(self, name: str) -> str | None:
        """GGUF's name of a Hugging Face tensor; None for one that is derived and not stored."""
        if name.endswith(_IGNORED_SUFFIXES):
            return None
        found = self.place(name)
        if found is None:
            raise UnsupportedModel(
                f"tensor {name!r} has no place in GGUF's {self.architecture.gguf_name} architecture"
            )
        if found.role in _WHOLE:
            return found.gguf
        return f"{found.gguf}.{name.rpartition('.')[2]}"

    def place(self, name: str) -> Place | None:
        """Where a Hugging Face tensor is; None where it is nowhere."""
        return self._find(name) or self._find(f"{self._base}{name}")

    def full_name(self, name: str) -> str:
        """A tensor's name with the prefix that checkpoints of the bare model leave out: "h.0.ln_1"
        is "transformer.h.0.ln_1".
        """
        return name if self._find(name) is not None else f"{self._base}{name}"

    @property
    def _base(self) -> str:
        return self.architecture.hf_name("embed").partition(".")[0] + "."

    def _find(self, name: str) -> Place | None:
        found = self._places.get(name)
        if found is not None and found.role in _WHOLE:
            return found
        module, _, suffix = name.rpartition(".")
        return self._places.get(module) if suffix in ("weight", "bias") else None

    def to_hf(self, name: str) -> str:
        """The Hugging Face name of a GGUF tensor; the first of them where it is a stack."""
        return self.all_hf(name)[0]

    def all_hf(self, name: str) -> list[str]:
        """Every Hugging Face tensor that is in a GGUF tensor, in the order of the stack."""
        if name in self._modules:
            return list(self._modules[name])
        module, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias") or module not in self._modules:
            raise UnsupportedModel(
                f"GGUF tensor {name!r} is not one of the {self.architecture.gguf_name} architecture"
            )
        return [f"{hf}.{suffix}" for hf in self._modules[module]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape [out, in] that the config gives a Hugging Face tensor."""
        found = self.place(name)
        assert found is not None, name
        shape = self.config.shape(found.role)
        is_bias = name.endswith(".bias") and found.role not in _WHOLE
        return shape[:1] if is_bias else shape

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The same as a checkpoint has it, where it stores linears as [in, out]."""
        found = self.place(name)
        shape = self.shape(name)
        transposed = found is not None and found.role in self.architecture.transposed
        return shape[::-1] if transposed else shape

    def required(self) -> list[str]:
        """Hugging Face names of the weights that a model cannot be without."""
        tied = self.config.tie_word_embeddings
        return [
            module if place.role in _WHOLE else f"{module}.weight"
            for module, place in self._places.items()
            if place.role != "head" or not tied
        ]

    def row_order(self, module: str) -> Tensor | None:
        """int64 [out]: which Hugging Face row each GGUF row of a module is; None where the same."""
        if not self.architecture.rope_interleaved_in_gguf:
            return None
        heads = {"q": self.config.num_heads, "k": self.config.num_kv_heads}
        found = self.place(f"{module}.weight")
        role = "" if found is None else found.role
        return interleave_rows(heads[role], self.config.head_dim) if role in heads else None

    def offset(self, name: str) -> float:
        """What GGUF adds to a tensor's values."""
        found = self.place(name)
        is_norm = found is not None and len(self.config.shape(found.role)) == 1
        return self.architecture.norm_offset if is_norm and name.endswith(".weight") else 0.0


def interleave_rows(heads: int, head_dim: int) -> Tensor:
    """gguf = hf[order]. For one head of 4: [0, 2, 1, 3]."""
    rows = torch.arange(heads * head_dim)
    return rows.view(heads, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def deinterleave_rows(heads: int, head_dim: int) -> Tensor:
    """hf = gguf[order], the inverse. For one head of 6: [0, 2, 4, 1, 3, 5]."""
    rows = torch.arange(heads * head_dim)
    return rows.view(heads, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def inverse_order(order: Tensor) -> Tensor:
    return torch.argsort(order)
