"""A tiny decoder learns arithmetic from its own right and wrong answers: NFT (arXiv 2505.18116).

python -m experiments.train --config=configs/digit_sum_sft.py --workdir=runs/digit_sum_sft
python -m experiments.train --config=configs/arithmetic_nft.py \
    --config.base=runs/digit_sum_sft --workdir=runs/arithmetic_nft

Twenty seconds on an idle core; 73.2 % of the answers are right then, from 32.9 %, after 52.0, 63.3
and 72.3 % on the way. --config.method= is any of `experiments.reasoning.METHODS`.
"""

import ml_collections

from configs.digit_sum_sft import NETWORK
from experiments import reasoning
from genjax_lab.training import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(reasoning.default_config())
    config.task = {"name": "digit_sum", "num_digits": 4}
    config.prompt_length, config.answer_length = 3, 5
    config.network = NETWORK
    config.method = "nft"
    config.rollout.update({"num_groups": 32, "num_samples": 8, "minibatches": 4})
    config.rollout.batch_questions = 64
    config.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 10})
    config.batch_size = 64
    config.steps_per_call = 4
    config.num_steps = 800
    config.log_every = 40
    config.eval_every = 200
    config.checkpoint_every = 200
    config.max_grad_norm = 1.0
    config.ema = {}
    config.evaluation.update({"num_samples": 2048, "answers_per_problem": 8, "batch_size": 2048})
    config.progress = True
    return config
