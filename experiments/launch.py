"""What the three programs share: joining the other hosts, and silence of chatty libraries."""

import logging
import os
import shlex
import sys
import warnings

import jax
from absl import flags

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes: join the others.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; detected if absent."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many; detected if absent.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is; detected if absent.")


def connect() -> None:
    """Joins the other processes if --distributed was given; must come before any computation."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Virtual devices block a thread of XLA's CPU client in every collective that they wait for;
        # it has one for each core, which may be too few for all of them to go on.
        os.environ.setdefault("NPROC", "32")
    if not _DISTRIBUTED.value:
        return
    jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


def quiet_libraries() -> None:
    """Keeps routine messages of libraries off the progress bar; warnings of ours stay."""
    for name in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="orbax")


def shown_command(program: str) -> str:
    """The command of a study or benchmark as results tell it: without where things were written."""
    shown = [part for part in sys.argv[1:] if not part.startswith(("--out", "--workdir"))]
    return " ".join([f"python -m experiments.{program}", shlex.join(shown)]).strip()
