"""The questions of a config, as texts and as tokens, and right answers to learn from."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from experiments.building import construct
from genjax_lab import data, reasoning
from genjax_lab.parallel import make_mesh, process_share

TASKS = ("digit_sum", "addition", "countdown", "jsonl")


class Questions:
    """The task of a config and its tokens, made when they are first needed."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config

    @functools.cached_property
    def task(self) -> reasoning.Task:
        """The task."""
        fields = self._config.task.to_dict()
        if fields["name"] not in TASKS:
            raise ValueError(f"config.task.name is {fields['name']!r}, not in {TASKS}")
        if fields["name"] == "jsonl":
            verifier = reasoning.Verifier(mode=fields.pop("verifier", "equivalence"))
            fields["verify"] = verifier.verify
        task = construct(reasoning, fields, "task")
        if fields["name"] == "jsonl":
            golds = [problem.gold for problem in (*task.train, *task.test)]
            verifier.check(golds)  # now, and not when such a question is asked
        return task

    @functools.cached_property
    def tests(self) -> tuple[reasoning.Problem, ...]:
        """Questions for testing whose prompts are not too long."""
        fitting = tuple(problem for problem in self.task.test if self.codec.fits(problem.prompt))
        if dropped := len(self.task.test) - len(fitting):
            logging.warning(
                "%d of %d questions for testing have prompts of more than %d tokens and are left "
                "out",
                dropped,
                len(self.task.test),
                self.codec.prompt_length,
            )
        if not fitting:
            raise ValueError(f"all prompts are longer than {self.codec.prompt_length} tokens")
        return fitting

    @functools.cached_property
    def codec(self) -> reasoning.Codec:
        """Its tokens."""
        config = self._config
        lengths = {"prompt_length": config.prompt_length, "answer_length": config.answer_length}
        path = config.tokenizer.get("path")
        if path is None:
            if not self.task.alphabet:
                raise ValueError("config.tokenizer.path is missing; this task has no alphabet")
            return reasoning.character_codec(self.task.alphabet, **lengths)
        tokenizer = data.read_tokenizer(path, separator=None)
        ends = tuple(tokenizer.token_to_id(token) for token in config.tokenizer.end_tokens)
        if not ends or None in ends:
            raise ValueError(
                f"config.tokenizer.end_tokens is {tuple(config.tokenizer.end_tokens)}; there must "
                f"be some, and the tokenizer in {path!r} must have them"
            )
        return reasoning.Codec(tokenizer, ends, **lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that there are texts for; networks may have rows for more."""
        return self.codec.tokenizer.get_vocab_size()


class Demonstrations:
    """Endless batches of questions with right answers, each a function of seed and position."""

    def __init__(self, config: ml_collections.ConfigDict, questions: Questions):
        self._task, self._codec, self._seed = questions.task, questions.codec, config.seed
        if self._task.demonstrate is None:
            raise ValueError(f"task {config.task.name!r} has no answers of its own to learn from")
        index, count = process_share(make_mesh(**config.mesh))
        self._order = data.BatchOrder(
            len(self._task.train),
            config.batch_size,
            config.seed,
            num_epochs=None,
            shuffle=True,
            drop_remainder=False,
            shard_index=index,
            shard_count=count,
        )
        self._step = 0

    def __iter__(self) -> "Demonstrations":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch."""
        rows = self._order[self._step]
        self._step += 1
        problems = [self._task.train[i] for i in rows.indices]
        texts = [
            self._task.demonstrate(np.random.default_rng([self._seed, int(position)]), problem)
            for position, problem in zip(rows.positions, problems, strict=True)
        ]
        prompts, prompt_mask = self._codec.encode_prompts([p.prompt for p in problems])
        answers, mask = self._codec.encode_answers(texts)
        # Each answer's mean over its tokens, so that parts of a batch need not know the others.
        weights = (1.0 / mask.sum(axis=1)).astype(np.float32)
        return {
            "prompt": prompts,
            "prompt_mask": prompt_mask,
            "answer": answers,
            "answer_mask": mask,
            "weights": weights,
        }

    def get_state(self) -> dict[str, Any]:
        """The position."""
        return {"step": self._step, "seed": self._seed}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        if state["seed"] != self._seed:
            raise ValueError(f"the position is of seed {state['seed']}, this one of {self._seed}")
        self._step = state["step"]
