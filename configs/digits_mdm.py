"""Handwritten digits, pixel by pixel: masked diffusion of image tokens (arXiv 2409.02908).

python -m experiments.train --config=configs/digits_mdm.py --workdir=runs/digits_mdm

Not run to its end by us.
"""

import ml_collections

from configs import pydoc_mdm


def get_config() -> ml_collections.ConfigDict:
    config = pydoc_mdm.get_config()
    config.data.update({"name": "digits", "feature": "image", "length": 64})
    config.data.image_shape = (8, 8, 1)
    config.data.tokenizer.update({"kind": "levels", "vocab_size": 17})
    config.network.update({"width": 128, "depth": 4, "tied": False})
    config.objective.max_rows = None
    config.optimizer.learning_rate = 2e-3
    config.batch_size = 64
    config.num_steps = 3_000
    config.optimizer.decay_steps = config.num_steps
    return config
