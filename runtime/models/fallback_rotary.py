"""Rotary embeddings in transformers' code that depend on the length of a sequence.

Such a module looks at the longest position of a step, so it would turn one sequence by the length
of another, and keys that are cached already by another length than the queries. Here each is
settled: it turns by the frequencies of the longest sequence that a model serves, whatever a step
holds. PhiMoE also looks up, at each step, a magnitude for short or for long sequences; it takes the
frequencies for short ones always, which its authors' code does not.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

KINDS = ("longrope", "dynamic")
SHORT, LONG = "short_mscale", "long_mscale"


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A settled module and what it turns by.

    kind         of KINDS
    scales       PhiMoE's magnitudes for short and for long sequences; None: it has no such
    frequencies  inverse, [half of the rotated channels] float32
    magnitude    of `scales`
    """

    module: Any
    kind: str
    scales: tuple[float, float] | None
    frequencies: Tensor
    magnitude: float | None = None

    @classmethod
    def settle(cls, module: Any, device: torch.device) -> Turn:
        """The module is changed: it asks `apply` for what it used to work out."""
        kind, parameters = module.rope_type, module.config.rope_parameters
        scales = None
        if LONG in parameters:
            scales = float(parameters[SHORT]), float(parameters[LONG])
            module.config = copy.deepcopy(module.config)
        module.rope_type = "default"
        return cls(module, kind, scales, torch.empty(0)).for_context(1, device)

    def for_context(self, num_tokens: int, device: torch.device) -> Turn:
        config = self.module.config
        frequencies: Tensor = ROPE_INIT_FUNCTIONS[self.kind](config, device, seq_len=num_tokens)[0]
        magnitude = None
        if self.scales is not None:
            limit = config.rope_parameters["original_max_position_embeddings"]
            magnitude = self.scales[num_tokens > limit]
        return dataclasses.replace(self, frequencies=frequencies, magnitude=magnitude)

    def apply(self) -> None:
        """Of models that share the module, the one that is about to run."""
        if self.magnitude is None:
            self.module.inv_freq = self.frequencies
            return
        self.module.config.rope_parameters |= {SHORT: self.magnitude, LONG: self.magnitude}
        self.module.rope_init_fn = lambda config: (self.frequencies, 1.0)


def settle_turns(base: nn.Module, device: torch.device) -> tuple[Turn, ...]:
    return tuple(
        Turn.settle(module, device)
        for module in base.modules()
        if getattr(module, "rope_type", None) in KINDS and hasattr(module, "inv_freq")
    )
