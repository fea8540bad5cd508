"""Rotary position embeddings between config.json and GGUF: keys, and tensors of divisors.

    default    rope.freq_base
    linear     + rope.scaling.type, rope.scaling.factor
    yarn       + rope.scaling.original_context_length and yarn_* keys
    llama3     rope_freqs.weight: what each frequency is divided by
    longrope   rope_factors_long.weight and rope_factors_short.weight: the same for long and for
               short texts, and rope.scaling.attn_factor

Settings are transformers' `rope_parameters`, or `rope_theta` with `rope_scaling` as files before it
have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from qtool.convert.gguf.reading import Reading, Scalar
from qtool.errors import FormatError, UnsupportedModel
from qtool.rope import Rope

ROPE_FREQUENCIES = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"
DERIVED_TENSORS = (ROPE_FREQUENCIES, LONG_FACTORS, SHORT_FACTORS)

# transformers' name: GGUF's, after rope.scaling.
_YARN_KEYS = {
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def rope_settings(config: Mapping[str, Any], layers: str | None = None) -> dict[str, Any]:
    """`rope_parameters` in today's spelling, with rope_type and rope_theta always there.

    layers  "full_attention" or "sliding_attention", where a model rotates them differently
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise FormatError(f"config.json: the settings of rope are {given!r}, no object")
    found = dict(given)
    if layers is not None and isinstance(found.get(layers), Mapping):
        found = dict(found[layers])
    kind = str(found["rope_type"] if "rope_type" in found else found.pop("type", "default"))
    found["rope_type"] = {"None": "default", "su": "longrope"}.get(kind, kind)
    theta = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    found["rope_theta"] = _number({"rope_theta": theta}, "rope_theta")
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if key not in found and config.get(key) is not None:
            found[key] = config[key]
    return found


def rotated(config: Mapping[str, Any], head_dim: int) -> int:
    """How many of a head's channels are rotated."""
    settings = {"partial_rotary_factor": 1.0, **rope_settings(config)}
    return int(head_dim * _number(settings, "partial_rotary_factor"))


@dataclass(frozen=True, slots=True)
class RopeKeys:
    """rope.scaling.* and rope.freq_base.

    kinds   the rope types that the architecture has in GGUF
    layers  where a model's full and sliding layers differ: those whose settings these are
    """

    kinds: tuple[str, ...] = ("default", "linear", "yarn")
    layers: str | None = None

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        rope = rope_settings(config, self.layers)
        kind = rope["rope_type"]
        if kind not in self.kinds:
            raise UnsupportedModel(
                f"config.json: GGUF has no rope type {kind!r} for {config.get('model_type')}",
                f"known: {', '.join(self.kinds)}",
            )
        if kind in ("linear", "yarn"):
            yield "rope.scaling.type", kind
            yield "rope.scaling.factor", _number(rope, "factor")
        if kind == "yarn":
            lengths = {"original_max_position_embeddings": config["max_position_embeddings"]}
            original = _number(lengths | rope, "original_max_position_embeddings")
            yield "rope.scaling.original_context_length", int(original)
            for name, key in _YARN_KEYS.items():
                if rope.get(name) is not None:
                    yield f"rope.scaling.{key}", _number(rope, name)
        yield "rope.freq_base", rope["rope_theta"]

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        rope = self._parameters(reading, config)
        if self.layers is None:
            config["rope_parameters"] = rope
        else:
            config.setdefault("rope_parameters", {})[self.layers] = rope

    def _parameters(self, reading: Reading, config: Mapping[str, Any]) -> dict[str, Any]:
        theta = reading.number("rope.freq_base", 10000.0)
        kind = reading.text("rope.scaling.type", "none")
        if kind == "none" and LONG_FACTORS in reading.file.tensors:
            kind = "longrope"
        if kind != "none" and kind not in self.kinds:
            raise UnsupportedModel(f"{reading.where}: rope scaling {kind!r} is not supported")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if kind == "linear":
            return rope | {"rope_type": kind, "factor": reading.number("rope.scaling.factor")}
        if kind == "yarn":
            rope |= {"rope_type": kind, "factor": reading.number("rope.scaling.factor")}
            original = reading.whole(
                "rope.scaling.original_context_length", config["max_position_embeddings"]
            )
            rope["original_max_position_embeddings"] = original
            for name, key in _YARN_KEYS.items():
                if reading.has(f"rope.scaling.{key}"):
                    rope[name] = reading.number(f"rope.scaling.{key}")
            return rope
        if kind == "longrope":
            return rope | _read_longrope(reading)
        return _read_llama3(reading, theta, config) if "llama3" in self.kinds else rope


@dataclass(frozen=True, slots=True)
class SlidingRope:
    """rope.freq_base_swa: what layers with a sliding window are rotated by."""

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        local = config.get("rope_local_base_freq")
        parameters = config.get("rope_parameters") or {}
        if isinstance(parameters.get("sliding_attention"), Mapping):
            local = parameters["sliding_attention"].get("rope_theta")
        yield "rope.freq_base_swa", _number({"rope_theta": local or 10000.0}, "rope_theta")

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        theta = reading.number("rope.freq_base_swa", 10000.0)
        config.setdefault("rope_parameters", {})["sliding_attention"] = {
            "rope_type": "default",
            "rope_theta": theta,
        }


@dataclass(frozen=True, slots=True)
class RotatedChannels:
    """rope.dimension_count."""

    partial: bool = False

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        yield "rope.dimension_count", rotated(config, head_dim) if self.partial else head_dim

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        found = reading.whole("rope.dimension_count", head_dim)
        if head_dim < 1:
            raise FormatError(f"{reading.where}: fewer channels than attention heads")
        if self.partial:
            config["rope_parameters"]["partial_rotary_factor"] = found / head_dim
        elif found != head_dim:
            raise UnsupportedModel(
                f"{reading.where}: {reading.prefix}.rope.dimension_count is {found}, not the head "
                f"dimension {head_dim}"
            )


@dataclass(frozen=True, slots=True)
class LongRopeScale:
    """rope.scaling.attn_factor: by how much longer texts sharpen attention."""

    def write(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
        rope = rope_settings(config)
        if rope["rope_type"] != "longrope":
            return
        if rope.get("attention_factor") is not None:
            yield "rope.scaling.attn_factor", _number(rope, "attention_factor")
            return
        original = _number(rope, "original_max_position_embeddings")
        scale = config["max_position_embeddings"] / original
        wider = scale > 1.0 and original > 1.0
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if wider else 1.0
        yield "rope.scaling.attn_factor", factor

    def read(self, reading: Reading, config: dict[str, Any]) -> None:
        if config["rope_parameters"]["rope_type"] == "longrope":
            factor = reading.number("rope.scaling.attn_factor", 1.0)
            config["rope_parameters"]["attention_factor"] = factor


def derived_tensors(config: Mapping[str, Any], head_dim: int) -> dict[str, Tensor]:
    """The tensors that follow from config.json, float32 [rotated channels / 2]."""
    layers = "full_attention"
    settings = rope_settings(config, layers)
    if settings["rope_type"] == "llama3":
        divisors = rope_divisors(llama3_rope(settings), head_dim)
        return {} if divisors is None else {ROPE_FREQUENCIES: divisors}
    if settings["rope_type"] != "longrope":
        return {}
    size = rotated(config, head_dim) // 2
    tensors = {}
    for name, key in ((LONG_FACTORS, "long_factor"), (SHORT_FACTORS, "short_factor")):
        factors = settings.get(key)
        if not _are_numbers(factors, size):
            raise FormatError(f"config.json: rope's {key} is not a list of {size} numbers")
        tensors[name] = torch.tensor(factors, dtype=torch.float32)
    return tensors


def llama3_rope(settings: Mapping[str, Any]) -> Rope:
    given = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **settings,
    }
    return Rope(
        theta=settings["rope_theta"],
        kind="llama3",
        factor=_number(given, "factor"),
        low_freq_factor=_number(given, "low_freq_factor"),
        high_freq_factor=_number(given, "high_freq_factor"),
        original_max_position_embeddings=int(_number(given, "original_max_position_embeddings")),
    )


def _are_numbers(value: object, count: int) -> bool:
    numbers = isinstance(value, list) and all(type(item) in (int, float) for item in value)
    return numbers and isinstance(value, list) and len(value) == count


def _number(rope: Mapping[str, Any], key: str) -> float:
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2.0**63:
        raise FormatError(f"config.json: rope's {key} is {value!r}, not a positive number")
    return float(value)


def _read_longrope(reading: Reading) -> dict[str, Any]:
    long, short = (_floats(reading, name) for name in (LONG_FACTORS, SHORT_FACTORS))
    return {
        "rope_type": "longrope",
        "long_factor": [_shortest(value) for value in long.tolist()],
        "short_factor": [_shortest(value) for value in short.tolist()],
    }


def _read_llama3(reading: Reading, theta: float, config: Mapping[str, Any]) -> dict[str, Any]:
    if ROPE_FREQUENCIES not in reading.file.tensors:
        return {"rope_type": "default", "rope_theta": theta}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    entry = reading.file.tensors[ROPE_FREQUENCIES]
    if entry.type.name != "F32" or entry.shape != (head_dim // 2,):
        raise FormatError(
            f"{reading.where}: {ROPE_FREQUENCIES} is {entry.type.name} {list(entry.shape)}, "
            f"not F32 [{head_dim // 2}]"
        )
    rope = rope_from_divisors(_floats(reading, ROPE_FREQUENCIES), theta)
    if rope.kind == "default":
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }


def _floats(reading: Reading, name: str) -> Tensor:
    entry = reading.file.tensors.get(name)
    if entry is None or entry.type.name != "F32" or len(entry.shape) != 1:
        raise FormatError(f"{reading.where} has no vector {name} of type F32")
    return reading.file.data(name).clone().view(torch.float32).view(-1)


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1.1, not 1.100000023841858."""
    return float(str(numpy.float32(value)))


def rope_divisors(rope: Rope, head_dim: int) -> Tensor | None:
    """float32 [head_dim / 2] for `rope_freqs.weight`, or None where frequencies are plain.

    In float32 and in the converter's order of operations, so that the bytes are its own.
    """
    if rope.kind != "llama3":
        return None
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    context = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    divisors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(rope.factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(float(1 / ((1 - smooth) / rope.factor + smooth)))
    return torch.tensor(divisors, dtype=torch.float32)


def rope_from_divisors(divisors: Tensor, theta: float) -> Rope:
    """The llama3 parameters that give `rope_freqs.weight`; the inverse of `rope_divisors`.

    The tensor fixes them up to one choice: a frequency's blend is a line in 1/wavelength,
    smooth = context / (high - low) / wavelength - low / (high - low), so that two blended
    frequencies give its slope and offset, and low = 1 (as in every published model) the rest.
    """
    values = divisors.double()
    head_dim = 2 * values.numel()
    factor = float(values.max())
    if factor == 1.0:
        return Rope(theta=theta)
    published = Rope(theta, "llama3", factor, 1.0, 4.0, 8192)
    candidates = [published]
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    blended = (values > 1.0) & (values < factor)
    if int(blended.sum()) >= 2:
        smooth = (1 / values[blended] - 1 / factor) / (1 - 1 / factor)
        inverse_wavelength = frequencies[blended] / (2 * math.pi)
        slope = float((smooth[0] - smooth[-1]) / (inverse_wavelength[0] - inverse_wavelength[-1]))
        offset = slope * float(inverse_wavelength[0]) - float(smooth[0])
        if offset > 0:
            high = 1.0 + 1.0 / offset
            candidates.append(Rope(theta, "llama3", factor, 1.0, high, round(slope * (high - 1.0))))
    for rope in candidates:
        again = rope_divisors(rope, head_dim)
        if again is not None and torch.allclose(again.double(), values, rtol=1e-3):
            return rope
    raise UnsupportedModel(
        f"{ROPE_FREQUENCIES} is no Llama 3 scaling (its divisors run from 1 to {factor:g})"
    )
