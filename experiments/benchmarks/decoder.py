"""Generation and training of a decoder against transformers, and what the parts of a step cost.

    python -m experiments.benchmarks.decoder [--repeats=5] [--sizes=tiny,small]

The same weights in both (PyTorch on the CPU, transformers' Qwen2), the same batch of 64 prompts,
answers drawn at temperature 1 up to a limit; of training steps the faster of the whole batch at
once and in MICROBATCHES parts, each side its own. Beside it, of our own program alone:

  losses       a step of NFT, GRPO and DAPO / a step of supervised learning on the same batch
  cache        drawing T tokens with whole forward passes / with keys and values kept
  slots        answers of random lengths, mean 64 and limit 512: a batch at a time / slots that are
               refilled; the share of slot steps that were of use
  chunks       temporary memory and time of the gradient of log-probabilities over a vocabulary of
               32,768: all positions at once / some at a time
  prompts      operations of a prefill for 8 answers each / once

Of the larger size only what SIZES_OF says: the rest takes many minutes there.

Programs take turns in one process, after warm-up; the table has medians. Writes decoder.json.
"""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments.benchmarks.interleaved import Program, interleaved_seconds
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import networks, objectives, pretrained, samplers, training

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions.", lower_bound=1)
_SIZES = flags.DEFINE_list("sizes", ["tiny", "small"], "Of SIZES.")
_BATCH = flags.DEFINE_integer(
    "batch_size", 64, "Prompts and slots, a multiple of 8.", lower_bound=8
)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens of an answer.", lower_bound=4)
_LIMIT = flags.DEFINE_integer("limit", 512, "Of answers of random lengths.", lower_bound=8)
_QUEUE = flags.DEFINE_integer("queue", 16, "Answers in units of slots.", lower_bound=2)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32_768, "Of the chunks.", lower_bound=8)
_PARTS = flags.DEFINE_list(
    "parts", ["transformers", "losses", "cache", "slots", "chunks", "prompts"], "What is measured."
)
_OUT = flags.DEFINE_string("out", "experiments/results/decoder.json", "Where it goes.")

PROMPT = 16
MICROBATCHES = 8
SIZES = {
    "tiny": {"width": 64, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 192},
    "small": {"width": 256, "depth": 4, "num_heads": 8, "num_kv_heads": 2, "mlp_width": 704},
}
SIZES_OF = {"cache": ("tiny",), "slots": ("tiny",)}
VOCABULARIES = {"tiny": 32, "small": 4096}


def make(size: str, **changes: Any) -> tuple[networks.Decoder, dict[str, Any]]:
    fields = {"vocab_size": VOCABULARIES[size], **SIZES[size], **changes}
    network = networks.Decoder(**fields)
    return network, jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def prompts_of(network: networks.Decoder) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(1, network.vocab_size, (_BATCH.value, PROMPT)).astype(np.int32)


def batch_of(network: networks.Decoder) -> dict[str, np.ndarray]:
    """A batch that has been answered a little off the policy."""
    generator = np.random.default_rng(1)
    size, length = _BATCH.value, _LENGTH.value
    answers = generator.integers(0, network.vocab_size, (size, length)).astype(np.int32)
    outcome = jnp.asarray(np.arange(size) % 2, jnp.float32)
    group = objectives.group_statistics(outcome, jnp.arange(size) // 8)
    return objectives.answer_batch(
        prompts_of(network),
        np.ones((size, PROMPT), bool),
        answers,
        np.ones((size, length), bool),
        np.full((size, length), -np.log(network.vocab_size), np.float32),
        outcome,
        group,
        aggregation="token-mean",
    )


def step_program(
    network: networks.Decoder, variables: Any, objective: Any, parts: int = 1
) -> Program:
    step = training.make_train_step(
        objective,
        optax.adamw(1e-5),
        batch_size=_BATCH.value,
        accumulation_steps=parts,
        ema={},
        max_grad_norm=1.0,
    )
    state = step.init(variables, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[None], batch_of(network))

    def program():
        nonlocal state
        state, metrics = step.step(state, batch)
        jax.block_until_ready(metrics)

    return program


def likelihood(network: networks.Decoder) -> Any:
    return objectives.answer_likelihood(network.apply)


def learning(network: networks.Decoder, loss: Any) -> Any:
    return objectives.answer_objective(network.apply, loss)


def generation_program(network: networks.Decoder, variables: Any, **options: Any) -> Program:
    decoder = samplers.token_decoder(network.apply, variables, network.vocab_size)
    prompts = prompts_of(network)
    options = {"length": _LENGTH.value, "end_ids": ()} | options
    return lambda: jax.block_until_ready(
        samplers.generate(decoder, jax.random.key(0), prompts, **options)
    )


def against_transformers(size: str) -> dict[str, float]:
    """Ratios to transformers with the same weights."""
    import torch
    import transformers

    network, variables = make(size)
    with tempfile.TemporaryDirectory() as directory:
        pretrained.qwen2.save(Path(directory) / "model", network, variables)
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "model")
    prompts = torch.tensor(prompts_of(network), dtype=torch.long)
    visible = torch.ones_like(prompts)
    length = _LENGTH.value

    def torch_generate():
        with torch.no_grad():
            model.eval().generate(
                prompts,
                attention_mask=visible,
                do_sample=True,
                top_k=0,
                max_new_tokens=length,
                min_new_tokens=length,
                pad_token_id=0,
                eos_token_id=None,
            )

    batch = batch_of(network)
    tokens = torch.tensor(np.concatenate([batch["prompt"], batch["answer"]], 1), dtype=torch.long)
    old, outcome = (torch.tensor(batch[name]) for name in ("old_log_probs", "outcome"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def torch_step(parts=1):
        """The same loss at the same weights, as one would write it."""
        model.train()
        for part in torch.arange(len(tokens)).chunk(parts):
            logits = model(tokens[part]).logits[:, PROMPT - 1 : -1].float()
            answers = tokens[part, PROMPT:, None]
            log_probs = torch.log_softmax(logits, -1).gather(-1, answers)[..., 0]
            ratio = torch.exp((log_probs - old[part]).clamp(max=10.0))
            negative = (1 - 0.5 * ratio) / 0.5
            floored = negative + (negative.clamp(min=1.0) - negative).detach()
            right = outcome[part, None]
            loss = -0.5 * (right * torch.log(ratio) + (1 - right) * torch.log(floored))
            (loss.mean() / parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    objective = learning(network, objectives.nft_loss)
    seconds = interleaved_seconds(
        {
            "generate": generation_program(network, variables),
            "torch_generate": torch_generate,
            "step": step_program(network, variables, objective),
            "torch_step": torch_step,
            "step_in_parts": step_program(network, variables, objective, MICROBATCHES),
            "torch_step_in_parts": functools.partial(torch_step, MICROBATCHES),
        },
        repeats=_REPEATS.value,
    )
    best = {
        side: min(seconds[f"{side}step"], seconds[f"{side}step_in_parts"])
        for side in ("", "torch_")
    }
    return {
        "tokens_per_second": _BATCH.value * length / seconds["generate"],
        "generation_ratio": seconds["torch_generate"] / seconds["generate"],
        "step_ratio": best["torch_"] / best[""],
        "torch_threads": torch.get_num_threads(),
        **{f"seconds_{name}": value for name, value in seconds.items()},
    }


def losses(size: str) -> dict[str, float]:
    network, variables = make(size)
    programs = {
        "sft": likelihood(network),
        "nft": learning(network, objectives.nft_loss),
        "grpo": learning(network, objectives.grpo_loss),
        "dapo": learning(network, objectives.dapo_loss),
    }
    seconds = interleaved_seconds(
        {name: step_program(network, variables, f) for name, f in programs.items()},
        repeats=3 * _REPEATS.value,
    )
    return {name: value / seconds["sft"] for name, value in seconds.items()}


def cache(size: str) -> dict[str, Any]:
    network, variables = make(size)
    prompts, rows = jnp.asarray(prompts_of(network)), {}

    def whole(length: int) -> Program:
        def draw(step, tokens):
            at = jnp.full((len(tokens), 1), PROMPT + step - 1)
            logits = network.apply(variables, tokens, rows=at)[:, 0]
            keys = jax.random.split(jax.random.key(0), len(tokens))
            drawn = samplers.exact_categorical(keys, logits, counter=step).token
            return tokens.at[:, PROMPT + step].set(drawn)

        empty = jnp.pad(prompts, ((0, 0), (0, length)))
        compiled = jax.jit(lambda: jax.lax.fori_loop(0, length, draw, empty))
        return lambda: jax.block_until_ready(compiled())

    for length in (_LENGTH.value // 2, _LENGTH.value, 2 * _LENGTH.value):
        seconds = interleaved_seconds(
            {
                "kept": generation_program(network, variables, length=length),
                "whole": whole(length),
            },
            repeats=max(1, _REPEATS.value // 2),
        )
        rows[str(length)] = seconds["whole"] / seconds["kept"]
    return rows


def slots(size: str) -> dict[str, float]:
    """A network that knows nothing ends an answer with one of two tokens of 128."""
    network, variables = make(size, vocab_size=128)
    count = _QUEUE.value
    options = {"length": _LIMIT.value, "end_ids": (0, 1)}
    decoder = samplers.token_decoder(network.apply, variables, network.vocab_size)
    prompts, useful, tokens = prompts_of(network), {}, {}

    def refilled():
        more = {"num_samples": count, "slots": _BATCH.value}
        drawn = samplers.generate(decoder, jax.random.key(0), prompts, **options, **more)
        report = jax.device_get(drawn.report)
        tokens["slots"] = float(report.lengths.sum())
        useful["slots"] = float(report.lengths.sum() / report.slot_steps)

    def batches():
        """The same number of answers, one for each prompt at a time."""
        lengths = steps = 0
        for number in range(count):
            drawn = samplers.generate(decoder, jax.random.key(number), prompts, **options)
            report = jax.device_get(drawn.report)
            lengths, steps = lengths + report.lengths.sum(), steps + report.slot_steps
        tokens["batches"], useful["batches"] = float(lengths), float(lengths / steps)

    seconds = interleaved_seconds(
        {"batches": batches, "slots": refilled},
        repeats=max(1, _REPEATS.value // 2),
    )
    return {
        "throughput_ratio": (tokens["slots"] / seconds["slots"])
        / (tokens["batches"] / seconds["batches"]),
        "utilisation_batches": useful["batches"],
        "utilisation_slots": useful["slots"],
    }


def chunks(size: str) -> dict[str, Any]:
    network, variables = make(size, vocab_size=_VOCABULARY.value)
    rows = 8
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, (rows, 2 * _LENGTH.value)))

    def gradient(chunk):
        def loss(variables):
            log_probs, _ = network.apply(variables, tokens, chunk=chunk, method="log_probs")
            return -log_probs.mean()

        return jax.jit(jax.grad(loss)).lower(variables).compile()

    sizes = {"all": None, "16": 16}
    compiled = {name: gradient(chunk) for name, chunk in sizes.items()}
    memory = {name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()}
    seconds = interleaved_seconds(
        {name: lambda f=f: jax.block_until_ready(f(variables)) for name, f in compiled.items()},
        repeats=_REPEATS.value,
    )
    return {
        "temporary_bytes": memory,
        "memory_ratio": memory["all"] / memory["16"],
        "positions_ratio": (2 * _LENGTH.value - 1) / 16,
        "time_ratio": seconds["16"] / seconds["all"],
    }


def prompts(size: str) -> dict[str, float]:
    network, variables = make(size)
    tokens = jnp.asarray(prompts_of(network))

    def operations(tokens):
        def prefill(variables, tokens):
            return network.apply(variables, tokens, jnp.ones(tokens.shape, bool), method="prefill")

        analysis = jax.jit(prefill).lower(variables, tokens).compile().cost_analysis()
        return analysis["flops"]

    return {"operations_ratio": operations(jnp.repeat(tokens, 8, axis=0)) / operations(tokens)}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    quiet_libraries()
    if _BATCH.value % MICROBATCHES:
        raise app.UsageError(f"--batch_size must be a multiple of {MICROBATCHES}")
    result: dict[str, Any] = {
        "command": shown_command("benchmarks.decoder"),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "batch_size": _BATCH.value,
        "length": _LENGTH.value,
    }
    measures = {
        "transformers": against_transformers,
        "losses": losses,
        "cache": cache,
        "slots": slots,
        "chunks": chunks,
        "prompts": prompts,
    }
    if unknown := sorted(set(_PARTS.value) - set(measures)):
        raise app.UsageError(f"parts {unknown} are not in {list(measures)}")
    out = Path(_OUT.value)
    for size in _SIZES.value:
        result[size] = {}
        for part in (part for part in _PARTS.value if size in SIZES_OF.get(part, SIZES)):
            result[size][part] = measures[part](size)
            print(size, part, json.dumps(result[size][part]), flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")  # what there is so far


if __name__ == "__main__":
    app.run(main)
