"""How fast neighborhood attention (arXiv 2504.16922) can be with given tiles and strides.

    python -m experiments.simulate_attention --grid=256,256 --window=80,80 --stride=16,16 \\
        --tiles=16x16/16x8
    python -m experiments.simulate_attention --grid=30,48,80 --window=18,24,24 \\
        --tiles=4x8x8/2x8x8,2x8x8/2x8x8

Without --stride the smallest strides that visit the fewest tiles are found. Fields with one number
mean it for all axes.
"""

import time

from absl import app, flags

from genjax_lab.attention import NeighborhoodSpec, SimResult, simulate, suggest

_GRID = flags.DEFINE_list("grid", None, "Tokens along each axis.", required=True)
_WINDOW = flags.DEFINE_list("window", None, "Keys along each axis.", required=True)
_STRIDE = flags.DEFINE_list("stride", None, "Queries that share a window; default: the best.")
_DILATION = flags.DEFINE_list("dilation", ["1"], "Distance of keys.")
_CAUSAL = flags.DEFINE_list("causal", ["false"], "Whether queries see no later keys.")
_TILES = flags.DEFINE_list("tiles", None, "Tiles of queries/keys: 16x16/16x8.", required=True)
_EXTRA = flags.DEFINE_integer("additional", 0, "Keys that every query sees.", lower_bound=0)
_TILING = flags.DEFINE_enum("tiling", "multi", ["multi", "flat"], "Boxes, or runs of the sequence.")


def _values(texts: list[str]) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(text) for text in texts)
    except ValueError as error:
        raise app.UsageError(f"{','.join(texts)!r} is no list of numbers") from error
    return numbers[0] if len(numbers) == 1 else numbers


def _tiles(text: str) -> list[tuple[int, ...]]:
    sides = text.split("/")
    if len(sides) != 2:
        raise app.UsageError(f"--tiles has {text!r}; it must be like 16x16/16x8")
    edges = [_values(side.split("x")) for side in sides]
    return [edge if isinstance(edge, tuple) else (edge,) for edge in edges]


def table(results: list[SimResult]) -> str:
    """A row for each result."""
    header = ("tiles", "stride", "visited", "full", "padding", "bound", "by keys")
    rows = [header]
    for result in results:
        edges = ["x".join(map(str, tile)) for tile in (result.q_tile, result.kv_tile)]
        stride = result.spec.stride
        rows.append(
            (
                "/".join(edges),
                "x".join(map(str, stride)) if isinstance(stride, tuple) else str(stride),
                str(result.visited),
                f"{result.full / result.visited:.0%}",
                f"{result.padding:.0%}",
                f"{result.bound:.3f}",
                f"{result.flop_bound:.3f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    started = time.perf_counter()
    grid = _values(_GRID.value)
    grid = grid if isinstance(grid, tuple) else (grid,)
    window, dilation = _values(_WINDOW.value), _values(_DILATION.value)
    if wrong := [text for text in _CAUSAL.value if text.lower() not in ("true", "false")]:
        raise app.UsageError(f"--causal has {wrong}; each must be true or false")
    causal = tuple(text.lower() == "true" for text in _CAUSAL.value)
    causal = causal[0] if len(causal) == 1 else causal
    tiles = [_tiles(text) for text in _TILES.value]
    try:
        if _STRIDE.value is None:
            if _EXTRA.value or _TILING.value == "flat":
                raise app.UsageError("--additional and --tiling=flat need a --stride")
            results = suggest(grid, window, tiles, dilation=dilation, is_causal=causal)
        else:
            spec = NeighborhoodSpec(window, _values(_STRIDE.value), dilation, causal)
            options = {"tiling": _TILING.value, "num_additional": _EXTRA.value}
            results = [simulate(grid, spec, *pair, **options) for pair in tiles]
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    print(table(results))
    print(f"{1e3 * (time.perf_counter() - started):.0f} ms")


if __name__ == "__main__":
    app.run(main)
