"""Rotary position embedding: how far each pair of channels turns a position, in all its stretches.

A pair turns by theta^(-2i / d) a position. Models that were taught longer texts than they began
with stretch the slow pairs (config.json's rope_type):

    linear    every frequency divided by factor
    dynamic   theta grows with the length, once it is beyond what the model was made for ("NTK")
    llama3    short wavelengths stay, long ones are divided by factor, and a blend between
    yarn      the same idea with the bounds in turns over the original context, and a factor on the
              cosines and sines (https://arxiv.org/abs/2309.00071)
    longrope  a divisor for each pair, one list for contexts within the original one and another for
              longer ones, and a factor on both (https://arxiv.org/abs/2402.13753)

Keys are cached already turned, so dynamic and longrope depend on the longest sequence that a model
is to hold and never on the one at hand: `inverse_frequencies` takes it as `context`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qtool.errors import FormatError, UnsupportedModel

RopeKind = Literal["default", "linear", "llama3", "dynamic", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class Rope:
    """``kind`` says how frequencies are stretched, and which of the fields below it has a use.

    attention_factor  what cosines and sines are multiplied by (yarn, longrope)
    share             of a head's channels that turn, the first ones
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    share: float = 1.0

    def rotated_channels(self, head_dim: int) -> int:
        return int(head_dim * self.share)

    def inverse_frequencies(self, head_dim: int, context: int = 0) -> list[float]:
        """Radians a position for each rotated pair, [rotated_channels / 2].

        ``context`` is the longest sequence to come; 0 is no longer than the model was made for.
        """
        width = self.rotated_channels(head_dim)
        theta = self.theta
        original = self.original_max_position_embeddings
        if self.kind == "dynamic" and context > original:
            grown = self.factor * context / original - (self.factor - 1.0)
            theta *= grown ** (width / (width - 2))
        frequencies = [theta ** (-2.0 * i / width) for i in range(width // 2)]
        divisors = self.divisors(head_dim, context)
        return [f / d for f, d in zip(frequencies, divisors, strict=True)]

    def divisors(self, head_dim: int, context: int = 0) -> list[float]:
        """What each frequency is divided by; GGUF stores llama3's as rope_freqs.weight."""
        width = self.rotated_channels(head_dim)
        pairs = width // 2
        if self.kind in ("default", "dynamic"):
            return [1.0] * pairs
        if self.kind == "linear":
            return [self.factor] * pairs
        if self.kind == "yarn":
            return self._yarn_divisors(width)
        if self.kind == "longrope":
            is_long = context > self.original_max_position_embeddings
            return list(self.long_factors if is_long else self.short_factors)
        frequencies = [self.theta ** (-2.0 * i / width) for i in range(pairs)]
        return [self._llama3_divisor(2.0 * math.pi / f) for f in frequencies]

    def _llama3_divisor(self, wavelength: float) -> float:
        context = self.original_max_position_embeddings
        if wavelength < context / self.high_freq_factor:
            return 1.0
        if wavelength > context / self.low_freq_factor:
            return self.factor
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (context / wavelength - self.low_freq_factor) / span
        return 1.0 / ((1.0 - smooth) / self.factor + smooth)

    def _yarn_divisors(self, width: int) -> list[float]:
        def pair_of(turns: float) -> float:
            """The pair that makes this many turns over the original context."""
            ratio = self.original_max_position_embeddings / (turns * 2.0 * math.pi)
            return width * math.log(ratio) / (2.0 * math.log(self.theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        span = high - low if high != low else 0.001
        ramps = [min(max((i - low) / span, 0.0), 1.0) for i in range(width // 2)]
        return [1.0 / (ramp / self.factor + 1.0 - ramp) for ramp in ramps]


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1: how much yarn raises the scores of a stretched context."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(
    config: Mapping[str, Any], parameters: Mapping[str, Any], *, head_dim: int, theta: float
) -> Rope:
    """A Rope from one set of config.json's rope_parameters (rope_scaling before transformers 5).

    theta  where the parameters have no rope_theta of their own
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "su":  # the first name that Phi-3 gave to longrope
        kind = "longrope"
    if kind not in get_args(RopeKind):
        raise UnsupportedModel(
            f"config.json: rope type {kind!r} is not supported",
            f"known: {', '.join(get_args(RopeKind))}",
        )
    reader = _Reader(config, parameters)
    share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    share = 1.0 if share is None else float(share)
    theta = float(parameters.get("rope_theta") or theta)
    trained = int(config.get("max_position_embeddings") or 2048)
    if kind == "default":
        return Rope(theta=theta, share=share)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=reader.number("factor"), share=share)
    if kind == "dynamic":
        factor = reader.number("factor")
        return Rope(theta, "dynamic", factor, original_max_position_embeddings=trained, share=share)
    if kind == "llama3":
        return Rope(
            theta=theta,
            kind="llama3",
            factor=reader.number("factor", 8.0),
            low_freq_factor=reader.number("low_freq_factor", 1.0),
            high_freq_factor=reader.number("high_freq_factor", 4.0),
            original_max_position_embeddings=int(
                reader.number("original_max_position_embeddings", 8192)
            ),
            share=share,
        )
    original = config.get("original_max_position_embeddings")
    original = int(original or reader.number("original_max_position_embeddings", trained))
    factor = reader.number("factor", trained / original)
    if kind == "yarn":
        return Rope(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=reader.number("beta_fast", 32.0),
            beta_slow=reader.number("beta_slow", 1.0),
            truncate=bool(parameters.get("truncate", True)),
            attention_factor=reader.number("attention_factor", _yarn_factor(parameters, factor)),
            share=share,
        )
    grown = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
    pairs = int(head_dim * share) // 2
    return Rope(
        theta=theta,
        kind="longrope",
        factor=factor,
        original_max_position_embeddings=original,
        short_factors=reader.numbers("short_factor", pairs),
        long_factors=reader.numbers("long_factor", pairs),
        attention_factor=reader.number("attention_factor", grown),
        share=share,
    )


def _yarn_factor(parameters: Mapping[str, Any], factor: float) -> float:
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_magnitude(factor, float(mscale)) / yarn_magnitude(factor, float(all_dim))
    return yarn_magnitude(factor)


@dataclass(frozen=True, slots=True)
class _Reader:
    config: Mapping[str, Any]
    parameters: Mapping[str, Any]

    def number(self, key: str, default: float | None = None) -> float:
        value = self.parameters.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise FormatError(
                f"config.json: rope_parameters.{key} is {value!r}, a positive number is needed"
            )
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self.parameters.get(key)
        if not isinstance(values, list) or len(values) != count:
            found = f"{len(values)} numbers" if isinstance(values, list) else repr(values)
            raise FormatError(
                f"config.json: rope_parameters.{key} is {found}, {count} are needed, one a pair"
            )
        return tuple(float(value) for value in values)
