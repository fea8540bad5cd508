"""Prometheus metrics under vLLM's names, so that its Grafana dashboards and autoscalers work
unchanged.

Two names changed in vLLM over time; both are served: `vllm:gpu_cache_usage_perc` (now
`kv_cache_usage_perc`) and `vllm:time_per_output_token_seconds` (now
`inter_token_latency_seconds`). Buckets are vLLM's.

What the engine counts is read from its stats, which it renews once a step, at the moment of the
scrape: nothing is paid for a gauge that nobody reads, and it cannot be stale. Latencies are
observed here, once a step and sequence, where the client's waiting is known. Each server has a
registry of its own; prometheus-client's global one would mix the servers of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from qtool.runtime.engine.client import EngineStats, ModelInfo
from qtool.runtime.engine.sequence import TokenOutput
from qtool.runtime.server.engine_metrics import EngineCollector

FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_GAP_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
    120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
FINISHED_REASONS = ("stop", "length", "abort", "timeout", "error")
INTER_TOKEN_LATENCY = "vllm:inter_token_latency_seconds"
TIME_PER_OUTPUT_TOKEN = "vllm:time_per_output_token_seconds"


def token_count_buckets(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to the longest sequence there can be."""
    steps = (mantissa * 10**exponent for exponent in range(10) for mantissa in (1, 2, 5))
    return [count for count in steps if count <= largest] or [1]


class Exposition(NamedTuple):
    body: bytes
    content_type: str


class Metrics:
    def __init__(self, info: ModelInfo, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        # One engine a model; vLLM numbers those of data-parallel servers.
        labels = {"model_name": model_name, "engine": "0"}

        def histogram(name: str, text: str, buckets: tuple[float, ...] | list[int]) -> Histogram:
            family = Histogram(name, text, list(labels), registry=None, buckets=buckets)
            self.registry.register(family)
            return family.labels(**labels)

        counts = token_count_buckets(info.max_model_len)
        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            FIRST_TOKEN_BUCKETS,
        )
        gaps = Histogram(
            INTER_TOKEN_LATENCY,
            "Time between two steps that gave a sequence tokens.",
            list(labels),
            registry=None,
            buckets=TOKEN_GAP_BUCKETS,
        )
        self.registry.register(_UnderTwoNames(gaps, TIME_PER_OUTPUT_TOKEN))
        self.inter_token_latency = gaps.labels(**labels)
        self.request_time_per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time per token after the first.",
            TOKEN_GAP_BUCKETS,
        )
        self.request_latency = histogram(
            "vllm:e2e_request_latency_seconds",
            "From the arrival of a request to its last token.",
            REQUEST_BUCKETS,
        )
        self.prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "Tokens in the prompt of a request.", counts
        )
        self.generation_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens in the answer to a request.", counts
        )
        self._finished = Counter(
            "vllm:request_success",
            "Requests that ended, by how.",
            [*labels, "finished_reason"],
            registry=self.registry,
        )
        # Every reason from the start: a counter that appears with its first event hides that
        # event from rate().
        self.finished = {
            reason: self._finished.labels(**labels, finished_reason=reason)
            for reason in FINISHED_REASONS
        }
        self.request_queue_time = histogram(
            "vllm:request_queue_time_seconds",
            "From the arrival of a request until it first ran.",
            REQUEST_BUCKETS,
        )
        self.request_prefill_time = histogram(
            "vllm:request_prefill_time_seconds",
            "From then until its first token.",
            REQUEST_BUCKETS,
        )
        self.request_inference_time = histogram(
            "vllm:request_inference_time_seconds",
            "From then until its last token.",
            REQUEST_BUCKETS,
        )
        self.computed_prompt_tokens = histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Tokens in the prompt of a request that the KV cache did not hold.",
            counts,
        )
        self.preemptions = histogram(
            "vllm:request_num_preemptions",
            "Times that a request had to give up its KV blocks.",
            [1, 2, 3, 4, 5, 10, 20],
        )
        self.request_decode_time = histogram(
            "vllm:request_decode_time_seconds",
            "From a request's first token to its last.",
            REQUEST_BUCKETS,
        )
        self.request_max_tokens = histogram(
            "vllm:request_max_num_generation_tokens",
            "Longest answer that a request allows.",
            counts,
        )
        self.request_params_max_tokens = histogram(
            "vllm:request_params_max_tokens", "The same, as it was asked for.", counts
        )
        self.request_params_n = histogram(
            "vllm:request_params_n", "Answers that a request asks for.", [1, 2, 5, 10, 20]
        )
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests that were refused because too many wait, or because the server stops.",
            [*labels, "reason"],
            registry=self.registry,
        )
        self.rejections = {
            reason: self._rejections.labels(**labels, reason=reason)
            for reason in ("queue_full", "client_limit", "shutting_down")
        }
        self.http_requests = Counter(
            "http_requests",
            "HTTP requests, by route and the first digit of the status.",
            ["handler", "method", "status"],
            registry=self.registry,
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "From the request to the last byte of its answer.",
            ["handler", "method"],
            registry=self.registry,
            buckets=REQUEST_BUCKETS,
        )
        self.http_request_bytes = Summary(
            "http_request_size_bytes",
            "Bodies of requests, as their headers announce them.",
            ["handler"],
            registry=self.registry,
        )
        self.http_response_bytes = Summary(
            "http_response_size_bytes",
            "Bodies of answers, all pieces of a stream together.",
            ["handler"],
            registry=self.registry,
        )
        self.cached_prompt_tokens = Counter(
            "vllm:prompt_tokens_cached",
            "Prompt tokens that were found in the KV cache.",
            list(labels),
            registry=self.registry,
        ).labels(**labels)
        self.registry.register(EngineCollector(info, labels, stats))

    def asked(self, num_answers: int, max_tokens: int) -> None:
        self.request_params_n.observe(num_answers)
        self.request_params_max_tokens.observe(max_tokens)
        self.request_max_tokens.observe(max_tokens)

    def expose(self, accept: str) -> Exposition:
        encoder, content_type = choose_encoder(accept)
        return Exposition(encoder(self.registry), content_type)


def expose_together(several: Sequence[Metrics], accept: str) -> Exposition:
    """The metrics of several models as one; samples of equal labels, as those of HTTP, add up."""

    class Together:
        def collect(self) -> Iterator[Metric]:
            families: dict[str, Metric] = {}
            for metrics in several:
                for family in metrics.registry.collect():
                    merged = families.setdefault(
                        family.name, Metric(family.name, family.documentation, family.type)
                    )
                    merged.samples += family.samples
            for family in families.values():
                sums: dict[tuple[object, ...], Sample] = {}
                for sample in family.samples:
                    key = (sample.name, *sorted(sample.labels.items()))
                    before = sums[key].value if key in sums else 0.0
                    sums[key] = sample._replace(value=before + sample.value)
                family.samples = list(sums.values())
                yield family

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Together())
    encoder, content_type = choose_encoder(accept)
    return Exposition(encoder(registry), content_type)


class SequenceTimer:
    """The latencies of one sequence, observed as its tokens arrive, in monotonic seconds."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._first: float | None = None
        self._latest = arrival
        self._num_tokens = 0

    @property
    def seconds_to_first_token(self) -> float | None:
        return None if self._first is None else self._first - self._arrival

    def tokens(self, count: int, now: float) -> None:
        if count == 0:
            return
        if self._first is None:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._arrival)
        else:
            self._metrics.inter_token_latency.observe(now - self._latest)
        self._latest = now
        self._num_tokens += count

    def finished(self, reason: str, latest: TokenOutput | None, now: float) -> None:
        """The answer is complete or given up; `latest` is the last that the engine said of it."""
        metrics = self._metrics
        metrics.finished[reason].inc()
        if latest is None:
            return
        metrics.cached_prompt_tokens.inc(latest.num_cached_tokens)
        if reason not in ("stop", "length"):
            return  # an answer cut short says nothing about how long answers take
        metrics.request_latency.observe(now - self._arrival)
        metrics.prompt_tokens.observe(latest.num_prompt_tokens)
        metrics.computed_prompt_tokens.observe(latest.num_prompt_tokens - latest.num_cached_tokens)
        metrics.generation_tokens.observe(self._num_tokens)
        metrics.preemptions.observe(latest.num_preemptions)
        metrics.request_queue_time.observe(latest.queue_seconds)
        if self._first is not None:
            started = self._arrival + latest.queue_seconds
            metrics.request_prefill_time.observe(max(self._first - started, 0.0))
            metrics.request_inference_time.observe(max(self._latest - started, 0.0))
            metrics.request_decode_time.observe(self._latest - self._first)
        if self._first is not None and self._num_tokens > 1:
            metrics.request_time_per_token.observe(
                (self._latest - self._first) / (self._num_tokens - 1)
            )


class _UnderTwoNames:
    """A histogram that is observed once and exposed under its own name and an alias."""

    def __init__(self, source: Histogram, alias: str) -> None:
        self._source = source
        self._alias = alias

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            yield family
            twin = HistogramMetricFamily(self._alias, family.documentation)
            for sample in family.samples:
                name = sample.name.replace(family.name, self._alias, 1)
                twin.add_sample(name, sample.labels, sample.value)
            yield twin
