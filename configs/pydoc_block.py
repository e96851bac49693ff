"""Python's language reference in blocks of eight words: block diffusion (arXiv 2503.09573).

python -m experiments.train --config=configs/pydoc_block.py --workdir=runs/pydoc_block

Not run to its end by us.
"""

import ml_collections

from configs import pydoc_mdm


def get_config() -> ml_collections.ConfigDict:
    config = pydoc_mdm.get_config()
    config.objective.block = 8
    config.sampler = {"name": "block_diffusion"}
    return config
