"""text8, character by character: the published masked diffusion model (arXiv 2406.07524).

    python -m experiments.train --config=configs/text8_mdm.py --workdir=DIR

Needs a TFDS data set "text8" with the feature "text", prepared by `genjax_lab.data.prepare`: 27
characters, of which the first 90 million are for training. Bits for each character are the bound
over log 2. Not run by us.
"""

import ml_collections

from configs import openwebtext_mdm


def get_config() -> ml_collections.ConfigDict:
    config = openwebtext_mdm.get_config()
    config.data.update({"name": "text8", "split": "train", "test_split": "test", "length": 256})
    config.data.tokenizer.kind = "character"
    config.network.vocab_size = 29  # with the separator, and what is unknown
    return config
