"""Counters and histograms in Prometheus' text format 0.0.4, and one request's own record.

Everything here is touched by the event loop's thread only.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ITL_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)
E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Histogram:
    """Seconds, counted in buckets with inclusive upper bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        index = next((i for i, bound in enumerate(self._bounds) if seconds <= bound), len(self._bounds))
        self._counts[index] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        """The sample lines; buckets are cumulative."""
        total = 0
        lines: list[str] = []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum}", f"{name}_count {total}"]


@dataclass(slots=True)
class Metrics:
    """The server's totals; names follow vLLM's, under our prefix."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=lambda: Counter[str]())
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BUCKETS))
    itl: Histogram = field(default_factory=lambda: Histogram(ITL_BUCKETS))
    e2e: Histogram = field(default_factory=lambda: Histogram(E2E_BUCKETS))

    def text(self, *, running: int, waiting: int) -> str:
        """The page at /metrics."""
        lines: list[str] = []

        def family(name: str, kind: str, text: str, samples: list[str]) -> None:
            lines.extend((f"# HELP nanoserve_{name} {text}", f"# TYPE nanoserve_{name} {kind}", *samples))

        def single(name: str, kind: str, text: str, value: int) -> None:
            family(name, kind, text, [f"nanoserve_{name} {value}"])

        def histogram(name: str, text: str, values: Histogram) -> None:
            family(name, "histogram", text, values.lines(f"nanoserve_{name}"))

        single("num_requests_running", "gauge", "Requests being generated.", running)
        single("num_requests_waiting", "gauge", "Requests in the queue.", waiting)
        single("prompt_tokens_total", "counter", "Prompt tokens accepted.", self.prompt_tokens)
        single("generation_tokens_total", "counter", "Tokens generated.", self.generation_tokens)
        histogram("time_to_first_token_seconds", "From request to first token, queue included.", self.ttft)
        histogram("inter_token_latency_seconds", "Between two tokens of an answer.", self.itl)
        histogram("e2e_request_latency_seconds", "From request to the end of its answer.", self.e2e)
        finished = [
            f'nanoserve_request_success_total{{finished_reason="{reason}"}} {count}'
            for reason, count in sorted(self.finished.items())
        ]
        family("request_success_total", "counter", "Answers by how they ended.", finished)
        return "\n".join(lines) + "\n"


class RequestRecord:
    """One HTTP request's numbers, for its log line and the totals.

    Attributes:
        status: HTTP status sent; 499 when the client left before.
        prompt_tokens: of all its prompts.
        completion_tokens: of all its choices.
        reasoning_tokens: those of them that are reasoning.
        finish: how the last choice ended.
        ttft: seconds to the first token; None before it.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = time.monotonic()
        self._last_token: dict[int, float] = {}
        self._turn = self._started  # when the choice that is generated now could begin
        self._decoding = False
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0
        self._decode_steps = 0
        self.status: int | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.finish: str | None = None
        self.ttft: float | None = None

    def prompt(self, tokens: int) -> None:
        """The prompts were accepted."""
        self.prompt_tokens += tokens
        self._metrics.prompt_tokens += tokens
        self._turn = time.monotonic()

    def token(self, choice: int, reasoning: bool = False) -> None:
        """A token of a choice arrived; choices come one after another."""
        now = time.monotonic()
        if self.ttft is None:
            self.ttft = now - self._started
            self._metrics.ttft.observe(self.ttft)
        if choice in self._last_token:
            self._metrics.itl.observe(now - self._last_token[choice])
            self._decode_seconds += now - self._last_token[choice]
            self._decode_steps += 1
        else:
            self._prefill_seconds += now - self._turn
        self._last_token[choice], self._decoding = now, True
        self.completion_tokens += 1
        self.reasoning_tokens += reasoning
        self._metrics.generation_tokens += 1

    def end(self, reason: str) -> None:
        """A choice ended."""
        self.finish = reason
        self._metrics.finished[reason] += 1
        now = time.monotonic()
        if not self._decoding:  # it was only scored
            self._prefill_seconds += now - self._turn
        self._turn, self._decoding = now, False

    def close(self) -> None:
        """The HTTP request ended; requests that generated count in the latency histogram."""
        if self.finish is not None:
            self._metrics.e2e.observe(self.seconds())

    def seconds(self) -> float:
        """Since the request began."""
        return time.monotonic() - self._started

    def tokens_per_second(self) -> float | None:
        """Decoding speed, without each choice's first token; None where no choice has a second one."""
        return self._decode_steps / self._decode_seconds if self._decode_seconds > 0 else None

    def timings(self, prompt_tokens: int) -> dict[str, Any]:
        """The numbers under llama.cpp's names; a speed that cannot be told is null.

        ``prompt_ms`` is from the request's acceptance (for further choices, from the end of the one before) to
        the first token: what it waited for other requests is in it. ``predicted_ms`` is from the first token
        on, and ``predicted_per_second`` does not count that one.

        Args:
            prompt_tokens: that the engine has read: the prompt, as often as it was answered.
        """
        speed = prompt_tokens / self._prefill_seconds if self._prefill_seconds > 0 else None
        decode = self.tokens_per_second()
        return {
            "cache_n": 0,
            "prompt_n": prompt_tokens,
            "prompt_ms": round(self._prefill_seconds * 1e3, 3),
            "prompt_per_second": None if speed is None else round(speed, 3),
            "predicted_n": self.completion_tokens,
            "predicted_ms": round(self._decode_seconds * 1e3, 3),
            "predicted_per_second": None if decode is None else round(decode, 3),
        }
