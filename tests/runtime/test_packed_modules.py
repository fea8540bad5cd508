"""Modules of transformers give the same numbers with our linears in them as with their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qtool.convert.formats import WeightReader, open_weights
from qtool.runtime.layers import DEFAULT_RULES
from qtool.runtime.models.packed_modules import (
    PackedLinear,
    called_linears,
    model_bytes,
    pack_modules,
    unpack_modules,
)
from qtool.source import resolve

CPU = torch.device("cpu")
TOKENS = torch.arange(20)[None] * 50


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> tuple[Any, WeightReader]:
    folder = tiny_checkpoint("gpt_neox", tie_word_embeddings=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return loaded.requires_grad_(False), open_weights(resolve(str(folder)))


def test_linears_are_replaced_and_put_back(model: tuple[Any, WeightReader]) -> None:
    net, reader = model
    expected, size = net(TOKENS).logits, model_bytes(net)
    with called_linears(net) as called:
        net(TOKENS)
    assert len(called) == 2 * 4 + 1
    uses = pack_modules(net, called, reader, torch.float32, CPU, DEFAULT_RULES)
    replaced = {name for name, part in net.named_modules() if isinstance(part, PackedLinear)}
    # The head is the embedding's matrix, which has to stay as it is.
    assert len(called - replaced) == 1
    assert len(uses) == len(replaced) == 8
    torch.testing.assert_close(net(TOKENS).logits, expected, rtol=0, atol=1e-5)
    assert model_bytes(net) == size
    unpack_modules(net, replaced, reader, torch.float32, CPU)
    assert not any(isinstance(part, PackedLinear) for part in net.modules())
    torch.testing.assert_close(net(TOKENS).logits, expected, rtol=0, atol=1e-5)


def test_a_replaced_module_says_what_it_was(model: tuple[Any, WeightReader]) -> None:
    net, reader = model
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    before = net.get_submodule(name)
    pack_modules(net, {name}, reader, torch.float32, CPU, DEFAULT_RULES)
    after = net.get_submodule(name)
    assert not isinstance(after, nn.Linear)
    assert (after.in_features, after.out_features) == (before.in_features, before.out_features)
    assert after.weight.shape == before.weight.shape
    assert (after.weight.dtype, after.weight.device) == (before.weight.dtype, before.weight.device)
    assert after.weight.untyped_storage().nbytes() < 64
