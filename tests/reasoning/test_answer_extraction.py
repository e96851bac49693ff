"""Answers are found where graders look for them, and expressions have exact values."""

import ast
import operator
import random
from fractions import Fraction

import pytest

from genjax_lab.reasoning.answers import (
    evaluate_expression,
    extract_answer,
    extract_boxed,
    extract_last_number,
    extract_stated_answer,
    minerva_normalize,
    response_text,
    strict_box,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{5} or rather \boxed{6}.", "6"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}$", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {5}", "5"),
        (r"\boxed 5", "5"),
        (r"$\boxed 12$.", "12"),
        (r"\boxed 5.", "5"),
        (r"\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed{ x = 3 }", "x = 3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{[0,1\}}", r"[0,1\}"),
        (r"\boxed{\begin{matrix}1\\{2}\end{matrix}}", r"\begin{matrix}1\\{2}\end{matrix}"),
        ("\\boxed{1\n+2}", "1\n+2"),
        (r"} stray { \boxed{5}", "5"),
        (r"\boxed{5", None),
        (r"\boxed{1} and \boxed{\frac{1}{2}", None),  # the last one counts, and is cut off
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed", None),
        (r"\boxedness{5}", None),
        ("no box: 5", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text, expected):
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 5.", "5"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is 4. No, the answer is 6", "6"),
        ("Answer: 12\nThanks", "12"),
        ("**Answer:** 12", "12"),
        ("Answer: **12**", "12"),
        ("The final answer is: $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
        ("ANSWER IS (B)", "(B)"),
        ("Answer:\n\n7", "7"),
        ("the answer is ", None),
        ("the answer isolates x", None),
        ("5", None),
    ],
)
def test_the_last_stated_answer_ends_with_its_sentence(text, expected):
    assert extract_stated_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 apples and 4 pears", "4"),
        ("it is -3", "-3"),
        ("it is 7-3", "3"),
        ("x=-3.50 dollars", "-3.50"),
        ("a total of 1,234.5.", "1,234.5"),
        ("1,234,567, or so", "1,234,567"),
        ("1,2", "2"),
        ("12,34.5", "34.5"),
        ("about .5", ".5"),
        ("3/4 of it", "3/4"),
        ("none", None),
    ],
)
def test_the_last_number_is_read_as_it_is_written(text, expected):
    assert extract_last_number(text) == expected


def test_only_the_response_counts_and_boxes_come_first():
    prompt = "<|im_start|>user\nWrite \\boxed{0}.<|im_end|>\n<|im_start|>assistant\n"
    assert response_text(prompt + "It is 3<|im_end|>\\boxed{4}").strip() == "It is 3"
    assert extract_answer(prompt + "It is 3<|im_end|>\\boxed{4}") == "3"
    assert extract_answer(prompt + "\\boxed{2}. The answer is 3, or 4") == "2"
    assert extract_answer(prompt + "The answer is 3, or 4. Thanks to 5 of us") == "3, or 4"
    assert extract_answer("1 STOP 2", stop_strings=("STOP",)) == "1"
    assert extract_answer(prompt) is None
    assert response_text(prompt + "first<|im_end|>" + prompt + "second<|im_end|>") == "\nsecond"


def test_a_box_that_is_cut_off_is_not_replaced_by_a_number():
    assert extract_answer("The answer is 5: \\boxed{5") is None
    assert extract_answer("The answer is 5: \\boxed{}") is None


def test_the_strict_box_wants_the_same_characters():
    assert strict_box("\\boxed{34}", "34")
    assert not strict_box("\\boxed{34.0}", "34")
    assert not strict_box("\\boxed{034}", "34")
    assert not strict_box("34", "34")
    assert not strict_box("\\boxed{}", "")


def test_the_window_of_the_strict_box_rejects_long_boxes_only_on_request():
    long = "\\boxed{" + "1" * 120 + "}"
    assert strict_box(long, "1" * 120)
    assert not strict_box(long, "1" * 120, window=100)
    assert strict_box("x" * 500 + "\\boxed{34}", "34", window=100)
    assert not strict_box("\\boxed{34}" + "x" * 100, "34", window=100)
    with pytest.raises(ValueError, match="window"):
        strict_box(long, "1", window=0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x = 5", "5"),
        ("the value is $\\frac12$ here", "\\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        ("(1,2)", "(1,2)"),
        ("12 cm", "12"),
        (r"12\text{ cm}^2", "12"),
        (r"90^\circ", "90"),
        (r"\text{even}", "even"),
        (r"\mbox{a dog}", "dog"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
        (r"\$5.", "5"),
        ("an apple", "apple"),
        ("shift", "shift"),  # no unit inside of a word
        ("\\overline{3}", "3"),
    ],
)
def test_minervas_normal_form(answer, expected):
    assert minerva_normalize(answer) == expected
    assert minerva_normalize(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3", Fraction(7)),
        ("(1 + 2) * 3", Fraction(9)),
        ("8 / (3 - 8 / 3)", Fraction(24)),
        ("10 - 3 - 2", Fraction(5)),
        ("24 / 4 / 2", Fraction(3)),
        ("1/3", Fraction(1, 3)),
        ("-3 + 5", Fraction(2)),
        ("2 * -(3 - 4)", Fraction(2)),
        ("007", Fraction(7)),
        ("12345678901234567890", Fraction(12345678901234567890)),
    ],
)
def test_expressions_have_exact_values(text, expected):
    assert evaluate_expression(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 +",
        "+",
        "()",
        "(1",
        "1)",
        "1 2",
        "1 / 0",
        "1/(2-2)",
        "2 ** 3",
        "2^3",
        "7 // 2",
        "1.5",
        "1e3",
        "0x10",
        "1_000",
        "x",
        "2(3)",
        "(2)(3)",
        "1 = 1",
        "1, 2",
        "__import__('os')",
        "²",
        "١",
        "1\x00",
        "\ud800",
        "123456789012345678901",
    ],
)
def test_what_is_no_expression_has_no_value(text):
    assert evaluate_expression(text) is None


def test_expressions_of_absurd_size_have_no_value():
    for text in ("1" * 10**6, "(" * 10**5 + "1" + ")" * 10**5, "-" * 10**5 + "1", "+1" * 10**6):
        assert evaluate_expression(text) is None
    assert evaluate_expression("(" * 40 + "1" + ")" * 40) is None
    assert evaluate_expression("-" * 40 + "1") is None
    assert evaluate_expression("(" * 30 + "1" + ")" * 30) == 1
    assert evaluate_expression("*".join(["9" * 20] * 12)) == Fraction(10**20 - 1) ** 12
    assert evaluate_expression(None) is None


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand)
    return Fraction(node.value)


def _expression(generator: random.Random, depth: int) -> str:
    if depth == 0 or generator.random() < 0.2:
        return str(generator.randrange(12))
    left, right = (_expression(generator, depth - 1) for _ in range(2))
    space = generator.choice(["", " "])
    text = f"{left}{space}{generator.choice('+-*/')}{space}{right}"
    return generator.choice([f"({text})", text, f"-({text})"])


def test_values_are_those_of_pythons_grammar():
    generator = random.Random(0)
    values = 0
    for _ in range(500):
        text = _expression(generator, 3)
        try:
            expected = _value(ast.parse(text, mode="eval").body)
        except ZeroDivisionError:
            expected = None
        assert evaluate_expression(text) == expected, text
        values += expected is not None
    assert values > 300


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 10**5,
        "{" * 10**6,
        "1,111" * 2 * 10**5 + "1",
        ",111" * 2 * 10**5,
        "answer" + " " * 10**6,
        "answer is $" * 10**5,
        "\\text{" * 10**5,
        "$" + "a" * 10**6,
        "<|im_start|>assistant" * 10**4,
        "9" * 10**6,
        "-." * 10**6,
    ],
    ids=lambda text: text[:12],
)
def test_extraction_ends_on_long_texts(text):
    """A quadratic scan of a million characters would run into the suite's time limit."""
    extract_answer(text)
    extract_boxed(text)
    extract_stated_answer(text)
    extract_last_number(text)
    minerva_normalize(text)
    minerva_normalize(text[:4096])
    assert not strict_box(text, "1")
