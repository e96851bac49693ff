"""A tiny decoder learns to write numbers as sums of four digits, and does it rightly now and then.

python -m experiments.train --config=configs/digit_sum_sft.py --workdir=runs/digit_sum_sft

Twenty seconds on an idle core; then 32.9 % of its answers are right, and one of eight for 91 % of
the questions. What `configs/arithmetic_nft.py` begins with.
"""

import ml_collections

from experiments import reasoning
from genjax_lab.training import default_config

NETWORK = {
    "name": "Decoder",
    "width": 64,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_width": 192,
    "rope_theta": 1e4,
}


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(reasoning.default_config())
    config.task = {"name": "digit_sum", "num_digits": 4}
    config.prompt_length, config.answer_length = 3, 5
    config.network = NETWORK
    config.method = "sft"
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 20})
    config.batch_size = 256
    config.num_steps = 300
    config.steps_per_call = 20
    config.log_every = 20
    config.eval_every = config.num_steps
    config.checkpoint_every = config.num_steps
    config.max_grad_norm = 1.0
    config.ema = {}
    config.evaluation.update({"num_samples": 2048, "answers_per_problem": 8, "batch_size": 2048})
    config.progress = True
    return config
