"""Long work shown: a bar on a terminal, plain lines elsewhere. Always on stderr, so that stdout can be piped."""

import sys
import time
from typing import TextIO

_LINE_EVERY = 5.0
"""Seconds between plain lines where there is no terminal."""
_BAR_EVERY = 0.1
_WIDTH = 30


class Bar:
    """A line that is shown now and then: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._started = self._shown = time.perf_counter()

    def show(self, done: int, total: int, words: str) -> None:
        """Show the state, if it is time to; the last call (done == total) always shows."""
        now, last, on_terminal = time.perf_counter(), done >= total, self._stream.isatty()
        if not last and now - self._shown < (_BAR_EVERY if on_terminal else _LINE_EVERY):
            return
        self._shown = now
        share = done / total if total else 1.0
        text = f"{self._label} {share:4.0%}  {words}".rstrip()
        if on_terminal:
            filled = int(share * _WIDTH)
            text = "\r" + "█" * filled + "░" * (_WIDTH - filled) + f" {text}"
        self._stream.write(text + "\n" * (last or not on_terminal))
        self._stream.flush()


class LoadBar(Bar):
    """Progress of reading weights, in GB and GB/s. Call it with (bytes read, bytes in all)."""

    def __call__(self, done: int, total: int) -> None:
        """Show the state, if it is time to."""
        speed = done / max(time.perf_counter() - self._started, 1e-9) / 1e9
        self.show(done, total, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB  {speed:.2f} GB/s")


class QuestionBar(Bar):
    """Progress over questions. Call it with (answered, in all, more to say)."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show the state, if it is time to."""
        self.show(done, total, f"{done:,} of {total:,} questions  {note}")


class KernelBar(Bar):
    """Progress of compiling. Call it with (jobs done, jobs in all, kernels so far)."""

    def __call__(self, done: int, total: int, kernels: int) -> None:
        """Show the state, if it is time to."""
        self.show(done, total, f"{done} of {total} jobs, {kernels:,} kernels")


class OpBar(Bar):
    """Progress over ops. Call it with (done, in all, the next one)."""

    def __call__(self, done: int, total: int, op: str) -> None:
        """Show the state, if it is time to."""
        self.show(done, total, f"{done} of {total} cases  {op}")
