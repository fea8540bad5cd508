"""Linears of transformers' modules, run by our kernels.

A linear that the file holds packed is never unpacked: its module is loaded with a placeholder, and
packed from the file. One in 16 bit is laid out for the CPU once, as in the native decoder. Only
modules that are seen to be called stay replaced: code that takes a linear's weight and multiplies
by itself gets the weight.
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
from qtool.runtime.models.kernel_use import Use
from qtool.weights import DenseWeight


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
        if type(module) in (nn.Linear, PackedLinear)
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def packed_in_file(skeleton: nn.Module, reader: WeightReader) -> set[str]:
    """Linears of a model (which may be on the meta device) that the file holds packed."""
    packed = set(reader.modules())
    return {
        name
        for name, module in skeleton.named_modules()
        if type(module) is nn.Linear
        and name in packed
        and reader.describe(name).shape == tuple(module.weight.shape)
    }


def pack_modules(
    model: nn.Module,
    names: Collection[str],
    reader: WeightReader,
    dtype: torch.dtype,
    device: torch.device,
    rules: PackingRules,
) -> list[Use]:
    """Replace these linears, each by the file's weight where that is packed, else by its own."""
    shared = Counter(
        parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    packed = packed_in_file(model, reader)
    uses = []
    for name in sorted(names):
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        if shared[module.weight.data_ptr()] > 1:  # a tied head: the embedding needs it as it is
            continue
        weight = reader.weight(name) if name in packed else DenseWeight(module.weight.data)
        bias = None if module.bias is None else module.bias.data
        fused = pack([weight], [bias], dtype, device, rules)
        assert isinstance(fused.layer, Linear)
        (choice,) = fused.choices
        role = name.rpartition(".")[2]
        uses.append(Use(role, describe(weight), choice.kernel.name, choice.reason))
        model.set_submodule(name, PackedLinear(fused.layer, module))
    return uses


def unpack_modules(
    model: nn.Module,
    names: Collection[str],
    reader: WeightReader,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give these modules their weights, dequantized."""
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, PackedLinear)
        bias = module.linear.bias
        linear = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta")
        values = reader.tensor(f"{name}.weight").to(device, dtype)
        linear.weight = nn.Parameter(values, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        model.set_submodule(name, linear)


def model_bytes(model: nn.Module) -> int:
    """Of weights in memory, each counted once."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    plain = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    return sum(plain.values()) + sum(module.linear.nbytes for module in packed)
