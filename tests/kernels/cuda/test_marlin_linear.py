"""Products with Marlin words equal `reference.linear`; the bit tricks are run by themselves."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cuda import marlin_linear
from qtool.kernels.cuda.tuning import LinearTile
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

Random = Callable[..., Tensor]
Quantized = Callable[..., QuantizedWeight]
Error = Callable[[Tensor, Tensor], float]
CPU = torch.device("cpu")
# Half a unit in the last place of a float16 output, and sums of float32 in another order.
TOLERANCE = {torch.float16: 5e-4, torch.float32: 2e-6}

SCHEMES = [
    ("int4-g128-sym", (128, 256)),
    ("int4-g32-asym", (64, 96)),
    ("int4-g64-sym", (192, 128)),
    ("int4-row-sym", (64, 256)),
    ("int4-row-asym", (64, 64)),
    ("int8-g64-sym", (192, 128)),
    ("int8-row-sym", (64, 128)),
    ("int3-g64-asym", (64, 128)),
    ("int2-g32-sym", (64, 64)),
    ("int6-g32-sym", (64, 64)),
]


@pytest.mark.parametrize(("scheme", "shape"), SCHEMES)
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_products_equal_the_reference(
    scheme: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    quantized: Quantized,
    random: Random,
    relative_error: Error,
) -> None:
    weight = quantized(*shape, scheme)
    packed = marlin_linear.pack(weight, dtype, device)
    x, bias = random(5, shape[1], seed=1).to(dtype), random(shape[0], seed=2).to(dtype)
    found = marlin_linear.matmul(x, packed, bias)
    assert found.dtype == dtype
    expected = reference.linear(x.float().cpu(), weight, bias.cpu())
    assert relative_error(found, expected) < TOLERANCE[dtype]


# Every tile that the table can name, with rows that fill it, that do not, and that need several.
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 17, 65])
@pytest.mark.parametrize("strips", [1, 2, 4])
@pytest.mark.parametrize(("height", "split"), [(16, 1), (16, 3), (16, 4), (32, 2), (64, 1)])
def test_every_tile_computes_the_same(
    rows: int,
    strips: int,
    height: int,
    split: int,
    device: torch.device,
    quantized: Quantized,
    random: Random,
    relative_error: Error,
) -> None:
    weight = quantized(256, 128, "int4-g32-asym")
    packed = marlin_linear.pack(weight, torch.float16, device)
    x = random(rows, 128, seed=rows).half()
    tile = LinearTile(strips, height, split, warps=4, stages=2)
    parts = marlin_linear.matmul_parts(x, packed, config=tile)
    assert parts.shape == (split, rows, 256)
    expected = reference.linear(x.float().cpu(), weight)
    assert relative_error(parts.sum(0), expected) < 5e-4


def test_rows_may_lie_apart_and_sums_may_be_given(
    device: torch.device, quantized: Quantized, random: Random, relative_error: Error
) -> None:
    weight = quantized(64, 128, "int4-g64-sym")
    packed = marlin_linear.pack(weight, torch.float16, device)
    both = random(3, 256, seed=1).half()
    x = both[:, 128:]
    sums = x.float().view(3, 2, 64).sum(-1).t().contiguous()
    expected = reference.linear(x.float().cpu(), weight)
    found = marlin_linear.matmul_parts(x, packed, sums=sums).sum(0)
    assert relative_error(found, expected) < 5e-4
    assert torch.equal(marlin_linear.block_sums(x, packed), sums)


def test_many_rows_multiply_by_the_unpacked_weight(
    device: torch.device, quantized: Quantized, random: Random, relative_error: Error
) -> None:
    weight = quantized(64, 64, "int4-g32-sym")
    packed = marlin_linear.pack(weight, torch.float16, device)
    x = random(300, 64, seed=1).half()
    found = marlin_linear.matmul(x, packed, None)
    assert relative_error(found, reference.linear(x.float().cpu(), weight)) < 1e-3


@pytest.mark.parametrize(("scheme", "shape"), SCHEMES)
def test_unpacking_gives_the_weight_exactly(
    scheme: str, shape: tuple[int, int], device: torch.device, quantized: Quantized
) -> None:
    weight = quantized(*shape, scheme)
    packed = marlin_linear.pack(weight, torch.float32, device)
    assert torch.equal(marlin_linear.unpack(packed, torch.float32).cpu(), weight.dequantize())


def test_one_weight_worked_by_hand(device: torch.device) -> None:
    # Only W[8, 9] is not zero: code 11 of a symmetric scheme, (11 - 8) * 0.5.
    codes = torch.full((64, 128), 8, dtype=torch.uint8)
    codes[8, 9] = 11
    scheme = QuantScheme.parse("int4-g128-sym")
    weight = QuantizedWeight(codes, torch.full((64, 1), 0.5), None, scheme)
    packed = marlin_linear.pack(weight, torch.float16, device)
    # convert/marlin.py: input 9 of output 8 lies in word 0, field 7.
    assert packed.words[0, 0].item() & 0xFFFFFFFF == 0xB8888888
    x = torch.zeros(1, 128, dtype=torch.float16, device=device)
    x[0, 9] = 4.0
    expected = torch.zeros(64)
    expected[8] = 6.0
    assert torch.equal(marlin_linear.matmul(x, packed, None)[0].float().cpu(), expected)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ("int4-g16-sym", (64, 64), "takes groups of 32, 64, 128 or a row, these have 16"),
        ("int8-g32-asym", (64, 64), "takes zero points with codes of 2 to 4 bits, these have 8"),
        ("int4-g32-sym", (96, 64), "takes outputs in strips of 64, these are 96"),
        ("int4-row-sym", (64, 96), "takes inputs in blocks of 128, these are 96"),
        ("int4-row-sym", (64, 64), None),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    scheme: str, shape: tuple[int, int], reason: str | None
) -> None:
    assert marlin_linear.refuses_shape(QuantScheme.parse(scheme), shape) == reason


def test_other_devices_and_activations_are_refused(quantized: Quantized) -> None:
    weight = quantized(64, 64, "int4-g32-sym")
    reason = marlin_linear.refuses(weight, torch.bfloat16, CPU, None)
    assert reason == "runs on cuda, not cpu"


# --- NVIDIA's assembly, run instruction by instruction -------------------------------------------


def _lop3(a: int, b: int, c: int, table: int) -> int:
    found = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        found |= (table >> index & 1) << bit
    return found


def _halves(value: int, dtype: torch.dtype) -> Tensor:
    signed = [half - (1 << 16) if half >> 15 else half for half in (value & 0xFFFF, value >> 16)]
    return torch.tensor(signed, dtype=torch.int16).view(dtype)


def _word(halves: Tensor) -> int:
    low, high = (int(half) & 0xFFFF for half in halves.view(torch.int16))
    return high << 16 | low


def run_assembly(text: str, word: int) -> list[float]:
    """The outputs of a block of inline assembly whose only input is `word`."""
    text = text[text.index(";") + 1 :] if ".reg" in text else text
    statements = [part.strip() for part in text.strip(" {}\n").split(";\n") if part.strip()]
    statements = [part.strip() for line in statements for part in line.split("; ") if part.strip()]
    num_outputs = max(int(number) for number in re.findall(r"\$(\d+)", text))
    dtype = torch.bfloat16 if "bf16" in text or "0x4300" in text else torch.float16
    values = {f"${num_outputs}": word}
    outputs: dict[int, float] = {}

    def value(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for statement in statements:
        name, _, rest = statement.rstrip(";").partition(" ")
        pair = re.fullmatch(r"\{\$(\d+), \$(\d+)\}, (\w+)", rest.strip())
        if pair is not None:
            halves = _halves(values[pair[3]], dtype)
            outputs[int(pair[1])], outputs[int(pair[2])] = halves.tolist()
            continue
        target, *operands = (part.strip() for part in rest.split(","))
        given = [value(operand) for operand in operands]
        if name == "shr.u32":
            values[target] = given[0] >> given[1]
        elif name == "mov.b32":
            values[target] = given[0]
        elif name == "lop3.b32":
            values[target] = _lop3(*given)
        elif name == "fma.rn.bf16x2":
            a, b, c = (_halves(part, torch.bfloat16).double() for part in given)
            values[target] = _word((a * b + c).bfloat16())
        elif name == "sub.f16x2":
            a, b = (_halves(part, torch.float16) for part in given)
            values[target] = _word(a - b)
        else:
            raise AssertionError(f"{name} is not known here")
    return [outputs[index] for index in range(num_outputs)]


@pytest.fixture(scope="module")
def words() -> list[int]:
    """Every byte in every place, and some at random."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(0, 1 << 32, (64,), generator=generator).tolist()
    return [byte * 0x01010101 ^ turn for byte in range(256) for turn in (0, 0x00FF00FF)] + some


@pytest.mark.parametrize(
    ("name", "dtype"), [("FOUR_BF16", torch.bfloat16), ("FOUR_FP16", torch.float16)]
)
def test_the_assembly_unpacks_four_bits_with_their_bias(
    name: str, dtype: torch.dtype, words: list[int], device: torch.device
) -> None:
    from qtool.kernels.cuda.device import words as code

    bias = marlin_linear.BIASES[dtype]
    assembly = getattr(code, name).value
    for word in words:
        expected = [bias + (word >> 4 * field & 15) for field in range(8)]
        assert run_assembly(assembly, word) == expected, hex(word)


@pytest.mark.parametrize("name", ["EIGHT_BF16", "EIGHT_FP16"])
def test_the_assembly_unpacks_eight_bits_centred(
    name: str, words: list[int], device: torch.device
) -> None:
    from qtool.kernels.cuda.device import words as code

    assembly = getattr(code, name).value
    for word in words:
        expected = [(word >> 8 * byte & 255) - 128 for byte in range(4)]
        assert run_assembly(assembly, word) == expected, hex(word)
