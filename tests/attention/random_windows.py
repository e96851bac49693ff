"""Random neighborhoods of small grids."""

from genjax_lab.attention import NeighborhoodSpec


def random_spec(rng, grid):
    """Any windows that fit, with borders whose windows are intervals."""
    fields = {name: [] for name in ("window", "stride", "dilation", "is_causal", "border")}
    for length in grid:
        dilation = int(rng.integers(1, min(length, 3) + 1))
        window = int(rng.integers(1, length // dilation + 1))
        fields["window"].append(window)
        fields["stride"].append(int(rng.integers(1, window + 1)))
        fields["dilation"].append(dilation)
        fields["is_causal"].append(bool(rng.random() < 0.3))
        fields["border"].append(("shift", "mask")[rng.integers(2)])
    return NeighborhoodSpec(**{name: tuple(value) for name, value in fields.items()})
