"""Signals that end a program: at once, or with what it has."""

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program by default, and so would leave its files behind."""


def leave(number: int, frame: FrameType | None) -> None:
    """A handler that ends the process there and then.

    Raising an exception in the handler instead would be lost now and then: Python drops what is raised inside
    a destructor or a weak reference's callback, and every import runs one of those.
    """
    os._exit(128 + number)


@contextmanager
def hearing(handler: Callable[[int, FrameType | None], None], *signals: signal.Signals) -> Generator[None]:
    """Handle signals; what was ignored when we came stays so: that is what nohup, and a shell's &, ask for."""
    heard = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@dataclass(slots=True)
class Interrupt:
    """A signal that ends long work early, with what it has.

    Attributes:
        worthwhile: the work has something to show. Before, and at a second signal, the process ends at once.
        number: of the signal that came.
    """

    worthwhile: bool = False
    number: int | None = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler.

        Raises:
            KeyboardInterrupt: the work is to stop; see `check`.
        """
        if self.number is not None or not self.worthwhile:
            leave(number, frame)
        self.number = number
        os.write(2, b"\nending with what has been answered; another signal leaves at once\n")
        raise KeyboardInterrupt

    def check(self) -> None:
        """To be called now and then, since what a handler raises may be lost (see `leave`).

        Raises:
            KeyboardInterrupt: a signal came.
        """
        if self.number is not None:
            raise KeyboardInterrupt
