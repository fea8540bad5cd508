"""Type mixes against llama.cpp's own snapshots, and the options that change them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool.convert.gguf.mix import (
    MixOverrides,
    TypeChoice,
    category,
    choose_types,
    file_order,
    is_quantizable,
    require_importance,
)
from qtool.convert.gguf.mix_rules import DEFAULT_TYPES, MixModel
from qtool.errors import QtoolError, UnknownName, UsageError

Shapes = dict[str, tuple[int, ...]]


def dense(
    blocks: int, hidden: int, inner: int, queries: int, keys: int, *, tied: bool = False
) -> Shapes:
    """Shapes of a dense model; the size of the vocabulary does not matter."""
    shapes: Shapes = {"token_embd.weight": (512, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (512, hidden)
    for i in range(blocks):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (queries, hidden),
            f"blk.{i}.attn_q.bias": (queries,),
            f"blk.{i}.attn_k.weight": (keys, hidden),
            f"blk.{i}.attn_v.weight": (keys, hidden),
            f"blk.{i}.attn_output.weight": (hidden, queries),
            f"blk.{i}.ffn_gate.weight": (inner, hidden),
            f"blk.{i}.ffn_up.weight": (inner, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, inner),
        }
    return shapes


def experts(shapes: Shapes, count: int) -> Shapes:
    """The same with its feed-forward matrices stacked by expert."""
    return {
        name.replace(".weight", "_exps.weight") if "ffn_" in name else name: (
            (count, *shape) if "ffn_" in name else shape
        )
        for name, shape in shapes.items()
    }


MODELS: dict[str, tuple[Shapes, MixModel]] = {
    "qwen3-0.6b": (dense(28, 1024, 3072, 2048, 1024), MixModel("qwen3", 28, 16, 8)),
    "qwen3-14b": (dense(40, 5120, 17408, 5120, 1024), MixModel("qwen3", 40, 40, 8)),
    "gemma-3-4b-it": (dense(34, 2560, 10240, 2048, 1024, tied=True), MixModel("gemma3", 34, 8, 4)),
    "meta-llama-3.1-70b-instruct": (
        dense(80, 8192, 28672, 8192, 1024),
        MixModel("llama", 80, 64, 8),
    ),
    "gpt-oss-120b": (
        experts(dense(36, 2880, 2880, 4096, 512), 128),
        MixModel("gpt-oss", 36, 64, 8, num_experts=128),
    ),
}


def chosen(file_type: str, shapes: Shapes, model: MixModel) -> dict[str, str]:
    choices = choose_types(file_type, shapes, model)
    return {name: choice.type for name, choice in choices.items()}


def test_qwen3_gets_the_types_of_the_committed_snapshot() -> None:
    path = Path(__file__).parent / "data" / "qwen3-0.6b-types.json"
    shapes, model = MODELS["qwen3-0.6b"]
    decisions = 0
    for file_type, golden in json.loads(path.read_text()).items():
        expected = {}
        for exception, blocks in golden["exceptions"].items():
            name, type = exception.split()
            names = [name] if blocks is None else [name.replace("N", str(i)) for i in blocks]
            expected |= dict.fromkeys(names, type)
        assert DEFAULT_TYPES[file_type].upper() == golden["default"]
        for name, type in chosen(file_type, shapes, model).items():
            assert type.upper() == expected.get(name, golden["default"]), (file_type, name)
            decisions += 1
    assert decisions > 5000


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_cpps_snapshots(name: str, shared_data: Path) -> None:
    path = shared_data / "goldens" / "type-mix-snapshots" / f"{name}.schema"
    shapes, model = MODELS[name]
    golden: dict[str, tuple[str, dict[str, str]]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            file_type, default = line[1:].split("] ")
            golden[file_type] = (default.upper(), {})
        elif line and not line.startswith("#"):
            tensor, type = line.rsplit(" ", 1)
            golden[file_type][1][tensor] = type.upper()
    assert len(golden) == 33
    for file_type, (default, exceptions) in golden.items():
        types = chosen(file_type, shapes, model)
        for tensor, type in types.items():
            assert type.upper() == exceptions.get(tensor, default), (file_type, tensor)
        assert exceptions.keys() <= types.keys()


def test_q4_k_m_of_a_small_tied_model() -> None:
    """16 blocks: v and down get more bits in blocks 0, 1, then every third from 4, then 14, 15."""
    shapes = dense(16, 256, 512, 256, 128, tied=True)
    types = chosen("Q4_K_M", shapes, MixModel("llama", 16, 4, 2))
    order = file_order(shapes)
    more = [
        i for i in range(16) if i < 2 or i >= 14 or (i - 2) % 3 == 2
    ]  # in the order of the file, which is that of numbers, not of names
    assert [i for i in range(16) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"] == more
    assert [i for i in range(16) if types[f"blk.{i}.attn_v.weight"] == "Q6_K"] == more
    assert types["token_embd.weight"] == "Q6_K"
    assert types["blk.3.attn_q.weight"] == "Q4_K"
    assert order[0] == "output_norm.weight"
    assert order.index("blk.2.ffn_up.weight") < order.index("blk.10.attn_k.weight")


@pytest.mark.parametrize(
    ("file_type", "columns", "expected"),
    [
        ("Q4_K_S", 896, "Q5_0"),
        ("Q5_K_S", 896, "Q5_1"),
        ("Q6_K", 896, "Q8_0"),
        ("Q3_K_S", 896, "Q4_0"),
        ("IQ4_XS", 896, "IQ4_NL"),
        ("Q4_K_S", 172, "F16"),
        ("Q4_0", 172, "F16"),
    ],
)
def test_rows_that_are_no_whole_blocks_fall_back(
    file_type: str, columns: int, expected: str
) -> None:
    shapes = dense(8, columns, columns, columns, columns)
    choices = choose_types(file_type, shapes, MixModel("qwen2", 8, 14, 14))
    choice = choices["blk.6.attn_q.weight"]
    assert (choice.type, choice.wanted) == (expected, DEFAULT_TYPES[file_type])
    assert choice.fell_back
    assert choices["output.weight"].type == ("Q8_0" if columns == 896 else "F16")


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16"])
def test_floating_types_are_the_same_everywhere(file_type: str) -> None:
    shapes, model = MODELS["qwen3-0.6b"]
    assert set(chosen(file_type, shapes, model).values()) == {file_type}


def test_importance_changes_the_mix_and_its_lack_is_refused() -> None:
    shapes = dense(16, 256, 256, 256, 256)
    without = MixModel("llama", 16, 4, 4)
    given = MixModel("llama", 16, 4, 4, has_importance=True)
    with pytest.raises(QtoolError, match="importance matrix"):
        require_importance("Q2_K_S", choose_types("Q2_K_S", shapes, without))
    require_importance("Q2_K", choose_types("Q2_K", shapes, without))
    assert choose_types("Q2_K_S", shapes, given)["blk.9.attn_q.weight"].type == "Q2_K"
    assert choose_types("Q4_0", shapes, given)["blk.1.ffn_down.weight"].type == "Q4_1"
    assert choose_types("Q4_0", shapes, without)["blk.1.ffn_down.weight"].type == "Q4_0"


def test_eight_experts_get_more_bits_in_attention() -> None:
    shapes = experts(dense(32, 4096, 14336, 4096, 1024), 8)
    types = chosen("Q4_K_M", shapes, MixModel("llama", 32, 32, 8, num_experts=8))
    assert types["blk.5.attn_v.weight"] == types["blk.5.attn_k.weight"] == "Q8_0"
    assert types["blk.5.attn_output.weight"] == "Q5_K"
    assert types["blk.5.ffn_gate_exps.weight"] == "Q4_K"


def test_the_users_word_comes_before_the_rules() -> None:
    shapes = dense(8, 256, 256, 256, 256)
    overrides = MixOverrides(
        output="Q8_0", embedding="F16", by_pattern=((r"blk\.3\..*_v", "Q5_K"), (r"_v", "Q3_K"))
    )
    choices = choose_types("Q4_K_M", shapes, MixModel("llama", 8, 4, 4), overrides)
    assert choices["output.weight"] == TypeChoice("Q8_0", "Q8_0")
    assert choices["token_embd.weight"].type == "F16"
    assert choices["blk.3.attn_v.weight"].type == "Q5_K"
    assert choices["blk.0.attn_v.weight"].type == "Q3_K"
    pure = choose_types(
        "Q4_K_M", shapes, MixModel("llama", 8, 4, 4), MixOverrides(pure=True, leave_output=True)
    )
    assert {choice.type for choice in pure.values()} == {"Q4_K"}
    assert "output.weight" not in pure


def test_overrides_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UnknownName, match="Q4_Q"):
        MixOverrides(output="Q4_Q")
    with pytest.raises(UsageError, match="regular expression"):
        MixOverrides(by_pattern=(("(", "Q4_K"),))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (8, 8), True),
        ("blk.0.ffn_up_exps.weight", (4, 8, 8), True),
        ("blk.0.attn_norm.weight", (8,), False),
        ("blk.0.attn_q_norm.weight", (8, 8), False),
        ("blk.0.ffn_gate_inp.weight", (8, 8), False),
        ("blk.0.attn_q.bias", (8, 8), False),
        ("blk.0.ffn_up.weight", (1, 8), False),
    ],
)
def test_only_weight_matrices_are_quantized(
    name: str, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_quantizable(name, shape) is expected


def test_fused_projections_count_as_v() -> None:
    assert category("blk.0.attn_qkv.weight", tied=True) == "v"
    assert category("blk.0.attn_kv_b.weight", tied=True) == "v"
    assert category("token_embd.weight", tied=True) == "output"
    assert category("token_embd.weight", tied=False) == "embedding"
