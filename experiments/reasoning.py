"""Learning to answer questions that a program can check: fields of configs and their builder.

Beside the loop's fields (`genjax_lab.training.default_config`) a config has

  task        name in genjax_lab.reasoning (digit_sum, addition, countdown, jsonl) and arguments;
              those of jsonl are path, test_path, template (around "{problem}") and verifier
              ("equivalence" or "strict")
  tokenizer   path of a tokenizer.json and its end_tokens, for tasks without an alphabet; that of
              single characters is `reasoning.character_codec(...).tokenizer`, its end "<end>"
  prompt_length, answer_length   of arrays, in tokens
  network     name in genjax_lab.networks and its arguments, beside vocab_size
  base        where training begins: directory of a run of this domain, or of a Hugging Face model
  method      "sft", supervised learning from the task's own answers, or one of METHODS
  objective   arguments of the method's loss, and of `objectives.answer_objective`; None stands for
              what the method itself has
  rollout     arguments of `reasoning.RolloutSettings`, and slots of `samplers.generate`
  reward      for policy gradients: signed, -1 for wrong answers; overlong_buffer, overlong_factor
              of `objectives.overlong_penalty`
  optimizer   as for images
  sampler     temperature, top_k, top_p, min_p of evaluation and of sample.py
  evaluation  num_samples answers in all, answers_per_problem of them each, batch_size, ema, metrics
              (all of `evaluation.answer_summary` if empty)

Every call of the step is one rollout: batch_size = num_groups num_samples / minibatches and
steps_per_call = minibatches epochs.

The log has, beside what the loss reports (`nft_loss`, `clipped_policy_loss`), of each rollout

  rollout_accuracy, rollout_truncated        shares of all answers
  rollout_kept                               share of questions asked that are useful
  rollout_length_right, rollout_length_wrong in tokens, of answers that are kept
  rollout_tokens_per_kept                    tokens generated for one that is kept
  rollout_utilisation                        share of the sampler's slot steps that gave a token
  ledger/...                                 what all rollouts so far have cost, see `Ledger`
"""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from ml_collections.config_dict import placeholder

from experiments.answering import AnswerJudge, answer
from experiments.building import construct, default_optimizer, make_optimizer
from experiments.questions import Demonstrations, Questions
from genjax_lab import networks, objectives, pretrained, reasoning
from genjax_lab.parallel import (
    batch_sharding,
    make_mesh,
    parameter_shardings,
    process_share,
)
from genjax_lab.training import Experiment, restore

_OF_OBJECTIVE = ("chunk", "kl_coefficient", "kl_kind", "entropy_coefficient", "diagnostics")


class Method(NamedTuple):
    """A loss, and how its tokens are summed up where the config does not say it."""

    loss: Callable[..., Any]
    aggregation: str
    takes_weights: bool = True
    takes_reward: bool = True
    takes_rate: bool = False


METHODS = {
    "nft": Method(objectives.nft_loss, "token-sum-const", takes_reward=False, takes_rate=True),
    "rft": Method(objectives.rft_loss, "token-sum-const", takes_reward=False, takes_rate=True),
    "grpo": Method(objectives.grpo_loss, "seq-mean-token-mean"),
    "dr_grpo": Method(objectives.dr_grpo_loss, "seq-mean-token-sum-norm"),
    "dapo": Method(objectives.dapo_loss, "token-mean"),
    "gspo": Method(objectives.gspo_loss, "seq-mean-token-mean"),
    "rloo": Method(objectives.rloo_loss, "seq-mean-token-sum"),
    "reinforce": Method(objectives.reinforce_loss, "seq-mean-token-sum"),
    "signed_likelihood": Method(
        objectives.signed_likelihood_loss, "token-sum-const", takes_reward=False
    ),
    "online_dpo": Method(
        objectives.online_dpo_loss, "token-mean", takes_weights=False, takes_reward=False
    ),
}


def default_config() -> ml_collections.ConfigDict:
    """The fields of this domain with their defaults; a config adds the loop's."""
    return ml_collections.ConfigDict(
        {
            "domain": "reasoning",
            "task": {"name": "digit_sum"},
            "tokenizer": {"path": placeholder(str), "end_tokens": ()},
            "prompt_length": 8,
            "answer_length": 8,
            "network": {"name": "Decoder"},
            "base": placeholder(str),
            "method": "nft",
            "objective": {
                "aggregation": placeholder(str),
                "constant": placeholder(float),
                "chunk": placeholder(int),
                "diagnostics": False,
                "kl_coefficient": 0.0,
                "kl_kind": "k3",
                "entropy_coefficient": 0.0,
                # Of NFT and RFT.
                "epsilon": placeholder(float),
                "negative_weight": placeholder(float),
                "weighting": placeholder(str),
                "ratio": placeholder(str),
                # Of policy gradients.
                "epsilon_low": placeholder(float),
                "epsilon_high": placeholder(float),
                "dual_clip": placeholder(float),
                # Of online DPO.
                "beta": placeholder(float),
            },
            "rollout": {
                "num_groups": 32,
                "num_samples": 8,
                "minibatches": 4,
                "epochs": 1,
                "batch_questions": 64,
                "band": (0.0, 1.0),
                "max_batches": 10,
                "strategy": "backfill",
                "carry_over": False,
                "rate": "mean",
                "history_decay": 0.5,
                "importance_cap": placeholder(float),
                "truncated_is_wrong": True,
                "mask_truncated": False,
                "bucket": placeholder(int),
                "temperature": 1.0,
                "slots": placeholder(int),
            },
            "reward": {"signed": False, "overlong_buffer": 0, "overlong_factor": 1.0},
            "optimizer": default_optimizer(warmup_steps=10),
            "sampler": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
            "evaluation": {
                "num_samples": 512,
                "answers_per_problem": 4,
                "batch_size": 256,
                "ema": placeholder(str),
                "metrics": (),
            },
        }
    )


def build(
    config: ml_collections.ConfigDict,
    *,
    task: reasoning.Task | None = None,
    reward: reasoning.Reward | None = None,
) -> Experiment:
    """Builds the experiment of a config.

    Args:
      config: the config.
      task: one's own, in place of `config.task`; a checkpoint does not know it.
      reward: one's own reward of policy gradients, in place of `config.reward`; likewise.

    Raises:
      ValueError: if a name is unknown, or arguments or numbers do not fit; if a reward is given to
        a method that takes none.
    """
    questions = Questions(config)
    if task is not None:
        questions.task = task
    takes_reward = config.method in METHODS and METHODS[config.method].takes_reward
    if reward is not None and not takes_reward:
        raise ValueError(f"config.method={config.method!r} learns without a reward, but got one")
    network = make_network(config, questions)
    judge = AnswerJudge(config, network, questions)
    supervised = config.method == "sft"
    return Experiment(
        init=functools.partial(initial_variables, config, network),
        objective=make_objective(config, network),
        optimizer=make_optimizer(config),
        batches=(
            (lambda state: Demonstrations(config, questions))
            if supervised
            else (lambda state: make_stream(config, network, questions, reward))
        ),
        evaluate=judge.evaluate,
        sample=judge.sample,
        write=judge.write,
    )


def make_network(config: ml_collections.ConfigDict, questions: Questions) -> networks.Decoder:
    """The network of a config; its vocabulary is that of the texts if the config has none."""
    fields = dict(config.network)
    if fields.get("vocab_size") is None:
        fields["vocab_size"] = questions.num_tokens
    return construct(networks, fields, "network")


def initial_variables(
    config: ml_collections.ConfigDict, network: networks.Decoder, key: jax.Array
) -> Mapping[str, Any]:
    """Those of `config.base`, or random ones."""
    if not config.get("base"):
        if config.method != "sft":
            logging.warning("config.base is missing: the model begins with random weights")
        return jax.jit(network.init)(key, jnp.zeros((1, 2), jnp.int32))
    base = Path(config.base)
    if not base.is_dir():
        raise ValueError(f"config.base={config.base!r} is not a directory")
    if (base / "config.json").exists() and not (base / "checkpoints").exists():
        mesh = make_mesh(**config.mesh)
        found, variables = pretrained.qwen2.load(base, scan=network.scan, mesh=mesh)
    else:
        run = restore(base / "checkpoints" if (base / "checkpoints").exists() else base)
        settings = ml_collections.ConfigDict(run.config)
        if settings.get("domain") != "reasoning":
            raise ValueError(f"config.base={config.base!r} is a run of {settings.get('domain')!r}")
        questions = Questions(settings)
        found = make_network(settings, questions)
        variables = run.state.variables(settings.evaluation.get("ema"))
        make = networks.stacked if network.scan else networks.unstacked
        found, variables = make(found, variables)
    same = ("vocab_size", "width", "depth", "num_heads", "num_kv_heads", "mlp_width", "tied")
    same += ("rope_theta", "norm_eps", "qkv_bias", "head_dim")
    if differences := {
        name: (getattr(found, name), getattr(network, name))
        for name in same
        if getattr(found, name) != getattr(network, name)
    }:
        raise ValueError(
            f"config.network differs from the network in {config.base!r}: {differences} (there, "
            "here)"
        )
    return variables


def make_objective(
    config: ml_collections.ConfigDict, network: networks.Decoder
) -> objectives.Objective:
    """The objective of a config, which also reports the means of the rollout."""
    fields = {name: value for name, value in config.objective.items() if value is not None}
    options = {name: fields.pop(name) for name in _OF_OBJECTIVE if name in fields}
    if config.method == "sft":
        options.pop("kl_kind", None)
        asked = {name: value for name, value in options.items() if value}
        try:
            return objectives.answer_likelihood(network.apply, **asked, **fields)
        except TypeError as error:
            raise ValueError(f"config.objective does not fit 'sft': {error}") from error
    method = method_of(config)
    for name in ("aggregation", "constant"):
        fields.pop(name, None)
    _check_options(config.method, fields)
    objective = objectives.answer_objective(
        network.apply,
        functools.partial(method.loss, **fields),
        temperature=config.rollout.temperature,
        takes_weights=method.takes_weights,
        **options,
    )

    def reporting(variables, batch, key):
        loss, metrics = objective(variables, batch, key)
        rollout = {
            name: jnp.mean(value)
            for name, value in batch.items()
            if name.startswith(reasoning.STATISTIC)
        }
        return loss, metrics | rollout

    return reporting


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """ValueError if a method's loss does not take options, by its shapes for two answers."""
    values, mask = jnp.zeros((2, 1)), jnp.ones((2, 1), bool)
    outcome = jnp.zeros(2)
    group = objectives.Groups(jnp.zeros(2, jnp.int32), *5 * [outcome])
    loss = functools.partial(METHODS[name].loss, **options)
    try:
        jax.eval_shape(loss, values, values, mask, outcome, group)
    except TypeError as error:
        raise ValueError(
            f"config.objective does not fit {name!r}: {error}. It takes {_options_of(name)}"
        ) from error


def _options_of(name: str) -> list[str]:
    """Arguments of a method's loss that configs may have."""
    functions = [METHODS[name].loss]
    if METHODS[name].takes_reward:
        functions.append(objectives.clipped_policy_loss)
    if METHODS[name].takes_rate:
        functions.append(objectives.nft_loss)
    parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
    names = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return sorted(names - {"weights", "importance"})


def method_of(config: ml_collections.ConfigDict) -> Method:
    """The method of a config, checked."""
    if config.method not in METHODS:
        raise ValueError(f"config.method is {config.method!r}, not 'sft' or in {sorted(METHODS)}")
    method = METHODS[config.method]
    ignored = [n for n in ("aggregation", "constant") if config.objective.get(n) is not None]
    ignored += ["importance_cap"] if config.rollout.get("importance_cap") is not None else []
    if not method.takes_weights and ignored:
        raise ValueError(
            f"config.method={config.method!r} is a mean over pairs, it has no {ignored}"
        )
    if not method.takes_reward and (config.reward.signed or config.reward.overlong_buffer):
        raise ValueError(
            f"config.method={config.method!r} learns from outcomes, it has no config.reward"
        )
    if not method.takes_rate and config.rollout.get("rate", "mean") != "mean":
        raise ValueError(
            f"config.method={config.method!r} does not look at rates, of which config.rollout.rate="
            f"{config.rollout.rate!r} is an estimate"
        )
    if config.method == "rft" and config.objective.get("negative_weight"):
        raise ValueError("config.objective.negative_weight is 0 for 'rft'; it is that of 'nft'")
    if not method.takes_weights and config.accumulation_steps > 1:
        raise ValueError(
            f"config.method={config.method!r} compares answers with each other, so batches cannot "
            "be cut; config.accumulation_steps must be 1"
        )
    return method


def settings_of(config: ml_collections.ConfigDict) -> reasoning.RolloutSettings:
    """The settings of the rollouts of a config, checked."""
    fields = config.rollout.to_dict()
    for name in ("slots", "temperature"):
        fields.pop(name, None)
    if fields.get("band") is not None:
        fields["band"] = tuple(fields["band"])
    if not config.rollout.temperature > 0:
        raise ValueError(
            f"config.rollout.temperature={config.rollout.temperature} must be positive: answers "
            "are trained at the temperature at which they were drawn"
        )
    aggregation = config.objective.get("aggregation") or method_of(config).aggregation
    ratio = config.objective.get("ratio") or "token"
    one_term = config.method in ("nft", "rft") and ratio != "token"
    if one_term and "token-mean" in aggregation:
        raise ValueError(
            f"config.objective.aggregation={aggregation!r} divides by numbers of tokens, but with "
            f"config.objective.ratio={ratio!r} an answer has one term"
        )
    buffer = config.reward.overlong_buffer
    if not 0 <= buffer <= config.answer_length:
        raise ValueError(
            f"config.reward.overlong_buffer={buffer} must be in [0, config.answer_length="
            f"{config.answer_length}]"
        )
    try:
        settings = reasoning.RolloutSettings(
            aggregation=aggregation, constant=config.objective.get("constant"), **fields
        ).checked()
    except TypeError as error:
        raise ValueError(f"config.rollout does not fit: {error}") from error
    steps = settings.minibatches * settings.epochs
    if config.batch_size != settings.batch_size or config.steps_per_call != steps:
        raise ValueError(
            f"config.batch_size={config.batch_size} must be num_groups num_samples / minibatches = "
            f"{settings.batch_size}, and config.steps_per_call={config.steps_per_call} the "
            f"optimiser steps of a rollout, minibatches epochs = {steps}"
        )
    return settings


def make_stream(
    config: ml_collections.ConfigDict,
    network: networks.Decoder,
    questions: Questions,
    reward: reasoning.Reward | None = None,
) -> reasoning.AnswerStream:
    """The batches of a config: what the model answers, judged."""
    settings, mesh = settings_of(config), make_mesh(**config.mesh)
    reference = None
    if config.objective.get("kl_coefficient"):
        if not config.get("base"):
            raise ValueError("config.objective.kl_coefficient needs config.base, the reference")
        reference = initial_variables(config, network, jax.random.key(0))
        reference = jax.device_put(reference, parameter_shardings(reference, mesh))
    temperature = config.rollout.temperature

    def generate(variables, key, prompts, mask):
        return answer(
            network,
            variables,
            questions,
            key,
            prompts,
            mask,
            num_samples=settings.num_samples,
            slots=config.rollout.get("slots"),
            temperature=temperature,
            mesh=mesh,
        )

    chunk = config.objective.get("chunk")

    @jax.jit
    def judge(variables, prompts, prompt_mask, answers, answer_mask):
        if config.compute_dtype:  # as the training step does it
            params = optax.tree.cast(variables["params"], jnp.dtype(config.compute_dtype))
            variables = {**variables, "params": params}
        return network.apply(
            variables,
            jnp.concatenate([prompts, answers], axis=1),
            start=prompts.shape[1],
            token_mask=jnp.concatenate([prompt_mask, answer_mask], axis=1),
            temperature=temperature,
            chunk=chunk,
            method="log_probs",
        )[0]

    def log_probs(variables, *rows):
        return judge(variables, *jax.device_put(rows, batch_sharding(mesh)))

    return reasoning.AnswerStream(
        questions.task,
        questions.codec,
        generate=generate,
        log_probs=log_probs,
        settings=settings,
        seed=config.seed,
        judged_rows=settings.batch_size // config.accumulation_steps,
        reward=reward or reward_of(config),
        share=process_share(mesh),
        reference=reference,
    )


def reward_of(config: ml_collections.ConfigDict) -> reasoning.Reward | None:
    """The reward that `config.reward` describes; None for the outcome."""
    fields = config.reward
    if not fields.signed and not fields.overlong_buffer:
        return None

    def reward(answers):
        value = 2 * answers.outcome - 1 if fields.signed else answers.outcome
        if fields.overlong_buffer:
            value = value + objectives.overlong_penalty(
                answers.lengths,
                max_length=config.answer_length,
                buffer=fields.overlong_buffer,
                factor=fields.overlong_factor,
            )
        return np.asarray(value, np.float32)

    return reward
