"""Broken and hostile checkpoints: whatever the bytes, a FormatError or a model, never a crash."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qtool.convert.formats import FORMATS, open_weights
from qtool.errors import FormatError, UnsupportedModel
from qtool.scheme import QuantScheme
from qtool.source import Source
from qtool.weights import QuantizedWeight

RandomWeight = Callable[..., QuantizedWeight]
MODULE = "model.layers.0.mlp.up_proj"
QUICK = settings(max_examples=60, deadline=None, database=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
LONG = settings(QUICK, max_examples=1000)


@pytest.fixture(params=FORMATS)
def packed_model(
    request: pytest.FixtureRequest, random_weight: RandomWeight
) -> tuple[bytes, dict[str, Any]]:
    """One packed linear and a norm, as the bytes of a safetensors file and a config."""
    layout, scheme = FORMATS[request.param], QuantScheme(4, 32)
    packed = layout.pack(random_weight(scheme, 64, 128), torch.float16)
    tensors = {f"{MODULE}.{suffix}": tensor for suffix, tensor in packed.items()}
    tensors["model.norm.weight"] = torch.ones(128)
    config = {"model_type": "llama",
              "quantization_config": layout.quantization_config({MODULE: scheme}, [])}  # fmt: skip
    return save(tensors), config


def read_everything(folder: Path) -> None:
    reader = open_weights(Source("model", folder))
    for module in reader.modules():
        reader.describe(module)
        reader.weight(module).dequantize()
    for name in reader.tensor_names():
        reader.describe(name)
        reader.tensor(name)


def reads_or_is_refused(folder: Path) -> bool:
    """Whether it was read; anything but a word about the file itself is a failure of ours."""
    try:
        read_everything(folder)
    except (FormatError, UnsupportedModel):
        return False
    return True


def written(folder: Path, weights: bytes, config: object) -> Path:
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["F16", "I32", "BF16", "F8_E4M3", "gptq", "gptq_v2", "group", "channel",
                       "re:.*", "re:(", "Linear", "pack-quantized", "int4-g32-sym"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip


def paths_in(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_in(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from paths_in(inner, (*path, i))


def with_changes(value: Any, data: st.DataObject) -> Any:
    """A copy with one to three places replaced or removed."""
    changed = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(paths_in(changed))
        if not places:
            break
        *parents, last = data.draw(st.sampled_from(places))
        holder = changed
        for key in parents:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(JSON_VALUES)
        else:
            del holder[last]
    return changed


def check_truncation(packed: tuple[bytes, dict[str, Any]], folder: Path, length: int) -> None:
    weights, config = packed
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        read_everything(written(folder, weights[: length % len(weights)], config))


def check_changed_header(
    packed: tuple[bytes, dict[str, Any]], folder: Path, data: st.DataObject
) -> None:
    weights, config = packed
    header, body = split(weights)
    reads_or_is_refused(written(folder, joined(with_changes(header, data), body), config))


def check_changed_bytes(
    packed: tuple[bytes, dict[str, Any]], folder: Path, changes: list[tuple[int, int]]
) -> None:
    weights, config = packed
    hostile = bytearray(weights)
    header_end = 8 + struct.unpack("<Q", weights[:8])[0]
    for position, byte in changes:
        hostile[position % header_end] = byte
    reads_or_is_refused(written(folder, bytes(hostile), config))


def check_changed_config(
    packed: tuple[bytes, dict[str, Any]], folder: Path, data: st.DataObject
) -> None:
    weights, config = packed
    hostile = config | {"quantization_config": with_changes(config["quantization_config"], data)}
    reads_or_is_refused(written(folder, weights, hostile))


BYTE_CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1,
                        max_size=4)  # fmt: skip


@QUICK
@given(length=st.integers(0, 10**6))
def test_a_truncated_file_is_refused_by_name(
    packed_model: tuple[bytes, dict[str, Any]], tmp_path: Path, length: int
) -> None:
    check_truncation(packed_model, tmp_path, length)


@QUICK
@given(data=st.data())
def test_a_header_with_wrong_entries_is_refused_or_read(
    packed_model: tuple[bytes, dict[str, Any]], tmp_path: Path, data: st.DataObject
) -> None:
    check_changed_header(packed_model, tmp_path, data)


@QUICK
@given(changes=BYTE_CHANGES)
def test_a_header_with_flipped_bytes_is_refused_or_read(
    packed_model: tuple[bytes, dict[str, Any]], tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    check_changed_bytes(packed_model, tmp_path, changes)


@QUICK
@given(data=st.data())
def test_a_config_with_wrong_values_is_refused_or_read(
    packed_model: tuple[bytes, dict[str, Any]], tmp_path: Path, data: st.DataObject
) -> None:
    check_changed_config(packed_model, tmp_path, data)


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_no_change_of_a_header_gets_through_in_a_long_search(
    packed_model: tuple[bytes, dict[str, Any]], tmp_path: Path, data: st.DataObject
) -> None:
    check_changed_header(packed_model, tmp_path, data)
    check_changed_bytes(packed_model, tmp_path, data.draw(BYTE_CHANGES))


@pytest.mark.slow
@LONG
@given(data=st.data())
def test_no_change_of_a_config_gets_through_in_a_long_search(
    packed_model: tuple[bytes, dict[str, Any]], tmp_path: Path, data: st.DataObject
) -> None:
    check_changed_config(packed_model, tmp_path, data)


def test_overlapping_tensors_and_gaps_are_refused_with_the_tensor(
    packed_model: tuple[bytes, dict[str, Any]], tmp_path: Path
) -> None:
    weights, config = packed_model
    header, body = split(weights)
    name = "model.norm.weight"
    begin, end = header[name]["data_offsets"]
    for shift in (-4, 4):
        header[name]["data_offsets"] = [begin + shift, end + shift]
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            read_everything(written(tmp_path, joined(header, body), config))


def test_a_header_longer_than_the_file_is_refused(
    packed_model: tuple[bytes, dict[str, Any]], tmp_path: Path
) -> None:
    weights, config = packed_model
    hostile = struct.pack("<Q", 2**63) + weights[8:]
    with pytest.raises(FormatError, match="header claims"):
        read_everything(written(tmp_path, hostile, config))


def test_a_weight_shape_that_lies_is_refused_before_anything_is_allocated(
    random_weight: RandomWeight, tmp_path: Path
) -> None:
    layout, scheme = FORMATS["compressed-tensors"], QuantScheme(4, 32)
    packed = layout.pack(random_weight(scheme, 64, 128), torch.float16)
    config = {"quantization_config": layout.quantization_config({MODULE: scheme}, [])}
    for shape in ([64, 2**60], [64, -128], [2**60, 128], [64, 0], [64, 129]):
        packed["weight_shape"] = torch.tensor(shape)
        weights = save({f"{MODULE}.{suffix}": tensor for suffix, tensor in packed.items()})
        with pytest.raises(FormatError, match=r"up_proj\.weight_"):
            read_everything(written(tmp_path, weights, config))
