"""`qtool deploy --to ray`, as far as it goes without Ray: the configuration, what travels, what the
engines' counters add up to, and what is refused before a cluster is asked.
"""

from __future__ import annotations

import json
import pickle
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qtool import __version__
from qtool.errors import QtoolError, UsageError
from qtool.runtime.deploy.deployment import given_to_serve, meaning
from qtool.runtime.deploy.ray.board import SILENT_SECONDS, Board
from qtool.runtime.deploy.ray.keys import check_keys, digest_of_key
from qtool.runtime.deploy.ray.run import check_resources
from qtool.runtime.deploy.ray.wire import Refusal, as_text
from qtool.runtime.engine.async_engine import EngineStopped
from qtool.runtime.engine.client import EngineStats, QueueFull
from qtool.runtime.engine.sequence import PromptTooLong

MODEL = "builtin:books-7m"
Deploy = Callable[[str], str]
Refused = Callable[[str], QtoolError]


def config(printed: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(printed)
    return found


def deployments(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (application,) = found["applications"]
    return {entry["name"]: entry for entry in application["deployments"]}


def test_the_configuration_is_one_application(deploy: Deploy) -> None:
    line = f"--to ray {MODEL} --replicas 2 --cpus 3 --port 9000 --max-num-seqs 8 --dry-run"
    found = config(deploy(line))
    assert found["http_options"]["port"] == 9000
    (application,) = found["applications"]
    assert application["args"]["qtool_version"] == __version__
    engine = deployments(found)["Engine"]
    assert engine["num_replicas"] == 2
    assert engine["ray_actor_options"]["num_cpus"] == 3
    assert engine["max_ongoing_requests"] == 16
    assert json.loads(deploy(f"{line} --json")) == found


def test_flags_reach_the_cluster_as_they_were_meant(deploy: Deploy) -> None:
    line = f"--to ray -m {MODEL} -c 128 --kv-cache-dtype int8 --shutdown-timeout 7 --dry-run"
    found = config(deploy(line))
    model, flags = given_to_serve(found["applications"][0]["args"]["arguments"])
    there = meaning(model, flags)
    assert there.engine.model == MODEL
    assert (there.engine.max_model_len, there.engine.kv_cache_dtype) == (128, "int8")
    assert deployments(found)["Engine"]["graceful_shutdown_timeout_s"] == 7


def test_the_queue_decides_within_a_range(deploy: Deploy) -> None:
    line = f"--to ray {MODEL} --autoscale 2:8 --replicas 3 --max-num-seqs 16 --dry-run"
    engine = deployments(config(deploy(line)))["Engine"]
    scaling = engine["autoscaling_config"]
    assert "num_replicas" not in engine
    assert (scaling["min_replicas"], scaling["initial_replicas"]) == (2, 3)
    assert scaling["max_replicas"] == 8
    # More than run at once wait: that is the queue.
    assert scaling["target_ongoing_requests"] == 16 < engine["max_ongoing_requests"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--autoscale 8:1", "8:1"),
        ("--autoscale many", "many"),
        ("--autoscale 2:4 --replicas 5", "5"),
        ("--replicas 0", "0"),
        ("--pipeline-parallel-size 2", "2"),
        ("-tp 3", "4 attention heads"),
        ("--memory big", "big"),
        ("--router fastest", "fastest"),
        ("--api-key k", "--api-key"),
        ("--also-serve Qwen/Qwen3-0.6B", "--also-serve"),
        ("--uds /tmp/x", "--uds"),
        ("--image x", "--image"),
        ("--name No_Name", "No_Name"),
        ("--gpus 1 -tp 2", "--gpus 1"),
    ],
)
def test_what_cannot_work_is_refused_by_its_number(
    flags: str, named: str, refusal: Refused
) -> None:
    error = refusal(f"--to ray {MODEL} --dry-run {flags}")
    assert named in error.message
    assert error.hint


def test_a_flag_without_its_value_is_named(refusal: Refused) -> None:
    assert refusal(f"--to ray {MODEL} --memory").message == "--memory needs a value"


def test_an_unknown_target_is_guessed(refusal: Refused) -> None:
    assert "k8s" in (refusal(f"--to k9s {MODEL}").hint or "")


def test_a_port_is_named(refusal: Refused) -> None:
    assert "--port 0" in refusal(f"--to ray {MODEL} --port 0").message


def test_on_a_cluster_the_proxies_listen_for_other_machines(deploy: Deploy) -> None:
    assert config(deploy(f"--to ray {MODEL} --dry-run"))["http_options"]["host"] == "0.0.0.0"
    line = f"--to ray {MODEL} --host 10.0.0.1 --dry-run"
    assert config(deploy(line))["http_options"]["host"] == "10.0.0.1"


def test_a_taken_port_is_found_before_ray_starts(refusal: Refused) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refusal(f"--to ray {MODEL} --port {port}").message


def test_a_cluster_that_does_not_answer_is_named(refusal: Refused) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = refusal(f"--to ray {MODEL} --address 127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in error.message
    assert "ray start --head" in (error.hint or "")


def test_without_ray_the_way_to_it_is_said(
    refusal: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        free_port = free.getsockname()[1]
    monkeypatch.setitem(sys.modules, "ray", None)  # what an import that fails leaves behind
    error = refusal(f"--to ray {MODEL} --port {free_port}")
    assert "qtool[ray]" in (error.hint or "")


def test_a_cluster_that_is_too_small_names_both_numbers() -> None:
    there = {"CPU": 4.0, "memory": 8e9}
    check_resources({"CPU": 4, "GPU": 0, "memory": 8e9}, there, None)
    with pytest.raises(UsageError, match="9 CPUs, and the cluster at auto has 4 CPUs"):
        check_resources({"CPU": 9}, there, "auto")
    with pytest.raises(UsageError, match="this machine has 0 GPUs"):
        check_resources({"GPU": 1}, there, None)
    with pytest.raises(UsageError, match=r"9\.5 GB"):
        check_resources({"memory": 9.5e9}, there, None)


def test_a_key_that_only_this_machine_has_guards_nothing() -> None:
    check_keys(None, {})
    check_keys("a", {"10.0.0.1": "a", "10.0.0.2": "a"})
    with pytest.raises(UsageError, match=r"answer without a key: 10\.0\.0\.2") as error:
        check_keys("a", {"10.0.0.1": "a", "10.0.0.2": None})
    assert "unset it here" in (error.value.hint or "")
    with pytest.raises(UsageError, match=r"another key on the cluster than here: 10\.0\.0\.1"):
        check_keys("a", {"10.0.0.1": "b"})


def test_a_key_is_told_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("QTOOL_API_KEY", "abc")
    found = digest_of_key()
    # SHA-256 of "abc", as FIPS 180-2 has it.
    assert found == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.delenv("QTOOL_API_KEY")
    assert digest_of_key() is None


def test_every_token_is_one_character() -> None:
    assert as_text((65, 66)) == "AB"
    assert as_text((0xD7FF, 0xD800)) == "\ud7ff\ue000"  # surrogates are skipped
    assert len(as_text(tuple(range(262_144)))) == 262_144


@given(st.lists(st.integers(0, 1_000_000)), st.lists(st.integers(0, 1_000_000)))
def test_prompts_share_as_many_characters_as_tokens(first: list[int], second: list[int]) -> None:
    def shared(a: Any, b: Any) -> int:
        return next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )

    texts = as_text(tuple(first)), as_text(tuple(second))
    assert shared(*texts) == shared(first, second)
    texts[0].encode()  # a surrogate alone could not be


@pytest.mark.parametrize(
    "error",
    [
        PromptTooLong(9, 8),
        QueueFull(3, 2),
        UsageError("wrong", "do it so"),
        EngineStopped("gone"),
        QtoolError("failed", "look"),
    ],
)
def test_errors_are_the_same_on_the_other_side(error: QtoolError) -> None:
    there = pickle.loads(pickle.dumps(Refusal.of(error))).error()
    assert type(there) is type(error)
    assert (there.message, there.hint) == (error.message, error.hint)


def test_counters_add_up_and_never_go_back() -> None:
    now = 0.0
    board = Board(lambda: now)
    named = {"running_lora_adapters": ("x", "y")}
    board.report("a", EngineStats(2, 1, 0.5, generation_tokens_total=10, **named))
    board.report(
        "b",
        EngineStats(
            *(1, 0, 0.1),
            generation_tokens_total=5,
            spec_decode_num_accepted_tokens_per_pos=(3, 1),
            running_lora_adapters=("y", "z"),
        ),
    )
    both = board.snapshot()
    assert both.num_engines == 2
    assert (both.stats.num_requests_running, both.stats.num_requests_waiting) == (3, 1)
    assert both.stats.kv_cache_usage == pytest.approx(0.3)
    assert both.stats.generation_tokens_total == 15
    assert both.stats.spec_decode_num_accepted_tokens_per_pos == (3, 1)
    assert both.stats.running_lora_adapters == ("x", "y", "z")

    now = SILENT_SECONDS + 1  # a is gone; what it has done stays done
    board.report("b", EngineStats(1, 0, 0.1, generation_tokens_total=6))
    one = board.snapshot()
    assert one.num_engines == 1
    assert one.stats.num_requests_running == 1
    assert one.stats.running_lora_adapters == ()
    assert one.stats.kv_cache_usage == pytest.approx(0.1)
    assert one.stats.generation_tokens_total == 16


def test_a_board_that_nobody_wrote_on_is_empty() -> None:
    empty = Board(lambda: 0.0).snapshot()
    assert (empty.num_engines, empty.stats) == (0, EngineStats())
