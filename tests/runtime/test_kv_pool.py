"""The KV pool: as many bytes as the arithmetic says, and whole blocks copied and cleared."""

from dataclasses import dataclass

import pytest
import torch

from qtool.runtime.config import KvCacheDtype
from qtool.runtime.engine.kv_pool import KVPool, block_bytes
from qtool.runtime.models.attention_spec import AttentionSpec

CPU = torch.device("cpu")
GROUPED = AttentionSpec(num_heads=6, num_kv_heads=2, key_dim=24, value_dim=16, scale=0.2)
LATENT = AttentionSpec(
    num_heads=4, num_kv_heads=1, key_dim=40, value_dim=32, scale=0.2, value_in_key=True
)


@dataclass(frozen=True)
class Model:
    """What the arithmetic asks of a model."""

    attention: tuple[AttentionSpec, ...]
    dtype: torch.dtype


def make_pool(kv_cache_dtype: KvCacheDtype, dtype: torch.dtype = torch.bfloat16) -> KVPool:
    return KVPool((GROUPED, LATENT), 5, 8, kv_cache_dtype, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_pool_has_the_bytes_of_its_blocks(
    kv_cache_dtype: KvCacheDtype, dtype: torch.dtype
) -> None:
    pool = make_pool(kv_cache_dtype, dtype)
    model = Model((GROUPED, LATENT), dtype)
    assert pool.nbytes == 5 * block_bytes(model, 8, kv_cache_dtype)  # type: ignore[arg-type]


def test_a_token_in_8_bits_takes_a_byte_a_channel_and_its_scales() -> None:
    model = Model((GROUPED,), torch.bfloat16)
    assert block_bytes(model, 1, "int8") == 2 * (24 + 16) + 2 * 2 * 4  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_blocks_are_copied_up_to_a_token_and_cleared_whole(kv_cache_dtype: KvCacheDtype) -> None:
    pool = make_pool(kv_cache_dtype)
    parts = [part for layer in pool.layers for part in layer.tensors]
    for part in parts:
        part.copy_(torch.randint(1, 100, part.shape))
    before = [part.clone() for part in parts]
    pool.copy_block(1, 3, 5)
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part[:, 24:29], old[:, 8:13])
        assert torch.equal(part[:, 29:], old[:, 29:])
        assert torch.equal(part[:, :24], old[:, :24])
    pool.clear([0, 3])
    for part, old in zip(parts, before, strict=True):
        assert not bool(part[:, :8].any())
        assert not bool(part[:, 24:32].any())
        assert torch.equal(part[:, 8:24], old[:, 8:24])


def test_values_inside_keys_take_no_memory_of_their_own() -> None:
    layer = make_pool("int8").layers[1]
    assert layer.values.data_ptr() == layer.keys.data_ptr()
    assert layer.scales is not None
    assert layer.scales[0] is layer.scales[1]
    assert len(layer.tensors) == 2
