"""MNIST (5000 images of 28x28), class-conditional EDM with a small DDPM++ U-Net.

    python -m experiments.train --config=configs/mnist5k_edm.py --workdir=runs/mnist5k_edm

38 minutes on two busy CPU cores. Samples are legible digits of their class with some strays;
Frechet distance on features of a classifier, 500 samples of fresh seeds, Heun with 35 evaluations:
19.6 (`python -m experiments.evaluate --checkpoint=DIR --num=500 --seed_ranges=2`).
"""

import ml_collections

from experiments import images
from genjax_lab.training import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(images.default_config())
    config.data.update(
        {"name": "mnist5k", "split": "train", "image_shape": (28, 28, 1), "num_classes": 10}
    )
    config.network = {
        "name": "SongUNet",
        "resolution": 28,
        "model_channels": 16,
        "channel_mult": (1, 2, 2),
        "num_blocks": 1,
        "attn_resolutions": (7,),
        "dropout": 0.0,
        "label_dropout": 0.1,
    }
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100, "schedule": "cosine"})
    config.batch_size = 64
    config.num_steps = 1_200
    config.optimizer.decay_steps = config.num_steps
    config.steps_per_call = 10
    config.log_every = 50
    config.checkpoint_every = 400
    config.ema = {"ema": {"half_life_images": 20_000.0, "rampup_ratio": 0.05}}
    config.progress = True
    config.evaluation.update({"num_samples": 1_000, "batch_size": 250})
    config.evaluation.reference_split = "train+test"
    return config
