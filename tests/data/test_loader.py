"""The input pipeline: same batches however they are read, split over processes, or resumed."""

import functools
import importlib
import itertools
import json

import numpy as np
import orbax.checkpoint as ocp
import pytest

from genjax_lab.data import Prefetch, horizontal_flip, make_loader, make_loader_from_arrays


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        np.testing.assert_array_equal(first[key], second[key])


def take(loader, count):
    return list(itertools.islice(loader, count))


def images_of(num_examples, seed=0):
    """Distinct uint8 images; the first pixel tells which it is."""
    images = np.random.default_rng(seed).integers(0, 256, (num_examples, 4, 6, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(num_examples)
    return images


@pytest.fixture
def digits(data_dir):
    """`make_loader` for the digits, with defaults that a test can override."""

    def make(split="train", batch_size=64, seed=3, **options):
        return make_loader(
            split=split,
            name="digits",
            batch_size=batch_size,
            seed=seed,
            data_dir=data_dir,
            **options,
        )

    return make


def test_batches_have_the_contracts_types_and_ranges(digits):
    batch = next(digits())
    assert set(batch) == {"image", "label"}
    assert batch["image"].shape == (64, 8, 8, 1) and batch["image"].dtype == np.float32
    assert batch["label"].shape == (64,) and batch["label"].dtype == np.int32
    assert batch["image"].min() == -1 and batch["image"].max() == 1
    # Seventeen levels between -1 and 1 are multiples of 1/8.
    assert (batch["image"] * 8 == np.round(batch["image"] * 8)).all()


def test_streaming_and_memory_give_the_same_batches(digits):
    memory = digits(transforms=(horizontal_flip,), in_memory=True)
    streaming = digits(transforms=(horizontal_flip,), in_memory=False)
    for step in (0, 22, 500):  # 22 straddles the first two epochs of 1442
        assert_same(memory[step], streaming[step])
    for first, second in zip(take(memory, 3), take(streaming, 3), strict=True):
        assert_same(first, second)
    streaming.close()


def test_digits_fit_in_memory_and_are_kept_there(digits, monkeypatch):
    loader = digits()
    monkeypatch.setattr(
        "array_record.python.array_record_data_source.ArrayRecordDataSource.__getitems__",
        lambda *_: pytest.fail("read from disk"),
    )
    next(loader)
    with pytest.raises(BaseException, match="read from disk"):
        digits(in_memory=False)


def test_small_splits_are_decoded_once_as_long_as_their_files_stay(digits, monkeypatch):
    loader_module = importlib.import_module("genjax_lab.data.loader")
    loader_module._decoded_split.cache_clear()
    first, second = digits(), digits(seed=1)
    assert loader_module._decoded_split.cache_info().misses == 1
    batch = next(first)
    batch["image"][:] = 0  # a batch is the caller's own
    assert np.any(next(second)["image"]) and np.any(digits()[0]["image"])
    files = loader_module._files_of
    monkeypatch.setattr(loader_module, "_files_of", lambda path: (*files(path), ("new", 1, 1)))
    digits()
    assert loader_module._decoded_split.cache_info().misses == 2


@pytest.mark.parametrize("shard_count", [1, 2, 4])
def test_processes_together_see_the_global_batches(digits, shard_count):
    whole = digits(transforms=(horizontal_flip,))
    shards = [
        digits(transforms=(horizontal_flip,), shard_index=index, shard_count=shard_count)
        for index in range(shard_count)
    ]
    for _ in range(3):
        parts = [next(shard) for shard in shards]
        together = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert_same(together, next(whole))


def test_each_of_two_epochs_shows_every_example_once():
    loader = make_loader_from_arrays({"image": images_of(24)}, 8, 0, num_epochs=2)
    batches = list(loader)
    assert len(batches) == loader.num_batches == 6
    seen = np.round((np.concatenate([batch["image"] for batch in batches]) + 1) * 127.5)
    epochs = seen[:, 0, 0, 0].reshape(2, 24)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(24), (2, 1)))
    assert not np.array_equal(epochs[0], epochs[1])
    restored = make_loader_from_arrays({"image": images_of(24)}, 8, 0, num_epochs=2)
    restored.set_state(loader.get_state())
    for exhausted in (loader, restored):
        with pytest.raises(StopIteration):
            next(exhausted)


def test_seeds_differ_and_repeat(digits):
    batches = [next(digits(seed=seed)) for seed in (0, 1, 0)]
    assert not np.array_equal(batches[0]["image"], batches[1]["image"])
    assert_same(batches[0], batches[2])


@pytest.mark.parametrize("prefetch", [Prefetch(0, 0), Prefetch(2, 5)])
@pytest.mark.parametrize("step", [0, 1, 23])
def test_restored_iterator_continues_with_the_same_batches(digits, prefetch, step):
    loader = digits(transforms=(horizontal_flip,), prefetch=prefetch)
    take(loader, step)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 4)  # more batches are in flight behind these
    restored = digits(transforms=(horizontal_flip,), prefetch=prefetch)
    restored.set_state(state)
    loader.set_state(state)  # rewinding the old one must forget what it had prefetched
    for batch, other, same in zip(expected, take(restored, 4), take(loader, 4), strict=True):
        assert_same(batch, other)
        assert_same(batch, same)
    assert restored.get_state() == {**state, "step": step + 4}
    loader.close()
    restored.close()


def test_state_of_one_process_restores_on_two(digits):
    whole = digits()
    take(whole, 5)
    shards = [digits(shard_index=index, shard_count=2) for index in range(2)]
    for shard in shards:
        shard.set_state(whole.get_state())
    together = np.concatenate([next(shard)["image"] for shard in shards])
    np.testing.assert_array_equal(together, next(whole)["image"])
    assert shards[0].get_state() == whole.get_state()


def test_state_passes_through_an_orbax_checkpoint(digits, tmp_path):
    loader = digits()
    take(loader, 7)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "data", args=ocp.args.JsonSave(loader.get_state()))
        state = checkpointer.restore(tmp_path / "data", args=ocp.args.JsonRestore())
    restored = digits()
    restored.set_state(state)
    assert_same(next(restored), next(loader))


def test_foreign_states_are_refused(digits):
    loader = digits()
    state = loader.get_state()
    for change, message in [
        ({"seed": 4}, "seed: state 4, loader 3"),
        ({"batch_size": 32}, "batch_size"),
        ({"num_examples": 1}, "num_examples"),
        ({"shuffle": False}, "shuffle"),
        ({"step": -1}, "step"),
        ({"step": None}, "step"),
    ]:
        with pytest.raises(ValueError, match=message):
            loader.set_state({**state, **change})
    assert loader.get_state() == state
    with pytest.raises(ValueError, match="step"):
        digits(num_epochs=1).set_state({**state, "step": 23})


def test_flips_are_fair_and_a_function_of_seed_and_place():
    arrays = {"image": images_of(200)}
    make = functools.partial(make_loader_from_arrays, arrays, 200, shuffle=False)
    plain = make(0)[0]["image"]
    flipped = [make(seed, transforms=(horizontal_flip,))[0]["image"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(flipped[0], flipped[1])
    assert not np.array_equal(flipped[0], flipped[2])
    mirrored = (flipped[0] == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    assert ((flipped[0] == plain).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert 60 < mirrored.sum() < 140  # a fair coin leaves this range once in 10^8


def test_two_random_transforms_do_not_share_their_bits():
    seen = []

    def spy(batch, bits):
        seen.append(bits)
        return batch

    make_loader_from_arrays({"image": images_of(8)}, 8, 0, transforms=(spy, spy))[0]
    assert not np.isin(seen[0], seen[1]).any()


def test_arrays_keep_their_further_entries_and_their_floats():
    images = np.linspace(-1, 1, 6 * 4, dtype=np.float64).reshape(6, 2, 2, 1)
    arrays = {"image": images, "label": np.arange(6), "weight": np.arange(6) / 10}
    batch = make_loader_from_arrays(arrays, 6, 0)[0]
    np.testing.assert_array_equal(batch["image"], images.astype(np.float32)[batch["label"]])
    np.testing.assert_array_equal(batch["weight"], batch["label"] / 10)


@pytest.mark.parametrize("in_memory", [True, False])
def test_columns_stay_with_their_examples(digits, in_memory):
    plain = digits(in_memory=in_memory)
    whole = digits(num_epochs=1, shuffle=False, drop_remainder=False)
    brightness = np.concatenate([batch["image"].mean((1, 2, 3)) for batch in whole])
    wider = plain.with_columns({"brightness": brightness})
    for _ in range(3):
        batch = next(wider)
        np.testing.assert_array_equal(batch["brightness"], batch["image"].mean((1, 2, 3)))
        del batch["brightness"]
        assert_same(batch, next(plain))
    assert wider.get_state() == plain.get_state()
    with pytest.raises(ValueError, match=r"columns\['brightness'\].*\[3, 2\]"):
        plain.with_columns({"brightness": np.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"\['label'\]"):
        plain.with_columns({"label": np.zeros(len(brightness))})


def test_arrays_without_labels_have_no_classes():
    loader = make_loader_from_arrays({"image": images_of(4)}, 4, 0)
    assert loader.info.num_classes == 0
    np.testing.assert_array_equal(next(loader)["label"], np.zeros(4))
    with pytest.raises(ValueError, match=r"'label' for num_classes=3, got \['image'\]"):
        make_loader_from_arrays({"image": images_of(4)}, 4, 0, num_classes=3)


def test_latents_of_any_range_are_taken_when_asked_for():
    latents = np.full((4, 2, 2, 4), 3.0)
    with pytest.raises(ValueError, match=r"Example 0 .*outside \[-1, 1\]"):
        make_loader_from_arrays({"image": latents}, 4, 0)
    loader = make_loader_from_arrays({"image": latents}, 4, 0, value_range=None)
    assert (next(loader)["image"] == 3).all()


def nan_at(index):
    images = np.zeros((5, 2, 2, 1))
    images[index, 1, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"image": nan_at(3)}, {}, "Example 3 .* NaN"),
        ({"image": images_of(5)}, {"max_value": 3}, "Example .* above max_value=3"),
        ({"image": images_of(5).astype(np.int32)}, {}, "int32"),
        ({"image": images_of(5)[..., 0]}, {}, "channel axis"),
        ({"image": images_of(5), "label": np.arange(4)}, {}, "equally many"),
        ({"image": images_of(5), "label": np.arange(5)}, {"num_classes": 4}, "Example 4 .*label 4"),
        ({"image": images_of(5), "label": np.zeros(5)}, {}, "integers"),
        ({"image": images_of(0)}, {}, "no examples"),
        ({"label": np.arange(5)}, {}, "'image'"),
        ({"image": images_of(5)}, {"shard_index": 0}, "given together"),
        ({"image": images_of(5)}, {"prefetch": Prefetch(-1, 2)}, "prefetch"),
        ({"image": images_of(3)}, {}, "larger than the data set of 3"),
    ],
)
def test_bad_arrays_are_named(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader_from_arrays(arrays, 4, 0, **options)


def test_batch_of_more_than_the_split_is_refused(digits):
    with pytest.raises(ValueError, match="batch_size=356 is larger than the data set of 355"):
        digits("test", batch_size=356)
    batch = next(digits("test", batch_size=356, num_epochs=1, drop_remainder=False))
    assert len(batch["label"]) == 355


def test_steps_outside_the_loader_are_refused(digits):
    loader = digits(num_epochs=1)
    assert loader.num_batches == 22
    with pytest.raises(IndexError, match="22"):
        loader[22]
