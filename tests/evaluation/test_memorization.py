"""The memorization report tells a generator that copies from one that generalises."""

import numpy as np
import pytest

from genjax_lab.evaluation import memorization_report

_NUM = 300


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(_NUM, 5)) for name in ("train", "held_out", "generated")}


def test_a_generator_that_generalises_is_as_near_to_held_out_data(data):
    report = memorization_report(**data, tile=128)
    # Four standard errors of a fraction, sqrt(0.25 / 300), doubled as neighbours are shared; the
    # seed is fixed, so this passes always or never.
    assert report.closer_to_train == pytest.approx(0.5, abs=0.23)
    assert report.distance_ratio == pytest.approx(1, abs=0.1)
    assert abs(report.copying_z) < 4
    assert report.copied_fraction < 0.05
    assert report.num_compared == _NUM


def test_a_generator_that_copies_is_found_out(data):
    copies = data["train"][:150] + 1e-3
    report = memorization_report(copies, data["train"], data["held_out"])
    assert report.distance_ratio < 0.01
    assert report.closer_to_train > 0.99
    assert report.copying_z < -10
    assert report.copied_fraction > 0.99


def test_fields_are_those_of_a_case_by_hand():
    # Distances to train: 1 (then 4), 2 (then 3); to held_out: 2, 1. The copy rule needs 1 < 4 / 3.
    report = memorization_report([[1.0], [3.0]], [[0.0], [5.0]], [[-1.0], [4.0], [100.0]], seed=0)
    assert report.copied_fraction == 0.5
    assert report.num_compared == 2
    report = memorization_report([[1.0], [3.0]], [[0.0], [5.0]], [[-1.0], [4.0]])
    assert report.distance_ratio == pytest.approx((1 / 2 + 2 / 1) / 2)
    assert report.closer_to_train == 0.5


def test_a_larger_training_set_alone_does_not_look_like_memorization(data):
    rng = np.random.default_rng(1)
    train = rng.normal(size=(3000, 5))
    report = memorization_report(data["generated"], train, data["held_out"])
    assert report.closer_to_train == pytest.approx(0.5, abs=0.23)
    assert report.num_compared == _NUM


def test_equal_distances_of_zero_are_a_tie():
    points = np.arange(6.0).reshape(3, 2)
    report = memorization_report(points, points, points)
    assert report.distance_ratio == 1
    assert report.closer_to_train == 0.5


def test_bad_arguments_are_refused(data):
    with pytest.raises(ValueError, match="held_out has dimension 4"):
        memorization_report(data["generated"], data["train"], data["held_out"][:, :4])
    with pytest.raises(ValueError, match="generated is empty"):
        memorization_report(data["generated"][:0], data["train"], data["held_out"])
    with pytest.raises(ValueError, match="train has 1"):
        memorization_report(data["generated"], data["train"][:1], data["held_out"])
