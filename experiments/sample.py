"""Samples from a checkpoint; its path is all that is needed.

    python -m experiments.sample --checkpoint=runs/digits_edm --num=80 --out=samples.png
    python -m experiments.sample --config=FILE --config.base=DIR --num=8 --out=answers.txt

The second is about what training would begin with, such as published weights.
The kind of file follows from --out: for images .png is a grid under a row of real images and .npz
the arrays. Sample i is a function of the weights and of seed i, so --first=1000 --num=1000
continues --num=1000. With --before=OTHER_RUN the samples of another model are shown above.
"""

import jax
import numpy as np
from absl import app, flags

import experiments
from experiments.chosen_model import CHANGES, chosen_model
from experiments.launch import connect, quiet_libraries

_NUM = flags.DEFINE_integer("num", 80, "How many samples.", lower_bound=1)
_FIRST = flags.DEFINE_integer("first", 0, "Seed of the first sample.", lower_bound=0)
_BEFORE = flags.DEFINE_string(
    "before", None, "Directory of another run, whose samples of the same seeds are shown above."
)
_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    quiet_libraries()
    connect()
    experiment, restored = chosen_model()
    seeds = range(_FIRST.value, _FIRST.value + _NUM.value)

    def draw(experiment, state) -> np.ndarray:
        return np.concatenate([part for _, part in experiment.sample(state, seeds, progress=True)])

    samples, others = draw(experiment, restored.state), {}
    if _BEFORE.value:
        other, earlier = experiments.from_checkpoint(_BEFORE.value, changes=CHANGES.value)
        others["before"] = draw(other, earlier.state)
    if jax.process_index() == 0:
        experiment.write(samples, _OUT.value, **others)
        print(f"{len(samples)} samples of step {restored.step} written to {_OUT.value}")


if __name__ == "__main__":
    app.run(main)
