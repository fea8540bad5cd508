"""A decoder whose blocks lie on several devices, one stretch after the other.

    x = parts[0].embed(tokens)
    each part:  x = its blocks (x, moved to its device)
    logits = parts[-1].logits(x)

A part is a `Decoder` of some of the blocks, whose attention numbers its layers from 0. What belongs
to the whole is in all parts and used in one: the embedding in the first, norm and head in the last.
So a part runs by whatever runs a decoder on its device, and each has a KV cache of its own there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.decoder_config import DecoderConfig
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.model import Attend
from qtool.runtime.models.parts import Norm


@dataclass(frozen=True, slots=True)
class Stretch:
    """Blocks, by their numbers in the whole model, and the device that they are on."""

    blocks: range
    device: torch.device


@dataclass(frozen=True, slots=True, eq=False)
class SplitDecoder:
    """part_bytes  of each part's weights"""

    parts: tuple[Decoder, ...]
    stretches: tuple[Stretch, ...]
    part_bytes: tuple[int, ...]

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        return tuple(spec for part in self.parts for spec in part.attention)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where tokens are looked up."""
        return self.parts[0].device

    @property
    def vocab_size(self) -> int:
        return self.parts[0].vocab_size

    @property
    def norm(self) -> Norm:
        return self.parts[-1].norm

    @property
    def num_ranks(self) -> int:
        return 1

    @property
    def whole_config(self) -> DecoderConfig:
        layers = tuple(layer for part in self.parts for layer in part.config.layers)
        return dataclasses.replace(self.parts[0].config, layers=layers)

    @property
    def looked_up_bytes(self) -> int:
        """See `Decoder.looked_up_bytes`."""
        return self.parts[-1].looked_up_bytes

    def place(self, part: int) -> str:
        """Which layers a part has and where they are: "0 to 19 on cpu"."""
        stretch = self.stretches[part]
        blocks = f"{stretch.blocks[0]} to {stretch.blocks[-1]}" if stretch.blocks else ""
        names = [blocks] if blocks else []
        if part == len(self.parts) - 1:
            names.append("head")
        return f"{' and '.join(names)} on {stretch.device.type}"

    def for_context(self, num_tokens: int) -> SplitDecoder:
        parts = tuple(part.for_context(num_tokens) for part in self.parts)
        return dataclasses.replace(self, parts=parts)

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """As `Decoder.hidden`; the result is on the last part's device, and so is what `attend`
        gets of each part on that part's.
        """
        x = self.parts[0].embed(token_ids)
        first = 0
        for part in self.parts:
            x = part.through(
                x.to(part.device), positions.to(part.device), _numbered_from(attend, first)
            )
            first += len(part.attention)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return self.parts[-1].logits(hidden)


def _numbered_from(attend: Attend, first: int) -> Attend:
    """A part's `attend`, from the whole model's."""

    def own(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(first + layer, query, key, value)

    return own
