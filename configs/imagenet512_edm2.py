"""ImageNet 512x512 latents, EDM2-S (arXiv 2312.02696, Table 6): the paper's full size.

    python -m experiments.train --config=configs/imagenet512_edm2.py --workdir=DIR

The paper reaches a Frechet Inception distance of 2.56 without guidance. `data.name` is a data set
of yours in TFDS form whose "image" is the float32 [64, 64, 4] latent of the Stable Diffusion
auto-encoder (ft-mse), normalised with the channels' mean (5.81, 3.25, 0.12, -2.15) and standard
deviation (4.17, 4.62, 3.71, 3.28) to mean 0 and standard deviation 0.5. Not run by us.
"""

import ml_collections

from experiments import images
from genjax_lab.training import default_config

IMAGES = 2048 * 2**20
BATCH = 2048


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(images.default_config())
    config.data.update(
        {
            "name": "imagenet512_latents",
            "split": "train",
            "image_shape": (64, 64, 4),
            "num_classes": 1000,
        }
    )
    config.process = {"name": "edm", "log_sigma_mean": -0.4, "log_sigma_std": 1.0}
    config.network = {"name": "edm2_imagenet", "size": "S", "dtype": "bfloat16", "remat": True}
    config.optimizer.update(
        {
            "learning_rate": 1e-2,
            "schedule": "inverse_sqrt",
            "warmup_steps": 10_000_000 // BATCH,
            "decay_steps": 70_000,
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
        {"num_samples": 50_000, "ema": "narrow", "features": "inception.safetensors"}
    )
    return config
