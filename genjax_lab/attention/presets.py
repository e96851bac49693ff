"""Neighborhoods of every layer of published models, for their grids and, in proportion, for others.

FLUX.1 and HunyuanVideo have the windows of arXiv 2504.16922, the same in all layers; those of
Cosmos-Predict2 were chosen layer by layer and published with its code (Video2World, 720p).
"""

from collections.abc import Sequence
from typing import NamedTuple

from genjax_lab.attention.shapes import SHAPES
from genjax_lab.attention.windows import NeighborhoodSpec, adaptive_spec


class NeighborhoodPreset(NamedTuple):
    """The neighborhoods of a model.

    Attributes:
        grid: tokens along each axis that windows are meant for.
        specs: of each layer; None for one that attends to everything.
        tile: edges of tiles that suit GPUs, if all layers have one dilation; None otherwise.
    """

    grid: tuple[int, ...]
    specs: tuple[NeighborhoodSpec | None, ...]
    tile: tuple[int, ...] | None = None

    def on(self, grid: Sequence[int]) -> tuple[NeighborhoodSpec | None, ...]:
        """Windows, strides and dilations in proportion to another grid, by `adaptive_spec`.

        Raises:
            ValueError: if the numbers of axes differ.
        """
        return tuple(spec and adaptive_spec(spec, grid, self.grid) for spec in self.specs)


_OF_SHAPES = {shape.name: shape for shape in SHAPES}


def _same_in_all(name: str, depth: int) -> NeighborhoodPreset:
    shape = _OF_SHAPES[name]
    return NeighborhoodPreset(shape.grid, (shape.spec,) * depth, shape.q_tile)


def _cosmos(layers: str) -> NeighborhoodPreset:
    """The preset with the layers of a letter each, all of which see all frames."""
    local = _OF_SHAPES["cosmos-predict2"]
    specs = {
        "b": NeighborhoodSpec((24, 4, 16), 1, (1, 11, 5)),  # dilated in both axes
        "c": NeighborhoodSpec((24, 12, 16), (1, 4, 1), (1, 1, 5)),  # dilated in columns
        "l": local.spec,
        "m": NeighborhoodSpec((24, 20, 40), (1, 4, 8)),
        "w": _OF_SHAPES["cosmos-predict2 wide"].spec,
        "d": None,
    }
    return NeighborhoodPreset(local.grid, tuple(specs[layer] for layer in layers))


NEIGHBORHOODS = {
    "flux-4k": _same_in_all("flux-4k", 19 + 38),
    "hunyuan-video": _same_in_all("hunyuan-video", 20 + 40),
    "cosmos-predict2-2b": _cosmos("bbcllcllllc" + "m" * 12 + "wmmml"),
    "cosmos-predict2-14b": _cosmos("b" * 11 + "cc" + "l" * 10 + "mwmwdwmmwwmwm"),
}
