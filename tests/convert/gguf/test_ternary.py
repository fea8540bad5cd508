"""TQ1_0, TQ2_0 and MXFP4 against the gguf package, and by hand."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from qtool.convert.formats import open_weights
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.plan import plan_export
from qtool.source import Source

TYPES = ("TQ1_0", "TQ2_0", "MXFP4")


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40, 512, generator=generator)
    zeros = normal.clone()
    zeros[::3, :256] = 0
    powers = torch.exp2(torch.randint(-20, 20, (40, 512), generator=generator).float())
    return {
        "normal": normal,
        "small": normal * 1e-5,
        "large": normal * 3e3,
        "zero blocks": zeros,
        "ternary": torch.randint(-1, 2, (40, 512), generator=generator) * 0.37,
        "ties": torch.randint(-24, 25, (40, 512), generator=generator) / 8,
        "powers of two": powers.clamp(max=2.0**14),
    }


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("case", samples())
def test_bytes_are_the_gguf_packages(type: str, case: str) -> None:
    rows = samples()[case]
    number = gguf.GGMLQuantizationType[type]
    assert quantize(type, rows).equal(torch.from_numpy(gguf.quants.quantize(rows.numpy(), number)))


@pytest.mark.parametrize("type", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_come_back_as_they_were(type: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-1, 2, (16, 512), generator=generator) * 0.5
    assert BLOCK_CODECS[type].dequantize(quantize(type, rows)).equal(rows)


def test_an_mxfp4_block_by_hand() -> None:
    row = torch.zeros(1, 32)
    row[0, 0], row[0, 1], row[0, 16], row[0, 17] = 6.0, -0.5, 1.5, 0.25
    data = quantize("MXFP4", row)
    # the largest is 6 = 1.5 * 4: exponent 2 - 2 + 127; 0.25 lies between 0 and 0.5: the first wins
    assert data[0, :3].tolist() == [127, 0x7 | 0x3 << 4, 0x9]
    meant = row.clone()
    meant[0, 17] = 0.0
    assert BLOCK_CODECS["MXFP4"].dequantize(data).equal(meant)


def test_values_of_mxfp4_come_back_as_they_were() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    rows = values[torch.randint(0, 8, (8, 256), generator=generator)]
    rows[:, ::32] = 6.0
    rows *= torch.where(torch.rand(rows.shape, generator=generator) < 0.5, -1.0, 1.0) * 2.0**-7
    assert BLOCK_CODECS["MXFP4"].dequantize(quantize("MXFP4", rows)).equal(rows)


@pytest.mark.parametrize("type", ["TQ1_0", "TQ2_0", "MXFP4_MOE"])
def test_whole_files_of_these_types(type: str, books_7m: Path, tmp_path: Path) -> None:
    reader = open_weights(Source("books", books_7m))
    out = tmp_path / "out.gguf"
    write_gguf(plan_export(reader, type), out, progress=lambda n: None)
    types = {tensor.type.name for tensor in GgufFile.open(out).tensors.values()}
    # a dense model has no experts for MXFP4_MOE
    assert types == ({"F32", "Q8_0"} if type == "MXFP4_MOE" else {"F32", "Q6_K", type})
