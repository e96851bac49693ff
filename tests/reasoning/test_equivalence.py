"""Which answers mean the same, by class, and for answers that are made by rule."""

import random

import pytest

from genjax_lab.reasoning.verifier import Verifier

# (prediction, gold), one class in a line or two
_EQUIVALENT = [
    *[
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac12", ".5"),
        (r"\frac{2}{4}", "1/2"),
    ],
    *[(r"\dfrac{3}{4}", r"\tfrac{3}{4}"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), ("3/6", "0.5000")],
    *[("0/16", "0.0"), ("0", "0.00"), ("(1,0.0)", "(1,0)"), ("$5$.", "5"), ("1 2", "2, 1")],
    *[(r"3\frac{1}{2}", "3.5"), ("5.0", "5"), ("08", "8"), (r"\frac{1}{3}", "0.333333")],
    *[(r"0.\overline{3}", r"\frac13"), (r"0.1\overline{6}", "1/6"), ("1.5e3", "1500")],
    *[("1,234", "1234"), ("1{,}234", "1234"), (r"1\,234", "1,234"), ("1 234 567", "1,234,567")],
    *[("1,234.5", "1234.5"), (r"\$1,234.50", "1234.5"), ("1000000", "1,000,000")],
    *[(r"50\%", "0.5"), ("50%", "50"), (r"12.5\%", "12.5"), (r"\frac{1}{2}\%", "0.005")],
    *[(r"33\frac{1}{3}\%", r"\frac{1}{3}"), ("25 percent", r"25\%"), (r"1,000\%", "10")],
    *[(r"90^\circ", "90"), (r"90^{\circ}", "90"), ("90°", r"90\text{ degrees}")],
    *[(r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt2", r"\sqrt{2}"), (r"\sqrt[3]{27}", "3")],
    *[(r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), (r"1+\sqrt{5}", r"\sqrt 5 + 1")],
    *[(r"2\pi", r"\pi \cdot 2"), (r"\frac{\pi}{2}", r"\pi/2"), (r"100\pi\text{ cm}^2", r"100\pi")],
    *[("2^{10}", "1024"), ("2**10", "1024"), ("9^{1/2}", "3"), ("10^{-3}", "0.001")],
    *[(r"2^{3^{2}}", "512"), (r"1.5\times10^{3}", "1500"), ("10!", "3628800")],
    *[(r"\binom{5}{2}", "10"), (r"\log_2 8", "3"), (r"\ln e", "1"), ("(2)(-3)", "-6")],
    *[("x^2+2x+1", "(x+1)^2"), ("b+a", "a+b"), (r"\sin^2 x+\cos^2 x", "1"), ("3+4i", "4i+3")],
    *[("(1,2)", "( 1 , 2 )"), (r"(\frac12,3)", "(0.5,3)"), (r"(3,\frac{\pi}{2})", r"(3,\pi/2)")],
    *[(r"\{1,2\}", r"\{2,1\}"), ("1,2", "2,1"), (r"\{3,1,2\}", "1, 2, 3"), (r"\pm 2", "2,-2")],
    *[("[0,1)", "[0, 1)"), (r"(-\infty,3]", r"(-\infty, 3]"), ("x>3", r"(3,\infty)")],
    *[(r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"), (r"0\le x\le 1", "[0,1]")],
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\begin{pmatrix}1/2\\3\end{pmatrix}", r"\begin{pmatrix}0.5\\3\end{pmatrix}"),
    *[("x=5", "5"), ("5", "x = 5"), (r"x=\frac{1}{2}", "0.5"), ("y=2x+1", "1+2x"), ("f(x)=x", "x")],
    *[("(B)", "B"), (r"\text{(B)}", "B"), (r"\textbf{(B)}", "(B)"), (r"\text{(B)}\ 12", "B")],
    *[(r"\text{Monday}", "monday"), (r"\text{no solution}", "No solution"), ("7 dollars", "7")],
    *[(r"5\text{ cm}", "5"), ("12 square units", "12"), ("−3", "-3"), (r"\boxed{5}", "5")],
]
_DIFFERENT = [
    *[("1/2", "2/1"), ("5", "5.1"), ("-5", "5"), (r"\frac{1}{3}", "0.33"), ("3 1/2", "31/2")],
    *[("1 2", "3"), ("1 2", "12"), ("0", "0.1"), ("", "0")],
    *[(r"5\%", r"500\%"), ("0.5", "50"), (r"50\%", "5"), ("3 million", "3"), ("3 pi", "3")],
    *[(r"\sqrt{8}", r"\sqrt{2}"), (r"\pi", "3.14159"), (r"\pi", r"\frac{22}{7}")],
    *[("2^{10}", "20"), ("(2)(3)", "5"), ("x^2", "x^3"), ("x+1", "y+1"), (r"\frac{1}{0}", "5")],
    *[("(1,2)", "(2,1)"), ("(1,2,3)", "(1,2)"), ("(1,2,3)", "(1,3,2)"), ("(1,234)", "1234")],
    *[(r"\{1,2\}", r"\{1,3\}"), (r"\{1,2\}", "(1,2)"), ("(1,2)", r"\{1,2\}"), ("1", "1,2")],
    (r"\left\{1,2\right\}", "(1,2)"),
    *[("[0,1)", "(0,1)"), ("[0,1]", "(0,1)"), ("(0,1]", "[0,1)"), (r"[0,\infty)", r"(0,\infty)")],
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    *[("x=5", "6"), ("x=5", "y=5"), (r"x\ge3", "x>3"), (r"-\infty", r"\infty")],
    *[("(B)", "(C)"), ("(A)", "1"), (r"\text{(B)}\ 12", "C"), ("(A, B)", "A")],
    *[(r"\text{even}", r"\text{odd}"), ("stop", "spot"), ("11_2", "11_3"), (r"\emptyset", "0")],
]
# Where math-verify and what one might want differ: what is really answered.
_DEBATABLE = [
    ("1011_2", "1011", True),  # a base that only one side names is not compared
    (r"45^\circ", r"\frac{\pi}{4}", False),  # degrees are dropped, not converted
    (r"\sin 30^\circ", "0.5", False),  # likewise: this is the sine of 30 radians
    (r"\sqrt{-1}", "i", False),  # symbols are real unless both sides look complex
    ("(3,4)", "4, 3", True),  # a list without brackets has no order
    ("4, 3", "(3,4)", False),  # but a gold answer in parentheses has
    ("(0,1)", "0<x<1", True),  # an open interval, or a point
    (r"5 \mod 7", "5", True),
    ("3 am", "3 pm", True),  # words after a number are taken for units
]
_TABLE = [
    *((prediction, gold, True) for prediction, gold in _EQUIVALENT),
    *((prediction, gold, False) for prediction, gold in _DIFFERENT),
    *_DEBATABLE,
]


def _box(answer: str) -> str:
    return rf"So it is $\boxed{{{answer}}}$."


@pytest.fixture(scope="module")
def verifier():
    with Verifier(num_workers=2, timeout=30.0) as opened:
        yield opened


@pytest.mark.parametrize(("prediction", "gold", "expected"), _TABLE)
def test_answers_mean_the_same(verifier, prediction, gold, expected):
    assert verifier.verify([_box(prediction)], [gold]) == [expected]


def test_no_pair_of_the_table_took_too_long(verifier):
    assert len(_TABLE) > 120
    assert verifier.num_timeouts == 0


def _generated(generator: random.Random) -> tuple[str, str, str]:
    """An answer, the same in another form, and another answer."""
    a, b, c = (generator.randrange(2, 30) for _ in range(3))
    kind = generator.randrange(6)
    if kind == 0:
        return (
            rf"\frac{{{a}}}{{{b}}}",
            rf"\dfrac{{{a * c}}}{{{b * c}}}",
            rf"\frac{{{a + 1}}}{{{b}}}",
        )
    if kind == 1:
        return rf"{a}+{b}\sqrt{{{c}}}", rf"\sqrt{{{b * b * c}}}+{a}", rf"{a}-{b}\sqrt{{{c}}}"
    if kind == 2:
        return f"({a},{b},{c})", f"({a},{2 * b}/2,{c})", f"({a},{b},{c + 1})"
    if kind == 3:
        return rf"\{{-{a},{b}\}}", rf"\{{{b},-{a}\}}", rf"\{{{a},{b}\}}"
    if kind == 4:
        return f"[-{a},{b})", f"[-{a},{2 * b}/2)", f"[-{a},{b}]"
    return f"x^{{{a}}}+{b}x", f"{b}x+x^{{{a}}}", f"x^{{{a}}}+{b + 1}x"


_PAIRS_OF_BRACKETS = [("(", ")"), ("[", "]"), (r"\{", r"\}")]


def _with_left_right(answer: str) -> str:
    if any(answer.startswith(x) for x, _ in _PAIRS_OF_BRACKETS):
        left, right = (2, 2) if answer.startswith("\\") else (1, 1)
        inner = answer[left : len(answer) - right]
        return rf"\left{answer[:left]}{inner}\right{answer[-right:]}"
    return rf"\left({answer}\right)"


def _with_spaces(answer: str) -> str:
    spaced = answer.replace("+", " + ").replace(",", r" ,\; ").replace("}{", "} {")
    return f" {spaced}\n "


def test_form_does_not_matter_and_value_does(verifier):
    generator = random.Random(0)
    cases = []
    for answer, same, other in (_generated(generator) for _ in range(12)):
        cases.append((answer, answer, True))
        cases.append((answer, other, False))
        for one, two in ((answer, same), (same, answer)):
            cases.append((one, two, True))
            cases.append((_with_spaces(one), two, True))
            cases.append((f"${one}$", two, True))
            cases.append((rf"\({one}\)", two, True))
            cases.append((_with_left_right(one), two, True))
    found = verifier.verify(
        [rf"\boxed{{{one}}}" for one, _, _ in cases], [two for _, two, _ in cases]
    )
    assert [case for case, right in zip(cases, found, strict=True) if right != case[2]] == []


def test_answers_are_taken_from_responses_and_golds_from_boxes(verifier):
    predictions = [
        "The answer is 1/2.",
        "I get 0.5",
        r"\boxed{0.5",
        r"\boxed{}",
        "",
        r"\boxed{1/2}",
    ]
    golds = [r"\boxed{\frac12}"] * 5 + [r" \frac{1}{2} "]
    assert verifier.verify(predictions, golds) == [True, True, False, False, False, True]
