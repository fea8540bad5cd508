"""Who has what: parts tile the whole, and what cannot be shared out is refused by its number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.arch import ARCHITECTURES, Role
from qtool.convert.formats import open_weights
from qtool.errors import UnsupportedModel, UsageError
from qtool.runtime.models.load import plan_decoder
from qtool.runtime.models.tensors import role_shapes
from qtool.runtime.parallel.shard import Shard, ShardPlan
from qtool.source import resolve
from qtool.weight_parts import row_numbers


@given(total=st.integers(1, 2000), unit=st.integers(1, 128), size=st.integers(1, 9))
def test_shares_of_all_ranks_are_the_whole_in_order(total: int, unit: int, size: int) -> None:
    shares = [Shard(rank, size).of(total, unit) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(total))
    lengths = [-(-len(share) // unit) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_the_shares_of_a_small_model() -> None:
    """Two KV heads for four ranks: ranks 0 and 1 have the first. 5 groups of 128 channels."""
    assert [list(Shard(rank, 2).of(5)) for rank in range(2)] == [[0, 1, 2], [3, 4]]
    assert Shard(1, 2).of(5 * 128, 128) == range(384, 640)


def plans(folder: Path, size: int) -> list[ShardPlan]:
    plan = plan_decoder(open_weights(resolve(str(folder))))
    return [plan.shard(Shard(rank, size)) for rank in range(size)]


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_all_ranks_are_the_whole_weight(
    family: str, size: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Each row or column once, or as often as a KV head is kept."""
    shared = plans(tiny_checkpoint(family), size)
    shapes = role_shapes(ARCHITECTURES[family], shared[0].config)
    copies = {"k": shared[0].kv_copies, "v": shared[0].kv_copies}
    roles: list[Role] = [role for role in ARCHITECTURES[family].tensors if role in shapes]
    for role in roles:
        parts = [plan.part(role) for plan in shared]
        if all(part.is_whole for part in parts):
            continue
        axis = 0 if parts[0].rows is not None else 1
        runs = [run for part in parts for run in part.rows or (part.columns or range(0),)]
        numbers = row_numbers(runs)
        counts = torch.bincount(numbers, minlength=shapes[role][axis])
        if role == "qkv":
            keys = shared[0].config.num_heads * shared[0].config.head_dim
            assert counts[:keys].eq(1).all()
            assert counts[keys:].eq(shared[0].kv_copies).all()
        else:
            assert counts.eq(copies.get(role, 1)).all(), role
        assert len(counts) == shapes[role][axis]


def test_kv_heads_are_shared_or_kept_twice(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama")
    assert [plan.kv_heads for plan in plans(folder, 2)] == [range(1), range(1, 2)]
    assert [plan.kv_heads.start for plan in plans(folder, 4)] == [0, 0, 1, 1]
    assert {plan.local_config.num_kv_heads for plan in plans(folder, 4)} == {1}


def test_biases_of_sums_are_added_once(tiny_checkpoint: Callable[..., Path]) -> None:
    shared = plans(tiny_checkpoint("llama"), 2)
    assert [plan.holds_bias("o") for plan in shared] == [True, False]
    assert [plan.holds_bias("q") for plan in shared] == [True, True]


@pytest.mark.parametrize(
    ("family", "overrides", "size", "problem", "hint"),
    [
        ("llama", {}, 3, "4 attention heads cannot be shared by 3 ranks", "1, 2 or 4"),
        ("llama", {}, 8, "4 attention heads cannot be shared by 8 ranks", "1, 2 or 4"),
        (
            "llama",
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 384},
            4,
            "6 KV heads can be neither shared by 4 ranks nor kept",
            "1, 2, 3, 6 or 12",
        ),
        ("llama", {"intermediate_size": 32}, 2, "in groups of 32 that cannot be cut: 1 for 2", "1"),
        (
            "mixtral",
            {"num_local_experts": 6},
            4,
            "6 experts cannot be shared by 4 ranks",
            "1, 2, 3 or 6",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_number(
    family: str,
    overrides: dict[str, Any],
    size: int,
    problem: str,
    hint: str,
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint(family, **overrides)
    with pytest.raises(UsageError, match=problem) as caught:
        plans(folder, size)
    assert caught.value.hint == f"use --tensor-parallel-size {hint}"


def test_families_of_transformers_code_are_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModel, match="gpt_neox cannot be shared by 2 ranks"):
        plans(tiny_checkpoint("gpt_neox"), 2)
