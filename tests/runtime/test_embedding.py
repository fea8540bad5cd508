"""Tokens are looked up in the file's own blocks: the same values, at the file's size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.convert.run import convert_model
from qtool.runtime.loading import load_model
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.embedding import Embedding
from qtool.weights import BlockWeight, DenseWeight


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q6_K", "Q4_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_blocks_is_the_row_of_the_unpacked_table(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(40, 512, generator=generator)
    weight = BlockWeight(quantize(name, values), 512, BLOCK_CODECS[name])
    table = Embedding.of(weight, dtype, torch.device("cpu"))
    ids = torch.tensor([39, 0, 7, 7])
    assert table.nbytes == weight.data.nbytes
    assert table.values is None
    assert table(ids).dtype == dtype
    assert torch.equal(table(ids), weight.dequantize(dtype)[ids])


def test_a_dense_row_is_a_copy_in_the_model_s_type() -> None:
    table = Embedding.of(DenseWeight(torch.eye(3)), torch.bfloat16, torch.device("cpu"))
    row = table(torch.tensor([1]))
    row += 1
    assert table(torch.tensor([1])).tolist() == [[0.0, 1.0, 0.0]]
    assert row.dtype == torch.bfloat16


def test_of_a_gguf_file_the_table_stays_in_its_blocks(books_7m: Path, tmp_path: Path) -> None:
    packed = convert_model(str(books_7m), to="gguf", type="Q8_0", out=tmp_path / "model.gguf")
    loaded = load_model(str(packed), dtype="bfloat16")
    assert isinstance(loaded.decoder, Decoder)
    vocab, hidden = loaded.decoder.vocab_size, loaded.decoder.embedding.hidden_size
    assert loaded.decoder.looked_up_bytes == vocab * hidden // 32 * 34


def test_what_a_loaded_model_does_not_read_leaves_memory(books_7m: Path, tmp_path: Path) -> None:
    packed = convert_model(str(books_7m), to="gguf", type="Q8_0", out=tmp_path / "model.gguf")
    loaded = load_model(str(packed), dtype="bfloat16")
    before = resident_bytes(packed)
    loaded.logits(torch.tensor([[1, 2, 3]]))
    after = resident_bytes(packed)
    assert before < packed.stat().st_size / 4
    assert before <= after < packed.stat().st_size / 2  # rows of three tokens have come


def resident_bytes(file: Path) -> int:
    """Of a mapped file, by Linux's account."""
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("only Linux says what of a map is in memory")
    total, ours = 0, False
    for line in maps.read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
