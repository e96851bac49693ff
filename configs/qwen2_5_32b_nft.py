r"""Qwen2.5-32B learns from its own right and wrong answers: NFT's 32B run (arXiv 2505.18116).

    python -m experiments.train --config=configs/qwen2_5_32b_nft.py --workdir=DIR \
        --config.base=Qwen2.5-32B --config.tokenizer.path=Qwen2.5-32B/tokenizer.json \
        --config.task.path=dapo_math_17k.jsonl --config.task.test_path=aime24.jsonl

As `configs/qwen2_5_math_7b_nft.py`, with prompts of 2048 and answers of 14,336 tokens; published
is a mean of 59.2 after it, 29.6 before. DAPO instead: --config.method=dapo
--config.reward.signed=True --config.reward.overlong_buffer=4096. Written for 128 devices of 80 GB;
the training step is checked by its shapes, nothing was run by us.
"""

import ml_collections

from configs import qwen2_5_math_7b_nft


def get_config() -> ml_collections.ConfigDict:
    config = qwen2_5_math_7b_nft.get_config()
    config.prompt_length, config.answer_length = 2048, 14_336
    config.network.update({"width": 5120, "depth": 64, "num_heads": 40, "num_kv_heads": 8})
    config.network.update({"mlp_width": 27_648, "rope_theta": 1e6})
    config.network.attention_chunk = 512
    config.accumulation_steps = 32
    config.rollout.slots = 2048
    config.mesh = {"data": -1, "fsdp": 16, "tensor": 8}
    config.sampler.update({"temperature": 1.0, "top_p": 0.7})
    return config
