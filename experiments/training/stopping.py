"""Stops from outside: SIGTERM and USR2, which clusters send before they kill.

A training that is told to stop finishes its step, saves, and exits with `STATUS`; it
goes on from there. Several processes agree on the step.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import orbax.checkpoint as ocp

STATUS = 75  # EX_TEMPFAIL of sysexits.h: to be tried again
SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR2") if hasattr(signal, n)]
_ASKED = itertools.count(1)  # the same in all processes, which ask before every step


class Stopped(SystemExit):
    """Exit of a program that was told to stop; its text says where it was."""

    def __init__(self, text: str):
        super().__init__(STATUS)
        self.text = text

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass
class Stop:
    """Wish to stop.

    Attributes:
      signal: name of the signal that was received; "" before.
    """

    signal: str = ""

    def agreed(self) -> bool:
        """Returns True before the step at which all processes stop.

        Every process has to ask before each of its steps. Of several processes one
        needs to be told; JAX listens for SIGTERM in each.
        """
        if jax.distributed.is_initialized():
            return ocp.utils.reached_preemption(next(_ASKED))
        return bool(self.signal)


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
    """Takes signals as a wish, which a training grants between two steps.

    Raises:
      Stopped: a wish was not granted; at the end of the block.
    """
    stop = Stop()

    def wish(number: int, _: FrameType | None) -> None:
        stop.signal = signal.Signals(number).name

    with _handled_by(wish):
        yield stop
    if stop.signal:
        raise Stopped(f"Stopped by {stop.signal}, after the last step.")


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Takes signals as an exit, outside of trainings.

    Raises:
      Stopped: as soon as there is a signal.
    """

    def leave(number: int, _: FrameType | None) -> None:
        raise Stopped(f"Stopped by {signal.Signals(number).name}.")

    with _handled_by(leave):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Sets the handler of the signals, in the main thread, which alone has any.

    Among several processes SIGTERM is JAX's, which tells the others.
    """
    handlers = dict.fromkeys(SIGNALS, handler)
    if jax.distributed.is_initialized():
        handlers = {n: _as_sigterm for n in SIGNALS if n != signal.SIGTERM}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {number: signal.signal(number, own) for number, own in handlers.items()}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own or signal.SIG_DFL)


def _as_sigterm(_: int, __: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
