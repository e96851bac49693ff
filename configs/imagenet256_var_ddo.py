"""ImageNet 256 x 256: rounds of DDO (arXiv 2503.01103) on the next-scale model VAR-d16.

    python -m experiments.train --config=configs/imagenet256_var_ddo.py \\
        --workdir=runs/imagenet256_var_ddo --config.base=runs/imagenet256_var

The paper's two rounds of less than a hundred steps, samples drawn online and decoded and encoded
again, alpha from 10 to 100 at beta 0.02; batch and learning rate are ours, being unpublished.
Not run by us.
"""

import ml_collections

from experiments import self_play


def get_config() -> ml_collections.ConfigDict:
    config = self_play.default_config()
    config.rounds = 2
    config.loss = "ddo_normalized"
    config.alpha = (10.0, 30.0, 100.0)
    config.beta = (0.02,)
    config.fake_online = True
    config.batch_size = 768
    config.num_steps = 100
    config.eval_every = config.checkpoint_every = 20
    config.log_every = 10
    config.selection_seeds = config.fresh_seeds = 50_000
    config.sampler = {"cfg": 0.0, "top_k": 0, "top_p": 0.0}  # chosen by what the model itself draws
    config.optimizer.update({"learning_rate": 2e-5, "warmup_steps": 20, "b2": 0.95})
    config.ema.ema.half_life_images = 10_000.0
    return config
