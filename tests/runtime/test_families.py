"""Every family of the native decoder, through the paged engine: transformers' own greedy text.

Prompts of several lengths run together, cut into chunks, so that steps mix prefill and decode and
windows are passed. transformers reads prompt and answer at once: each token of the answer has to be
its likeliest after those before it, which is what generating one by one means.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.arch import ARCHITECTURES
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.loading import load_model

PROMPTS = {"long": range(100, 170), "short": (5, 900, 17), "middle": range(2000, 2025)}
NEW_TOKENS = {"long": 64, "short": 16, "middle": 16}
# What shows a family's own way best, where the tiny checkpoint's defaults do not.
OVERRIDES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "phi3": {"partial_rotary_factor": 0.5},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
    },
}
NATIVE = [name for name, row in ARCHITECTURES.items() if row.native]


def generate(model: Path, **options: Any) -> dict[str, list[int]]:
    loaded = load_model(str(model), dtype="float32")
    settings = {"block_size": 8, "max_num_batched_tokens": 32, **options}
    engine = Engine(loaded, EngineConfig(str(model), **settings))
    found: dict[str, list[int]] = {name: [] for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS[name], ignore_eos=True)
        engine.add(GenerationRequest(name, tuple(prompt), sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id] += output.new_token_ids
        engine.blocks.check()
    return found


@pytest.mark.parametrize("family", NATIVE)
def test_greedy_text_of_the_engine_is_that_of_transformers(
    family: str,
    tiny_checkpoint: Callable[..., Path],
    transformers_logits: Callable[[Path, Tensor], Tensor],
) -> None:
    folder = tiny_checkpoint(family, eos_token_id=None, **OVERRIDES.get(family, {}))
    found = generate(folder)
    for name, prompt in PROMPTS.items():
        assert len(found[name]) == NEW_TOKENS[name]
        read = torch.tensor([[*prompt, *found[name][:-1]]])
        likeliest = transformers_logits(folder, read)[0, len(prompt) - 1 :].argmax(-1)
        assert found[name] == likeliest.tolist(), name
