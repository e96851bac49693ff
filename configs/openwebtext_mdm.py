"""OpenWebText with GPT-2's tokens: the published masked diffusion model (arXiv 2406.07524).

    python -m experiments.train --config=configs/openwebtext_mdm.py --workdir=DIR \
        --config.data.tokenizer.path=gpt2/tokenizer.json

Needs a TFDS data set with the feature "text", prepared by `genjax_lab.data.prepare`, and GPT-2's
tokenizer. A million steps of 512 sequences. The published model is sampled by ancestral steps;
this config samples by first hitting. Not run by us.
"""

import ml_collections

from experiments import text
from genjax_lab.training import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.update(text.default_config())
    config.data.update({"name": "huggingface:openwebtext", "split": "train[:-100000]"})
    config.data.update({"test_split": "train[-100000:]", "length": 1024})
    config.data.tokenizer.kind = "bpe"
    config.network = {
        "name": "MaskedTransformer",
        "vocab_size": 50_257,
        "width": 768,
        "depth": 12,
        "num_heads": 12,
        "condition_width": 128,
        "dropout": 0.1,
        "dtype": "bfloat16",
    }
    config.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 2_500})
    config.batch_size = 512
    config.num_steps = 1_000_000
    config.max_grad_norm = 1.0
    # A decay of 0.9999 for each step.
    config.ema = {"ema": {"half_life_images": 512 * 6931.0}}
    config.checkpoint_every = 2_500
    config.eval_every = 50_000
    return config
