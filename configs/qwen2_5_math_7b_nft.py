r"""Qwen2.5-Math-7B learns from its own right and wrong answers: NFT's 7B run (arXiv 2505.18116).

    python -m experiments.train --config=configs/qwen2_5_math_7b_nft.py --workdir=DIR \
        --config.base=Qwen2.5-Math-7B --config.tokenizer.path=Qwen2.5-Math-7B/tokenizer.json \
        --config.task.path=dapo_math_17k.jsonl --config.task.test_path=aime24.jsonl

`base` is a Hugging Face directory. Files of questions have a JSON object {"problem", "answer"} in
each line. 320 rollouts of 512 questions, 16 answers each, 16 optimiser steps; published is a mean
of 51.7 over six benchmarks after it, 31.6 before. DAPO instead: --config.method=dapo
--config.reward.signed=True --config.reward.overlong_buffer=1024. Written for 64 devices of 80 GB;
the training step is checked by its shapes, nothing was run by us.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from experiments import reasoning
from genjax_lab.training import default_config

CHAT = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within "
    "\\boxed{}.<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
)


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(reasoning.default_config())
    config.task = {
        "name": "jsonl",
        "path": placeholder(str),
        "test_path": placeholder(str),
        "template": CHAT,
        "verifier": "strict",
    }
    config.tokenizer.end_tokens = ("<|endoftext|>", "<|im_end|>")
    config.prompt_length, config.answer_length = 512, 3584
    config.network = {
        "name": "Decoder",
        "vocab_size": 152_064,
        "width": 3584,
        "depth": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "mlp_width": 18_944,
        "rope_theta": 1e4,
        "tied": False,
        "scan": True,
        "remat": True,
        "attention_chunk": 1024,
        "dtype": "bfloat16",
    }
    config.method = "nft"
    config.objective.chunk = 256
    config.rollout.update({"num_groups": 512, "num_samples": 16, "minibatches": 16})
    config.rollout.update({"batch_questions": 1536, "slots": 4096})
    config.optimizer.update({"learning_rate": 1e-6, "warmup_steps": 10, "weight_decay": 0.1})
    config.batch_size = 512
    config.accumulation_steps = 8
    config.steps_per_call = 16
    config.num_steps = 320 * config.steps_per_call
    config.max_grad_norm = 1.0
    config.ema = {}
    config.compute_dtype = "bfloat16"
    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    config.log_every = config.steps_per_call
    config.eval_every = config.checkpoint_every = 10 * config.steps_per_call
    # AIME 24 has 30 questions.
    config.evaluation.update({"num_samples": 30 * 32, "answers_per_problem": 32})
    config.evaluation.batch_size = 30 * 32
    config.sampler.update({"temperature": 0.6, "top_p": 0.7})
    config.progress = True
    return config
