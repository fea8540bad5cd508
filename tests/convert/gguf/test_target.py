"""Types by hand and types for a wanted size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.cli import main
from qtool.convert.formats import open_weights
from qtool.convert.gguf.options import GgufOptions
from qtool.convert.gguf.target import LADDER, Candidate, Rung, climb, types_for_bits
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.convert.gguf_options import options_for
from qtool.convert.gguf_plan import mix_overrides, plan_gguf, tensor_facts
from qtool.errors import UnknownName, UsageError
from qtool.source import Source

TinyCheckpoint = Callable[..., Path]


def planned(model: Path, type: str | None, **values: Any) -> dict[str, str]:
    reader = open_weights(Source("m", model))
    plan = plan_gguf(reader, type, GgufOptions(**values))
    return {tensor.info.name: tensor.info.type.name for tensor in plan.tensors}


def test_types_by_hand(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    found = planned(
        folder,
        "Q4_K_M",
        tensor_types=("ffn_(up|gate)=q3_k", "ffn_=Q5_K", r"blk\.1\.attn_k=F16"),
        output_type="q8_0",
        embedding_type="Q4_0",
    )
    assert found["output.weight"] == "Q8_0"
    assert found["token_embd.weight"] == "Q4_0"
    assert found["blk.0.ffn_up.weight"] == "Q3_K"
    assert found["blk.0.ffn_down.weight"] == "Q5_K"
    assert found["blk.0.attn_k.weight"] == "Q4_K"
    assert found["blk.1.attn_k.weight"] == "F16"


def test_pure_files_and_heads_that_are_left_alone(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    pure = planned(folder, "Q3_K_M", pure=True)
    assert {t for name, t in pure.items() if not name.endswith("norm.weight")} == {"Q3_K"}
    left = planned(folder, "Q4_0", leave_output_tensor=True)
    held = open_weights(Source("m", folder)).describe("lm_head.weight").kind
    assert left["output.weight"] == {"float32": "F32", "bfloat16": "BF16"}[held]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"tensor_types": ("Q4_K",)}, "REGEX=TYPE"),
        ({"tensor_types": ("ffn=Q9_K",)}, "Q9_K"),
        ({"tensor_types": ("ff(n=Q4_K",)}, "regular expression"),
        ({"output_type": "nf4"}, "nf4"),
        ({"target_bits": 0.0}, "target-bits"),
        ({"target_bits": 4.0, "pure": True}, "exclude"),
        ({"target_bits": 1.5}, "takes"),
    ],
)
def test_options_that_make_no_sense(
    values: dict[str, Any], problem: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    with pytest.raises(UsageError, match=problem) as error:
        planned(tiny_checkpoint("llama"), "Q4_K_M", **values)
    assert error.value.exit_code == 2


def test_options_for_gguf_are_refused_elsewhere() -> None:
    with pytest.raises(UsageError, match="--target-bits is for --to gguf, not for --to gptq"):
        options_for("gptq", {"target_bits": 4.0})
    assert options_for("gptq", {"target_bits": None, "tensor_types": ()}) == GgufOptions()
    with pytest.raises(UnknownName, match="Q4_KM"):
        mix_overrides(GgufOptions(embedding_type="Q4_KM"))


def test_the_climb_takes_the_best_step_for_its_size() -> None:
    # a: 10 bytes buy 0.5; b: 10 bytes buy 0.1, and 30 buy 0.9 (a better price than the first step)
    ladders = {
        (0, "a"): [Rung(10, 1.0), Rung(20, 0.5), Rung(30, 0.45)],
        (0, "b"): [Rung(10, 1.0), Rung(20, 0.9), Rung(40, 0.1)],
    }
    assert climb(ladders, 19) is None
    assert climb(ladders, 20) == {(0, "a"): 0, (0, "b"): 0}
    assert climb(ladders, 30) == {(0, "a"): 1, (0, "b"): 0}
    assert climb(ladders, 60) == {(0, "a"): 1, (0, "b"): 2}
    assert climb(ladders, 1000) == {(0, "a"): 2, (0, "b"): 2}


def test_the_climb_is_close_to_the_best_of_all_choices() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        ladders = {}
        for name in "abcd":
            errors = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
            sizes = (1 + torch.randint(0, 9, (4,), generator=generator)).cumsum(0).tolist()
            ladders[0, name] = [Rung(n, e) for n, e in zip(sizes, errors, strict=True)]
        budget = sum(rungs[0].nbytes for rungs in ladders.values()) + 25
        found = climb(ladders, budget)
        assert found is not None

        def total(steps: tuple[int, ...], field: int, ladders: Any = ladders) -> float:
            return sum(r[s][field] for r, s in zip(ladders.values(), steps, strict=True))

        every = itertools.product(range(4), repeat=4)
        best = min(total(s, 1) for s in every if total(s, 0) <= budget)
        mine = tuple(found.values())
        assert total(mine, 0) <= budget
        assert total(mine, 1) <= best + 0.5


def test_sets_share_a_type_and_easy_weights_get_few_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 256, generator=generator)
    easy = torch.randint(0, 4, (64, 256), generator=generator).float()  # two bits hold it

    def candidate(name: str, values: torch.Tensor) -> Candidate:
        return Candidate(name, tuple(values.shape), lambda: values, None)

    names = [f"blk.0.attn_{x}.weight" for x in "qkv"]
    some = [candidate(name, weights) for name in names]
    some += [candidate("blk.0.ffn_down.weight", easy), candidate("blk.1.ffn_down.weight", weights)]
    count = 5 * weights.numel()
    found = types_for_bits(some, 4.5, fixed_bytes=0, num_weights=count)
    assert len({found[name] for name in names}) == 1
    steps = {name: LADDER.index(type) for name, type in found.items()}
    assert steps["blk.0.ffn_down.weight"] < steps["blk.1.ffn_down.weight"]
    used = sum(64 * TENSOR_TYPES[type].row_bytes(256) for type in found.values())
    assert 8 * used / count <= 4.5


def test_the_size_asked_for_is_kept_and_nearly_reached(tiny_checkpoint: TinyCheckpoint) -> None:
    reader = open_weights(Source("m", tiny_checkpoint("llama")))
    options = GgufOptions(target_bits=4.8)
    plan = plan_gguf(reader, None, options)
    assert 4.5 < plan.bits_per_weight <= 4.8
    why = {row["name"]: row["why"] for row in tensor_facts(plan, options)}
    assert why["blk.0.attn_q.weight"] == "4.8 bits a weight"
    assert why["output_norm.weight"] == "as it is"
    kept = plan_gguf(reader, None, GgufOptions(target_bits=5.5, output_type="Q8_0"))
    types = {tensor.info.name: tensor.info.type.name for tensor in kept.tensors}
    assert types["output.weight"] == "Q8_0"
    assert kept.bits_per_weight <= 5.5


def test_rows_of_other_widths_get_types_that_fit(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama", hidden_size=192, intermediate_size=256)
    reader = open_weights(Source("m", folder))
    plan = plan_gguf(reader, None, GgufOptions(target_bits=6.0))
    types = {tensor.info.name: tensor.info.type.name for tensor in plan.tensors}
    assert not types["blk.0.attn_q.weight"].endswith("_K")
    assert plan.bits_per_weight <= 6.0


def test_a_dry_run_shows_each_tensor_and_its_reason(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("llama")
    out = tmp_path / "out.gguf"
    arguments = ["convert", str(folder), "--to", "gguf", "--type", "Q4_K_M", "--dry-run", "--json"]
    main([*arguments, "--out", str(out), "--tensor-type", "attn_q=Q8_0"])
    assert not out.exists()
    facts = json.loads(capsys.readouterr().out)
    plan = {row["name"]: row for row in facts["tensor_plan"]}
    assert plan["blk.0.attn_q.weight"]["why"] == "asked for by attn_q"
    assert plan["blk.0.attn_k.weight"]["why"] == "default of Q4_K_M"
    assert plan["output.weight"]["why"] == "Q4_K_M's rule for output"
    assert plan["blk.0.attn_q.weight"]["bytes"] == 256 * 256 // 32 * 34
    total = 8 * sum(row["bytes"] for row in plan.values())
    count = sum(torch.Size(row["shape"]).numel() for row in plan.values())
    assert facts["bits_per_weight"] == pytest.approx(total / count, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral", "gpt2", "phi3"])
@pytest.mark.parametrize("bits", [4.6, 6.5])
def test_stacks_halves_and_transposed_matrices_count_too(
    family: str, bits: float, tiny_checkpoint: TinyCheckpoint
) -> None:
    reader = open_weights(Source("m", tiny_checkpoint(family)))
    plan = plan_gguf(reader, None, GgufOptions(target_bits=bits))
    assert bits - 0.1 < plan.bits_per_weight <= bits
