"""Noticing that the machine wants the process to stop.

Schedulers send SIGTERM some seconds before they take a machine away. With one process a handler
remembers it; with several, JAX's preemption service agrees on one step at which all of them stop,
since a checkpoint is written by all together.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def preemption_notice() -> Iterator[Callable[[int], bool]]:
    """Gives a function `(step) -> bool` that says whether to save and stop after this step.

    The first SIGTERM makes it true and a second one ends the process as usual. Every process must
    ask it at the same steps. Python delivers signals to the main thread only: in another thread a
    single process keeps whatever handler it has.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    noticed = threading.Event()

    def notice(signum: int, frame: object) -> None:
        noticed.set()
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)

    previous = signal.signal(signal.SIGTERM, notice)
    try:
        yield lambda step: noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
