"""Python's language reference as a TFDS data set of English text that needs no download.

Some topics have several names; of each the first is taken. Every tenth, in the order of their
lengths, is for testing.
"""

import platform
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds `pydoc`; registered with TFDS under that name once this module is imported."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First release."}  # noqa: RUF012 - TFDS's own form

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "topic": tfds.features.Text()}
            ),
            homepage="https://docs.python.org/3/reference/",
            metadata=tfds.core.MetadataDict(python=platform.python_version()),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from pydoc_data.topics import topics

        by_text = {text: name for name, text in sorted(topics.items(), reverse=True)}
        names = sorted(by_text.values(), key=lambda name: (len(topics[name]), name))
        test = names[5::10]
        return {
            "train": self._generate_examples(topics, [name for name in names if name not in test]),
            "test": self._generate_examples(topics, test),
        }

    def _generate_examples(self, topics: dict[str, str], names: list[str]) -> Iterator:
        for name in names:
            yield name, {"text": topics[name], "topic": name}
