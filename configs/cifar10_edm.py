"""CIFAR-10, class-conditional EDM with DDPM++ (arXiv 2206.00364, Table 7): the paper's full size.

    python -m experiments.train --config=configs/cifar10_edm.py --workdir=DIR

The paper reaches a Frechet Inception distance of 1.79 with 35 network evaluations (best of three
seed ranges). Needs `tfds build cifar10` and Inception weights, see
`genjax_lab.pretrained.inception`: --config.evaluation.features=PATH. Not run by us.
"""

import ml_collections

from experiments import images
from genjax_lab.training import default_config

IMAGES = 200_000_000
BATCH = 512


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(images.default_config())
    config.data.update(
        {"name": "cifar10", "split": "train", "image_shape": (32, 32, 3), "num_classes": 10}
    )
    config.network = {"name": "ddpmpp_cifar10", "augment_dim": 9, "dropout": 0.13}
    config.augmentation = 0.12
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 10_000_000 // BATCH})
    config.batch_size = BATCH
    config.num_steps = IMAGES // BATCH
    config.ema = {"ema": {"half_life_images": 500_000.0, "rampup_ratio": 0.05}}
    config.checkpoint_every = 5_000
    config.sampler = {"name": "heun", "num_steps": 18}
    config.evaluation.update(
        {"num_samples": 50_000, "features": "inception.safetensors", "reference_split": "train"}
    )
    return config
