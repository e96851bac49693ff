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
Draw = Callable[[range], Iterable[tuple[Int[np.ndarray, "part"], Shaped[np.ndarray, "part ..."]]]]


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
        seeds: the samples' seeds; a range of step 1.
        provenance: what decides the samples, as JSON values: a digest of the model's weights, the
            sampler and its settings.
        label: seeds -> the classes that these samples are drawn for.
        part_size: samples in one file; what a kill loses at most.

    Returns:
        {"image": [num, ...], "label": [num] int32 where there are labels}.

    Raises:
        ValueError: the directory holds a pool of another provenance, or damaged files; `draw` gives
            other seeds than it was asked for.
    """
    directory = Path(directory)
    if part_size < 1:
        raise ValueError(f"part_size must be positive, got {part_size}")
    if not seeds or seeds.step != 1:
        raise ValueError(f"seeds must be a range of step 1 that is not empty, got {seeds}")
    expected = _described(provenance, seeds)
    if not (directory / "manifest.json").exists():
        _draw_parts(directory, draw, seeds, expected, label, part_size)
    return read_pool(directory, seeds=seeds, provenance=provenance)


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
    parts = []
    for start in range(seeds.start, seeds.stop, part_size):
        part = range(start, min(start + part_size, seeds.stop))
        path = directory / f"samples_{part.start}.npz"
        if not path.exists():
            drawn, samples = (np.concatenate(rows) for rows in zip(*draw(part), strict=True))
            if not np.array_equal(drawn, part) or len(samples) != len(part):
                raise ValueError(
                    f"draw gave {len(samples)} samples of the seeds {drawn} where those of {part} "
                    "were asked for"
                )
            arrays = {"image": samples}
            if label is not None:
                arrays["label"] = np.asarray(label(part), np.int32)
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
