"""Linears of transformers' modules, run by our kernels.

A linear that the file holds packed stays so, and one in 16 bit is laid out for the CPU once, as in
the native decoder. Only modules that were seen to be called are replaced: code that takes a
linear's weight and multiplies by itself keeps the linear that it has.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.formats import WeightReader
from qtool.kernels.dispatch import describe
from qtool.runtime.layers import Linear, PackingRules, pack
from qtool.runtime.models.build import KernelUse
from qtool.weights import DenseWeight, Weight


class PackedLinear(nn.Module):
    """`weight` says its type, shape and device to code that asks for them, and holds nothing."""

    def __init__(self, linear: Linear, like: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = None
        self.weight = like.weight.new_zeros(1).expand(like.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear(x.reshape(-1, self.in_features))
        return rows.view(*x.shape[:-1], self.out_features)


@contextmanager
def called_linears(model: nn.Module) -> Iterator[set[str]]:
    """Names of the linears that are called while the context lasts."""
    names: set[str] = set()

    def note(name: str) -> Any:
        return lambda *unused: names.add(name)

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def pack_modules(
    model: nn.Module,
    names: Collection[str],
    reader: WeightReader,
    dtype: torch.dtype,
    device: torch.device,
    rules: PackingRules,
) -> tuple[tuple[KernelUse, ...], int]:
    """Replace these linears; returns what runs them, and the bytes of their packed weights."""
    shared = Counter(parameter.data_ptr() for _, parameter in _parameters(model))
    packed_in_file = set(reader.modules())
    uses: Counter[tuple[str, str, str, str]] = Counter()
    nbytes = 0
    for name in sorted(names):
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        if shared[module.weight.data_ptr()] > 1:  # a tied head: the embedding needs it as it is
            continue
        weight: Weight = DenseWeight(module.weight.data)
        if name in packed_in_file and reader.describe(name).shape == weight.shape:
            weight = reader.weight(name)
        bias = None if module.bias is None else module.bias.data
        fused = pack([weight], [bias], dtype, device, rules)
        assert isinstance(fused.layer, Linear)
        (choice,) = fused.choices
        uses[name.rpartition(".")[2], describe(weight), choice.kernel.name, choice.reason] += 1
        nbytes += fused.layer.nbytes
        model.set_submodule(name, PackedLinear(fused.layer, module))
    return tuple(KernelUse(*key, count) for key, count in uses.items()), nbytes


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)
