"""TFDS data sets on disk: preparing them as array_record, finding them, reading them.

Everything goes through tensorflow-datasets and is read by random access without TensorFlow.
`digits`, `mnist5k`, `pydoc` and `kjv` are prepared from installed packages the first time they are
asked for. Every other TFDS name (`cifar10`, `imagenet2012`, ...) is read the same way once it was
given to `prepare`: reading never touches the network.

A data set is written into a directory of its own and moved into place by one rename. A killed
preparation therefore leaves nothing that could be taken for data, and of several processes that
prepare the same name at once one wins and the others use its result.
"""

import contextlib
import difflib
import errno
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from genjax_lab.data.digits import digits_dataset_builder
from genjax_lab.data.image_levels import DatasetInfo
from genjax_lab.data.kjv import kjv_dataset_builder
from genjax_lab.data.mnist5k import mnist5k_dataset_builder
from genjax_lab.data.pydoc import pydoc_dataset_builder

# Data sets whose source is an installed package: they can be prepared anywhere, in seconds.
PACKAGED = tuple(
    builder.Builder.name
    for builder in (
        digits_dataset_builder,
        mnist5k_dataset_builder,
        pydoc_dataset_builder,
        kjv_dataset_builder,
    )
)

DataDir = str | os.PathLike | None


def find_builder(name: str, data_dir: DataDir = None) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of `name`, prepared or not.

    Args:
        name: A TFDS name, with configuration and version if wanted:
            `"imagenet_resized/64x64:0.1.0"`.
        data_dir: Where data sets live; by default the environment variable TFDS_DATA_DIR at import,
            else `~/tensorflow_datasets`.

    Raises:
        ValueError: If TFDS knows no such name and no data set of that name lies in `data_dir`, or
            if what lies there cannot be understood.
    """
    where = data_dir or tfds.core.constants.DATA_DIR
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = sorted({*tfds.list_builders(with_community_datasets=False), *PACKAGED})
        close = difflib.get_close_matches(name, known) or PACKAGED
        raise ValueError(
            f"name={name!r} is no TFDS data set, and none of that name lies in {where}. Did you "
            f"mean {' or '.join(close)}? tensorflow_datasets.list_builders() lists the names; for "
            "images of your own use make_loader_from_arrays."
        ) from None
    except Exception as error:  # whatever a damaged file makes the JSON and protobuf readers raise
        raise ValueError(
            f"TFDS cannot open data set {name!r} in {where}: {error} If its files are damaged, "
            f"delete its directory there and prepare it again: {_call_prepare(name, data_dir)}."
        ) from error


def prepare(name: str, data_dir: DataDir = None) -> Path:
    """Downloads and writes a data set as array_record, unless it is there already.

    Needs the network for everything but `digits`, `mnist5k` and `pydoc`; many builders also need
    TensorFlow installed while they write. Prepare large data sets once, before several processes
    are launched: processes that prepare the same name at the same time repeat each other's work.

    Args:
        name: A TFDS name.
        data_dir: Where data sets live, as in `find_builder`.

    Returns:
        The directory of the prepared data set.

    Raises:
        ValueError: If the name is unknown, or it could not be downloaded or written; the message
            holds the reason.
    """
    builder = find_builder(name, data_dir)
    final = Path(builder.data_path)
    if _is_whole(final):
        return final
    if final.exists() and any(final.iterdir()):
        _require_whole(final, name)
    root = Path(builder.data_dir_root)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=root, prefix="incomplete.", ignore_cleanup_errors=True
    ) as private:
        try:
            writer = tfds.builder(name, data_dir=private)
            if writer.name in PACKAGED:
                _write_quietly(writer, download_dir=os.path.join(private, "downloads"))
            else:  # downloads are kept, so that an interrupted preparation finds them again
                _write(writer, download_dir=root / "downloads")
        except Exception as error:
            raise ValueError(
                f"Data set {name!r} could not be prepared in {root}: {error}\nPrepare it where the "
                "network and, for many data sets, TensorFlow are at hand, with "
                f"genjax_lab.data.prepare({name!r}, data_dir=...), and copy the directory here."
            ) from error
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(writer.data_path, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process was first. Its files are as good as ours, if they are whole.
            _require_whole(final, name)
    return final


def _write(writer: tfds.core.DatasetBuilder, download_dir: str | os.PathLike) -> None:
    writer.download_and_prepare(download_dir=download_dir, file_format="array_record")


def _write_quietly(writer: tfds.core.DatasetBuilder, download_dir: str | os.PathLike) -> None:
    """Writes a data set that takes seconds without TFDS's progress bars and notices."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _write(writer, download_dir)
    finally:
        tfds.enable_progress_bar()


def _is_whole(directory: Path) -> bool:
    """Whether a prepared data set lies there: its description comes with the data or not at all."""
    return (directory / "dataset_info.json").exists()


def _require_whole(directory: Path, name: str) -> None:
    if not _is_whole(directory):
        raise ValueError(
            f"{directory} exists but holds no dataset_info.json, so it is not the prepared data "
            f"set {name!r}. Delete that directory and try again."
        )


def _call_prepare(name: str, data_dir: DataDir) -> str:
    """The call that prepares the data set, to be pasted from a message."""
    argument = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
    return f"genjax_lab.data.prepare({name!r}{argument})"


def prepared_builder(name: str, data_dir: DataDir = None) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set that is on disk; writes packaged ones if need be.

    Raises:
        ValueError: If the name is unknown, or known but not prepared: the message says how to.
    """
    builder = find_builder(name, data_dir)
    directory = Path(builder.data_path)
    if _is_whole(directory):
        return builder
    if builder.name not in PACKAGED:
        raise ValueError(
            f"Data set {name!r} is not prepared in {builder.data_dir_root} (looked for "
            f"{directory}). Download and prepare it once with {_call_prepare(name, data_dir)}, or "
            "set data_dir or TFDS_DATA_DIR to where it lies."
        )
    prepare(name, data_dir)
    return find_builder(name, data_dir)


def dataset_info(name: str, data_dir: DataDir = None) -> DatasetInfo:
    """Describes a prepared data set: image shape, classes, pixel levels, examples per split.

    Args:
        name: A TFDS name; its features must include an `"image"`.
        data_dir: Where data sets live, as in `find_builder`.

    Returns:
        The description. `max_value` is 255 for uint8 images unless the data set's own TFDS metadata
        give a `max_value` (16 for `digits`), and None for other images. `num_classes` is 0 without
        a class `"label"`.

    Raises:
        ValueError: If the data set cannot be had, or has no images.
    """
    return describe(prepared_builder(name, data_dir))


def describe(builder: tfds.core.DatasetBuilder) -> DatasetInfo:
    """`dataset_info` of a builder at hand."""
    features = builder.info.features
    if "image" not in features or len(features["image"].shape) != 3:
        raise ValueError(
            f"Data set {builder.name!r} has no feature 'image' of three axes, it has "
            f"{list(features)}. Only image data sets can be read; give other arrays to "
            "make_loader_from_arrays."
        )
    is_uint8 = np.dtype(features["image"].np_dtype) == np.uint8
    declared = (builder.info.metadata or {}).get("max_value", 255)
    # A label that is no class (a number, a bounding box) is none to condition on.
    has_classes = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    return DatasetInfo(
        name=builder.info.full_name,
        image_shape=tuple(features["image"].shape),
        num_classes=features["label"].num_classes if has_classes else 0,
        max_value=int(declared) if is_uint8 else None,
        num_examples={split: info.num_examples for split, info in builder.info.splits.items()},
    )


def open_split(
    builder: tfds.core.DatasetBuilder, split: str
) -> tuple[int, Callable[[Sequence[int]], list[dict[str, Any]]]]:
    """Opens one split of a prepared data set for random access.

    Args:
        builder: The prepared data set.
        split: A TFDS split: `"train"`, `"train+test"`, `"all"`, `"train[:10%]"`.

    Returns:
        The number of examples and a function that reads the decoded examples of a list of indices
        into that split, in their order. It may be called from several threads.

    Raises:
        ValueError: If there is no such split, it is empty, or its files allow no random access; the
            returned function raises it if a file is damaged.
    """
    known = list(builder.info.splits)
    try:
        num_examples = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"split={split!r} is not one of {builder.name!r}, which has {known}; 'all', sums such "
            f"as 'train+test' and slices such as 'train[:10%]' work too. ({error})"
        ) from error
    if num_examples == 0:
        raise ValueError(f"split={split!r} of {builder.name!r} holds no examples.")
    try:
        source = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"Data set {builder.name!r} in {builder.data_path} is written as "
            f"{builder.info.file_format.value}, which allows no random access. Prepare it as "
            "array_record in another data_dir with genjax_lab.data.prepare."
        ) from error

    def read(indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return source.__getitems__([int(index) for index in indices])
        except Exception as error:  # RuntimeError from array_record, others from the decoders
            raise ValueError(
                f"Examples of {builder.name!r} could not be read from {builder.data_path}: "
                f"{error}. The files are damaged or missing: delete that directory and prepare the "
                f"data set again with genjax_lab.data.prepare({builder.name!r})."
            ) from error

    return num_examples, read
