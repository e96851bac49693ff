"""What training remembers from one optimiser step to the next, and nothing else.

A pure function of this state and of the next batch is the whole of a training step, so storing it
(with the position in the data) is enough to continue a run exactly.
"""

from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree


@flax.struct.dataclass
class TrainState:
    """The state of a training run; a pytree.

    Attributes:
        step: number of optimiser steps taken, skipped ones included; int32.
        params: the trained parameters, float32: the linen collection "params".
        constants: every other linen collection, such as "buffers", by name; never trained.
        opt_state: the optimiser's state. `None` where a checkpoint was read for evaluation.
        ema: averages of the parameters, by name, each shaped as `params`.
        key: the base key. Step `i` uses only `fold_in(key, i)`, so no randomness depends on how
            a run was cut into pieces.
        num_skipped: how many steps were skipped because something was not finite; int32.
        consecutive_skips: how many of the latest steps were skipped without a break; int32.
    """

    step: Int[Array, ""]
    params: PyTree
    constants: dict[str, PyTree]
    opt_state: Any
    ema: dict[str, PyTree]
    key: PRNGKeyArray
    num_skipped: Int[Array, ""]
    consecutive_skips: Int[Array, ""]

    def variables(self, ema: str | None = None) -> dict[str, PyTree]:
        """The linen variables of the trained network, or of one of its averages.

        Args:
            ema: name of the average to use; the parameters themselves by default.

        Returns:
            `{"params": ..., **constants}`.

        Raises:
            ValueError: there is no average of that name.
        """
        if ema is not None and ema not in self.ema:
            raise ValueError(f"ema={ema!r} names no average; there are {sorted(self.ema)}")
        return {"params": self.params if ema is None else self.ema[ema], **self.constants}

    @property
    def step_key(self) -> jax.Array:
        """The key of all randomness in the next step."""
        return jax.random.fold_in(self.key, self.step)
