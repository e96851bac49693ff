"""Trains what a config describes, or continues it.

    python -m experiments.train --config=configs/digits_edm.py --workdir=DIR [--config.field=value]

The same command after any interruption goes on where the last checkpoint is, exactly. On several
hosts run it on every one with --distributed; Slurm, Kubernetes and TPU pods are detected by JAX,
elsewhere give --coordinator, --num_processes and --process_id.
"""

from absl import app, flags
from ml_collections import config_flags

import experiments
from experiments.launch import connect, quiet_libraries

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to train.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_RESTORE_STEP = flags.DEFINE_integer(
    "restore_step",
    None,
    "Go on from this checkpoint; later ones are moved to checkpoints_set_aside.",
)
_ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes", [], "Fields in which the config may differ from the run's, * for any."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    quiet_libraries()
    connect()

    experiments.run(
        _CONFIG.value,
        _WORKDIR.value,
        restore_step=_RESTORE_STEP.value,
        allow_changes=_ALLOW_CHANGES.value,
    )


if __name__ == "__main__":
    app.run(main)
