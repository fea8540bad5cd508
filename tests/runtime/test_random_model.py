"""Models of random weights are built and run like any other."""

import torch

from qtool.runtime.memory import least_weight_bytes
from qtool.runtime.random_model import QWEN_05B, RandomReader, random_model
from qtool.scheme import QuantScheme

TINY = {
    **QWEN_05B,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}


def test_linears_are_in_the_scheme_and_the_rest_is_plain() -> None:
    loaded = random_model(TINY, "int4-g128-sym")
    stored = {use.layer: use.weight for use in loaded.kernels}
    assert stored["down"] == "int4-g128-sym"
    assert stored["head"].startswith("the embedding")
    logits = loaded.logits(torch.arange(20)[None])
    assert logits.shape == (1, 20, 512)
    assert torch.isfinite(logits).all()


def test_without_a_scheme_weights_are_bfloat16_and_a_seed_gives_them_again() -> None:
    tokens = torch.arange(12)[None]
    first, again, other = (random_model(TINY, None, seed).logits(tokens) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_its_headers_say_what_it_holds() -> None:
    reader = RandomReader(QWEN_05B, QuantScheme.parse("int4-g128-sym"), seed=0)
    # 136 million in the embedding at 2 bytes, 358 million in the blocks at half a byte.
    assert round(least_weight_bytes(reader, torch.bfloat16) / 1e6) == 451
