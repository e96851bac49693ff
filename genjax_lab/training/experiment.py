"""What the training loop, the evaluation and the sampling know of an experiment.

A builder (one per domain) makes an `Experiment` of a config; nothing else about images, text or
rewards reaches the loop.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree, Shaped

from genjax_lab.training.state import TrainState
from genjax_lab.training.step import Objective, Variables


class BatchIterator(Protocol):
    """An endless iterator of batches that can be stored and continued.

    It yields dicts of numpy arrays with a leading axis of `batch_size` rows; under several
    processes only the part that `genjax_lab.parallel.process_share(mesh)` gives this process. For
    results that do not depend on the number of processes, that part is the contiguous cut of the
    batch that one process would yield.

    Where data are made by the model as it stands, the iterator has a method `follow(variables)`,
    too. The loop calls it before it draws the batches of a call, which the next step makes invalid.
    With a method `counters() -> {name: number}` what it has cost so far stands in the log, too.
    """

    def __next__(self) -> dict[str, Shaped[np.ndarray, "rows ..."]]:
        """The next batch."""

    def get_state(self) -> dict[str, Any]:
        """The position after the last yielded batch, as JSON values."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken."""


class Experiment(NamedTuple):
    """One learning problem, as pure functions and the source of its data.

    Attributes:
        init: `(key) -> variables`, the initial linen variables, the same in every process.
        objective: `(variables, batch, key) -> (loss, metrics)`; see `make_train_step`.
        optimizer: an optax transformation.
        batches: `(state) -> BatchIterator`. It is called once, at the start or after a restart, so
            data made by the model itself must be reproducible from the iterator's stored state and
            what `follow` gives. The state's memory is reused by the first step: copy what is
            needed of it.
        evaluate: `(state, *, seeds=None, metrics=None, progress=False) -> {name: value}`, floats;
            the loop gives the state alone. It must be a function of the state and of what is given,
            or an interrupted run would log other values than an uninterrupted one.
        sample: `(state, seeds, *, progress=False) -> iterator of (seeds, samples)`, numpy arrays; a
            sample depends on the state and on its own seed only. The loop never calls it.
        write: `(samples, path, *, before=None) -> None` writes samples as the domain shows them,
            with those of another model to be compared where given; the loop never calls it.
        project: see `make_train_step`; None for unconstrained parameters.
    """

    init: Callable[[PRNGKeyArray], Variables]
    objective: Objective
    optimizer: optax.GradientTransformation
    batches: Callable[[TrainState], BatchIterator]
    evaluate: Callable[..., Mapping[str, float]]
    sample: Callable[..., Any] | None = None
    write: Callable[..., None] | None = None
    project: Callable[[PyTree], PyTree] | None = None
