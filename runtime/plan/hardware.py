"""What GPUs have, by their vendors' data sheets, and what of it a model gets.

Rates are dense (no sparsity), with float32 accumulation. The shares are what well-made kernels
reach; they are assumptions until a device is measured (`qtool plan --measure`), and every plan
that rests on them says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtool.errors import UnknownName

# Of a data sheet's bandwidth and arithmetic, what a step of a model gets.
BANDWIDTH_SHARE = 0.75
ARITHMETIC_SHARE = 0.6
# Launches and host work of a step, with its kernels in a graph.
STEP_SECONDS = 0.3e-3


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory in GB (1e9 bytes), bandwidth in GB/s, arithmetic in TFLOP/s (int8: TOP/s); 0: the
    device has no such units.
    """

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    bf16_tflops: float
    fp8_tflops: float = 0.0
    int8_tops: float = 0.0

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 1e9)

    def operations_per_second(self, multiplies_in: str) -> float:
        """Of "bf16", "fp8" or "int8"; what has no units of its own is multiplied in bf16."""
        rates = {"fp8": self.fp8_tflops, "int8": self.int8_tops}
        return 1e12 * (rates.get(multiplies_in) or self.bf16_tflops)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 16, 320, 65, int8_tops=130),
        Gpu("A10", 24, 600, 125, int8_tops=250),
        Gpu("L4", 24, 300, 121, 242, 242),
        Gpu("RTX3090", 24, 936, 71, int8_tops=284),
        Gpu("RTX4090", 24, 1008, 165, 330, 660),
        Gpu("RTX5090", 32, 1792, 209, 419, 838),
        Gpu("A100-40GB", 40, 1555, 312, int8_tops=624),
        Gpu("L40S", 48, 864, 362, 733, 733),
        Gpu("A100-80GB", 80, 2039, 312, int8_tops=624),
        Gpu("H100", 80, 3350, 989, 1979, 1979),
        Gpu("H200", 141, 4800, 989, 1979, 1979),
        Gpu("B200", 180, 8000, 2250, 4500, 4500),
        Gpu("MI300X", 192, 5300, 1307, 2615, 2615),
    )
}


def find_gpu(name: str) -> Gpu:
    found = next((gpu for gpu in GPUS.values() if gpu.name.lower() == name.lower()), None)
    if found is None:
        raise UnknownName("GPU", name, GPUS)
    return found
