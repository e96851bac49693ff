"""The King James Bible, word by word: masked diffusion without time (arXiv 2409.02908).

python -m experiments.train --config=configs/kjv_mdm.py --workdir=runs/kjv_mdm

Not run to its end by us.
"""

import ml_collections

from configs import pydoc_mdm


def get_config() -> ml_collections.ConfigDict:
    config = pydoc_mdm.get_config()
    config.data.name = "kjv"
    config.data.tokenizer.vocab_size = 8192
    config.network.update({"width": 256, "depth": 4, "num_heads": 8})
    config.optimizer.learning_rate = 2e-3
    config.num_steps = 6_000
    config.optimizer.decay_steps = config.num_steps
    return config
