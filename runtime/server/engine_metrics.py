"""What the engine counts, as Prometheus families under vLLM's names; see `metrics.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

from qtool.runtime.engine.client import EngineStats, ModelInfo
from qtool.runtime.engine.work import STEP_TOKENS

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")


class Family(NamedTuple):
    """values: what a sample is told apart by, and the sample."""

    name: str
    text: str
    values: tuple[tuple[Mapping[str, str], float], ...]


def one(name: str, text: str, value: float) -> Family:
    return Family(name, text, (({}, value),))


class EngineCollector:
    """Gauges and counters that the engine keeps, read when they are asked for."""

    def __init__(
        self, info: ModelInfo, labels: Mapping[str, str], stats: Callable[[], EngineStats]
    ) -> None:
        self._info = info
        self._labels = dict(labels)
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        families = (
            *gauges(stats),
            *settings(self._info),
            *adapters(self._info, stats, time.time()),
        )
        for family in families:
            yield self._filled(GaugeMetricFamily, family)
        for family in (*counters(stats), *guesses(stats), *work(stats)):
            yield self._filled(CounterMetricFamily, family)
        yield self._step_sizes(stats)

    def _step_sizes(self, stats: EngineStats) -> Metric:
        """A histogram, despite the ending of its name, which is vLLM's."""
        name, text = "vllm:iteration_tokens_total", "Tokens that a step computes."
        made = HistogramMetricFamily(name, text, labels=list(self._labels))
        ends = [*(str(float(size)) for size in STEP_TOKENS), "+Inf"]
        counts = list(accumulate(stats.steps_by_size or [0] * len(ends)))
        made.add_metric(
            list(self._labels.values()),
            list(zip(ends, counts, strict=True)),
            stats.step_tokens_total,
        )
        return made

    def _filled(
        self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], family: Family
    ) -> Metric:
        names = list(family.values[0][0]) if family.values else []
        made = kind(family.name, family.text, labels=[*self._labels, *names])
        for labels, value in family.values:
            made.add_metric([*self._labels.values(), *labels.values()], value)
        return made


def gauges(stats: EngineStats) -> tuple[Family, ...]:
    waiting = stats.num_requests_waiting
    return (
        one("vllm:num_requests_running", "Sequences computed now.", stats.num_requests_running),
        one("vllm:num_requests_waiting", "Sequences in the queue.", waiting),
        Family(
            "vllm:num_requests_waiting_by_reason",
            "Sequences in the queue, by what they wait for.",
            (({"reason": "capacity"}, waiting), ({"reason": "deferred"}, 0)),
        ),
        one("vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1.", stats.kv_cache_usage),
        one("vllm:gpu_cache_usage_perc", "Older name of the same.", stats.kv_cache_usage),
        one("vllm:cpu_cache_usage_perc", "Of blocks moved to another memory: there are none.", 0),
        Family(
            "vllm:engine_sleep_state",
            "1 for the state that the engine is in.",
            tuple(({"sleep_state": state}, float(state == "awake")) for state in SLEEP_STATES),
        ),
    )


def settings(info: ModelInfo) -> tuple[Family, ...]:
    cache = {
        "block_size": str(info.block_size),
        "num_gpu_blocks": str(info.num_kv_blocks),
        "cache_dtype": info.dtype,
    }
    model = {
        "format": info.format,
        "dtype": info.dtype,
        "device": info.device,
        "max_model_len": str(info.max_model_len),
        "weight_bytes": str(info.weight_bytes),
        "tensor_parallel_size": str(info.num_ranks),
    }
    return (
        Family("vllm:cache_config_info", "How the KV cache is laid out.", ((cache, 1),)),
        Family("qtool:model_info", "What is served.", ((model, 1),)),
    )


def adapters(info: ModelInfo, stats: EngineStats, now: float) -> tuple[Family, ...]:
    """Which adapters are used, as labels; the value is the time, which tells the newest apart.

    max_lora  how many different ones a step can hold: as many as sequences
    now       seconds since 1970
    """
    if not info.lora_enabled:
        return ()
    labels = {
        "max_lora": str(info.max_num_seqs),
        "waiting_lora_adapters": ",".join(stats.waiting_lora_adapters),
        "running_lora_adapters": ",".join(stats.running_lora_adapters),
    }
    return (Family("vllm:lora_requests_info", "Adapters in use, by name.", ((labels, now),)),)


def counters(stats: EngineStats) -> tuple[Family, ...]:
    return (
        one("vllm:num_preemptions", "Times KV blocks ran out.", stats.num_preemptions),
        one(
            "vllm:prefix_cache_queries",
            "Prompt tokens that the KV cache was searched for.",
            stats.prefix_cache_queries_total,
        ),
        one(
            "vllm:prefix_cache_hits",
            "Prompt tokens that were found there.",
            stats.prefix_cache_hits_total,
        ),
        one("vllm:prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens_total),
        one("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens_total),
    )


def guesses(stats: EngineStats) -> tuple[Family, ...]:
    by_position = stats.spec_decode_num_accepted_tokens_per_pos
    return (
        one(
            "vllm:spec_decode_num_drafts",
            "Times tokens were guessed for a sequence.",
            stats.spec_decode_num_drafts,
        ),
        one(
            "vllm:spec_decode_num_draft_tokens",
            "Tokens guessed.",
            stats.spec_decode_num_draft_tokens,
        ),
        one(
            "vllm:spec_decode_num_accepted_tokens",
            "Guessed tokens that were right.",
            stats.spec_decode_num_accepted_tokens,
        ),
        Family(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Guessed tokens that were right, by how far ahead.",
            tuple(
                ({"position": str(position)}, count) for position, count in enumerate(by_position)
            ),
        ),
    )


def work(stats: EngineStats) -> tuple[Family, ...]:
    """Of the arithmetic and the bandwidth that the machine has, what is used: the rates of these
    over the rate of the seconds.
    """
    return (
        one(
            "vllm:estimated_flops_per_gpu",
            "Operations of linears and attention, by arithmetic.",
            stats.operations_total,
        ),
        one(
            "vllm:estimated_read_bytes_per_gpu",
            "Bytes of weights and KV cache that steps had to read.",
            stats.bytes_read_total,
        ),
        one(
            "vllm:estimated_write_bytes_per_gpu",
            "Bytes of KV cache that steps wrote.",
            stats.bytes_written_total,
        ),
        one("qtool:step_seconds", "Seconds that steps took.", stats.step_seconds_total),
        one(
            "qtool:steps_launched_ahead",
            "Steps launched before the tokens of the one before were read; of all steps, those "
            "that vllm:iteration_tokens_total counts.",
            stats.steps_launched_ahead_total,
        ),
    )
