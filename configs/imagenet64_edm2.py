"""ImageNet 64x64, EDM2-S on pixels (arXiv 2312.02696, Table 6): the paper's full size.

    python -m experiments.train --config=configs/imagenet64_edm2.py --workdir=DIR

The paper reaches a Frechet Inception distance of 1.58 with 63 evaluations and no guidance. Needs
`tfds build imagenet2012` and Inception weights: --config.evaluation.features=PATH. Not run by us.
"""

import ml_collections

from experiments import images
from genjax_lab.training import default_config

IMAGES = 1024 * 2**20
BATCH = 2048


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(images.default_config())
    config.data.update(
        {
            "name": "imagenet2012",
            "split": "train",
            "image_shape": (64, 64, 3),
            "num_classes": 1000,
            "resolution": 64,
        }
    )
    config.process = {"name": "edm", "log_sigma_mean": -0.8, "log_sigma_std": 1.6}
    config.network = {
        "name": "EDM2UNet",
        "resolution": 64,
        "model_channels": 192,
        "dtype": "bfloat16",
        "remat": True,
    }
    config.optimizer.update(
        {
            "learning_rate": 1e-2,
            "schedule": "inverse_sqrt",
            "warmup_steps": 10_000_000 // BATCH,
            "decay_steps": 35_000,
            "b2": 0.99,
        }
    )
    config.batch_size = BATCH
    config.num_steps = IMAGES // BATCH
    config.ema = {"narrow": {"sigma_rel": 0.05}, "wide": {"sigma_rel": 0.10}}
    config.checkpoint_every = 4_096
    config.keep_every = 4_096  # snapshots for averages of any width after the fact
    config.sampler = {"name": "heun", "num_steps": 32}
    config.evaluation.update(
        {
            "num_samples": 50_000,
            "ema": "narrow",
            "features": "inception.safetensors",
            "reference_split": "train",
        }
    )
    return config
