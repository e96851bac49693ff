"""Generation token by token, of many answers to many prompts, in one compiled loop.

Keys and values of prompts are computed once for all K answers to each. The loop ends when all
answers have. A batch of answers costs as many steps as its longest answer has tokens; with fewer
slots than answers, a slot whose answer has ended takes the next of the queue instead of waiting
(continuous batching), in arrays of fixed shapes: slots share one ring of columns for keys and
values, of which each sees the columns since its answer began.

A token's noise depends on the answer's key and the token's place alone: so answers do not depend
on slots, batches, meshes or on when they were drawn. What a sampler tells of a token is the
log-probability under the network itself, `log_probs`, and under the law it was drawn from, with
temperature and cuts, `drawn_log_probs`; they are the same only at temperature 1 without cuts. Both
are of the tokens that may be drawn, which are fewer than a network's rows where these are padded.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from genjax_lab.samplers.base import ExampleState, Sampler, SamplerState, SharedState, sample
from genjax_lab.samplers.categorical import exact_categorical, logit_floor
from genjax_lab.samplers.tokens import DrawOptions


class TokenDecoder(NamedTuple):
    """A network that predicts next tokens and keeps keys and values.

    Attributes:
        prefill: (tokens [prompts, columns], visible [prompts, columns]) -> what is shared, a
            pytree whose leaves have the leading axis of prompts.
        empty_ring: (answers, columns) -> the ring, a pytree with the leading axis of answers.
        decode: (tokens [answers], positions, shared, ring, column, age) -> (logits [answers, V],
            ring); see `networks.Decoder.decode`.
        vocab_size: tokens that may be drawn; logits of further ones are not looked at.
    """

    prefill: Callable[..., PyTree]
    empty_ring: Callable[[int, int], PyTree]
    decode: Callable[..., tuple[Float[Array, "answers vocabulary"], PyTree]]
    vocab_size: int


class AnswerReport(NamedTuple):
    """What is told of answers; [answers, length] is 0 behind the end.

    Attributes:
        lengths: tokens of each, with the one that ends it.
        truncated: whether the end was not reached within the limit.
        log_probs: of the tokens under the network, at temperature 1 and without cuts.
        drawn_log_probs: under the law that they were drawn from.
        entropies: of the network's laws, in nats.
        slot_steps: steps times slots: sum(lengths) of them were of use.
    """

    lengths: Int[Array, "answers"]
    truncated: Bool[Array, "answers"]
    log_probs: Float[Array, "answers length"]
    drawn_log_probs: Float[Array, "answers length"]
    entropies: Float[Array, "answers length"]
    slot_steps: Int[Array, ""]


class Generation(NamedTuple):
    """Answers to prompts.

    Attributes:
        tokens: int32, the end token included, and behind it again.
        mask: True for tokens of the answer, with the end token.
        report: what else is known, with axes [prompts, answers, ...].
    """

    tokens: Int[Array, "prompts answers length"]
    mask: Bool[Array, "prompts answers length"]
    report: AnswerReport


class _Answers(NamedTuple):
    key: Key[Array, "answers"]
    length: Int[Array, "answers"]
    ended: Bool[Array, "answers"]
    log_probs: Float[Array, "answers length"]
    drawn_log_probs: Float[Array, "answers length"]
    entropies: Float[Array, "answers length"]


class _Slots(NamedTuple):
    shared: PyTree  # of the prompts, or of each slot's prompt if there are fewer slots than answers
    queue: PyTree  # of the prompts, if there are fewer slots
    ring: PyTree
    answer: Int[Array, "slots"]  # which is written; their number if none
    age: Int[Array, "slots"]  # its tokens so far
    token: Int[Array, "slots"]  # its last
    position: Int[Array, "slots"]  # of that
    next: Int[Array, ""]  # answer of the queue


class _Settings(NamedTuple):
    length: int
    slots: int
    num_samples: int
    vocab_size: int
    end_ids: tuple[int, ...]
    top_k: int
    keep_crossing: bool
    mesh: jax.sharding.Mesh | None


def token_decoder(
    apply: Callable[..., Any], variables: Mapping[str, Any], vocab_size: int
) -> TokenDecoder:
    """A `networks.Decoder` whose blocks are apart, with its variables.

    Args:
        apply: called as `apply(variables, ..., method="prefill" | "empty_ring" | "decode")`.
        variables: its variables.
        vocab_size: tokens that may be drawn: those that the tokenizer knows, where the network has
            rows for more.

    Raises:
        ValueError: if `vocab_size` is not positive.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; it must be positive")
    of = lambda method: Partial(_apply, apply, method, variables)  # noqa: E731
    return TokenDecoder(of("prefill"), of("empty_ring"), of("decode"), int(vocab_size))


def _apply(apply, method, variables, *arguments):
    return apply(variables, *arguments, method=method)


def autoregressive(
    decoder: TokenDecoder,
    prompts: Int[Array, "prompts columns"],
    prompt_mask: Bool[Array, "prompts columns"] | None = None,
    *,
    length: int,
    end_ids: Sequence[int],
    num_samples: int = 1,
    slots: int | None = None,
    options: DrawOptions = DrawOptions(),  # noqa: B008
    mesh: jax.sharding.Mesh | None = None,
) -> Sampler:
    """The sampler of answers: int32 [prompts num_samples, length], those to a prompt in a row.

    Answers end with the first token of `end_ids`; behind it the first of them is repeated. Reports
    an `AnswerReport`. A function evaluation is one step of all slots.

    Args:
        decoder: the network, of `token_decoder`.
        prompts: tokens, left-padded.
        prompt_mask: False for padding; the last column is True everywhere. All True if None.
        length: most tokens of an answer.
        end_ids: tokens that end an answer; none if empty.
        num_samples: answers to each prompt, K.
        slots: answers that are written at a time; all if None.
        options: temperature, and cuts of the law at this temperature; temperature 0 takes the most
            probable token.
        mesh: splits the slots, and the prompts where they can be, over its "data" and "fsdp" axes.

    Raises:
        ValueError: if shapes, types or numbers do not fit.
    """
    if not isinstance(decoder, TokenDecoder):
        raise ValueError(f"decoder must come from token_decoder, got {type(decoder).__name__}")
    prompts, mask = _checked_prompts(prompts, prompt_mask, decoder.vocab_size)
    answers = len(prompts) * num_samples
    slots = answers if slots is None else slots
    if length < 1 or num_samples < 1 or not 1 <= slots <= answers:
        raise ValueError(
            f"length={length} and num_samples={num_samples} must be positive, and slots={slots} in "
            f"[1, {answers}], the number of answers"
        )
    end_ids = tuple(int(i) for i in end_ids)
    if any(not 0 <= i < decoder.vocab_size for i in end_ids):
        raise ValueError(f"end_ids must be in [0, {decoder.vocab_size}), got {end_ids}")
    options = options.checked(decoder.vocab_size)
    parts = _parts(mesh)
    if slots % parts:
        raise ValueError(f"slots={slots} must be a multiple of the mesh's data * fsdp = {parts}")
    settings = _Settings(
        length,
        slots,
        num_samples,
        decoder.vocab_size,
        end_ids,
        options.top_k,
        options.keep_crossing,
        mesh,
    )
    cuts = (options.temperature, options.top_p, options.min_p)
    rounds = 1 if slots == answers else 1 + -(-answers // slots)
    return Sampler(
        init=Partial(_init, decoder.prefill, decoder.empty_ring, settings, prompts, mask),
        predict=Partial(_predict, decoder.decode, settings),
        transition=Partial(_transition, settings, cuts, prompts, mask),
        num_steps=length * rounds,
        finished=Partial(_finished, settings),
        report=Partial(_report, settings),
    )


def generate(
    decoder: TokenDecoder,
    key: PRNGKeyArray,
    prompts: Int[Array, "prompts columns"],
    prompt_mask: Bool[Array, "prompts columns"] | None = None,
    *,
    length: int,
    end_ids: Sequence[int],
    num_samples: int = 1,
    slots: int | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
    min_p: float | Float[Array, ""] = 0.0,
    prompt_ids: Int[Array, "prompts"] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Generation:
    """Draws answers to prompts.

    Args:
        decoder: the network, of `token_decoder`.
        key: a typed key; answer j to the prompt with id i uses fold_in(key, i num_samples + j).
        prompts, prompt_mask, length, end_ids, num_samples, slots: as of `autoregressive`.
        temperature, top_k, top_p, min_p: see `exact_categorical` and `logit_floor`.
        prompt_ids: integers that name the prompts for the key; 0, 1, ... if None.
        mesh: splits answers, slots and prompts over its "data" and "fsdp" axes.

    Raises:
        ValueError: as `autoregressive`, or if `prompt_ids` are not one for each prompt.
    """
    sampler = autoregressive(
        decoder,
        prompts,
        prompt_mask,
        length=length,
        end_ids=end_ids,
        num_samples=num_samples,
        slots=slots,
        options=DrawOptions(temperature, top_k, top_p, min_p),
        mesh=mesh,
    )
    count = len(prompts)
    ids = np.arange(count) if prompt_ids is None else np.asarray(prompt_ids)
    if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompt_ids must be {count} integers, got {ids.dtype} {ids.shape}")
    seeds = (ids[:, None].astype(np.int64) * num_samples + np.arange(num_samples)).reshape(-1)
    tokens, info = sample(sampler, key, shape=(count * num_samples, length), seeds=seeds, mesh=mesh)
    grouped = lambda x: x.reshape(count, num_samples, *x.shape[1:])  # noqa: E731
    report = info.report._replace(
        **{
            name: grouped(value)
            for name, value in info.report._asdict().items()
            if name != "slot_steps"
        }
    )
    tokens = grouped(tokens)
    return Generation(tokens, jnp.arange(length) < report.lengths[..., None], report)


def _init(prefill, empty_ring, settings, prompts, mask, keys, shape, condition) -> SamplerState:
    answers = len(prompts) * settings.num_samples
    if shape != (answers, settings.length) or condition is not None:
        raise ValueError(
            f"shape is {tuple(shape)} and must be {(answers, settings.length)}; a condition cannot "
            "be given beside the prompts"
        )
    # The last token of a prompt is the first that is decoded.
    queue = prefill(*(_split(x, settings.mesh) for x in (prompts[:, :-1], mask[:, :-1])))
    queue = _split(queue, settings.mesh)
    shared = queue
    if settings.slots < answers:
        first = jnp.arange(settings.slots) // settings.num_samples
        shared = _split(jax.tree.map(lambda x: x[first], queue), settings.mesh)
    answer = jnp.arange(settings.slots, dtype=jnp.int32)
    zeros = jnp.zeros((answers, settings.length), jnp.float32)
    slots = _Slots(
        shared=shared,
        queue=queue if settings.slots < answers else None,
        ring=_split(empty_ring(settings.slots, settings.length), settings.mesh),
        answer=answer,
        age=jnp.zeros_like(answer),
        token=prompts[answer // settings.num_samples, -1],
        position=_last_position(mask)[answer // settings.num_samples],
        next=jnp.int32(settings.slots),
    )
    end = settings.end_ids[0] if settings.end_ids else 0
    history = _Answers(
        key=keys,
        length=jnp.zeros(answers, jnp.int32),
        ended=jnp.zeros(answers, bool),
        log_probs=zeros,
        drawn_log_probs=zeros,
        entropies=zeros,
    )
    tokens = jnp.full((answers, settings.length), end, jnp.int32)
    return SamplerState(
        ExampleState(tokens, None, history), SharedState(jnp.int32(0), slots, jnp.int32(0))
    )


def _predict(decode, settings, state: SamplerState) -> tuple[Array, SamplerState]:
    slots = state.shared.memory
    column = state.step % settings.length
    logits, ring = decode(slots.token, slots.position, slots.shared, slots.ring, column, slots.age)
    ring = _split(ring, settings.mesh)
    shared = state.shared._replace(
        memory=slots._replace(ring=ring), evaluations=state.shared.evaluations + 1
    )
    return logits[:, : settings.vocab_size], state._replace(shared=shared)


def _transition(settings, cuts, prompts, mask, keys, state: SamplerState, logits) -> SamplerState:
    del keys  # the noise of a token does not depend on the step at which it is drawn
    slots, history = state.shared.memory, state.example.history
    answers = len(history.length)
    writes = slots.answer < answers
    safe = jnp.minimum(slots.answer, answers - 1)
    temperature, top_p, min_p = cuts
    options = DrawOptions(temperature, settings.top_k, top_p, min_p, settings.keep_crossing)
    token, *told = _draw(history.key[safe], logits, slots.age, options)

    is_end = jnp.isin(token, jnp.asarray(settings.end_ids, jnp.int32))
    done = writes & (is_end | (slots.age + 1 == settings.length))
    at = (jnp.where(writes, slots.answer, answers), slots.age)  # beyond the last is dropped
    record = lambda array, value: array.at[at].set(value, mode="drop")  # noqa: E731
    history = history._replace(
        length=history.length.at[at[0]].add(1, mode="drop"),
        ended=history.ended.at[at[0]].set(is_end, mode="drop"),
        **{
            name: record(getattr(history, name), value)
            for name, value in zip(_Answers._fields[3:], told, strict=True)
        },
    )
    example = state.example._replace(sample=record(state.sample, token), history=history)
    slots = slots._replace(age=slots.age + 1, token=token, position=slots.position + 1)
    slots = _refill(settings, prompts, mask, slots, done, answers)
    return SamplerState(example, state.shared._replace(memory=slots))


def _draw(keys, logits, places, options: DrawOptions) -> tuple[Array, ...]:
    """(token, log-probability of the network, that of the law it is drawn from, entropy)."""
    exact = logits.astype(jnp.float32)
    temperature = jnp.asarray(options.temperature, jnp.float32)
    scaled = exact / jnp.where(temperature > 0, temperature, 1.0)
    floor = logit_floor(scaled, **options.cuts)
    greedy_or_not = jnp.where(temperature > 0, 1.0, 0.0)
    draw = exact_categorical(keys, scaled, counter=places, temperature=greedy_or_not, floor=floor)
    token = jnp.minimum(draw.token, logits.shape[-1] - 1)  # of NaN, whose log-probability is NaN
    of_network = jax.nn.log_softmax(exact, axis=-1)
    entropy = -jnp.sum(jnp.where(of_network > -jnp.inf, jnp.exp(of_network) * of_network, 0), -1)
    of_law = jax.nn.log_softmax(jnp.where(scaled >= floor[:, None], scaled, -jnp.inf), axis=-1)
    pick = lambda x: jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]  # noqa: E731
    drawn = jnp.where(temperature > 0, pick(of_law), 0.0)
    return token, pick(of_network), drawn, entropy


def _refill(settings, prompts, mask, slots: _Slots, done, answers: int) -> _Slots:
    """Gives slots whose answers have ended the next ones of the queue."""
    if settings.slots == answers:
        return slots._replace(answer=jnp.where(done, answers, slots.answer))
    rank = jnp.cumsum(done, dtype=jnp.int32) - 1
    answer = jnp.where(done, jnp.minimum(slots.next + rank, answers), slots.answer)
    starts = done & (answer < answers)
    prompt = jnp.minimum(answer, answers - 1) // settings.num_samples

    def copy(carry):
        left, shared = carry
        slot = jnp.argmax(left)
        shared = jax.tree.map(
            lambda all_slots, queue: jax.lax.dynamic_update_index_in_dim(
                all_slots, queue[prompt[slot]], slot, axis=0
            ),
            shared,
            slots.queue,
        )
        return left.at[slot].set(False), shared

    _, shared = jax.lax.while_loop(lambda carry: jnp.any(carry[0]), copy, (starts, slots.shared))
    return slots._replace(
        shared=shared,
        answer=answer,
        age=jnp.where(done, 0, slots.age),
        token=jnp.where(starts, prompts[prompt, -1], slots.token),
        position=jnp.where(starts, _last_position(mask)[prompt], slots.position),
        next=slots.next + jnp.sum(done, dtype=jnp.int32),
    )


def _finished(settings, state: SamplerState) -> Array:
    answers = len(state.example.history.length)
    return jnp.all(state.shared.memory.answer >= answers)


def _report(settings, state: SamplerState) -> AnswerReport:
    history = state.example.history
    return AnswerReport(
        lengths=history.length,
        truncated=~history.ended,
        log_probs=history.log_probs,
        drawn_log_probs=history.drawn_log_probs,
        entropies=history.entropies,
        slot_steps=state.step * settings.slots,
    )


def _parts(mesh: jax.sharding.Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def _split(tree: PyTree, mesh: jax.sharding.Mesh | None) -> PyTree:
    """Splits leading axes over the mesh where they can be; without it, XLA would copy them."""
    parts = _parts(mesh)
    if parts == 1:
        return tree
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(
        lambda x: x if len(x) % parts else jax.lax.with_sharding_constraint(x, split), tree
    )


def _last_position(mask: Bool[Array, "prompts columns"]) -> Int[Array, "prompts"]:
    return jnp.sum(mask, axis=1, dtype=jnp.int32) - 1


def _checked_prompts(prompts, mask, vocab_size: int) -> tuple[Array, Array]:
    if np.ndim(prompts) != 2 or not np.size(prompts):
        raise ValueError(f"prompts must be [prompts, columns], got shape {np.shape(prompts)}")
    prompts = jnp.asarray(prompts)
    if not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise ValueError(f"prompts must be integers, got {prompts.dtype}")
    mask = jnp.ones(prompts.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    if mask.shape != prompts.shape:
        raise ValueError(
            f"prompt_mask must have the prompts' shape {prompts.shape}, got {mask.shape}"
        )
    if not any(isinstance(x, jax.core.Tracer) for x in (prompts, mask)):
        host, real = np.asarray(prompts), np.asarray(mask)
        if not real[:, -1].all() or (np.diff(real.astype(int), axis=1) < 0).any():
            raise ValueError("prompts must be left-padded: no padding behind a token")
        if host.min() < 0 or host.max() >= vocab_size:
            raise ValueError(
                f"prompts must be in [0, {vocab_size}), got {host.min()}..{host.max()}"
            )
    return prompts.astype(jnp.int32), mask
