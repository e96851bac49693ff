"""ImageNet 64x64, class-conditional EDM with the ADM network (arXiv 2206.00364): full size.

    python -m experiments.train --config=configs/imagenet64_edm.py --workdir=DIR

The paper reaches a Frechet Inception distance of 1.36 with this stochastic sampler and 511
evaluations. Needs `tfds build imagenet2012` and Inception weights:
--config.evaluation.features=PATH. The reduction of the images is ADM's (halving with a box
filter, then bicubic), where EDM's own data set is made by cropping and Lanczos. Not run by us.
"""

import ml_collections

from experiments import images
from genjax_lab.training import default_config

IMAGES = 2_500_000_000
BATCH = 4096


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
    config.network = {
        "name": "adm_imagenet64",
        "dropout": 0.10,
        "dtype": "bfloat16",
        "remat": True,
    }
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 10_000_000 // BATCH})
    config.batch_size = BATCH
    config.num_steps = IMAGES // BATCH
    config.ema = {"ema": {"half_life_images": 50_000_000.0, "rampup_ratio": 0.05}}
    config.checkpoint_every = 2_500
    config.sampler = {
        "name": "heun",
        "num_steps": 256,
        "churn": 40.0,
        "churn_t_min": 0.05,
        "churn_t_max": 50.0,
        "churn_noise": 1.003,
    }
    config.evaluation.update(
        {"num_samples": 50_000, "features": "inception.safetensors", "reference_split": "train"}
    )
    return config
