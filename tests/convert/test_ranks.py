"""Every packed format, shared out among ranks, computes what it does in one process.

With four ranks a rank's heads end inside a group of 128 inputs of the attention's output, which is
then held as groups of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.convert.run import convert_model
from qtool.errors import UsageError
from qtool.scheme import QuantScheme

Same = Callable[..., None]
PACKED = [
    ("compressed-tensors", "int4-g128-sym"),
    ("compressed-tensors", "int4-g32-asym"),
    ("compressed-tensors", "int3-g64-sym"),
    ("compressed-tensors", "int8-row-sym"),
    ("gptq", "int4-g128-sym"),
    ("gptq", "int3-g32-sym"),
    ("gptq", "int8-g64-sym"),
    ("awq", "int4-g128-asym"),
    ("awq", "int4-g32-sym"),
    ("marlin", "int4-g128-sym"),
    ("marlin", "int4-g64-asym"),
    ("marlin", "int8-row-sym"),
]
FOREIGN = (
    *("int8", "int8-asym", "int4-in-bytes", "fp8-channel", "fp8-tensor", "fp8-block", "mxfp8"),
    *("mxfp4", "nvfp4", "fine-grained-fp8", "fine-grained-ue8m0", "nf4", "nf4-nested", "llm-int8"),
)
TYPES = ("F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K_M", "Q4_K_M", "Q6_K")
QUICK = {"compressed-tensors int4-g128-sym 4", "gptq int4-g128-sym 2", "nvfp4 2", "Q4_K_M 2"}


def cases(names: list[tuple[Any, ...]]) -> list[Any]:
    """Each with two and four ranks; most are for the long run."""
    found = []
    for name in names:
        for size in (2, 4):
            word = " ".join(map(str, (*name, size)))
            marks = () if word in QUICK else pytest.mark.slow
            found.append(pytest.param(*name, size, marks=marks, id=word))
    return found


@pytest.mark.parametrize(("format_name", "scheme", "size"), cases(PACKED))
def test_ranks_of_a_packed_folder(
    format_name: str, scheme: str, size: int, packed_checkpoint: Any, same_in_ranks: Same
) -> None:
    same_in_ranks(packed_checkpoint(format_name, scheme), size)


@pytest.mark.parametrize(("kind", "size"), cases([(kind,) for kind in FOREIGN]))
def test_ranks_of_what_others_write(
    kind: str, size: int, foreign_checkpoint: Any, same_in_ranks: Same
) -> None:
    same_in_ranks(foreign_checkpoint(kind), size)


@pytest.mark.parametrize(("type", "size"), cases([(type,) for type in TYPES]))
def test_ranks_of_a_gguf_file(
    type: str, size: int, tiny_checkpoint: Any, same_in_ranks: Same, tmp_path: Path
) -> None:
    # Super-blocks have 256 weights, and every rank needs one of each row.
    plain = tiny_checkpoint(
        "llama", num_hidden_layers=1, hidden_size=1024, intermediate_size=1280, head_dim=256
    )
    model = convert_model(str(plain), to="gguf", type=type, out=tmp_path / "model.gguf")
    same_in_ranks(model, size)


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq", "marlin"])
def test_ranks_of_packed_experts(
    format_name: str, write_packed: Any, tiny_checkpoint: Any, same_in_ranks: Same, tmp_path: Path
) -> None:
    scheme = QuantScheme.parse("int4-g128-sym")
    plain = tiny_checkpoint("qwen3_moe")
    model = write_packed(
        plain, tmp_path / "model", format_name, lambda name: scheme if "_proj" in name else None
    )
    same_in_ranks(model, 2)


def test_blocks_that_cannot_be_cut_are_refused_by_number(
    tiny_checkpoint: Any, same_in_ranks: Same, tmp_path: Path
) -> None:
    plain = tiny_checkpoint("llama", num_hidden_layers=1)
    model = convert_model(str(plain), to="gguf", type="Q4_K_M", out=tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="128 inputs a rank, which cut groups of 256") as caught:
        same_in_ranks(model, 2)
    assert caught.value.hint == "use --tensor-parallel-size 1"
