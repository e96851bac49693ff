"""Questions: their own answers are right, wrong ones are found out, splits stay the same."""

import functools
import itertools
import json
import zlib
from fractions import Fraction

import numpy as np
import pytest

from genjax_lab.reasoning import Problem, addition, countdown, digit_sum, jsonl

TASKS = {
    "digit_sum": lambda: digit_sum(4),
    "digit_sum of 11": lambda: digit_sum(11),
    "addition": lambda: addition(2),
    "countdown": lambda: countdown(3),
    "countdown of 2": lambda: countdown(2, largest=9, target=8),
}


@functools.cache
def task_of(name):
    return TASKS[name]()


def outcome(task, prompt, answer):
    problem = next(p for p in (*task.train, *task.test) if p.prompt == prompt)
    (value,) = task.verify([problem], [answer])
    return value


@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_are_right_answers_of_the_alphabet(name):
    task = task_of(name)
    problems = [*task.train, *task.test] * 3
    generator = np.random.default_rng(0)
    answers = [task.demonstrate(generator, problem) for problem in problems]
    outcomes = task.verify(problems, answers)
    assert outcomes.dtype == np.float32 and outcomes.shape == (len(problems),)
    np.testing.assert_array_equal(outcomes, 1)
    assert set("".join(answers)).union(*(p.prompt for p in problems)) <= set(task.alphabet)


def test_demonstrations_of_digit_sums_reach_all_answers_of_a_question():
    task, generator = digit_sum(2), np.random.default_rng(0)
    found = {task.demonstrate(generator, Problem("09=", "9")) for _ in range(300)}
    # Ten answers, each with a chance of 1/10: one is missed with a chance of 10 0.9^300 = 2e-13.
    assert found == {f"{a}{9 - a}" for a in range(10)}


def test_digit_sum_judges_every_text_of_two_digits():
    task = digit_sum(2)
    assert [p.prompt for p in task.train] == [f"{n:02d}=" for n in range(19)]
    assert task.train == task.test
    texts = [f"{n:02d}" for n in range(100)]
    for problem in task.train:
        expected = [sum(map(int, text)) == int(problem.gold) for text in texts]
        np.testing.assert_array_equal(task.verify([problem] * 100, texts), expected)


@pytest.mark.parametrize(
    ("name", "prompt", "right", "wrong"),
    [
        (
            "digit_sum",
            "17=",
            ["9800", "0179", "4454"],
            ["980", "98000", "9801", "", "17", "9 80", "98-0", "980\n", "9800\n", "٩٨٠٠", "abcd"],
        ),
        (
            "addition",
            "23+58=",
            ["81"],
            ["", "081", "81 ", "81\n", "18", "8", "811", "+81", "23+58", "??"],
        ),
        (
            "countdown",
            "138=",
            ["(1*3)*8", "8*3*1", "3*8/1", "(8)*(3)*1", "8/1*3"],
            [
                *("", "24", "3*8", "1*3*8*1", "3*8*1*1", "8*3", "(9-1)*3", "1+3*8", "1*38"),
                *("13+8", "3*8/1=", "3*8*1)", "(3*8*1", "3**8*1", "3*8/(1-1)", "a", "3*8*1.0"),
                *("3 8 1", "3*8*", "4*6*1", "3*8*01", "3*8+0*1", "٣*8*1"),
            ],
        ),
    ],
)
def test_only_right_answers_pass(name, prompt, right, wrong):
    task = task_of(name)
    assert [outcome(task, prompt, text) for text in right] == [1] * len(right)
    assert {text: outcome(task, prompt, text) for text in wrong} == dict.fromkeys(wrong, 0)


def test_digits_must_not_be_put_together():
    task = countdown(3, target=9)
    assert outcome(task, "123=", "(1+2)*3") == 1
    assert outcome(task, "123=", "12-3") == 0


def test_numbers_that_a_question_has_twice_must_be_used_twice():
    task = countdown(3, target=24)
    assert outcome(task, "266=", "6*(6-2)") == 1
    assert outcome(task, "266=", "6*2*2") == 0
    assert outcome(task, "266=", "6*6-6-6") == 0


@pytest.mark.parametrize("name", ["addition", "countdown"])
def test_train_and_test_are_apart_and_follow_from_the_checksum(name):
    task = task_of(name)
    train, test = ({p.prompt for p in problems} for problems in (task.train, task.test))
    assert train and test and not train & test
    assert (len(train), len(test)) == (len(task.train), len(task.test))
    chosen = {p for p in train | test if zlib.crc32(p.encode()) < 0.2 * 2**32}
    assert test == chosen
    again = TASKS[name]()
    assert (again.train, again.test) == (task.train, task.test)


def test_addition_asks_all_pairs_and_its_split_does_not_change():
    task = task_of("addition")
    problems = [*task.train, *task.test]
    assert len({p.prompt for p in problems}) == 100**2
    assert all(sum(map(int, p.prompt[:-1].split("+"))) == int(p.gold) for p in problems)
    # Of 10,000 a fifth, four standard deviations being 160. The number is what it was at first.
    assert abs(len(task.test) - 2000) < 160 and len(task.test) == 2010
    assert [p.prompt for p in task.test[:4]] == ["00+08=", "00+09=", "00+18=", "00+19="]


@functools.cache
def values_of(numbers):
    """All values of all trees over a sorted tuple of numbers, with their texts."""
    if len(numbers) == 1:
        return frozenset({(Fraction(numbers[0]), str(numbers[0]))})
    found = set()
    places = range(len(numbers))
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(places, size):
            left = tuple(numbers[i] for i in chosen)
            right = tuple(numbers[i] for i in places if i not in chosen)
            for (a, x), (b, y) in itertools.product(values_of(left), values_of(right)):
                found.add((a - b, f"({x}-{y})"))
                if b:
                    found.add((a / b, f"({x}/{y})"))
                first, second = sorted((x, y))
                found.add((a + b, f"({first}+{second})"))
                found.add((a * b, f"({first}*{second})"))
    return frozenset(found)


@pytest.mark.parametrize(("count", "target"), [(2, 12), (3, 24), (3, 7)])
def test_countdown_asks_all_that_can_be_answered_and_knows_all_answers(count, target):
    task = countdown(count, target=target)
    problems = {p.prompt: p for p in (*task.train, *task.test)}
    hands = itertools.combinations_with_replacement(range(1, 10), count)
    expected = {
        "".join(map(str, hand)) + "=": {x[1:-1] for value, x in values_of(hand) if value == target}
        for hand in hands
    }
    assert set(problems) == {prompt for prompt, texts in expected.items() if texts}
    assert all(p.gold == str(target) for p in problems.values())
    for prompt in list(problems)[::7]:

        class Each:
            """Gives the numbers below the first bound that it is asked for, one after another."""

            def __init__(self):
                self.bound, self.next = 1, 0

            def integers(self, bound):
                self.bound, self.next = bound, self.next + 1
                return self.next - 1

        each, texts = Each(), set()
        while each.next < each.bound:
            texts.add(task.demonstrate(each, problems[prompt]))
        assert texts == expected[prompt]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: digit_sum(0), "num_digits is 0"),
        (lambda: digit_sum(12), "num_digits is 12"),
        (lambda: addition(0), "num_digits is 0"),
        (lambda: addition(4), "num_digits is 4"),
        (lambda: countdown(1), "count=1"),
        (lambda: countdown(5), "count=5"),
        (lambda: countdown(3, largest=0), "largest=0"),
        (lambda: countdown(3, largest=10), "largest=10"),
        (lambda: countdown(2, largest=3, target=24), "hardly anything gives 24"),
    ],
)
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_answers_must_be_as_many_as_questions():
    task = digit_sum(2)
    with pytest.raises(ValueError):
        task.verify(task.train[:2], ["00"])


# Files of questions.


def equal(answers, golds):
    return [answer == gold for answer, gold in zip(answers, golds, strict=True)]


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_questions_of_a_file_are_prompts_and_its_answers_are_golds(tmp_path):
    rows = [
        {"problem": "What is 1 + 1?", "answer": "2", "source": "here"},
        {"problem": "{problem} and a half", "answer": 3},
        {"problem": "Two lines:\n{x}", "answer": 2.5},
        {"problem": 7, "answer": "sept\u2028\u00e9"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    train = write(tmp_path / "train.jsonl", lines[0], "", "  ", *lines[1:])
    test = write(tmp_path / "test.jsonl", lines[3])
    task = jsonl(train, verify=equal, test_path=test, template="Q: {problem}\nA {set}:")
    assert [p.gold for p in task.train] == ["2", "3", "2.5", "sept\u2028\u00e9"]
    assert task.train[1].prompt == "Q: {problem} and a half\nA {set}:"
    assert [p.prompt for p in task.test] == ["Q: 7\nA {set}:"]
    assert task.alphabet == "" and task.demonstrate is None
    outcomes = task.verify(task.train[:3], ["2", "2.5", "2.5"])
    np.testing.assert_array_equal(outcomes, [1, 0, 1])
    assert outcomes.dtype == np.float32


def test_fields_may_have_other_names_and_tests_default_to_train(tmp_path):
    path = write(tmp_path / "q.jsonl", '{"question": "a", "gold": "b", "problem": true}')
    task = jsonl(str(path), verify=equal, problem_field="question", answer_field="gold")
    assert task.train == task.test == (Problem("a", "b"),)


GOOD = '{"problem": "a", "answer": "b"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'problem': 'a'}", "is no JSON"),
        ("nonsense", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"problem": "a"}', r"must be an object.*'problem', 'answer'"),
        ('{"answer": "a"}', "must be an object"),
        ('{"problem": "a", "answer": true}', "must be an object"),
        ('{"problem": false, "answer": "a"}', "must be an object"),
        ('{"problem": "a", "answer": null}', "must be an object"),
        ('{"problem": "a", "answer": ["b"]}', "must be an object"),
        ('["a", "b"]', "must be an object"),
        ('"a"', "must be an object"),
    ],
)
def test_a_line_that_is_no_question_is_named_with_its_number(tmp_path, line, message):
    path = write(tmp_path / "broken.jsonl", GOOD, "", line)
    with pytest.raises(ValueError, match=rf"line 3 of .*broken\.jsonl.*{message}"):
        jsonl(path, verify=equal)
    good = write(tmp_path / "good.jsonl", GOOD)
    with pytest.raises(ValueError, match="line 3 of"):
        jsonl(good, verify=equal, test_path=path)


def test_files_without_questions_and_templates_without_place_are_refused(tmp_path):
    empty = write(tmp_path / "empty.jsonl", "", "   ")
    with pytest.raises(ValueError, match=r"empty\.jsonl.*has no questions"):
        jsonl(empty, verify=equal)
    good = write(tmp_path / "good.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"\{problem\}"):
        jsonl(good, verify=equal, template="{question}")
