"""The decoder of Qwen2, Llama and LLaDA (arXiv 2407.10671): a language model of any size.

Blocks are x + attention(norm(x)), then x + down(silu(gate(y)) * up(y)) with y = norm(x). Queries
of several heads share keys and values (arXiv 2305.13245), positions are rotations, norms are root
mean squares. Causal, it predicts the next token; not causal, with a row of the embedding for the
mask, it predicts masked ones, as LLaDA does (arXiv 2502.09992).

Logits of a long answer over 150,000 tokens do not fit anywhere, so `log_probs` makes them for some
positions at a time and makes them again for gradients. Keys and values are kept in two parts: those
of prompts, which several answers share, and those of the answers, a ring of columns of which every
answer sees its own last ones; see `samplers.generate`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from genjax_lab.attention.merging import merge_attentions
from genjax_lab.networks.rotary import rotary_angles, rotate

# Columns of keys are the last axis, as the product with one query reads them.
KeysValues = tuple[
    Float[Array, "batch kv_heads head_dim columns"], Float[Array, "batch kv_heads columns head_dim"]
]
MaskedAttention = Callable[[Array, Array, Array, Bool[Array, "batch 1 queries length"]], Array]


def masked_dot_product(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    mask: Bool[Array, "batch 1 queries length"],
) -> Float[Array, "batch queries heads head_dim"]:
    """Attention where `mask` allows it, softmax in float32; the mean where it allows nothing."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def chunked_attention(attention: MaskedAttention, chunk: int) -> MaskedAttention:
    """`attention` for `chunk` queries at a time, again for gradients.

    [chunk, length] instead of [length, length] logits are held. The attention gets fewer queries
    than keys, with their rows of the mask.

    Raises:
        ValueError: if the chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be positive")

    def attend(query, key, value, mask):
        batch, length = query.shape[:2]
        if chunk >= length:
            return attention(query, key, value, mask)
        padding = -length % chunk
        query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, padding), (0, 0)))
        queries = jnp.moveaxis(query.reshape(batch, -1, chunk, *query.shape[2:]), 1, 0)
        masks = jnp.moveaxis(mask.reshape(*mask.shape[:2], -1, chunk, length), 2, 0)
        part = jax.checkpoint(lambda part: attention(part[0], key, value, part[1]))
        out = jnp.moveaxis(jax.lax.map(part, (queries, masks)), 0, 1)
        return out.reshape(batch, length + padding, *out.shape[3:])[:, :length]

    return attend


class SharedKeys(NamedTuple):
    """What a step of generation sees of the prompts.

    Attributes:
        keys_values: of each block, `KeysValues`. Prompt i is seen by the answers i K .. i K + K - 1
            where there are K times as many answers.
        visible: [prompts, columns], False for padding.
    """

    keys_values: tuple[KeysValues, ...]
    visible: Bool[Array, "prompts columns"]


class Decoder(nn.Module):
    """The network.

    Attributes:
        vocab_size: V, tokens.
        width, depth, num_heads: of the transformer.
        num_kv_heads: heads of keys and values, of which `num_heads` is a multiple.
        mlp_width: hidden features of the MLPs.
        head_dim: features of a head, even; width / num_heads if None.
        rope_theta: base of the rotations.
        norm_eps: of the norms.
        qkv_bias: whether queries, keys and values have biases.
        tied: whether the last layer is the embedding.
        causal: whether a token sees only itself and those before it.
        with_mask: whether the embedding has one more row, token V, for what is masked.
        scan: hold the blocks in one `lax.scan`, compiled once; their parameters are then stacked in
            "blocks" instead of "block_0" and so on. Generation needs them apart, see `unstacked`.
        remat: recompute blocks for gradients.
        attention: `(query, key, value, mask) -> out` of whole sequences.
        attention_chunk: queries of whole sequences that are attended at a time, see
            `chunked_attention`; all if None.
        dtype: of the computation; norms, softmax, rotations and logits are float32 at least.
    """

    vocab_size: int
    width: int = 896
    depth: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    mlp_width: int = 4864
    head_dim: int | None = None
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tied: bool = True
    causal: bool = True
    with_mask: bool = False
    scan: bool = False
    remat: bool = False
    attention: MaskedAttention = masked_dot_product
    attention_chunk: int | None = None
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Makes the parameters; ValueError if heads do not fit."""
        size = self.width // self.num_heads if self.head_dim is None else self.head_dim
        if size % 2 or size * self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads="
                f"{self.num_kv_heads}, and head_dim={size} even and positive"
            )
        self._head_dim = size
        normal = nn.initializers.normal(0.02)
        self.embedding = self.param(
            "embedding", normal, (self.vocab_size + self.with_mask, self.width)
        )
        arguments = (self.num_heads, self.num_kv_heads, size, self.mlp_width, self.norm_eps)
        attention = self.attention
        if self.attention_chunk is not None:
            attention = chunked_attention(attention, self.attention_chunk)
        arguments += (self.qkv_bias, self.depth, attention, self.dtype)
        block = nn.remat(DecoderBlock) if self.remat else DecoderBlock
        if self.scan:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
                in_axes=(nn.broadcast, nn.broadcast),
            )
            self.blocks = block(*arguments)
        else:
            self.block = [block(*arguments) for _ in range(self.depth)]
        self.norm = nn.RMSNorm(epsilon=self.norm_eps, dtype=self.dtype)
        if not self.tied:
            self.head = self.param("head", normal, (self.width, self.vocab_size))

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        t: None = None,
        condition: None = None,
        *,
        rows: Int[Array, "batch rows"] | None = None,
        token_mask: Bool[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch rows vocab"]:
        """Predicts at every position: the next token if causal, else its own.

        Args:
            tokens: in [0, V), or [0, V] with a mask.
            t: must be None: the network is not told the time.
            condition: must be None.
            rows: positions whose logits are wanted; all if None.
            token_mask: False for padding, which is not seen and takes no position.
            segments: which sequence of several in a row a token belongs to; it sees only its own,
                whose positions begin at 0. One each if None.
            train: does nothing; there is no dropout.

        Returns:
            Logits, float32.

        Raises:
            ValueError: for shapes or types that do not fit, a time or a condition.
        """
        del train
        if t is not None or condition is not None:
            raise ValueError("this network is told neither a time nor a condition, got one")
        x = self.hidden(tokens, token_mask=token_mask, segments=segments)
        if rows is not None:
            x = jnp.take_along_axis(x, rows[..., None], axis=1)
        return self._logits(x)

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        *,
        token_mask: Bool[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """What the last layer makes logits of; arguments as of `__call__`."""
        return self._blocks(tokens, token_mask, segments)[0]

    def log_probs(
        self,
        tokens: Int[Array, "batch length"],
        *,
        start: int = 1,
        token_mask: Bool[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        temperature: float = 1.0,
        chunk: int | None = None,
    ) -> tuple[Float[Array, "batch answer"], Float[Array, "batch answer"]]:
        """Log-probabilities of the tokens from position `start` on, each given those before it.

        Args:
            tokens: prompts and answers, one after the other.
            start: first position that is judged, at least 1: the length of prompts.
            token_mask, segments: as of `__call__`.
            temperature: logits are divided by it.
            chunk: positions whose logits are held at a time; all if None.

        Returns:
            (log-probabilities, entropies of the laws the tokens come from), float32 [batch,
            length - start], in nats; of padding, too, where they mean nothing.

        Raises:
            ValueError: as `__call__`; if `start` is out of range or the network not causal.
        """
        if not self.causal:
            raise ValueError("a network that is not causal gives no probabilities of next tokens")
        if not 1 <= start < tokens.shape[1]:
            raise ValueError(f"start is {start}; it must be in [1, {tokens.shape[1] - 1}]")
        x = self.hidden(tokens, token_mask=token_mask, segments=segments)
        x, targets = x[:, start - 1 : -1], tokens[:, start:]
        kernel = self._kernel()

        def judge(x, targets):
            logits = _matmul_float32(x, kernel) / temperature
            total = jax.nn.logsumexp(logits, axis=-1)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            mean = jnp.sum(jnp.exp(logits - total[..., None]) * logits, axis=-1)
            return chosen - total, total - mean

        length = targets.shape[1]
        if chunk is None or chunk >= length:
            return judge(x, targets)
        # Cut along positions: every device keeps its own rows of the batch.
        padding = -length % chunk
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, padding)))
        parts = jax.lax.map(
            jax.checkpoint(lambda part: judge(*part)),
            tuple(
                jnp.moveaxis(y.reshape(len(y), -1, chunk, *y.shape[2:]), 1, 0) for y in (x, targets)
            ),
        )
        return tuple(jnp.moveaxis(y, 0, 1).reshape(len(tokens), -1)[:, :length] for y in parts)

    def prefill(
        self, tokens: Int[Array, "prompts columns"], token_mask: Bool[Array, "prompts columns"]
    ) -> SharedKeys:
        """Keys and values of left-padded prompts; there may be no columns."""
        if not tokens.shape[1]:
            return SharedKeys(self.empty_ring(len(tokens), 0), token_mask)
        _, own = self._blocks(tokens, token_mask, None)
        if self.scan:
            own = tuple(jax.tree.map(lambda x, i=i: x[i], own) for i in range(self.depth))
        return SharedKeys(tuple(_by_heads(k, v) for k, v in own), token_mask)

    def empty_ring(self, answers: int, columns: int) -> tuple[KeysValues, ...]:
        """Room for keys and values of answers."""
        zeros = jnp.zeros((answers, columns, self.num_kv_heads, self._head_dim), self.dtype)
        return (_by_heads(zeros, zeros),) * self.depth

    def decode(
        self,
        tokens: Int[Array, "answers"],
        positions: Int[Array, "answers"],
        shared: SharedKeys,
        ring: tuple[KeysValues, ...],
        column: Int[Array, ""],
        age: Int[Array, "answers"],
    ) -> tuple[Float[Array, "answers vocab"], tuple[KeysValues, ...]]:
        """One step of generation: logits of what follows one token of each answer.

        Args:
            tokens: the last token of each answer.
            positions: theirs in prompt and answer, without padding.
            shared: keys and values of the prompts.
            ring: those of the answers; the tokens' own are written to `column`, for all answers.
            column: the next of the ring, which begins again at its end.
            age: how many columns before this one are of the same answer, less than the ring has.

        Returns:
            Logits float32, and the ring.

        Raises:
            ValueError: if the blocks are held in a scan or the network is not causal.
        """
        if self.scan or not self.causal:
            raise ValueError("decode needs causal=True and scan=False; see networks.unstacked")
        x = jnp.asarray(self.embedding)[tokens].astype(self.dtype)[:, None]
        angles = rotary_angles(positions[:, None], self._head_dim, base=self.rope_theta)
        columns = ring[0][0].shape[3]
        seen = (column - jnp.arange(columns)) % columns <= age[:, None]
        updated = []
        for number, block in enumerate(self.block):
            prompt = (*shared.keys_values[number], shared.visible)
            x, own = block.decode(x, angles, prompt, ring[number], column, seen)
            updated.append(own)
        return self._logits(self.norm(x))[:, 0], tuple(updated)

    def _blocks(self, tokens, token_mask, segments):
        self._check(tokens, token_mask, segments)
        batch, length = tokens.shape
        valid = jnp.ones((batch, length), bool) if token_mask is None else token_mask.astype(bool)
        groups = jnp.zeros((batch, length), jnp.int32) if segments is None else segments
        same = groups[:, :, None] == groups[:, None, :]
        before = jnp.tril(jnp.ones((length, length), bool))
        # Padding has the position of what follows it, which no one sees.
        if segments is None:
            positions = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        else:
            positions = jnp.sum(same & before & valid[:, None, :], axis=-1, dtype=jnp.int32) - 1
        mask = same & valid[:, None, :]
        if self.causal:
            mask &= before
        angles = rotary_angles(jnp.maximum(positions, 0), self._head_dim, base=self.rope_theta)
        x = jnp.asarray(self.embedding)[tokens].astype(self.dtype)
        if self.scan:
            x, cache = self.blocks(x, angles, mask[:, None])
        else:
            cache = []
            for block in self.block:
                x, own = block(x, angles, mask[:, None])
                cache.append(own)
        return self.norm(x), cache

    def _kernel(self) -> Float[Array, "width vocab"]:
        if not self.tied:
            return self.head.astype(self.dtype)
        return self.embedding[: self.vocab_size].astype(self.dtype).T

    def _logits(self, x):
        return _matmul_float32(x, self._kernel())

    def _check(self, tokens, token_mask, segments) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers [batch, length], got {tokens.dtype} {tokens.shape}"
            )
        for name, array in (("token_mask", token_mask), ("segments", segments)):
            if array is not None and array.shape != tokens.shape:
                raise ValueError(
                    f"{name} must have the tokens' shape {tokens.shape}, got {array.shape}"
                )


class DecoderBlock(nn.Module):
    """Attention and a gated MLP, each after a norm.

    Attributes:
        num_heads, num_kv_heads, head_dim: of the attention.
        mlp_width: hidden features.
        norm_eps: of the norms.
        qkv_bias: whether queries, keys and values have biases.
        depth: blocks of the network, which scales the initial residual branches.
        attention: of whole sequences.
        dtype: of the computation.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    qkv_bias: bool
    depth: int
    attention: MaskedAttention
    dtype: DTypeLike

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        angles: Float[Array, "batch length half"],
        mask: Bool[Array, "batch 1 length length"],
    ) -> tuple[Array, tuple[Array, Array]]:
        """The tokens, and their keys and values [batch, length, kv_heads, head_dim]."""

        def attend(query, key, value):
            return self.attention(query, key, value, mask), (key, value)

        return self._block(x, angles, attend)

    def decode(self, x, angles, prompt, ring, column, seen):
        """One token of each answer, [answers, 1, width]; see `Decoder.decode`."""

        def attend(query, key, value):
            own = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, column, axis)
                for old, new, axis in zip(ring, _by_heads(key, value), (3, 2), strict=True)
            )
            parts = (_attend_part(query, *prompt), _attend_part(query, *own, seen))
            out, _ = merge_attentions(*zip(*parts, strict=True))
            return out.astype(query.dtype), own

        return self._block(x, angles, attend)

    @nn.compact
    def _block(self, x, angles, attend):
        branch = nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5)
        norm = lambda name: nn.RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)  # noqa: E731
        y = norm("norm_attention")(x)
        query, key, value = (
            self._dense(heads * self.head_dim, name, self.qkv_bias)(y).reshape(
                *x.shape[:2], heads, self.head_dim
            )
            for name, heads in (
                ("query", self.num_heads),
                ("key", self.num_kv_heads),
                ("value", self.num_kv_heads),
            )
        )
        y, own = attend(rotate(query, angles), rotate(key, angles), value)
        y = y.reshape(*x.shape[:2], self.num_heads * self.head_dim)
        x = x + self._dense(x.shape[-1], "out", False, branch)(y)
        y = norm("norm_mlp")(x)
        gate, up = (self._dense(self.mlp_width, name, False)(y) for name in ("gate", "up"))
        return x + self._dense(x.shape[-1], "down", False, branch)(nn.silu(gate) * up), own

    def _dense(self, size, name, bias, init=nn.initializers.normal(0.02)):  # noqa: B008
        return nn.Dense(size, use_bias=bias, dtype=self.dtype, kernel_init=init, name=name)


def _attend_part(query, keys, values, visible):
    """Attention of one token of each answer to keys and values of which K answers share one.

    Queries of the answers and heads that share keys are rows of one matrix, so that these are read
    once. Returns (out, log of the sum of exponentials), as `merge_attentions` takes them.
    """
    answers, _, heads, head_dim = query.shape
    groups, kv_heads, _, columns = keys.shape
    exact = jnp.promote_types(query.dtype, jnp.float32)
    if not columns:
        return jnp.zeros_like(query), jnp.full(query.shape[:-1], -jnp.inf, exact)
    split = (groups, answers // groups, kv_heads, heads // kv_heads)
    rows = jnp.swapaxes(query.reshape(*split, head_dim), 1, 2)
    rows = rows.reshape(groups, kv_heads, -1, head_dim)
    logits = jnp.einsum("nhqd,nhdc->nhqc", rows, keys, preferred_element_type=exact)
    logits = jnp.where(visible[:, None, None], logits / head_dim**0.5, jnp.finfo(exact).min)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "nhqc,nhcd->nhqd", weights.astype(values.dtype), values, preferred_element_type=exact
    )

    def by_answers(x):
        x = jnp.swapaxes(x.reshape(groups, kv_heads, *split[1::2], -1), 1, 2)
        return x.reshape(answers, 1, heads, -1)

    return by_answers(out / total), by_answers(largest + jnp.log(total))[..., 0]


def unstacked(network: Decoder, variables: Mapping[str, Any]) -> tuple[Decoder, dict[str, Any]]:
    """The same network with its blocks apart, as generation needs them, and its variables."""
    params = dict(variables["params"])
    if not network.scan:
        return network, {**variables, "params": params}
    blocks = params.pop("blocks")
    for number in range(network.depth):
        params[f"block_{number}"] = jax.tree.map(lambda x, i=number: x[i], blocks)
    return network.clone(scan=False), {**variables, "params": params}


def stacked(network: Decoder, variables: Mapping[str, Any]) -> tuple[Decoder, dict[str, Any]]:
    """The same network with its blocks in a scan, and its variables."""
    params = dict(variables["params"])
    if network.scan:
        return network, {**variables, "params": params}
    blocks: list[PyTree] = [params.pop(f"block_{number}") for number in range(network.depth)]
    params["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return network.clone(scan=True), {**variables, "params": params}


def _by_heads(key: Array, value: Array) -> KeysValues:
    """From [batch, columns, kv_heads, head_dim] each."""
    return jnp.moveaxis(key, 1, 3), jnp.swapaxes(value, 1, 2)


def _matmul_float32(x: Array, kernel: Array) -> Array:
    """The product with sums in float32 at least."""
    exact = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...d,dv->...v", x, kernel, preferred_element_type=exact)
