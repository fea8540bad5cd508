"""Compiled quantizers give the bytes of the torch ones, which give the reference's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.convert.gguf.blocks import codecs, native
from qtool.convert.gguf.blocks.codecs import (
    BLOCK_CODECS,
    QUANTIZERS,
    Codec,
    quantize,
    quantize_by_torch,
)
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.errors import QtoolError
from qtool.native_build import Loaded

DATA = Path(__file__).parent / "data" / "blocks.npz"
ISAS = tuple(isa.name for isa in native.QUANTIZERS.instruction_sets)
COLUMNS = 512


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this machine can build for and run."""
    found = native.load(request.param)
    if not isinstance(found, Loaded):
        pytest.skip(found.reason)
    name: bytes = found.functions.qtool_blocks_isa()
    assert name.decode() == request.param
    return str(request.param)


def compiled(type: str, rows: Tensor, importance: Tensor | None, isa: str) -> Tensor:
    done = native.quantize(TENSOR_TYPES[type], rows, importance, isa)
    assert done is not None
    data, faults = done
    assert faults == 0
    return data


@functools.cache
def weights() -> Tensor:
    """[rows, COLUMNS]: two rows of each kind of weights that may trip a quantizer."""
    generator = torch.Generator().manual_seed(0)

    def normal(width: int = COLUMNS) -> Tensor:
        return torch.randn(2, width, generator=generator)

    def uniform(width: int = COLUMNS) -> Tensor:
        return torch.rand(2, width, generator=generator)

    signed_zeros = torch.where(uniform() > 0.5, 0.0, -0.0)
    outliers, single, half_empty = 1e-3 * normal(), torch.zeros(2, COLUMNS), normal()
    outliers[:, ::37] = 50.0
    single[:, 5::64] = -3.0
    half_empty[:, :256] = 0.0
    sizes = torch.pow(10.0, 14 * uniform(COLUMNS // 32) - 12).repeat_interleave(32, 1)
    kinds = [
        *(normal(), 0.02 * normal(), (0.02 * normal()).bfloat16().float()),
        *(normal() * normal().mul(2).exp(), normal() * sizes),
        *(
            torch.zeros(2, COLUMNS),
            signed_zeros,
            torch.where(uniform() > 0.9, normal(), signed_zeros),
        ),
        *(torch.full((2, COLUMNS), 0.37), torch.full((2, COLUMNS), -0.37)),
        normal(COLUMNS // 16).repeat_interleave(16, 1),
        *(normal().abs() + 0.1, -normal().abs() - 0.1, 10 + 0.1 * uniform(), -10 - 0.1 * uniform()),
        *(torch.where(uniform() > 0.5, 0.25, -0.25), (16 * uniform()).floor() - 8),
        *(outliers, single, half_empty, torch.linspace(-1, 1, COLUMNS).expand(2, -1)),
        *(1e-40 * normal(), 1e-38 * normal(), 1e-36 * normal(), 1e-20 * normal()),
        *(1e-15 * normal(), 1e-8 * normal(), 1e4 * normal()),
    ]
    return torch.cat(kinds)


@functools.cache
def importance(kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(COLUMNS, generator=generator)
    if kind == "positive":
        return torch.randn(COLUMNS, generator=generator).mul(3).exp()
    # some zeros make scales negative now and then, which the reference keeps as bytes
    return None if kind == "none" else torch.where(uniform > 0.7, uniform, 0.0)


@functools.cache
def expected(type: str, kind: str) -> Tensor:
    data, faults = quantize_by_torch(type, weights(), importance(kind))
    assert faults == 0
    return data


def assert_same_blocks(type: str, found: Tensor, wanted: Tensor) -> None:
    size = TENSOR_TYPES[type].block_bytes
    assert found.shape == wanted.shape
    wrong = (found.view(-1, size) != wanted.view(-1, size)).any(1).nonzero()[:, 0]
    assert wrong.numel() == 0, f"{wrong.numel()} blocks differ, the first is {int(wrong[0])}"


@pytest.mark.parametrize("kind", ["none", "positive", "with zeros"])
@pytest.mark.parametrize("type", native.TYPES)
def test_compiled_bytes_are_those_of_torch(type: str, kind: str, isa: str) -> None:
    found = compiled(type, weights(), importance(kind), isa)
    assert_same_blocks(type, found, expected(type, kind))


@pytest.mark.parametrize("type", native.TYPES)
def test_any_number_of_rows_and_threads_gives_the_same_rows(type: str, isa: str) -> None:
    wanted, x = expected(type, "positive"), weights()
    for rows in (1, 2, 7, 23):
        found = compiled(type, x[:rows], importance("positive"), isa)
        assert_same_blocks(type, found, wanted[:rows])
    every_other = compiled(type, x[::2], importance("positive"), isa)  # not contiguous
    assert_same_blocks(type, every_other, wanted[::2].contiguous())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = compiled(type, x, importance("positive"), isa)
    finally:
        torch.set_num_threads(before)
    assert_same_blocks(type, found, wanted)


@pytest.mark.parametrize("type", native.TYPES)
def test_one_narrow_row(type: str, isa: str) -> None:
    """One block: most lanes of every vector are padding."""
    x = weights()[:1, : TENSOR_TYPES[type].block_size].contiguous()
    for weighting in (None, torch.ones(x.shape[1])):
        wanted, _ = quantize_by_torch(type, x, weighting)
        assert_same_blocks(type, compiled(type, x, weighting, isa), wanted)


class Golden(NamedTuple):
    weights: Tensor
    importance: Tensor | None
    blocks: Tensor


@functools.cache
def goldens(path: Path) -> dict[str, list[Golden]]:
    """What the reference makes of some weights, by type."""
    with np.load(path) as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    found: dict[str, list[Golden]] = {type: [] for type in native.TYPES}
    for name, blocks in data.items():
        type, _, rest = name.partition(".")
        kind, _, important = rest.partition(".")
        if type in found:
            weighting = data[f"imatrix.{kind}"] if important else None
            found[type].append(Golden(data[f"x.{kind}"], weighting, blocks))
    return found


def test_every_type_that_torch_writes_is_compiled() -> None:
    assert set(native.TYPES) == set(QUANTIZERS)


@pytest.mark.parametrize("type", native.TYPES)
def test_compiled_bytes_are_those_of_the_reference(type: str, isa: str) -> None:
    for x, weighting, wanted in goldens(DATA)[type]:
        assert_same_blocks(type, compiled(type, x, weighting, isa).view(wanted.shape), wanted)


@pytest.mark.parametrize("type", native.TYPES)
def test_slabs_do_not_change_the_bytes_of_torch(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weighting = weights()[:7], importance("positive")
    codec = BLOCK_CODECS[type]
    assert isinstance(codec, Codec)
    whole, _ = quantize_by_torch(type, x, weighting)
    values = codec.dequantize_by_torch(whole)
    monkeypatch.setattr(codecs, "SLAB_WEIGHTS", 1024)  # two rows a slab, and one of one
    assert quantize_by_torch(type, x, weighting)[0].equal(whole)
    assert codec.dequantize_by_torch(whole).equal(values)


@pytest.mark.parametrize("type", native.TYPES)
def test_compiled_bytes_are_those_of_the_reference_on_more_data(
    type: str, isa: str, shared_data: Path
) -> None:
    for x, weighting, wanted in goldens(shared_data / "goldens" / "gguf-blocks.npz")[type]:
        assert_same_blocks(type, compiled(type, x, weighting, isa).view(wanted.shape), wanted)


atoms = st.lists(
    st.one_of(
        st.floats(-60000, 60000, width=32),
        st.floats(-1, 1, width=32),
        st.sampled_from([0.0, -0.0, 1e-45, -1e-39, 2**-24, 1.0, -1.0]),
    ),
    min_size=1,
    max_size=12,
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    type=st.sampled_from(native.TYPES),
    values=atoms,
    importances=st.none() | st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_few_values_in_any_order_give_the_same_bytes(
    type: str, values: list[float], importances: list[float] | None, seed: int
) -> None:
    """Blocks of few values have the ties, the flat ranges and the near-singular fits."""
    if not isinstance(native.load(), Loaded):
        pytest.skip("no compiled quantizers")
    generator = torch.Generator().manual_seed(seed)

    def spread(drawn: list[float], *shape: int) -> Tensor:
        return torch.tensor(drawn)[torch.randint(len(drawn), shape, generator=generator)]

    x = spread(values, 2, 256)
    weighting = None if importances is None else spread(importances, 256)
    wanted, wrong = quantize_by_torch(type, x, weighting)
    done = native.quantize(TENSOR_TYPES[type], x, weighting)
    assert done is not None
    assert done[1] == wrong
    if not wrong:
        assert_same_blocks(type, done[0], wanted)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to quantize, the second as a user gets it."""
    if request.param == "torch":
        monkeypatch.setenv("QTOOL_NATIVE", "0")
    native._load.cache_clear()
    native._say_once.cache_clear()
    if request.param == "compiled" and not isinstance(native.load(), Loaded):
        pytest.skip("no compiled quantizers")
    yield str(request.param)
    native._load.cache_clear()


def test_switched_off_torch_serves_and_says_so_once(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    x = weights()[:3]
    for _ in range(2):
        assert_same_blocks("Q4_K", quantize("Q4_K", x), expected("Q4_K", "none")[:3])
    said = capsys.readouterr().err
    if path == "torch":
        assert said.count("switched off by QTOOL_NATIVE; torch quantizes") == 1
        assert native.backend() == "torch (compiled code is switched off by QTOOL_NATIVE)"
    else:
        assert said == ""
        assert native.backend().startswith("compiled code (")


@pytest.mark.parametrize("type", native.TYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinite_weights_are_refused(path: str, type: str, value: float) -> None:
    x = weights()[:2].clone()
    x[1, COLUMNS - 1] = value
    for weighting in (None, importance("positive")):
        with pytest.raises(QtoolError, match="the weights have NaN or infinite values"):
            quantize(type, x, weighting)


@pytest.mark.parametrize("type", [type for type in native.TYPES if type != "MXFP4"])
@pytest.mark.parametrize("value", [1e10, 3e38])
def test_weights_too_large_for_half_precision_are_refused(
    path: str, type: str, value: float
) -> None:
    x = weights()[:2].clone()
    x[0, 37] = value
    with pytest.raises(QtoolError, match=f"too large for the half-precision scales of {type}"):
        quantize(type, x, importance("positive"))


def test_importance_that_is_not_finite_is_refused(path: str) -> None:
    weighting = torch.ones(COLUMNS)
    weighting[3] = torch.nan
    with pytest.raises(QtoolError, match="importance has NaN"):
        quantize("Q4_K", weights()[:1], weighting)


@pytest.mark.parametrize("type", native.TYPES)
def test_compiled_decoding_is_that_of_torch(type: str, isa: str) -> None:
    """On quantized weights, and on random bytes: infinities and NaN of their scales too."""
    codec = BLOCK_CODECS[type]
    assert isinstance(codec, Codec)
    size = TENSOR_TYPES[type].block_bytes
    noise = torch.randint(0, 256, (5, 3 * size), generator=torch.Generator().manual_seed(1))
    for data in (expected(type, "none"), noise.to(torch.uint8)):
        found = native.dequantize(TENSOR_TYPES[type], data, isa)
        assert found is not None
        with np.errstate(invalid="ignore"):  # the gguf package multiplies infinities by 0
            wanted = codec.dequantize_by_torch(data)
        assert bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.QUANTIZERS.instruction_sets, ids=lambda isa: isa.name)
def test_the_sanitizers_find_nothing(
    run_sanitized: Callable[..., str], isa: native.InstructionSet
) -> None:
    library = native.QUANTIZERS
    harness = Path(__file__).parent / "native_harness.cpp"
    flags = library.compile_flags(isa)
    printed = run_sanitized(harness, library.sources, flags, isa, library.instruction_sets)
    assert printed == f"{isa.name} clean\n"
