r"""Do two answers mean the same? A program for processes that may be killed (`reasoning.verifier`).

math-verify (with sympy) decides; before it, answers are written in a form that it reads rightly.
What math-verify reads cannot be bounded in time or memory from within: it may compute 9^{9^{9^9}}.
So this program works for a parent that kills it, one pair at a time, over its standard input and
output. It is run as a file and imports nothing of genjax_lab, hence no JAX, and starts in a second.

    parent: {"prediction": "...", "gold": "..."}     one line of JSON, all ASCII
    here:   {"ready": true}, once, then {"equivalent": true or false} or {"error": "..."} for each
"""

import contextlib
import json
import logging
import re
import signal
import sys

_SPACES = re.compile(r"(?:\\[!,;:> ]|~|\\q?quad(?![A-Za-z])|\s)+")
_IDLE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # 3 1/2 is not 31/2
_DELIMITERS = re.compile(
    r"\\(?:left|right)(?![a-zA-Z])\.?|\\[bB]igg?[lr]?(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])"
    r"|(?<!\\)(?:\\[()\[\]]|\$)"
)
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|°")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|percent)\s*\}|percent)$")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:\{,\}\d{3}| \d{3})+(?!\d)")
_THOUSANDS = re.compile(r"([-+]?)(?:\\\$)?(\d{1,3}(?:,\d{3})+)(\.\d+)?")
_ADJACENT = re.compile(r"(?<=\d) (?=\d+(?![\d/]))")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_FACTOR = re.compile(r"\((-?\d+)\) ?(?=\()")
_UNITS = re.compile(
    r"((?:\\\$)?[-+]?[\d.,/]+) (?!(?:hundred|thousand|[mbtr]+illion|dozen|pi|sqrt)s?\b)"
    r"[A-Za-z]{2,}(?: [A-Za-z]+)*(?:\^\{?[23]\}?)?"
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|mathrm|mathbf)\s*\{\s*([^{}\\]*?)\s*\}")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_LABELLED = re.compile(r"\(([A-Z])\) ?[^ ,].*")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '-]{3,}")
_BASE = re.compile(r"[\dA-F]+_\{?(\d+)\}?")


def _bare(answer: str) -> str:
    r"""Without "$", \left, \right and a full stop, and with single spaces."""
    answer = _SPACES.sub(" ", _DELIMITERS.sub(" ", answer)).strip()
    return answer.removesuffix(".").strip()


def _normalize(answer: str) -> str:
    r"""Numbers of a bare answer as math-verify reads them rightly.

    1{,}234, 1\,234, 1 234 and a lone 1,234 become 1234 (in brackets 1,234 are two numbers);
    0.1\overline{6} becomes a fraction; degrees and words after a number are units and go.
    """
    answer = _DEGREE.sub("", answer.replace("−", "-").replace("**", "^"))
    answer = _GROUPED.sub(lambda match: re.sub(r"\{,\}| ", "", match.group()), answer)
    answer = _REPEATING.sub(_repeating_decimal, answer)
    # math-verify adds what stands side by side, as in 3 1/2: also in (2)(3) and 2 3.
    answer = _FACTOR.sub(r"(\1) \\cdot ", answer)
    answer = answer if "\\" in answer else _ADJACENT.sub(", ", answer)
    if units := _UNITS.fullmatch(answer):
        answer = units.group(1)
    if thousands := _THOUSANDS.fullmatch(answer):
        sign, whole, rest = thousands.groups(default="")
        answer = sign + whole.replace(",", "") + rest
    if scientific := _SCIENTIFIC.fullmatch(answer):
        answer = r"{} \cdot 10^{{{}}}".format(*scientific.groups())
    return answer.strip()


def _repeating_decimal(match: re.Match) -> str:
    """0.1666... = (16 - 1) / 90"""
    whole, fixed, repeated = match.groups()
    numerator = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def equivalent(prediction: str, gold: str) -> bool:
    """Do two answers mean the same? May take forever, and may raise whatever sympy raises.

    Text answers are compared as words, choices by their letters. A percentage equals both its value
    and its number of percents, as data sets write either.
    """
    answers = [_bare(prediction), _bare(gold)]
    plain = [_normalize(_PERCENT.sub("", answer)) for answer in answers]
    percent = [bool(_PERCENT.search(answer)) for answer in answers]
    if not all(plain):
        return False
    verdict = _compare_texts(*plain)
    if verdict is not None:
        return verdict
    if _math_verify(*plain):
        return True
    if percent[0] == percent[1]:
        return False
    return _math_verify(
        *(rf"\frac{{{x}}}{{100}}" if p else x for x, p in zip(plain, percent, strict=True))
    )


def _compare_texts(prediction: str, gold: str) -> bool | None:
    """Whether two normal forms are the same, where text alone tells; else None."""
    texts = [_TEXT.sub(r"\1", answer).strip() for answer in (prediction, gold)]
    if _IDLE_SPACE.sub("", texts[0]) == _IDLE_SPACE.sub("", texts[1]):
        return True
    choices = [_CHOICE.fullmatch(text) for text in texts]
    if any(choices):
        letters = [
            choice or _LABELLED.fullmatch(text) for choice, text in zip(choices, texts, strict=True)
        ]
        if all(letters):
            return letters[0].group(1) == letters[1].group(1)
    if all(_WORDS.fullmatch(text) for text in texts):  # math-verify: products of their letters
        return texts[0].casefold() == texts[1].casefold()
    if {_bracket(prediction), _bracket(gold)} == {"(", r"\{"}:  # math-verify: both are ordered
        return False
    bases = [_BASE.fullmatch(answer) for answer in (prediction, gold)]
    if all(bases) and bases[0].group(1) != bases[1].group(1):  # math-verify: they bear no meaning
        return False
    return None


def _bracket(answer: str) -> str | None:
    for left, right in (("(", ")"), (r"\{", r"\}")):
        if answer.startswith(left) and answer.endswith(right) and "," in answer:
            return left
    return None


def _math_verify(prediction: str, gold: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # Their time-outs are SIGALRM handlers, which wait for the very arithmetic that does not end.
    found, wanted = (
        parse(
            f"${answer}$",
            [LatexExtractionConfig()],
            extraction_mode="first_match",
            parsing_timeout=None,
        )
        for answer in (prediction, gold)
    )
    failure = None
    for right in wanted:
        for answer in found:
            try:
                if verify(
                    right,
                    answer,
                    allow_set_relation_comp=True,
                    timeout_seconds=None,
                    raise_on_error=True,
                ):
                    return True
            except Exception as error:  # sympy raises anything; another reading may still agree
                failure = error
    if failure is not None:
        raise failure
    return False


def _limit_memory(size: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has the limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main(seconds: float, memory: int) -> None:
    """Judge pairs until the standard input ends.

    Args:
        seconds: a pair that takes longer ends the process even if its parent is no longer there.
        memory: limit of the address space, in bytes.
    """
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    _limit_memory(memory)
    replies = sys.stdout
    sys.stdout = sys.stderr  # nothing that a library prints is a reply
    try:
        equivalent(r"\frac{1}{2} + x", "x + 0.5")  # loads sympy and builds the grammar's tables
    except Exception as error:
        print(json.dumps({"ready": False, "error": repr(error)}), file=replies, flush=True)
        return
    print(json.dumps({"ready": True}), file=replies, flush=True)
    # The system's own action on SIGALRM ends a process whatever it does; a handler would not.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            reply = {"equivalent": bool(equivalent(**json.loads(line)))}
        except (
            BaseException
        ) as error:  # RecursionError, MemoryError, math-verify's TimeoutException
            reply = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
