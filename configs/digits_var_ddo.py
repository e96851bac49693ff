"""Digits: rounds of DDO (arXiv 2503.01103) on the next-scale model of `digits_var.py`.

    python -m experiments.train --config=configs/digits_var_ddo.py --workdir=runs/digits_var_ddo \\
        --config.base=runs/digits_var

Not run at this size by us yet; `experiments.studies.ddo_tokens` plays such rounds with a smaller
model.
"""

import ml_collections

from experiments import self_play


def get_config() -> ml_collections.ConfigDict:
    config = self_play.default_config()
    config.rounds = 1
    config.loss = "ddo_normalized"
    config.alpha = (1.0, 4.0)
    config.beta = (0.1,)
    config.num_fakes = 1_797
    config.batch_size = 256
    config.num_steps = 100
    config.steps_per_call = 25
    config.eval_every = config.checkpoint_every = 25
    config.log_every = 25
    config.selection_seeds = 2_000
    config.optimizer.update({"learning_rate": 5e-4, "warmup_steps": 20, "b2": 0.95})
    config.ema.ema.half_life_images = 2_000.0
    config.progress = True
    return config
