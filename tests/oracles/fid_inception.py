"""The original PyTorch port of the FID Inception network, with random weights.

torch-fidelity's package imports torchvision, of which its Inception network uses nothing. So the
package is registered without running its `__init__`, and the one module imported from it.
"""

import importlib
import importlib.util
import sys

import torch


def make_extractor(*, seed: int, features: tuple[str, ...]) -> torch.nn.Module:
    """The original extractor, its weights drawn rather than loaded."""
    if "torch_fidelity" not in sys.modules:
        spec = importlib.util.find_spec("torch_fidelity")
        sys.modules["torch_fidelity"] = importlib.util.module_from_spec(spec)
    port = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")

    class RandomlyInitialised(port.FeatureExtractorInceptionV3):
        def load_state_dict(self, _):
            _randomise(self, seed)

    port.load_state_dict_from_url = lambda *_, **__: {}
    return RandomlyInitialised("inception-v3-compat", list(features))


def _randomise(network: torch.nn.Module, seed: int) -> None:
    """Fill every tensor, batch statistics included, keeping activations of order one."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("bn.weight", "running_var")):
                uniform(tensor, 0.7, 1.3)
            elif name.endswith(("bias", "running_mean")):
                uniform(tensor, -0.2, 0.2)
            elif name.endswith("weight"):
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
