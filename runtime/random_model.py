"""Models of real shapes with random weights, loaded by the runtime's own builder without a file.

Speed does not depend on the values of weights, and everybody can make these: no download, no
gigabytes on disk. What is served is what `load_model` would give for a checkpoint of the scheme.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.arch import find_architecture
from qtool.convert.formats import Held
from qtool.decoder_config import DecoderConfig
from qtool.runtime.layers import DEFAULT_RULES, PackingRules
from qtool.runtime.loading import LoadedModel
from qtool.runtime.models.load import plan_decoder
from qtool.runtime.models.tensors import expected_tensors
from qtool.scheme import QuantScheme
from qtool.source import Source
from qtool.weights import DenseWeight, QuantizedWeight, Weight

# config.json of Qwen/Qwen2.5-0.5B, without what has no bearing on the decoder's shape.
QWEN_05B: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
CPU = torch.device("cpu")
# Outside the blocks, and one number a channel: kept as they are.
PLAIN = ("embed", "norm", "bias")


class RandomReader:
    """A `WeightReader` of linears in one scheme and plain tensors in bfloat16."""

    format = "random"

    def __init__(
        self,
        config: Mapping[str, Any],
        scheme: QuantScheme | None,
        seed: int,
        *,
        repeat: bool = False,
    ) -> None:
        self._made: dict[tuple[int, ...], QuantizedWeight] | None = {} if repeat else None
        self.config = dict(config)
        self.source = Source("random", Path("random"))
        self._scheme = scheme
        self._generator = torch.Generator().manual_seed(seed)
        architecture = find_architecture(self.config)
        decoder = DecoderConfig.from_hf(self.config)
        self._shapes = {
            tensor.name: tensor.shape
            for tensor in expected_tensors(architecture, decoder)
            if not tensor.optional
        }

    def modules(self) -> list[str]:
        if self._scheme is None:
            return []
        return [
            name.removesuffix(".weight")
            for name, shape in self._shapes.items()
            if len(shape) == 2 and not any(word in name for word in PLAIN)
        ]

    def tensor_names(self) -> list[str]:
        packed = set(self.modules())
        return [name for name in self._shapes if name.removesuffix(".weight") not in packed]

    def describe(self, name: str) -> Held:
        if self._scheme is not None and f"{name}.weight" in self._shapes:
            return Held(self._shapes[f"{name}.weight"], str(self._scheme), self._scheme)
        return Held(self._shapes[name], "bfloat16")

    def weight(self, module: str) -> Weight:
        shape = self._shapes[f"{module}.weight"]
        if self._scheme is None or "embed" in module:
            return DenseWeight(self.tensor(f"{module}.weight"))
        if self._made is not None and shape in self._made:
            return self._made[shape]
        scheme = self._scheme
        codes = torch.randint(scheme.num_codes, shape, generator=self._generator, dtype=torch.uint8)
        groups = (shape[0], scheme.num_groups(shape[1]))
        # Weights of a standard deviation of about 0.02, as trained ones have.
        scales = torch.rand(groups, generator=self._generator) * 0.002 + 0.003
        zeros = None if scheme.symmetric else torch.full(groups, 8, dtype=torch.uint8)
        weight = QuantizedWeight(codes, scales.to(torch.bfloat16).float(), zeros, scheme)
        if self._made is not None:
            self._made[shape] = weight
        return weight

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1 and name.endswith(".weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=self._generator) * 0.02).to(torch.bfloat16)

    def has(self, name: str) -> bool:
        return name in self._shapes


def random_model(
    config: Mapping[str, Any] = QWEN_05B,
    scheme: str | None = "int4-g128-sym",
    seed: int = 0,
    *,
    rules: PackingRules = DEFAULT_RULES,
    device: torch.device = CPU,
    repeat: bool = False,
) -> LoadedModel:
    """scheme  of the linears; None: bfloat16
    rules   how they are packed
    repeat  whether linears of one shape are equal: large models are made in less time
    """
    parsed = None if scheme is None else QuantScheme.parse(scheme)
    reader = RandomReader(config, parsed, seed, repeat=repeat)
    with torch.inference_mode():
        built = plan_decoder(reader).load(torch.bfloat16, device, rules)
    return LoadedModel(
        source=reader.source,
        decoder=built.model,
        code=built.code,
        model_type=str(reader.config["model_type"]),
        max_position_embeddings=built.max_position_embeddings,
        tokenizer=None,
        eos_token_ids=(),
        dtype=torch.bfloat16,
        dtype_reason="as the model",
        device=device,
        format=scheme or "bfloat16",
        kernels=built.kernels,
        nbytes=built.nbytes,
    )
