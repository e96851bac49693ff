"""Pools of samples: whole or not at all, and nobody else's."""

import json

import numpy as np
import pytest

from genjax_lab.data import draw_pool, read_pool

ORIGIN = {"model": "abc", "sampler": {"name": "heun", "times": (1, 2)}}


def drawer(calls=None, fail_at=None):
    """Draws sample i = [[i mod 251]] in batches of 7."""

    def draw(seeds):
        if calls is not None:
            calls.append(seeds)
        for start in range(seeds.start, seeds.stop, 7):
            part = np.arange(start, min(start + 7, seeds.stop))
            if fail_at is not None and fail_at in part:
                raise KeyboardInterrupt
            yield part, (part % 251).astype(np.uint8)[:, None, None, None]

    return draw


def by_threes(seeds):
    return np.arange(seeds.start, seeds.stop) % 3


def draw_into(directory, draw=None, **changes):
    options = {"seeds": range(100, 160), "provenance": ORIGIN, "part_size": 25, "label": by_threes}
    return draw_pool(directory, draw or drawer(), **(options | changes))


def test_a_pool_holds_the_samples_of_its_seeds_in_order(tmp_path):
    pool = draw_into(tmp_path)
    np.testing.assert_array_equal(pool["image"][:, 0, 0, 0], np.arange(100, 160) % 251)
    np.testing.assert_array_equal(pool["label"], np.arange(100, 160) % 3)
    assert pool["label"].dtype == np.int32
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["label_counts"] == {"0": 20, "1": 20, "2": 20}
    assert manifest["provenance"]["model"] == "abc"


def test_drawing_goes_on_where_it_was_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        draw_into(tmp_path, drawer(fail_at=140))
    with pytest.raises(ValueError, match="no whole pool"):
        read_pool(tmp_path)
    calls = []
    pool = draw_into(tmp_path, drawer(calls))
    assert calls == [range(125, 150), range(150, 160)]
    np.testing.assert_array_equal(pool["image"], draw_into(tmp_path / "other")["image"])
    draw_into(tmp_path, drawer(calls))
    assert len(calls) == 2  # nothing is drawn twice


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize("change", [{"provenance": {"model": "abd"}}, {"seeds": range(60)}])
def test_a_pool_of_another_origin_is_refused(tmp_path, change, interrupted):
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            draw_into(tmp_path, drawer(fail_at=140))
    else:
        draw_into(tmp_path)
    with pytest.raises(ValueError, match="another origin"):
        draw_into(tmp_path, **change)


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [(by_threes, None), (None, by_threes), (by_threes, lambda seeds: by_threes(seeds) + 1)],
)
def test_a_pool_of_other_labels_is_refused(tmp_path, before, after, interrupted):
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            draw_into(tmp_path, drawer(fail_at=140), label=before)
    else:
        assert ("label" in draw_into(tmp_path, label=before)) == (before is not None)
    with pytest.raises(ValueError, match=r"holds (samples with|files of different entries)"):
        draw_into(tmp_path, label=after)


def test_another_size_of_parts_changes_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        draw_into(tmp_path, drawer(fail_at=140))
    pool = draw_into(tmp_path, part_size=11)
    np.testing.assert_array_equal(pool["image"][:, 0, 0, 0], np.arange(100, 160) % 251)


@pytest.mark.parametrize(
    "change",
    [
        lambda seeds, rows: (seeds[:-1], rows[:-1]),
        lambda seeds, rows: (seeds + 1, rows),
        lambda seeds, rows: (seeds, rows[:-1]),
        lambda seeds, rows: (seeds, {"image": rows, "weight": np.ones(len(rows) - 1)}),
    ],
)
def test_samples_of_other_seeds_are_refused(tmp_path, change):
    def draw(seeds):
        return (change(*part) for part in drawer()(seeds))

    with pytest.raises(ValueError, match="were asked for"):
        draw_into(tmp_path, draw)
    assert not list(tmp_path.glob("*.npz"))


def test_labels_are_as_many_as_samples(tmp_path):
    with pytest.raises(ValueError, match=r"'label': 24} rows"):
        draw_into(tmp_path, label=lambda seeds: by_threes(seeds)[:-1])
    assert not list(tmp_path.glob("*.npz"))


def test_a_part_whose_writing_was_interrupted_is_no_part(tmp_path, monkeypatch):
    write = np.savez

    def stop_halfway(file, **arrays):
        write(file, **arrays)
        file.truncate(file.tell() // 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", stop_halfway)
        with pytest.raises(KeyboardInterrupt):
            draw_into(tmp_path)
    np.testing.assert_array_equal(draw_into(tmp_path)["image"][:, 0, 0, 0], np.arange(100, 160))


def test_damage_is_noticed(tmp_path):
    draw_into(tmp_path)
    part = tmp_path / "samples_125.npz"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"samples_125\.npz is missing or was changed"):
        read_pool(tmp_path)
    part.unlink()
    with pytest.raises(ValueError, match=r"samples_125\.npz is missing or was changed"):
        draw_into(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("pool 1", "pool 0"))
    with pytest.raises(ValueError, match="does not say 'genjax_lab pool 1'"):
        read_pool(tmp_path)
    manifest.write_text(manifest.read_text().replace("pool 0", "pool 1").replace(": 25", ": 24"))
    with pytest.raises(ValueError, match="should hold 24 samples"):
        read_pool(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_pool(tmp_path)


@pytest.mark.parametrize("seeds", [range(0), range(0, 10, 2)])
def test_seeds_must_be_consecutive(tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds must be"):
        draw_into(tmp_path, seeds=seeds)
