"""Digits: a tokenizer of 21 tokens on scales 1, 2 and 4, the first stage of `digits_var.py`.

python -m experiments.train --config=configs/digits_tokenizer.py --workdir=runs/digits_tokenizer

Some 7 minutes on two CPU cores that were busy with other work. Mean squared error of the
reconstructions 0.022 (values in [-1, 1]), their Frechet distance 0.33 (classifier features, all
1797 images); the finest scale uses 95 % of the 64 codes.
"""

import ml_collections

from experiments import tokenizer
from genjax_lab.training import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(tokenizer.default_config())
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100, "schedule": "cosine"})
    config.batch_size = 256
    config.num_steps = 2_000
    config.optimizer.decay_steps = config.num_steps
    config.steps_per_call = 50
    config.log_every = 100
    config.checkpoint_every = 1_000
    config.ema = {"ema": {"half_life_images": 20_000.0, "rampup_ratio": 0.05}}
    config.progress = True
    config.evaluation.update({"num_samples": 1_797, "batch_size": 599})
    config.evaluation.reference_split = "train+test"
    return config
