"""Reported minima and fresh-seed values stay apart."""

import pytest

from genjax_lab.evaluation import seed_range_summary

_REPORTED = {range(0, 10): 2.0, range(10, 20): 1.5, range(20, 30): 2.5}


def test_the_minimum_of_reported_ranges_is_named_apart_from_fresh_values():
    summary = seed_range_summary(_REPORTED, {range(30, 40): 1.75, range(40, 50): 2.25})
    assert summary == pytest.approx(
        {
            "frechet_min_of_3": 1.5,
            "frechet_mean": 2.0,
            "frechet_std": 0.5,
            "frechet_max": 2.5,
            "frechet_fresh": 2.0,
            "frechet_num_fresh": 2,
            "frechet_fresh_std": 0.125**0.5,
        }
    )


def test_one_fresh_range_has_no_spread_and_the_metric_names_the_keys():
    summary = seed_range_summary(_REPORTED, {range(30, 40): 1.75}, metric="precision_loss")
    assert summary["precision_loss_fresh"] == 1.75
    assert "precision_loss_fresh_std" not in summary


@pytest.mark.parametrize(
    ("reported", "fresh", "message"),
    [
        (_REPORTED, {range(25, 35): 1.0}, "share seeds"),
        ({range(0, 10): 1.0, range(9, 12): 1.0}, {range(30, 40): 1.0}, "share seeds"),
        ({range(0, 10): 1.0}, {range(30, 40): 1.0}, "at least 2"),
        (_REPORTED, {}, "at least 1"),
        (_REPORTED, {range(40, 40): 1.0}, "non-empty range"),
        (_REPORTED, {range(40, 50): float("nan")}, "finite"),
        (_REPORTED, {7: 1.0}, "non-empty range"),
    ],
)
def test_bad_arguments_are_refused(reported, fresh, message):
    with pytest.raises(ValueError, match=message):
        seed_range_summary(reported, fresh)
