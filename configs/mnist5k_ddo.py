"""MNIST (5000 images of 28x28): a round of DDO (arXiv 2503.01103) on `mnist5k_dit.py`'s model.

    python -m experiments.train --config=configs/mnist5k_ddo.py --workdir=runs/mnist5k_ddo \\
        --config.base=runs/mnist5k_dit

Not run by us yet.
"""

import ml_collections

from experiments import self_play


def get_config() -> ml_collections.ConfigDict:
    config = self_play.default_config()
    config.rounds = 1
    config.alpha = (1.0, 4.0)
    config.beta = (0.05,)  # some 0.5 for the 64 pixels of digits, by dimension
    config.num_fakes = 1_000
    config.batch_size = 64
    config.num_steps = 100
    config.steps_per_call = 5
    config.log_every = 5
    config.eval_every = config.checkpoint_every = 50
    config.selection_seeds = 500
    config.fresh_seeds = 1_000
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 20})
    config.ema.ema.half_life_images = 1_500.0
    config.progress = True
    return config
