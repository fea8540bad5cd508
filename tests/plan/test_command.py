"""`qtool plan` as a user starts it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qtool.cli import qtool
from qtool.errors import UsageError

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "Qwen2.5-0.5B.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(qtool, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def plan_json(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(*arguments, "--json"))
    return found


def test_a_model_on_paper(config: str) -> None:
    shown = plan(config, "--gpu", "L4", "--gpu", "T4")
    assert "Qwen2.5-0.5B: qwen2, 0.49 B weights" in shown
    assert "GGUF Q4_K_M" in shown
    found = plan_json(config, "--gpu", "L4", "--as", "int4")
    assert found["model"]["num_weights"] == 494_032_768
    (row,) = found["fits"]
    assert row["gpu"] == "L4"
    assert row["sequences"] == 64


def test_replicas_for_a_rate(config: str) -> None:
    arguments = (config, "--gpu", "T4", "--as", "bf16", "--rate", "20")
    found = plan_json(*arguments, "--ttft-ms", "500", "--tpot-ms", "20")
    (row,) = found["rows"]
    assert row["problem"] is None
    assert row["outcome"]["ttft"]["p95"] <= 0.5
    assert row["outcome"]["num_replicas"] >= 1
    shown = plan(*arguments, "--replicas", "2")
    assert "simulated with qtool's scheduler" in shown


def test_a_device_that_cannot_is_named_among_others(config: str) -> None:
    found = plan_json(
        *(config, "--gpu", "T4", "--gpu", "H100", "--as", "bf16"),
        *("--rate", "20", "--tpot-ms", "2", "--num-requests", "60"),
    )
    slow, fast = found["rows"]
    assert slow["outcome"] is None
    assert "a request that is alone waits" in slow["problem"]
    assert fast["outcome"]["num_replicas"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--replicas", "2"), "--replicas says nothing without --rate"),
        (("--rate", "-1"), "--rate is -1, must be above 0"),
        (("--rate", "inf"), "--rate is inf, must be above 0 and finite"),
        (("--rate", "1", "--ttft-ms", "inf"), "--ttft-ms is inf, must be above 0 and finite"),
        (("--save-costs", "costs.json"), "--save-costs keeps what --measure finds"),
        (("--measure", "--costs", __file__), "--measure and --costs both say"),
        (("--tensor-parallel-size", "4"), "4 GPUs cannot share 14 heads"),
        (("--gpu-memory-utilization", "1.5"), "must be above 0 and at most 1"),
        (("--context", "40000"), "40000 tokens are asked for"),
        (("--gpu", "T4", "--as", "bf16", "--rate", "1", "--input-len", "9,3"), "neither a length"),
        (
            ("--gpu", "T4", "--as", "int4", "--rate", "1", "--input-len", "9999999"),
            "the model was made for 32768",
        ),
    ],
)
def test_bad_input(config: str, arguments: Sequence[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(config, *arguments)
    assert message in caught.value.message


def test_a_machine_that_is_measured(tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    found = plan_json(
        *("builtin:books-7m", "--measure", "--save-costs", str(costs)),
        *("--rate", "2", "--replicas", "1", "--input-len", "64", "--output-len", "16"),
        *("--num-requests", "40"),
    )
    rows = found["measured"]["costs"]["rows"]
    assert [number for number, _ in rows] == sorted({number for number, _ in rows})
    assert all(seconds > 0 for _, seconds in rows)
    assert found["rows"][0]["on"] == "this machine"
    # The same numbers, from the file.
    again = plan_json(
        *("builtin:books-7m", "--costs", str(costs)),
        *("--rate", "2", "--replicas", "1", "--input-len", "64", "--output-len", "16"),
        *("--num-requests", "40"),
    )
    assert again["rows"] == found["rows"]
