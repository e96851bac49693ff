"""Averages of any width, out of the checkpoints of a run that kept power-function averages.

EDM2 (arXiv 2312.02696, section 3.2) chooses the width of the average after training: the stored
snapshots of a few widths are combined so that their weights on the past match those of the width
that is wanted.
"""

import os
from collections.abc import Iterator

from jaxtyping import PyTree

from genjax_lab.training.checkpoint import checkpoint_directory, checkpoint_steps
from genjax_lab.training.ema import posthoc_ema, posthoc_weights
from genjax_lab.training.restoration import restore, restore_config


def restore_posthoc(
    directory: str | os.PathLike, sigma_rel: float, *, step: int | None = None
) -> dict[str, PyTree]:
    """The network's variables under an average of width `sigma_rel` that was not stored.

    Uses every kept checkpoint up to `step`, so it is the closer the more of them the run's
    `keep_every` left, and at its best with two stored widths (0.05 and 0.10 in the paper).

    Args:
        directory: the directory of the run.
        sigma_rel: the wanted relative width; see `power_ema`.
        step: the step at which the average stands; the latest by default.

    Returns:
        `{"params": ..., **constants}`, numpy arrays.

    Raises:
        ValueError: the run keeps no power-function average, or a checkpoint cannot be read.
    """
    directory = checkpoint_directory(directory)
    config = restore_config(directory, step)
    widths = {
        name: settings["sigma_rel"]
        for name, settings in config["ema"].items()
        if "sigma_rel" in settings
    }
    if not widths:
        raise ValueError(
            f"directory={str(directory)!r} holds no power-function average; config.ema of the run "
            f"is {config['ema']}, and one with sigma_rel is needed"
        )
    steps = checkpoint_steps(directory)
    steps = [stored for stored in steps if stored <= (steps[-1] if step is None else step)]

    def averages() -> Iterator[PyTree]:
        for stored in steps:
            state = restore(directory, stored).state
            for name in widths:
                yield state.ema[name]

    weights = posthoc_weights(
        [stored for stored in steps for _ in widths],
        list(widths.values()) * len(steps),
        target_step=steps[-1],
        target_sigma_rel=sigma_rel,
    )
    constants = restore(directory, steps[-1]).state.constants
    return {"params": posthoc_ema(weights, averages()), **constants}
