"""Training: one state, one step, one loop, and the checkpoints that continue a run exactly."""

from genjax_lab.training.checkpoint import Checkpoints
from genjax_lab.training.config import default_config
from genjax_lab.training.ema import (
    ParameterAverage,
    half_life_ema,
    posthoc_ema,
    posthoc_weights,
    power_ema,
)
from genjax_lab.training.experiment import BatchIterator, Experiment
from genjax_lab.training.loop import train
from genjax_lab.training.metric_log import read_metrics
from genjax_lab.training.posthoc import restore_posthoc
from genjax_lab.training.restoration import Restored, restore, restore_config
from genjax_lab.training.self_play import (
    RoundResult,
    SelfPlay,
    default_self_play_config,
    run_round,
    run_self_play,
)
from genjax_lab.training.state import TrainState
from genjax_lab.training.step import TrainStep, make_train_step

__all__ = [
    "BatchIterator",
    "Checkpoints",
    "Experiment",
    "ParameterAverage",
    "Restored",
    "RoundResult",
    "SelfPlay",
    "TrainState",
    "TrainStep",
    "default_config",
    "default_self_play_config",
    "half_life_ema",
    "make_train_step",
    "posthoc_ema",
    "posthoc_weights",
    "power_ema",
    "read_metrics",
    "restore",
    "restore_config",
    "restore_posthoc",
    "run_round",
    "run_self_play",
    "train",
]
