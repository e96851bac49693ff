"""What a network answers to the questions of a config: drawn, judged, evaluated and written."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.questions import Questions
from genjax_lab import evaluation, networks, reasoning, samplers
from genjax_lab.parallel import make_mesh
from genjax_lab.training import TrainState

# Keeps the keys of samples apart from those of training, which are children of the same seed.
_SAMPLING_STREAM = 2**31


def answer(
    network: networks.Decoder,
    variables: Mapping[str, Any],
    questions: Questions,
    key: jax.Array,
    prompts: np.ndarray,
    mask: np.ndarray,
    **options: Any,
) -> samplers.Generation:
    """Answers to prompts; `options` of `samplers.generate`."""
    apart, variables = networks.unstacked(network, variables)
    if network.dtype != jnp.float32:  # once, instead of in every step
        variables = optax.tree.cast(variables, network.dtype)
    codec = questions.codec
    return samplers.generate(
        samplers.token_decoder(apart.apply, variables, questions.num_tokens),
        key,
        prompts,
        mask,
        length=codec.answer_length,
        end_ids=codec.end_ids,
        **options,
    )


class AnswerJudge:
    """Draws, evaluates and writes answers of a train state to the questions for testing.

    Seed s is for answer s mod k to question s // k, of k answers each.
    """

    def __init__(self, config, network, questions: Questions):
        self._config, self._network, self._questions = config, network, questions
        self._mesh = functools.cache(lambda: make_mesh(**config.mesh))

    def sample(
        self, state: TrainState, seeds: Sequence[int], *, progress: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (seeds, tokens int32 [part, prompt and answer]); each depends on its own seed."""
        for part, prompts, generation in self._draw(state, np.asarray(seeds), 1, progress):
            yield part, np.concatenate([prompts, generation.tokens[:, 0]], axis=1)

    def _draw(self, state, seeds: np.ndarray, count: int, progress: bool):
        """For seeds a multiple of `count`, of that answer and the `count` - 1 next to it."""
        settings, questions = self._config.evaluation, self._questions
        variables = state.variables(settings.get("ema"))
        parts = self._mesh().shape["data"] * self._mesh().shape["fsdp"]
        size = -(-min(max(settings.batch_size // count, 1), len(seeds)) // parts) * parts
        tests = questions.tests
        key = jax.random.fold_in(jax.random.key(self._config.seed), _SAMPLING_STREAM)
        for start in tqdm(range(0, len(seeds), size), disable=not progress, desc="answering"):
            part = seeds[start : start + size]
            filled = np.pad(part, (0, size - len(part)), mode="edge")
            chosen = [tests[s // settings.answers_per_problem % len(tests)] for s in filled]
            prompts, mask = questions.codec.encode_prompts([p.prompt for p in chosen])
            generation = answer(
                *(self._network, variables, questions, key, prompts, mask),
                num_samples=count,
                prompt_ids=filled // count,
                mesh=self._mesh(),
                **self._config.sampler,
            )
            host = reasoning.received(generation)
            yield part, prompts[: len(part)], _first(host, len(part))

    def evaluate(
        self,
        state: TrainState,
        *,
        seeds: Sequence[int] | None = None,
        metrics: Sequence[str] | None = None,
        progress: bool = False,
    ) -> dict[str, float]:
        """Metrics of answers to the questions for testing; see `evaluation.answer_summary`.

        Answers with an outcome above 1/2 are right, but for truncated ones.
        """
        settings, questions = self._config.evaluation, self._questions
        count = settings.answers_per_problem
        seeds = np.asarray(range(settings.num_samples) if seeds is None else seeds)
        if len(seeds) % count or (seeds.reshape(-1, count)[:, 0] % count).any():
            raise ValueError(
                f"seeds must be whole blocks of answers_per_problem={count}, got {len(seeds)} "
                f"from {seeds[0]}"
            )
        outcomes, lengths, truncated, entropies, tokens, votes = [], [], [], [], [], []
        asked: list[int] = []
        tests = questions.tests
        for part, _, drawn in self._draw(state, seeds[::count], count, progress):
            numbers = (part // count % len(tests)).tolist()
            chosen = [tests[number] for number in numbers]
            told, outcome = reasoning.judged(questions.task, questions.codec, chosen, drawn)
            asked += numbers
            outcomes.append(np.where(drawn.report.truncated, 0, outcome > 0.5))
            lengths.append(drawn.report.lengths)
            truncated.append(drawn.report.truncated)
            entropies.append(drawn.report.entropies.sum())
            tokens.append(drawn.mask.sum())
            extracted = [questions.task.extract(text) for text in told]
            votes += [extracted[i : i + count] for i in range(0, len(told), count)]
        result = evaluation.answer_summary(
            np.concatenate(outcomes),
            lengths=np.concatenate(lengths),
            truncated=np.concatenate(truncated),
            ks=sorted({1, count}),
            answers=votes,
            names=asked,
        )
        result["entropy"] = float(np.sum(entropies) / np.sum(tokens))
        wanted = tuple(metrics or settings.metrics) or tuple(result)
        if unknown := sorted(set(wanted) - set(result)):
            raise ValueError(f"metrics {unknown} are not in {sorted(result)}")
        return {name: result[name] for name in wanted}

    def write(
        self, samples: np.ndarray, path: str | Path, *, before: np.ndarray | None = None
    ) -> None:
        """Writes questions and answers: .jsonl, one object a line, or .txt; .npz as tokens."""
        path = Path(path)
        groups = {"samples": samples} | ({} if before is None else {"before": before})
        if path.suffix == ".npz":
            np.savez(path, **groups)
            return
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"path is {str(path)!r}; answers are written as .jsonl, .txt or .npz")
        rows = [row for name, group in groups.items() for row in self._rows(name, group)]
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            return
        marks = {0.0: "wrong", 1.0: "right"}
        lines = [
            f"[{row['group']}] {row['prompt']} {row['answer']}   "
            f"({marks.get(row['outcome'], row['outcome'])})"
            for row in rows
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _rows(self, group: str, samples: np.ndarray) -> list[dict[str, Any]]:
        codec, task = self._questions.codec, self._questions.task
        tokens = np.split(samples, [codec.prompt_length], axis=1)
        everything = [np.ones_like(part, bool) for part in tokens]
        # Behind the end is the end again, and before a prompt, which are no text.
        prompts, answers = (codec.decode(*pair) for pair in zip(tokens, everything, strict=True))
        # By tokens: a tokenizer need not give back the text, such as that of special tokens.
        tests = self._questions.tests
        encoded = codec.encode_prompts([problem.prompt for problem in tests])[0]
        by_tokens = {tuple(row): problem for row, problem in zip(encoded, tests, strict=True)}
        ended = np.isin(tokens[1], codec.end_ids).any(axis=1)
        known = [
            by_tokens.get(tuple(row), reasoning.Problem(prompt, ""))
            for row, prompt in zip(tokens[0], prompts, strict=True)
        ]
        outcomes = np.where(ended, task.verify(known, answers), 0)
        return [
            {"group": group, "prompt": k.prompt, "gold": k.gold, "answer": a, "outcome": float(o)}
            for k, a, o in zip(known, answers, outcomes, strict=True)
        ]


def _first(generation: samplers.Generation, count: int) -> samplers.Generation:
    """Of the first prompts; slot steps stay those of all."""
    return jax.tree.map(lambda x: x[:count] if x.ndim else x, generation)
