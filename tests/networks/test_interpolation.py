"""Resizing as matrices: PyTorch's own, and what follows from the definition alone."""

import numpy as np
import pytest

from genjax_lab.networks.interpolation import (
    area_matrix,
    bicubic_matrix,
    resize_area,
    resize_bicubic,
)

SIZES = [(1, 16), (2, 16), (3, 16), (13, 16), (16, 16), (4, 3), (16, 5), (1, 1), (5, 1)]


@pytest.mark.oracle
@pytest.mark.parametrize(("size", "new_size"), SIZES)
def test_resizing_is_pytorchs(size, new_size):
    torch = pytest.importorskip("torch", reason="run `make oracles` for comparisons with PyTorch")
    functional = torch.nn.functional
    unit = torch.eye(size, dtype=torch.float64)[:, None, None]  # every column in a row of its own
    for mode, matrix in (("bicubic", bicubic_matrix), ("area", area_matrix)):
        expected = functional.interpolate(unit, (1, new_size), mode=mode)[:, 0, 0].T
        np.testing.assert_allclose(matrix(size, new_size), expected, atol=1e-12, err_msg=mode)
    # In float32 PyTorch rounds the positions, of up to 16 and thus by 1e-6, times a slope of 3.
    x = np.random.default_rng(0).standard_normal((2, size, size + 1, 3)).astype(np.float32)
    target = (new_size, new_size + 2)
    channels_first = torch.tensor(x).permute(0, 3, 1, 2)
    for mode, resize in (("bicubic", resize_bicubic), ("area", resize_area)):
        expected = functional.interpolate(channels_first, target, mode=mode)
        np.testing.assert_allclose(
            resize(x, target), expected.permute(0, 2, 3, 1), atol=1e-5, err_msg=mode
        )


@pytest.mark.parametrize(("size", "new_size"), SIZES)
def test_constants_stay_constant_and_equal_sizes_change_nothing(size, new_size):
    for matrix in (bicubic_matrix(size, new_size), area_matrix(size, new_size)):
        assert matrix.shape == (new_size, size)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
        if size == new_size:
            np.testing.assert_array_equal(matrix, np.eye(size))


def test_bins_are_those_of_the_definition():
    np.testing.assert_allclose(area_matrix(4, 3) * 2, [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_allclose(area_matrix(4, 2) * 2, [[1, 1, 0, 0], [0, 0, 1, 1]])


def test_keys_kernel_has_its_published_weights():
    # Halfway between two samples the weights are a/8 outside and (4 - a)/8 inside, a = -3/4.
    row = bicubic_matrix(8, 8 * 2 + 1)[8]  # its middle sample lies upon sample 3.5
    np.testing.assert_allclose(row[2:6], [-3 / 32, 19 / 32, 19 / 32, -3 / 32], atol=1e-12)


@pytest.mark.parametrize("matrix", [bicubic_matrix, area_matrix])
def test_empty_axes_are_refused(matrix):
    with pytest.raises(ValueError, match="positive"):
        matrix(0, 2)
