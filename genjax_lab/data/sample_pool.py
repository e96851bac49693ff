"""A pool of a model's samples on disk, with its provenance.

Methods that learn from a model's own samples (DDO, arXiv 2503.01103) must know whose samples they
are: fakes of another model, another sampler or another pipeline than the data's silently teach the
wrong thing. So a pool says what drew it, and is refused where something else is expected. It is
drawn in parts by ranges of seeds; killed and started again, drawing goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int, Shaped

FORMAT = "genjax_lab pool 1"
_PART_SIZE = 4096
_Samples = Shaped[np.ndarray, "part ..."]
Draw = Callable[
    [range], Iterable[tuple[Int[np.ndarray, "part"], _Samples | Mapping[str, _Samples]]]
]


def draw_pool(
    directory: str | os.PathLike,
    draw: Draw,
    *,
    seeds: range,
    provenance: Mapping[str, Any],
    label: Callable[[range], Int[np.ndarray, "part"]] | None = None,
    part_size: int = _PART_SIZE,
) -> dict[str, Shaped[np.ndarray, "num ..."]]:
    """Draws the samples of some seeds into a directory, or reads what was drawn there before.

    Args:
        directory: where the pool lives; made if missing.
        draw: seeds -> (seeds, samples) in order, a function of the model and the seeds alone.
            Samples are images, or a dict of "image" and what else belongs to a sample.
        seeds: the samples' seeds; a range of step 1.
        provenance: what decides the samples, as JSON values: a digest of the model's weights, the
            sampler and its settings.
        label: seeds -> the classes that these samples are drawn for.
        part_size: samples in one file; what a kill loses at most.

    Returns:
        {"image": [num, ...], what else `draw` gave, "label": [num] int32 where there are labels}.

    Raises:
        ValueError: the directory holds a pool of another provenance, with other labels, or damaged
            files; `draw` gives other seeds than it was asked for.
    """
    directory = Path(directory)
    if part_size < 1:
        raise ValueError(f"part_size must be positive, got {part_size}")
    if not seeds or seeds.step != 1:
        raise ValueError(f"seeds must be a range of step 1 that is not empty, got {seeds}")
    expected = _described(provenance, seeds)
    if not (directory / "manifest.json").exists():
        _draw_parts(directory, draw, seeds, expected, label, part_size)
    pool = read_pool(directory, seeds=seeds, provenance=provenance)
    _require_labels(directory, pool.get("label"), label and np.asarray(label(seeds)))
    return pool


def read_pool(
    directory: str | os.PathLike,
    *,
    seeds: range | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Shaped[np.ndarray, "num ..."]]:
    """Reads a whole pool and verifies every file.

    Args:
        directory: where the pool lives.
        seeds: the seeds that are expected; any if None.
        provenance: the provenance that is expected; any if None.

    Returns:
        As `draw_pool`.

    Raises:
        ValueError: there is no whole pool, it is another one than expected, or it is damaged.
    """
    directory = Path(directory)
    manifest = _read_json(directory / "manifest.json")
    if manifest is None:
        raise ValueError(f"directory={str(directory)!r} holds no whole pool of samples")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{directory / 'manifest.json'} does not say {FORMAT!r}")
    for name, value in (("provenance", provenance), ("seeds", seeds)):
        if value is not None:
            expected = _described(provenance or {}, seeds or range(1))[name]
            _require_equal(directory, manifest[name], expected)
    parts = [_read_part(directory, part) for part in manifest["parts"]]
    if len(entries := {tuple(sorted(part)) for part in parts}) > 1:
        raise ValueError(
            f"directory={str(directory)!r} holds files of different entries, {sorted(entries)}; "
            "remove it"
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _draw_parts(
    directory: Path,
    draw: Draw,
    seeds: range,
    expected: Mapping[str, Any],
    label: Callable[[range], np.ndarray] | None,
    part_size: int,
) -> None:
    is_writer = jax.process_index() == 0
    begun = directory / "begun.json"
    if is_writer:
        directory.mkdir(parents=True, exist_ok=True)
        if not begun.exists():
            _write(begun, json.dumps({**expected, "part_size": part_size}, indent=2).encode())
    _together("begun")
    before = _read_json(begun)
    part_size = before.pop("part_size", part_size)  # the parts that are there stay
    _require_equal(directory, before, expected)
    ranges = [
        range(start, min(start + part_size, seeds.stop))
        for start in range(seeds.start, seeds.stop, part_size)
    ]
    paths = [directory / f"samples_{part.start}.npz" for part in ranges]
    # All processes draw the same parts: they look for them before any of them writes.
    missing = {path for path in paths if not path.exists()}
    _together("looked")
    parts = []
    for part, path in zip(ranges, paths, strict=True):
        if path in missing:
            arrays = _drawn(draw, label, part)
            if is_writer:
                _write_arrays(path, arrays)
            _together(path.name)
        parts.append({"file": path.name, "num": len(part), "sha256": _digest(path)})
    if is_writer:
        manifest = {"format": FORMAT, **expected, "parts": parts}
        if label is not None:
            classes, counts = np.unique(label(seeds), return_counts=True)
            manifest["label_counts"] = dict(
                zip(map(str, classes.tolist()), counts.tolist(), strict=True)
            )
        _write(directory / "manifest.json", json.dumps(manifest, indent=2).encode())
    _together("manifest")


def _drawn(
    draw: Draw, label: Callable[[range], np.ndarray] | None, seeds: range
) -> dict[str, np.ndarray]:
    """The samples of a part by name, with their labels."""
    drawn, samples = zip(*draw(seeds), strict=True)
    drawn = np.concatenate(drawn)
    named = [part if isinstance(part, Mapping) else {"image": part} for part in samples]
    arrays = {name: np.concatenate([part[name] for part in named]) for name in named[0]}
    if label is not None:
        arrays["label"] = np.asarray(label(seeds), np.int32)
    lengths = {name: len(rows) for name, rows in arrays.items()}
    if not np.array_equal(drawn, seeds) or set(lengths.values()) != {len(seeds)}:
        raise ValueError(
            f"draw and label gave {lengths} rows, for the seeds {drawn}, where those of {seeds} "
            "were asked for"
        )
    return arrays


def _described(provenance: Mapping[str, Any], seeds: range) -> dict[str, Any]:
    # Through JSON, so that tuples and lists compare as they are stored.
    return json.loads(
        json.dumps({"provenance": dict(provenance), "seeds": [seeds.start, seeds.stop]})
    )


def _require_equal(directory: Path, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(
            f"directory={str(directory)!r} holds samples of another origin, {json.dumps(found)}, "
            f"than expected, {json.dumps(expected)}; use another directory, or remove it"
        )


def _require_labels(directory: Path, found: np.ndarray | None, expected: np.ndarray | None) -> None:
    if found is None and expected is None:
        return
    if found is None or expected is None or not np.array_equal(found, expected):
        kind = "without labels" if found is None else "with labels"
        wanted = "without" if expected is None else "with the labels that `label` gives"
        raise ValueError(
            f"directory={str(directory)!r} holds samples {kind}, and samples {wanted} were asked "
            "for; use another directory, or remove it"
        )


def _read_part(directory: Path, part: Mapping[str, Any]) -> dict[str, np.ndarray]:
    path = directory / part["file"]
    if not path.exists() or _digest(path) != part["sha256"]:
        raise ValueError(
            f"{path} is missing or was changed since it was written; remove it and manifest.json "
            "to draw its samples again"
        )
    with np.load(path, allow_pickle=False) as arrays:
        arrays = dict(arrays)
    if lengths := {name: len(rows) for name, rows in arrays.items() if len(rows) != part["num"]}:
        raise ValueError(f"{path} should hold {part['num']} samples, but holds {lengths}")
    return arrays


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove the directory") from error


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)  # whole or not at all


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(content)
    temporary.replace(path)


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"genjax_lab pool {name}")
