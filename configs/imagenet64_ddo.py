"""ImageNet 64x64: rounds of DDO (arXiv 2503.01103) on EDM2-S, `imagenet64_edm2.py`: full size.

    python -m experiments.train --config=configs/imagenet64_ddo.py --workdir=DIR --config.base=RUN

The paper goes from a Frechet Inception distance of 1.60 to 0.97 in 24 rounds of 6.4 million images
(0.6 % of pretraining each), with wider noise from round 17 on; learning rate and schedule are as
reported by its readers, the batch size is ours. Not run by us.
"""

import ml_collections

from experiments import self_play

IMAGES = 6_400_000
BATCH = 512


def get_config() -> ml_collections.ConfigDict:
    config = self_play.default_config()
    config.rounds = 24
    config.alpha = (0.5, 1.0, 2.0, 4.0, 6.0)
    config.beta = (0.01, 0.02, 0.05, 0.1)
    config.num_fakes = 50_000
    config.batch_size = BATCH
    config.num_steps = IMAGES // BATCH
    config.eval_every = config.checkpoint_every = config.num_steps // 10
    config.selection_seeds = config.fresh_seeds = 50_000
    config.process_from_round = {"17": {"log_sigma_std": 3.0}}
    config.optimizer.update(
        {
            "learning_rate": 5e-5,
            "warmup_steps": 500,
            "schedule": "inverse_sqrt",
            "decay_steps": config.num_steps * 4 // 25,  # 0.4 of the rate at the end
            "b2": 0.99,
        }
    )
    config.ema = {"ema": {"sigma_rel": 0.05}}
    return config
