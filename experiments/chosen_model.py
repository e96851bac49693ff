"""Which model evaluate.py and sample.py are about: the flags that both have.

Either --checkpoint=DIR, a run, with --step, --sigma_rel and --set; or --config=FILE, what training
of this config would begin with, such as the published weights that `config.base` names.
"""

from absl import app, flags
from ml_collections import config_flags

import experiments
from genjax_lab.training import Experiment, Restored

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a run.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "In place of a run: the model with which its training begins.", lock_config=True
)
_STEP = flags.DEFINE_string("step", None, "Which checkpoint: a number or 'best'; default the last.")
_SIGMA_REL = flags.DEFINE_float(
    "sigma_rel", None, "Width of an average made of the stored ones; default the config's average."
)
CHANGES = flags.DEFINE_multi_string(
    "set", [], "A field of the run's config and its new value, as in --set=sampler.temperature=0.6."
)


def chosen_model() -> tuple[Experiment, Restored]:
    """The experiment and the state that the flags name."""
    if (CHECKPOINT.value is None) == (_CONFIG.value is None):
        raise app.UsageError("give --checkpoint=DIR or --config=FILE, and not both")
    if _CONFIG.value is None:
        return experiments.from_checkpoint(
            CHECKPOINT.value, _STEP.value, sigma_rel=_SIGMA_REL.value, changes=CHANGES.value
        )
    if given := [flag.name for flag in (_STEP, _SIGMA_REL, CHANGES) if flag.value]:
        raise app.UsageError(
            f"--{given[0]} is about a run; change a config by --config.FIELD=VALUE"
        )
    return experiments.before_training(_CONFIG.value)
