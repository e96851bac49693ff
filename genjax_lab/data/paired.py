"""Real and generated examples side by side, row by row: as many of the one as of the other.

A discriminative loss is trivially small on a batch of one kind, so each batch, and each device's
part of it, holds both in equal numbers (DDO, arXiv 2503.01103).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from genjax_lab.data.loader import Batch, Loader


class PairedLoader(Iterator[Batch]):
    """Two loaders as one: the entries of the second have the prefix "fake_".

    A loader without classes brings no label: where only the samples have none, as for a network
    without classes on data that have them, a batch has "label" and no "fake_label", which an
    objective that reads labels refuses. Its place can be saved and restored as that of a `Loader`.
    """

    def __init__(self, real: Loader, fake: Loader, *, labels: bool | None = None):
        """Joins two loaders.

        Args:
            real: the data.
            fake: the samples.
            labels: True if both must have labels, False if batches shall have none; None leaves
                them as they are, but samples cannot have labels where the data have none.

        Raises:
            ValueError: if their batches differ in size, or one lacks labels that it should have.
        """
        if real.batch_size != fake.batch_size:
            raise ValueError(
                "real and fake must have batches of one size, got "
                f"{real.batch_size} and {fake.batch_size}"
            )
        self._loaders = {"real": real, "fake": fake}
        self._labelled = {
            name: labels is not False and loader.info.num_classes > 0
            for name, loader in self._loaders.items()
        }
        if labels or self._labelled["fake"]:
            for name, labelled in self._labelled.items():
                if not labelled:
                    raise ValueError(
                        f"{name} has no labels, and both must have them; draw the samples with the "
                        "labels of their classes, or pass labels=False for a network without any"
                    )

    def __next__(self) -> Batch:
        real, fake = (self._next(name) for name in self._loaders)
        return {**real, **{f"fake_{name}": value for name, value in fake.items()}}

    def _next(self, name: str) -> Batch:
        batch = next(self._loaders[name])
        if not self._labelled[name]:  # a loader without classes gives label 0 to all
            batch = {entry: value for entry, value in batch.items() if entry != "label"}
        return batch

    def get_state(self) -> dict[str, Any]:
        """Both loaders' places, as JSON values."""
        return {name: loader.get_state() for name, loader in self._loaders.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a place that `get_state` gave.

        Raises:
            ValueError: if it is the place of other loaders.
        """
        if set(state) != set(self._loaders):
            raise ValueError(f"state must have the entries real and fake, got {sorted(state)}")
        for name, loader in self._loaders.items():
            loader.set_state(state[name])
