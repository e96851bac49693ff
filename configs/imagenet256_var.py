"""ImageNet 256 x 256, next-scale autoregression (VAR-d16, arXiv 2404.02905), 310M parameters.

    python -m experiments.train --config=configs/imagenet256_var.py --workdir=DIR \\
        --config.tokenizer.weights=vae_ch160v4096z32.pth

Not run by us: 200 epochs of batch 768 on a pod. Needs `imagenet2012` prepared by TFDS, the
published tokenizer, and Inception weights for its metrics (`config.evaluation.features`).
"""

import ml_collections

from experiments import next_scale
from genjax_lab.training import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(next_scale.default_config())
    config.data.update(
        {
            "name": "imagenet2012",
            "split": "train",
            "image_shape": (256, 256, 3),
            "resolution": 256,
            "num_classes": 1000,
        }
    )
    config.tokenizer.name = "var_tokenizer"
    config.network = {"name": "var_imagenet", "size": "d16", "scan": True, "remat": True}
    config.batch_size = 768
    config.num_steps = 200 * 1_281_167 // config.batch_size
    # 1e-4 for every 256 rows. The published schedule falls linearly in the end, this one does not.
    config.optimizer.update(
        {"learning_rate": 3e-4, "warmup_steps": 6_600, "b2": 0.95, "weight_decay": 0.05}
    )
    config.max_grad_norm = 2.0
    config.log_every = 100
    config.checkpoint_every = 5_000
    config.ema = {"ema": {"half_life_images": 500_000.0, "rampup_ratio": 0.05}}
    config.sampler.cfg = 1.5
    config.sampler.top_k = 900
    config.sampler.top_p = 0.96
    config.evaluation.update({"num_samples": 50_000, "batch_size": 256})
    return config
