"""How tokens look at each other: functions `(query, key, value) -> out` over grids of any rank.

Arrays are `[batch, *grid, heads, head_dim]`; a sequence is a 1-D grid, an image a 2-D one. Networks
receive such a function as an attribute, so one attention is swapped for another without a new
network.
"""

from collections.abc import Callable

from jaxtyping import Array

from genjax_lab.attention.dense import dense_attention

__all__ = ["AttentionFunction", "dense_attention"]

AttentionFunction = Callable[[Array, Array, Array], Array]
