"""A checkpoint seen in turned coordinates: the same function, with outliers spread over channels.

    R1  the residual stream: x Q in x's place, in what writes it, and back in what reads it
    R2  each head's values: v R in v's place, and back in the output projection

(QuaRot, arXiv 2404.00456; SpinQuant's names.) Nothing is computed while the model runs: all of it
is in the weights, and the result is an ordinary model of its family. A norm stands between the
stream and its readers. x / rms(x) turns with x, its gain does not, so that the gain g goes into
the readers first:

    reader  W <- W diag(g) Q     writer  W <- Q^T W, b <- b Q     norm  g <- 1
    v       W <- R^T W           o       W <- W R

LayerNorm takes the mean away too, and is turned by a Q that leaves the mean alone (rotation.py);
its bias stays behind it as (b / g) Q. A head that is the embedding again would be turned without
the last norm's gain, so that it is stored on its own.

It is the reading of a tensor that turns it: the pass over the blocks, the rounding of single
tensors, the writer and the verifier all see a checkpoint as any other, a tensor at a time, and a
run that goes on after a crash sees the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.arch import Architecture, Role, find_family
from qtool.checkpoint import Checkpoint
from qtool.errors import UnsupportedModel
from qtool.quantize.rotation import Rotation, rotation

R1, R2 = "R1", "R2"

_AFTER_ATTENTION_NORM: tuple[Role, ...] = ("q", "k", "v", "qkv", "q_a", "kv_a")
_AFTER_MLP_NORM: tuple[Role, ...] = (
    "gate", "up", "gate_up", "router", "experts_gate", "experts_up",
    "shared_gate", "shared_up", "shared_router",
)  # fmt: skip
_WRITERS: tuple[Role, ...] = ("o", "down", "experts_down", "shared_down")
_TABLES: tuple[Role, ...] = ("embed", "positions")
_NORMS: tuple[Role, ...] = ("attn_norm", "mlp_norm", "norm")
# What neither turn touches, being behind a reader.
_INSIDE: tuple[Role, ...] = (
    "q_norm", "k_norm", "q_a_norm", "q_b", "kv_a_norm", "kv_b", "router_bias",
)  # fmt: skip
UNTIED = (
    "R1 stores the head apart from the embedding that it was: the last norm's gain goes into it"
)


class Place(NamedTuple):
    """A tensor of a checkpoint, by the table of families."""

    role: Role
    block: int | None
    is_bias: bool


class Heads(NamedTuple):
    """queries  how many heads there are; width  of a head's values"""

    queries: int
    width: int


@dataclass(frozen=True, slots=True)
class RotatedCheckpoint(Checkpoint):
    """source  as it lies on disk
    turns   what is done to the tensor of a name, in float32 at least
    copies  names that the source does not have, and what they are made of
    """

    source: Checkpoint | None = None
    turns: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the source: what is stored apart takes more in the artifact alone."""
        assert self.source is not None
        return self.source.nbytes

    def tensor(self, name: str) -> Tensor:
        assert self.source is not None
        stored = self.source.tensor(self.copies.get(name, name))
        turn = self.turns.get(name)
        if turn is None:
            return stored
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        return turn(wide).to(stored.dtype).contiguous()


def rotated(checkpoint: Checkpoint, rotations: Sequence[str], seed: int = 0) -> RotatedCheckpoint:
    """The checkpoint with its residual stream (R1), its heads' values (R2) or both turned.

    Raises UnsupportedModel for families whose structure does not let a turn through, with why.
    """
    family = find_family(checkpoint.config)
    places = {name: _place(name, family) for name in checkpoint.tensors}
    turns: dict[str, Callable[[Tensor], Tensor]] = {}
    config, tensors, copies = dict(checkpoint.config), dict(checkpoint.tensors), dict[str, str]()
    maker = _Maker(checkpoint, family, {place: name for name, place in places.items() if place})
    if R1 in rotations:
        _refuse_unknown(family, places, checkpoint)
        head = f"{family.hf_name('head')}.weight"
        embedding = f"{family.hf_name('embed')}.weight"
        if _is_tied(checkpoint, head):
            config["tie_word_embeddings"] = False
            tensors[head] = replace(checkpoint.tensors[embedding], name=head)
            places[head] = Place("head", None, False)
            copies[head] = embedding
        stream = rotation(maker.hidden, seed, keeps_mean=maker.has_mean)
        for name, place in places.items():
            made = maker.r1(name, place, stream) if place is not None else None
            if made is not None:
                turns[name] = made
    if R2 in rotations:
        heads = _heads(family, checkpoint.config)
        values = rotation(heads.width, seed + 1)
        for name, place in places.items():
            made = maker.r2(place, values, heads) if place is not None else None
            if made is not None:
                turns[name] = _both(turns.get(name), made)
    return RotatedCheckpoint(
        checkpoint.folder,
        config,
        tensors,
        checkpoint.mapped,
        source=checkpoint,
        turns=turns,
        copies=copies,
    )


def unties(checkpoint: Checkpoint) -> bool:
    """Whether the view stores a head that was the embedding's twin."""
    return isinstance(checkpoint, RotatedCheckpoint) and bool(checkpoint.copies)


def _is_tied(checkpoint: Checkpoint, head: str) -> bool:
    return bool(checkpoint.config.get("tie_word_embeddings")) or head not in checkpoint


def _place(name: str, family: Architecture) -> Place | None:
    module, _, suffix = name.rpartition(".")
    for role, tensor in family.tensors.items():
        pattern = re.escape(tensor.hf).replace(r"\{i\}", r"(\d+)").replace(r"\{e\}", r"\d+")
        found = re.fullmatch(pattern, module if suffix in ("weight", "bias") else name)
        if found is None and suffix == "bias":
            found = re.fullmatch(pattern, name)
        if found is not None:
            block = int(found[1]) if "{i}" in tensor.hf else None
            return Place(role, block, suffix == "bias" and role != "router_bias")
    return None


def _refuse_unknown(
    family: Architecture, places: Mapping[str, Place | None], checkpoint: Checkpoint
) -> None:
    after = [role for role in ("attn_post_norm", "mlp_post_norm") if role in family.tensors]
    if after:
        raise UnsupportedModel(
            f"{family.model_type} has norms after its layers, whose gains scale single channels of "
            "the residual stream: it cannot be turned",
            "the heads' values can: --rotations R2",
        )
    known = (*_AFTER_ATTENTION_NORM, *_AFTER_MLP_NORM, *_WRITERS, *_TABLES, *_NORMS, *_INSIDE)
    for name, place in places.items():
        if name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
            continue  # buffers that older files carry
        if place is None or (place.role not in known and place.role != "head"):
            raise UnsupportedModel(
                f"{checkpoint.folder.name} holds {name}, of which the table of families does not "
                "say whether it reads or writes the residual stream",
                "quantize without --rotations",
            )


def _heads(family: Architecture, config: Mapping[str, object]) -> Heads:
    if "kv_b" in family.tensors:
        raise UnsupportedModel(
            f"{family.model_type} makes keys and values in one latent projection: its heads cannot "
            "be turned apart",
            "R1 alone can: --rotations R1",
        )

    def number(*names: str) -> int | None:
        found = next((config[name] for name in names if config.get(name) is not None), None)
        return found if isinstance(found, int) else family.defaults.get(names[0])

    heads = number("num_attention_heads", "n_head") or 1
    hidden = number("hidden_size", "n_embd") or heads
    return Heads(heads, number("head_dim") or hidden // heads)


def _both(
    first: Callable[[Tensor], Tensor] | None, second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return second if first is None else lambda tensor: second(first(tensor))


@dataclass(frozen=True, slots=True)
class _Maker:
    """names  tensor of each place; a role with experts has one of them, which is not asked for"""

    checkpoint: Checkpoint
    family: Architecture
    names: Mapping[Place, str]

    @property
    def hidden(self) -> int:
        return self.checkpoint.tensors[self.names[Place("norm", None, False)]].shape[0]

    @property
    def has_mean(self) -> bool:
        return self.family.norm == "layer" or Place("norm", None, True) in self.names

    def r1(self, name: str, place: Place, q: Rotation) -> Callable[[Tensor], Tensor] | None:
        role, block, is_bias = place
        if role in _NORMS:
            gain, offset = self._gain(role, block), self.family.norm_offset
            if not is_bias:
                return lambda stored: torch.full_like(stored, 1.0 - offset)
            self._require_gains(name, gain())
            return lambda bias: q.turn(bias / gain().to(bias.dtype))
        if role in _WRITERS:
            if is_bias:
                return q.turn
            return self._in_rows(role, lambda weight: q.turn(weight.t()).t())
        if is_bias:
            return None
        if role in _TABLES:
            return q.turn
        norm = self._norm_of(role)
        if norm is None:
            return None
        gain = self._gain(norm, block)
        return self._in_rows(role, lambda weight: q.turn(weight * gain().to(weight.dtype)))

    def r2(self, place: Place, r: Rotation, heads: Heads) -> Callable[[Tensor], Tensor] | None:
        """v's rows and bias, o's columns."""
        role, _, is_bias = place

        def turn_rows(rows: Tensor) -> Tensor:
            """[values, ...], each head's rows mixed among themselves."""
            by_head = rows.reshape(rows.shape[0] // heads.width, heads.width, -1)
            return r.turn(by_head.transpose(1, 2)).transpose(1, 2).reshape(rows.shape)

        def turn_last(rows: Tensor) -> Tensor:
            """In a fused projection, q's rows come first, then k's, then as many of v."""
            kept = (rows.shape[0] + heads.queries * heads.width) // 2
            return torch.cat([rows[:kept], turn_rows(rows[kept:])])

        def turn_columns(weight: Tensor) -> Tensor:
            return r.turn(weight.reshape(weight.shape[0], -1, heads.width)).reshape(weight.shape)

        change = {"v": turn_rows, "qkv": turn_last, "o": turn_columns}.get(role)
        if change is None or (role == "o" and is_bias):
            return None
        return change if is_bias else self._in_rows(role, change)

    def _norm_of(self, role: Role) -> Role | None:
        """The norm that a reader of the stream stands behind."""
        if role == "head":
            return "norm"
        if role in _AFTER_MLP_NORM:
            return "mlp_norm" if "mlp_norm" in self.family.tensors else "attn_norm"
        if role in _AFTER_ATTENTION_NORM:
            return "attn_norm"
        return None

    def _gain(self, norm: Role, block: int | None) -> Callable[[], Tensor]:
        """What the norm multiplies by, read when it is asked for."""
        name = self.names[Place(norm, block, False)]
        offset = self.family.norm_offset

        def read() -> Tensor:
            stored = self.checkpoint.tensor(name)
            return stored.to(torch.promote_types(stored.dtype, torch.float32)) + offset

        return read

    def _require_gains(self, name: str, gain: Tensor) -> None:
        if bool((gain == 0).any()):
            raise UnsupportedModel(
                f"{name} is added where the norm's gain is zero, and cannot be turned",
                "quantize without --rotations",
            )

    def _in_rows(
        self, role: Role, change: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """A change of a weight [out, in], for one that may be stored [in, out]."""
        if role not in self.family.transposed:
            return change
        return lambda stored: change(stored.t()).t()
