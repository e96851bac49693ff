"""ImageNet 64x64, EDM2-S on pixels (arXiv 2312.02696, Table 6): the paper's full size.

    python -m experiments.train --config=configs/imagenet64_edm2.py --workdir=DIR

The paper reaches a Frechet Inception distance of 1.58 with 63 evaluations and no guidance. Needs
`tfds build imagenet2012` and Inception weights: --config.evaluation.features=PATH. Not run by us.
"""

import ml_collections

from configs import imagenet512_edm2

IMAGES = 1024 * 2**20


def get_config() -> ml_collections.ConfigDict:
    """The recipe for latents with pixels, wider noise and an earlier decay of the rate."""
    config = imagenet512_edm2.get_config()
    config.data.update({"name": "imagenet2012", "image_shape": (64, 64, 3), "resolution": 64})
    config.process.update({"log_sigma_mean": -0.8, "log_sigma_std": 1.6})
    config.optimizer.decay_steps = 35_000
    config.num_steps = IMAGES // imagenet512_edm2.BATCH
    config.evaluation.reference_split = "train"
    return config
