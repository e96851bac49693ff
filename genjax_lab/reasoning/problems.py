"""Questions whose answers a program can check: made up ones for laptops, and files of real ones.

`digit_sum` and `countdown` have many right answers to most questions, as mathematics in words has;
`addition` has one. Which is the case decides what wrong answers are good for (arXiv 2505.18116).
"""

import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from genjax_lab.reasoning.answers import evaluate_expression, extract_answer

_TEST_SHARE = 0.2


class Problem(NamedTuple):
    """A question.

    Attributes:
        prompt: what the model is given.
        gold: what the verifier compares an answer with.
    """

    prompt: str
    gold: str


class Task(NamedTuple):
    """Questions and who judges their answers.

    Attributes:
        train, test: questions; the same ones where there are only few.
        verify: (problems, answers) -> outcomes in [0, 1], one for each answer.
        alphabet: characters of prompts and answers; empty where a tokenizer must be given.
        demonstrate: (generator, problem) -> a right answer, if the task can give one.
        extract: text of an answer -> what is voted on; None for no answer.
    """

    train: tuple[Problem, ...]
    test: tuple[Problem, ...]
    verify: Callable[[Sequence[Problem], Sequence[str]], Float[np.ndarray, "answers"]]
    alphabet: str = ""
    demonstrate: Callable[[np.random.Generator, Problem], str] | None = None
    extract: Callable[[str], str | None] = str


def digit_sum(num_digits: int = 4) -> Task:
    """ "17=" is to be answered by `num_digits` digits that add up to 17.

    Raises:
        ValueError: if there are no digits, or so many that sums have three.
    """
    if not 1 <= num_digits <= 11:
        raise ValueError(f"num_digits is {num_digits}; it must be in [1, 11]")
    problems = tuple(Problem(f"{n:02d}=", str(n)) for n in range(9 * num_digits + 1))

    def is_right(problem: Problem, answer: str) -> bool:
        return bool(re.fullmatch(rf"[0-9]{{{num_digits}}}", answer)) and (
            sum(map(int, answer)) == int(problem.gold)
        )

    def demonstrate(generator: np.random.Generator, problem: Problem) -> str:
        left, digits = int(problem.gold), []
        for others in range(num_digits - 1, -1, -1):
            digit = generator.integers(max(0, left - 9 * others), min(9, left) + 1)
            digits.append(str(digit))
            left -= int(digit)
        return "".join(digits)

    return Task(problems, problems, _each(is_right), "0123456789=", demonstrate)


def addition(num_digits: int = 2) -> Task:
    """ "23+58=" is to be answered by "81"; a fifth of the questions are for testing.

    Raises:
        ValueError: if there are no digits, or so many that there are more than 10^6 questions.
    """
    if not 1 <= num_digits <= 3:
        raise ValueError(f"num_digits is {num_digits}; it must be in [1, 3]")
    numbers = range(10**num_digits)
    problems = [
        Problem(f"{a:0{num_digits}d}+{b:0{num_digits}d}=", str(a + b))
        for a, b in itertools.product(numbers, numbers)
    ]
    return Task(
        *_split(problems),
        _each(lambda problem, answer: answer == problem.gold),
        "0123456789+=",
        lambda generator, problem: problem.gold,
    )


def countdown(count: int = 4, *, largest: int = 9, target: int = 24) -> Task:
    """ "1346=" is to be answered by "6/(1-3/4)": all numbers once, + - * / and brackets give 24.

    Args:
        count: numbers of a question, 2 to 4.
        largest: of the numbers, one digit.
        target: what is to be reached.

    Raises:
        ValueError: if numbers are out of range, or no question can be answered.
    """
    if not 2 <= count <= 4 or not 1 <= largest <= 9:
        raise ValueError(f"count={count} must be in [2, 4] and largest={largest} in [1, 9]")
    hands = itertools.combinations_with_replacement(range(1, largest + 1), count)
    solutions = {hand: _solve(hand, target) for hand in hands}
    problems = [
        Problem("".join(map(str, hand)) + "=", str(target)) for hand, s in solutions.items() if s
    ]
    if len(problems) < 2:
        raise ValueError(f"with count={count} and largest={largest} hardly anything gives {target}")

    def is_right(problem: Problem, answer: str) -> bool:
        used = re.findall(r"\d+", answer)
        return sorted("".join(used)) == sorted(problem.prompt[:-1]) and (
            len(used) == count and evaluate_expression(answer) == Fraction(problem.gold)
        )

    def demonstrate(generator: np.random.Generator, problem: Problem) -> str:
        found = solutions[tuple(map(int, problem.prompt[:-1]))]
        return found[generator.integers(len(found))]

    return Task(*_split(problems), _each(is_right), "0123456789+-*/()=", demonstrate)


def jsonl(
    path: str | os.PathLike,
    *,
    verify: Callable[[Sequence[str], Sequence[str]], Sequence[bool]],
    test_path: str | os.PathLike | None = None,
    template: str = "{problem}",
    problem_field: str = "problem",
    answer_field: str = "answer",
) -> Task:
    """Questions of a file with one JSON object in each line.

    Args:
        path: of the questions for training.
        verify: (answers, golds) -> which are right; such as `Verifier.verify`.
        test_path: of those for testing; the same if None.
        template: what a prompt is made of; {problem} stands for the question.
        problem_field, answer_field: names of the fields.

    Raises:
        ValueError: with the number of the line, for one that is no such object; for a template
            without {problem}; for a file without questions.
    """
    if "{problem}" not in template:
        raise ValueError(f"template must have {{problem}}, got {template!r}")

    def read(path) -> tuple[Problem, ...]:
        problems = []
        # Not splitlines: texts may hold separators of lines that are none of JSON's.
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                problem, gold = _fields(line, (problem_field, answer_field), path, number)
                problems.append(Problem(template.replace("{problem}", problem), gold))
        if not problems:
            raise ValueError(f"{os.fspath(path)!r} has no questions")
        return tuple(problems)

    def outcomes(problems, answers):
        return np.asarray(verify(list(answers), [p.gold for p in problems]), np.float32)

    train = read(path)
    test = train if test_path is None else read(test_path)
    return Task(train, test, outcomes, extract=extract_answer)


def _fields(line: str, names: Sequence[str], path: Any, number: int) -> list[str]:
    where = f"line {number} of {os.fspath(path)!r}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, Mapping) or not all(
        isinstance(row.get(name), str | int | float) and not isinstance(row.get(name), bool)
        for name in names
    ):
        raise ValueError(f"{where} must be an object with texts or numbers {list(names)}")
    return [str(row[name]) for name in names]


def _each(is_right: Callable[[Problem, str], bool]):
    def verify(problems, answers):
        pairs = zip(problems, answers, strict=True)
        return np.asarray([is_right(problem, answer) for problem, answer in pairs], np.float32)

    return verify


def _split(problems: Sequence[Problem]) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """A fixed fifth, by a checksum of the prompt, is for testing."""
    is_test = [zlib.crc32(p.prompt.encode()) < _TEST_SHARE * 2**32 for p in problems]
    if all(is_test) or not any(is_test):
        is_test = [i == 0 for i in range(len(problems))]
    pairs = list(zip(problems, is_test, strict=True))
    return tuple(p for p, test in pairs if not test), tuple(p for p, test in pairs if test)


def _solve(hand: tuple[int, ...], target: int) -> list[str]:
    """All expressions that join two of the values at a time until one is left."""
    found: set[str] = set()
    seen: set[tuple] = set()

    def join(items: tuple[tuple[Fraction, str], ...]) -> None:
        key = tuple(sorted(text for _, text in items))
        if key in seen:
            return
        seen.add(key)
        if len(items) == 1:
            if items[0][0] == target:
                text = items[0][1]
                found.add(text[1:-1] if text.startswith("(") else text)
            return
        for i, j in itertools.permutations(range(len(items)), 2):
            rest = tuple(item for k, item in enumerate(items) if k not in (i, j))
            (a, left), (b, right) = items[i], items[j]
            results = [(a - b, "-")]
            if b:
                results.append((a / b, "/"))
            if left <= right:  # once for each pair
                results += [(a + b, "+"), (a * b, "*")]
            for value, sign in results:
                join(((value, f"({left}{sign}{right})"), *rest))

    join(tuple((Fraction(n), str(n)) for n in hand))
    return sorted(found)
