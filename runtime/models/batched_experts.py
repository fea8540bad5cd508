"""Experts that one kernel multiplies by at once, where all of them are packed for it alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qtool.kernels.cuda import experts
from qtool.kernels.cuda.experts import Experts
from qtool.kernels.cuda.fused import Activation
from qtool.kernels.cuda.marlin_linear import MarlinPacked
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.mlp import Mlp
from qtool.runtime.models.parts import GATED

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")


def batch(each: Sequence[Mlp | None]) -> tuple[tuple[Mlp | None, ...], Experts | None]:
    """The same experts in one memory, and what computes them at once; None if nothing does."""
    mlps = [mlp for mlp in each if mlp is not None]
    activation = next(
        (name for name in ACTIVATIONS if mlps and mlps[0].activate is GATED[name]), None
    )
    gate_up, down = (
        [_packed(layer) for layer in part] for part in zip(*map(_layers, mlps), strict=True)
    )
    found = [packed for packed in (*gate_up, *down) if packed is not None]
    if activation is None or len(mlps) < len(each) or len(found) < 2 * len(mlps):
        return tuple(each), None
    stacked = experts.stack(found[: len(mlps)], found[len(mlps) :], activation)
    if stacked is None:
        return tuple(each), None
    views = tuple(
        dataclasses.replace(
            mlp,
            up=_seen(mlp.up, experts.view(stacked.gate_up, index)),
            down=_seen(mlp.down, experts.view(stacked.down, index)),
        )
        for index, mlp in enumerate(mlps)
    )
    return views, stacked


def _layers(mlp: Mlp) -> tuple[Linear | Linears, Linear | Linears]:
    return mlp.up, mlp.down


def _packed(layer: Linear | Linears) -> MarlinPacked | None:
    """Of a linear without a bias."""
    if isinstance(layer, Linear) and layer.bias is None and isinstance(layer.packed, MarlinPacked):
        return layer.packed
    return None


def _seen(layer: Linear | Linears, packed: MarlinPacked) -> Linear:
    assert isinstance(layer, Linear)
    return dataclasses.replace(layer, packed=packed)
