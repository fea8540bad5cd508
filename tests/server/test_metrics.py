"""What Prometheus and vLLM's dashboards read."""

from __future__ import annotations

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

MODEL = {"model_name": "builtin:books-7m", "engine": "0"}
GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:cpu_cache_usage_perc",
    "vllm:num_requests_waiting_by_reason",
    "vllm:engine_sleep_state",
    "vllm:cache_config_info",
    "qtool:model_info",
)
COUNTERS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:estimated_flops_per_gpu_total",
    "vllm:estimated_read_bytes_per_gpu_total",
    "vllm:estimated_write_bytes_per_gpu_total",
    "qtool:step_seconds_total",
)
HISTOGRAMS = (
    "vllm:iteration_tokens_total",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_num_preemptions",
    "vllm:request_prefill_kv_computed_tokens",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
)


def samples(server: Any) -> dict[str, list[Any]]:
    text = server.get("/metrics").text
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_every_name_is_there_before_the_first_request(server: Any) -> None:
    found = samples(server)
    for name in (*GAUGES, *COUNTERS):
        assert all(MODEL.items() <= sample.labels.items() for sample in found[name]), name
    for name in HISTOGRAMS:
        for suffix in ("_bucket", "_sum", "_count"):
            assert name + suffix in found


def test_a_server_without_adapters_says_nothing_of_them(server: Any) -> None:
    assert "vllm:lora_requests_info" not in samples(server)


def test_one_request_moves_the_counts_by_what_it_used(server: Any) -> None:
    before = samples(server)
    usage = server.complete("The ship sailed", max_tokens=9, ignore_eos=True)["usage"]
    after = samples(server)

    def moved(name: str, **labels: str) -> float:
        def value(found: dict[str, list[Any]]) -> float:
            return sum(s.value for s in found[name] if labels.items() <= s.labels.items())

        return value(after) - value(before)

    assert moved("vllm:prompt_tokens_total") == usage["prompt_tokens"]
    assert moved("vllm:generation_tokens_total") == 9
    assert moved("vllm:request_success_total", finished_reason="length") == 1
    assert moved("vllm:request_success_total") == 1
    assert moved("vllm:time_to_first_token_seconds_count") == 1
    assert moved("vllm:inter_token_latency_seconds_count") == 8
    assert moved("vllm:time_per_output_token_seconds_count") == 8
    assert moved("vllm:request_time_per_output_token_seconds_count") == 1
    assert moved("vllm:e2e_request_latency_seconds_count") == 1
    assert moved("vllm:request_prompt_tokens_sum") == usage["prompt_tokens"]
    assert moved("vllm:request_generation_tokens_sum") == 9
    # Nine steps each read all weights once, but for rows of the embedding.
    info = server.service.client.info
    assert moved("vllm:estimated_read_bytes_per_gpu_total") > 8 * info.weight_bytes
    assert moved("vllm:estimated_flops_per_gpu_total") > 0
    assert moved("qtool:step_seconds_total") > 0
    # Nine steps again, of the prompt and of eight tokens.
    assert moved("vllm:iteration_tokens_total_count") == 9
    assert moved("vllm:iteration_tokens_total_bucket", le="1.0") == 8
    assert moved("vllm:iteration_tokens_total_sum") == usage["prompt_tokens"] + 8
    assert moved("vllm:e2e_request_latency_seconds_sum") > moved(
        "vllm:time_to_first_token_seconds_sum"
    )


def test_a_prompt_asked_again_is_a_hit_of_the_cache(server: Any) -> None:
    prompt = "It was a cold evening in November, and the fire had burned low. " * 4
    usages, seen = [], [samples(server)]
    for _ in range(2):
        usages.append(server.complete(prompt, max_tokens=2, ignore_eos=True)["usage"])
        seen.append(samples(server))

    def moved(name: str, step: int) -> float:
        before, after = (found[f"vllm:{name}"][0].value for found in seen[step : step + 2])
        return float(after - before)

    length = usages[0]["prompt_tokens"]
    cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached == length - 1
    assert [moved("prefix_cache_queries_total", step) for step in (0, 1)] == [length, length]
    assert moved("prefix_cache_hits_total", 1) == cached
    assert moved("request_prefill_kv_computed_tokens_sum", 1) == 1
    assert moved("request_queue_time_seconds_count", 1) == 1


def test_both_names_of_the_token_gap_say_the_same(server: Any) -> None:
    server.complete("The ship sailed", max_tokens=4)
    found = samples(server)
    old, new = "vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"
    for suffix in ("_bucket", "_sum", "_count"):
        assert [(s.labels, s.value) for s in found[old + suffix]] == [
            (s.labels, s.value) for s in found[new + suffix]
        ]


def test_bodies_are_counted_by_route(server: Any) -> None:
    def sizes(name: str) -> float:
        found = samples(server).get(f"http_{name}_size_bytes_sum", [])
        return sum(s.value for s in found if s.labels["handler"] == "/tokenize")

    before = sizes("request"), sizes("response")
    sent = b'{"prompt": "The ship sailed"}'
    answer = httpx.post(f"{server.url}/tokenize", content=sent)
    assert sizes("request") - before[0] == len(sent)
    assert sizes("response") - before[1] == len(answer.content)


def test_openmetrics_scrapers_get_openmetrics(server: Any) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    response = server.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_guesses_are_counted_by_how_far_ahead_they_were_right(serve: Any) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "adaptive": False}
    with serve(engine={"speculative_config": speculation}) as server:
        server.complete("a b c d a b c d a b c d a b", max_tokens=12, ignore_eos=True)
        found = {
            name.removeprefix("vllm:spec_decode_num_").removesuffix("_total"): values
            for name, values in samples(server).items()
            if name.startswith("vllm:spec_decode")
        }
    by_position = {s.labels["position"]: s.value for s in found["accepted_tokens_per_pos"]}
    assert set(by_position) == {"0", "1"}
    assert sum(by_position.values()) == found["accepted_tokens"][0].value
    assert 0 < found["drafts"][0].value <= found["draft_tokens"][0].value
