"""CIFAR-10: rounds of DDO (arXiv 2503.01103) on the model of `cifar10_edm.py`: the paper's size.

    python -m experiments.train --config=configs/cifar10_ddo.py --workdir=DIR --config.base=RUN

The paper goes from a Frechet Inception distance of 1.85 to 1.30 in 16 rounds of 1.5 million images
(0.75 % of pretraining each), and to 1.58 in the first; learning rate, average and length of a round
are as reported by its readers. Not run by us.
"""

import ml_collections

from experiments import self_play

IMAGES = 1_500_000
BATCH = 512


def get_config() -> ml_collections.ConfigDict:
    config = self_play.default_config()
    config.rounds = 16
    config.alpha = (0.5, 1.0, 2.0, 4.0, 6.0)
    config.beta = (0.01, 0.02, 0.05, 0.1)
    config.num_fakes = 50_000
    config.batch_size = BATCH
    config.num_steps = IMAGES // BATCH // 10 * 10
    config.eval_every = config.checkpoint_every = config.num_steps // 10
    config.selection_seeds = config.fresh_seeds = 50_000
    # Linear warm-up over the whole round.
    config.optimizer.update({"learning_rate": 1.5e-4, "warmup_steps": config.num_steps})
    config.ema.ema.half_life_images = 250_000.0
    return config
