"""Real and generated examples side by side, row by row: as many of the one as of the other.

A discriminative loss is trivially small on a batch of one kind, so each batch, and each device's
part of it, holds both in equal numbers (DDO, arXiv 2503.01103).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from genjax_lab.data.loader import Batch, Loader


class PairedLoader(Iterator[Batch]):
    """Two loaders as one: the entries of the second have the prefix "fake_".

    Its place can be saved and restored as that of a `Loader`.
    """

    def __init__(self, real: Loader, fake: Loader):
        """Joins two loaders.

        Raises:
            ValueError: if their batches differ in size.
        """
        if real.batch_size != fake.batch_size:
            raise ValueError(
                "real and fake must have batches of one size, got "
                f"{real.batch_size} and {fake.batch_size}"
            )
        self._loaders = {"real": real, "fake": fake}

    def __next__(self) -> Batch:
        real, fake = (next(loader) for loader in self._loaders.values())
        return {**real, **{f"fake_{name}": value for name, value in fake.items()}}

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
