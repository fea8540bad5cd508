"""Of every native family: a checkpoint has the tensors that are expected and no others, and each of
them is missed by name when it is gone or has another shape.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.arch import ARCHITECTURES, find_architecture
from qtool.convert.formats import Held, WeightReader, open_weights
from qtool.decoder_config import DecoderConfig
from qtool.errors import FormatError
from qtool.runtime.models.tensors import check_tensors, expected_tensors
from qtool.source import resolve

NATIVE = [name for name, row in ARCHITECTURES.items() if row.native]
# A family's other tensors, where the tiny checkpoint has not all of them.
MORE: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2_moe": {"num_hidden_layers": 2, "mlp_only_layers": [0]},
}


class Damaged:
    """A reader that hides one tensor, or tells another shape of it."""

    def __init__(self, reader: WeightReader, name: str, *, cut: bool) -> None:
        self._reader, self._name, self._cut = reader, name, cut

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def has(self, name: str) -> bool:
        return self._reader.has(name) and (self._cut or name != self._name)

    def describe(self, name: str) -> Held:
        held = self._reader.describe(name)
        if name != self._name:
            return held
        return dataclasses.replace(held, shape=(held.shape[0] - 1, *held.shape[1:]))


@pytest.mark.parametrize("family", NATIVE)
def test_every_tensor_is_expected_and_missed_by_name(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    reader = open_weights(resolve(str(tiny_checkpoint(family, **MORE.get(family, {})))))
    architecture = find_architecture(reader.config)
    config = DecoderConfig.from_hf(reader.config)
    expected = list(expected_tensors(architecture, config))
    names = {tensor.name for tensor in expected}
    required = {tensor.name for tensor in expected if not tensor.optional}
    assert required <= set(reader.tensor_names()) <= names
    check_tensors(reader, architecture, config)
    for name in reader.tensor_names():
        cut = Damaged(reader, name, cut=True)
        with pytest.raises(FormatError) as raised:
            check_tensors(cut, architecture, config)
        assert f"{name} has shape" in raised.value.message
        if name in required:
            hidden = Damaged(reader, name, cut=False)
            with pytest.raises(FormatError) as raised:
                check_tensors(hidden, architecture, config)
            assert f"{name} is missing" in raised.value.message
