"""Rotary frequencies, in every stretch, are transformers' own."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtool.rope import Rope, read_rope

TRAINED = 131072
HEAD_DIM = 64
STRETCHES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn, all said": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "factor": 32.0,
        "short_factor": [1.0 + i / 10 for i in range(HEAD_DIM // 2)],
        "long_factor": [1.0 + i for i in range(HEAD_DIM // 2)],
    },
}


def read(parameters: dict[str, Any]) -> Rope:
    config = {"max_position_embeddings": TRAINED}
    return read_rope(config, parameters, head_dim=HEAD_DIM, theta=5e5)


@pytest.mark.parametrize("context", [100, 2 * TRAINED])
@pytest.mark.parametrize("name", STRETCHES)
def test_frequencies_and_factors_are_transformers_own(name: str, context: int) -> None:
    parameters = {"rope_theta": 5e5, **STRETCHES[name]}
    config = LlamaConfig(
        head_dim=HEAD_DIM, rope_parameters=parameters, max_position_embeddings=TRAINED
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=context)
    rope = read(parameters)
    found = torch.tensor(rope.inverse_frequencies(HEAD_DIM, context))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor)


def test_a_share_of_the_channels_turns() -> None:
    rope = read({"rope_type": "default", "partial_rotary_factor": 0.25})
    assert rope.rotated_channels(HEAD_DIM) == 16
    assert rope.inverse_frequencies(HEAD_DIM) == Rope(5e5).inverse_frequencies(16)


def test_no_stretch_depends_on_a_length_that_the_model_was_made_for() -> None:
    for parameters in STRETCHES.values():
        rope = read(parameters)
        assert rope.inverse_frequencies(HEAD_DIM) == rope.inverse_frequencies(HEAD_DIM, 4096)
