"""What a GPU runs and why, decided without one."""

from collections.abc import Callable

import pytest
import torch

from qtool.kernels.cuda import eight_bit_linear, launch, marlin_linear
from qtool.kernels.dispatch import NoKernel, choose
from qtool.scheme import FloatScheme
from qtool.weights import DenseWeight, Float8Weight, QuantizedWeight

Quantized = Callable[..., QuantizedWeight]
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """A GPU of some compute capability, as far as it is asked about."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(launch, "has_triton", lambda: True)

    return pretend


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("int4-g128-sym", "marlin"),
        ("int3-g32-asym", "marlin"),
        ("int8-row-sym", "marlin"),
        ("int8-row-asym", "dequantized"),
        ("int4-g16-sym", "dequantized"),
    ],
)
def test_codes_run_as_marlin_words_where_they_can(
    scheme: str,
    kernel: str,
    quantized: Quantized,
    gpu: Callable[[tuple[int, int]], None],
) -> None:
    gpu((9, 0))
    found = choose(quantized(64, 128, scheme), torch.bfloat16, CUDA)
    assert found.kernel.name == kernel
    if kernel == "dequantized":
        assert "; marlin takes " in found.reason
    # Kernels of another device are not spoken of.
    assert "int4pack" not in found.reason
    assert "native" not in found.reason


def test_eight_bits_are_rounded_to_where_that_is_asked_for(
    quantized: Quantized, gpu: Callable[[tuple[int, int]], None]
) -> None:
    gpu((9, 0))
    weight = quantized(64, 128, "int8-row-sym")
    assert choose(weight, torch.bfloat16, CUDA, "int8").kernel.name == "int8_w8a8"
    plain = choose(weight, torch.bfloat16, CUDA)
    assert plain.reason.endswith("int8_w8a8 rounds activations to 8 bits, which was not asked for")


@pytest.mark.parametrize(
    ("capability", "kernel", "reason"),
    [
        ((9, 0), "fp8_w8a8", ""),
        ((8, 0), "dequantized", "fp8_w8a8 needs compute capability 8.9, this GPU has 8.0"),
        ((7, 5), "dequantized", "fp8_w8a8 needs compute capability 8.0, this GPU has 7.5"),
    ],
)
def test_8_bit_floats_need_a_gpu_that_multiplies_them(
    capability: tuple[int, int],
    kernel: str,
    reason: str,
    gpu: Callable[[tuple[int, int]], None],
) -> None:
    gpu(capability)
    values = torch.zeros(64, 64).to(torch.float8_e4m3fn)
    weight = Float8Weight(values, torch.ones(64, 1), FloatScheme("fp8", (1, None)))
    found = choose(weight, torch.bfloat16, CUDA)
    assert found.kernel.name == kernel
    assert reason in found.reason
    assert choose(weight, torch.bfloat16, CUDA, "bf16").kernel.name == "dequantized"


def test_without_triton_weights_are_unpacked_and_that_is_told(
    quantized: Quantized,
    gpu: Callable[[tuple[int, int]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu((9, 0))
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    found = choose(quantized(64, 128, "int4-g128-sym"), torch.bfloat16, CUDA)
    assert found.kernel.name == "dequantized"
    assert "marlin needs Triton, which is not installed (pip install triton)" in found.reason


def test_other_activations_are_refused(
    quantized: Quantized, gpu: Callable[[tuple[int, int]], None]
) -> None:
    gpu((9, 0))
    found = choose(quantized(64, 128, "int4-g128-sym"), torch.float32, CUDA)
    assert "marlin takes activations in 16 bits, these are float32" in found.reason


def test_a_refusal_by_all_names_the_kernels_of_other_devices(
    gpu: Callable[[tuple[int, int]], None],
) -> None:
    from qtool.kernels.dispatch import KERNELS

    gpu((9, 0))
    own = tuple(kernel for kernel in KERNELS if kernel.device == "cpu")
    with pytest.raises(NoKernel) as raised:
        choose(DenseWeight(torch.zeros(2, 2)), torch.bfloat16, CUDA, None, own)
    assert "onednn runs on cpu" in (raised.value.hint or "")


def test_the_kernels_ask_the_same_question() -> None:
    for module in (marlin_linear, eight_bit_linear):
        assert module.obstacle is launch.obstacle
    assert launch.obstacle(torch.device("cpu")) == "runs on cuda, not cpu"
