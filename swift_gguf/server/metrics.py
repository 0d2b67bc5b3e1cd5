"""Metrics for Prometheus, with llama-server's names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from swift_gguf.server.served import Tally

_WAITS_S = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics(Collector):
    """Sums over all requests.

    waiting, running: the number of requests that wait or run now.
    read_ahead: the number of tokens that were read ahead.
    """

    def __init__(
        self,
        *,
        waiting: Callable[[], int],
        running: Callable[[], int],
        read_ahead: Callable[[], int] = lambda: 0,
    ) -> None:
        self._waiting, self._running, self._read_ahead = waiting, running, read_ahead
        self._lock = threading.Lock()
        self._total = Tally()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._wait = Histogram(
            "swift_gguf:queue_seconds",
            "Time requests waited in the queue.",
            buckets=_WAITS_S,
            registry=self._registry,
        )

    def count(self, tally: Tally, queue_s: float) -> None:
        """Adds a request."""
        self._wait.observe(queue_s)
        with self._lock:
            self._total.add(tally)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        with self._lock:
            yield from self._metrics(self._total)

    def _metrics(self, total: Tally) -> Iterator[Metric]:
        stats = total.stats
        prompt_rate = stats.prompt_n / stats.prompt_s if stats.prompt_s else 0.0
        for name, text, value in (
            ("prompt_tokens", "Number of prompt tokens processed.", stats.prompt_n),
            ("prompt_seconds", "Prompt process time.", stats.prompt_s),
            ("tokens_predicted", "Number of generation tokens processed.", stats.predicted_n),
            ("tokens_predicted_seconds", "Predict process time.", stats.cycle_s),
            ("n_decode", "Forward passes of the full model.", stats.cycles + total.generations),
            ("n_drafted", "Number of tokens drafted.", stats.drafted),
            ("n_drafted_accepted", "Number of draft tokens accepted.", stats.accepted),
        ):
            yield CounterMetricFamily(f"llamacpp:{name}", text, value=value)
        cached = total.prompt_tokens - stats.prompt_n
        for name, text, value in (
            ("prompt_tokens_cached", "Number of prompt tokens found in the KV cache.", cached),
            (
                "prompt_tokens_read_ahead",
                "Number of prompt tokens processed after answers.",
                self._read_ahead(),
            ),
        ):
            yield CounterMetricFamily(f"swift_gguf:{name}", text, value=value)
        for name, text, gauge in (
            ("prompt_tokens_seconds", "Average prompt throughput in tokens/s.", prompt_rate),
            (
                "predicted_tokens_seconds",
                "Average generation throughput in tokens/s.",
                total.predicted_per_second,
            ),
            ("requests_processing", "Number of requests processing.", self._running()),
            ("requests_deferred", "Number of requests deferred.", self._waiting()),
            ("n_tokens_max", "Largest observed number of tokens in the context.", total.n_past),
        ):
            yield GaugeMetricFamily(f"llamacpp:{name}", text, value=gauge)
