"""Neighborhoods of published models."""

import math

import pytest

from genjax_lab.attention.presets import NEIGHBORHOODS
from genjax_lab.attention.windows import mean_keys

# Layers by percent of the keys that they do not see, as stated with the models.
SPARSITIES = {
    "flux-4k": {90: 57},
    "hunyuan-video": {91: 60},
    "cosmos-predict2-2b": {98: 2, 95: 3, 92: 7, 77: 15, 55: 1},
    "cosmos-predict2-14b": {98: 11, 95: 2, 92: 10, 77: 6, 55: 6, 0: 1},
}


@pytest.mark.parametrize("name", NEIGHBORHOODS)
def test_layers_are_as_sparse_as_published(name):
    grid, specs, _ = NEIGHBORHOODS[name]
    counts = {}
    for spec in specs:
        seen = 1 if spec is None else mean_keys(grid, spec) / math.prod(grid)
        percent = round(100 * (1 - seen))
        counts[percent] = counts.get(percent, 0) + 1
    assert counts == SPARSITIES[name]


def test_windows_keep_their_share_of_another_grid():
    preset = NEIGHBORHOODS["cosmos-predict2-14b"]
    small = preset.on((6, 22, 40))
    assert small[27] is None and len(small) == 36
    assert small[24].window == (6, 14, 28) and small[24].stride == (1, 2, 4)
    for spec, same in zip(preset.specs, preset.on(preset.grid), strict=True):
        assert spec == same or spec.axes(preset.grid) == same.axes(preset.grid)
