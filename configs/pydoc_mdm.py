"""Python's language reference, word by word: masked diffusion without time (arXiv 2409.02908).

python -m experiments.train --config=configs/pydoc_mdm.py --workdir=runs/pydoc_mdm

Held-out bound of 3.46 to 3.51 nats a word (six runs of `experiments.studies.mdm`; their numbers are
in mdm.json and mdm_quality.json).
"""

import ml_collections

from experiments import text
from genjax_lab.training import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(text.default_config())
    config.network = {
        "name": "MaskedTransformer",
        "width": 128,
        "depth": 3,
        "num_heads": 4,
        "condition_width": 0,
        "dropout": 0.2,
        "tied": True,
    }
    config.objective.max_rows = 48
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 100, "schedule": "cosine"})
    config.optimizer.weight_decay = 0.03
    config.batch_size = 32
    config.num_steps = 1_500
    config.optimizer.decay_steps = config.num_steps
    config.steps_per_call = 20
    config.log_every = 100
    config.eval_every = 500
    config.checkpoint_every = 500
    config.max_grad_norm = 1.0
    config.ema = {"ema": {"half_life_images": 3_000.0, "rampup_ratio": 0.05}}
    config.progress = True
    return config
