"""A policy that is a table of logits, and questions whose answers it gets right at known rates."""

import jax
import jax.numpy as jnp
import numpy as np

from genjax_lab.reasoning import AnswerStream, Problem, RolloutSettings, Task, character_codec
from genjax_lab.samplers import AnswerReport, Generation

LENGTH = 4
CODEC = character_codec("0123456789=", prompt_length=3, answer_length=LENGTH)
VOCAB = 12


def threshold_task(thresholds):
    """Question i is answered rightly by what begins with a digit below its threshold."""
    problems = tuple(Problem(f"{i:02d}=", str(n)) for i, n in enumerate(thresholds))

    def verify(problems, answers):
        pairs = zip(problems, answers, strict=True)
        return np.float32([a[:1].isdigit() and int(a[0]) < int(p.gold) for p, a in pairs])

    return Task(problems, problems, verify, "0123456789=")


def uniform_digits(end=2.0):
    """Digits alike, the end (token 0) as likely as `end` of them."""
    return {"params": {"table": jnp.log(jnp.array([end] + [1.0] * 10 + [1e-9]))}}


def apply(variables, tokens, *, start, token_mask=None, temperature=1.0, chunk=None, method=None):
    """As `networks.Decoder.log_probs`: (log-probabilities, entropies) of tokens from `start` on."""
    del token_mask, chunk, method
    law = jax.nn.log_softmax(variables["params"]["table"] / temperature)
    answers = jnp.asarray(tokens)[:, start:]
    entropy = -jnp.sum(jnp.exp(law) * law)
    return law[answers], jnp.full(answers.shape, entropy)


@jax.jit
def log_probs(variables, prompts, prompt_mask, answers, answer_mask):
    tokens = jnp.concatenate([prompts, answers], axis=1)
    return apply(variables, tokens, start=prompts.shape[1])[0]


def generate(variables, key, prompts, mask, *, num_samples, first_digit=True):
    """Answers of the table; if `first_digit` they begin with one, each as likely."""
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    law = np.asarray(jax.nn.softmax(variables["params"]["table"]), np.float64)
    shape = (len(prompts), num_samples, LENGTH)
    tokens = generator.choice(VOCAB, size=shape, p=law / law.sum()).astype(np.int32)
    if first_digit:
        tokens[..., 0] = generator.integers(1, 11, size=shape[:2])
    ends = tokens == 0
    shown = np.cumsum(ends, axis=-1) - ends == 0
    tokens = np.where(shown, tokens, 0)
    told = np.where(shown, np.log(law)[tokens], 0).astype(np.float32)
    report = AnswerReport(
        lengths=shown.sum(axis=-1),
        truncated=~ends.any(axis=-1),
        log_probs=told,
        drawn_log_probs=told,
        entropies=np.zeros_like(told),
        slot_steps=np.int32(shown.sum(axis=-1).max() * np.prod(shape[:2])),
    )
    return Generation(tokens, shown, report)


def stream(task, settings=None, *, seed=0, options=None, **fields):
    """An `AnswerStream` of the table that follows `uniform_digits()`."""
    settings = RolloutSettings(**({"num_groups": 4, "num_samples": 4} | fields))
    functions = {
        "generate": lambda *arguments: generate(*arguments, num_samples=settings.num_samples),
        "log_probs": log_probs,
    }
    options = functions | (options or {})
    result = AnswerStream(task, CODEC, settings=settings, seed=seed, **options)
    result.follow(uniform_digits())
    return result
