"""MNIST (5000 images of 28x28), class-conditional EDM with a small DiT of neighborhood attention.

    python -m experiments.train --config=configs/mnist5k_dit_gna.py --workdir=runs/mnist5k_dit_gna

Not run to its end; what windows change is measured by `experiments.studies.gna`. This is
`mnist5k_dit` with patches of 4 for 7, hence 7x7 tokens, each of which sees 4x4 of them (arXiv
2504.16922). `--config.network.neighborhood.window=7` is dense attention. A tuple of such dicts, or
None for dense, is one for each block.
"""

import ml_collections

from configs import mnist5k_dit


def get_config() -> ml_collections.ConfigDict:
    config = mnist5k_dit.get_config()
    config.network.update({"patch_size": 4, "neighborhood": {"window": 4, "stride": 2}})
    return config
