"""Long work shown: a bar on a terminal, plain lines elsewhere. Always on stderr, so that stdout can be piped."""

import sys
import time
from typing import TextIO

_LINE_EVERY = 5.0
"""Seconds between plain lines where there is no terminal."""
_BAR_EVERY = 0.1
_WIDTH = 30


class LoadBar:
    """Progress of reading weights, in GB and GB/s. Call it with (bytes read, bytes in all)."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._started = self._shown = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Show the state, if it is time to; the last call (done == total) always shows."""
        now, last = time.perf_counter(), done >= total
        on_terminal = self._stream.isatty()
        if not last and now - self._shown < (_BAR_EVERY if on_terminal else _LINE_EVERY):
            return
        self._shown = now
        share = done / total if total else 1.0
        speed = done / max(now - self._started, 1e-9) / 1e9
        text = f"{self._label} {share:4.0%}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  {speed:.2f} GB/s"
        if on_terminal:
            filled = int(share * _WIDTH)
            bar = "█" * filled + "░" * (_WIDTH - filled)
            self._stream.write(f"\r{bar} {text}" + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
