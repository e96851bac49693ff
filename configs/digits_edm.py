"""Digits, class-conditional EDM (arXiv 2206.00364) with a residual MLP: minutes on a laptop.

    python -m experiments.train --config=configs/digits_edm.py --workdir=runs/digits_edm

About 4 minutes on two busy CPU cores. Frechet distance on features of a classifier trained on all
digits, 5000 samples of fresh seeds, Heun with 35 evaluations: 0.28 (`make demo`). A long run
copies: see `genjax_lab.evaluation.memorization_report`.
"""

import ml_collections

from experiments import images
from genjax_lab.training import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(images.default_config())
    config.process = {
        "name": "edm",
        "sigma_min": 0.01,
        "sigma_max": 20.0,
        "log_sigma_mean": -1.0,
        "log_sigma_std": 1.2,
    }
    config.network = {"name": "ResidualMLP", "width": 256, "num_blocks": 4, "dropout": 0.0}
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 200, "schedule": "cosine"})
    config.batch_size = 256
    config.num_steps = 4_000
    config.optimizer.decay_steps = config.num_steps
    config.steps_per_call = 50
    config.log_every = 100
    config.checkpoint_every = 2_000
    config.ema = {"ema": {"half_life_images": 100_000.0, "rampup_ratio": 0.05}}
    config.progress = True
    config.evaluation.update({"num_samples": 5_000, "batch_size": 1_000})
    config.evaluation.reference_split = "train+test"
    return config
