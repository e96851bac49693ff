r"""The answer in a response to a question, taken out of its text; and the value of an expression.

Only text is handled here. Whether two answers mean the same is asked of `reasoning.verifier`; only
arithmetic with integers, as games of numbers want it, is evaluated (exactly, and with limits).

An answer is looked for as graders of mathematics do (NFT, arXiv 2505.18116, and its code): in the
last \boxed{...}, else after the last "answer is" or "Answer:", else it is the last number. A box
that is cut off or empty is no answer: what else the text says then does not count.
`minerva_normalize` follows arXiv 2206.14858, appendix D.1.
"""

import re
from fractions import Fraction

STOP_STRINGS = ("</s>", "<|im_end|>", "<|endoftext|>")
_ASSISTANT = "<|im_start|>assistant"

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"[^\s$]+")
_STATED = re.compile(r"answer[*\s]*(?:is\b|:)[\s:*]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|\.(?=\s|$)|<\|")
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])-)?(?:(?P<whole>[0-9][0-9,]*)(?P<rest>(?:\.[0-9]+)?(?:/[0-9]+)?)|\.[0-9]+)"
)
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")


def response_text(text: str, *, stop_strings: tuple[str, ...] = STOP_STRINGS) -> str:
    """What the model itself said: after the last assistant header, before the first stop string.

    Args:
        text: a response, with or without its prompt in Qwen's chat format.
        stop_strings: whatever begins with one of these is left out.
    """
    text = text[text.rfind(_ASSISTANT) + len(_ASSISTANT) :] if _ASSISTANT in text else text
    for stop in stop_strings:
        text = text.partition(stop)[0]
    return text


def extract_boxed(text: str) -> str | None:
    r"""Content of the last \boxed or \fbox; None if there is none, or it is unbalanced or empty.

    Braces are counted; escaped ones do not count, as in LaTeX. Without braces (`\boxed 5`) it is
    what follows up to a space or "$", less punctuation.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    if text[start : start + 1] == "{":
        content = _balanced(text, start)
    else:
        match = _UNBRACED.match(text, start)
        content = match.group().rstrip(".,;:") if match else None
    return (content or "").strip() or None


def _balanced(text: str, start: int) -> str | None:
    """Between the brace at `start` and the one that closes it, if there is one."""
    depth = 0
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start + 1 : match.start()]
    return None


def extract_stated_answer(text: str) -> str | None:
    """What follows the last "answer is" or "answer:" in its sentence, or None.

    Of a statement that begins with "$" only the formula is taken.
    """
    start = None
    for match in _STATED.finditer(text):
        start = match.end()
    if start is None:
        return None
    if text.startswith("$", start) and text.find("$", start + 1) > 0:
        return text[start + 1 : text.index("$", start + 1)].strip() or None
    end = _SENTENCE_END.search(text, start)
    return text[start : end.start() if end else len(text)].strip(" \t\r*$") or None


def extract_last_number(text: str) -> str | None:
    """The last number as it is written (-3, 1,234.5, .5, 3/4), or None.

    Commas that do not separate thousands separate numbers.
    """
    number = None
    for match in _NUMBER.finditer(text):
        number = match
    if number is None or number["whole"] is None:
        return number and number.group()
    whole = number["whole"].rstrip(",")
    if "," in whole and not _THOUSANDS.fullmatch(whole):
        return whole.rpartition(",")[2] + number["rest"]
    return number.group().rstrip(",")


def extract_answer(text: str, *, stop_strings: tuple[str, ...] = STOP_STRINGS) -> str | None:
    """The answer that a response gives: boxed, else stated, else its last number; or None.

    A response with a box is judged by its last box alone.

    Args:
        text: a response, with or without its prompt (see `response_text`).
        stop_strings: whatever begins with one of these is left out.
    """
    text = response_text(text, stop_strings=stop_strings)
    if _BOX.search(text):
        return extract_boxed(text)
    return extract_stated_answer(text) or extract_last_number(text)


def strict_box(text: str, gold: str, *, window: int | None = None) -> bool:
    """Is the last box exactly `gold`, character for character?

    Args:
        text: a response, with or without its prompt.
        gold: right answer, bare.
        window: only the last so many characters count. The scorer of DAPO (arXiv 2503.14476) has
            300, then 100 in its strict mode, and thereby rejects long boxes that are right.

    Raises:
        ValueError: if `window` is not positive.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be positive or None, got {window}")
    text = response_text(text)
    boxed = extract_boxed(text if window is None else text[-window:])
    return boxed is not None and boxed == gold


_MINERVA_LONGEST = 4096
_MINERVA_UNITS = [
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "ft",
    "hours",
    "km",
    "units",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "multiples",
]
_MINERVA_WORDS = re.compile(
    rf"(?<![A-Za-z\\])(?:an? (?=\S)|(?:{'|'.join(_MINERVA_UNITS)}|children ?tickets)(?![A-Za-z]))"
)
_MINERVA_REMOVED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\{,\}|\^\s*(?:\\circ|\{\\circ\})|\\mathrm\{th\}"
    r"|\\l?dots|\""
)
_MINERVA_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|overline)\s*\{([^{}]*)\}(?:\^[23])?")


def minerva_normalize(answer: str) -> str:
    r"""An answer in the form in which Minerva's graders compared strings.

    Takes what follows the last "=", and of that the first formula between "$"; drops units, "a" and
    "an", spaces, \left and \right, wrappers like \text, degrees, and the full stop at the end;
    writes \frac12 and \sqrt2 with braces and \dfrac, \tfrac as \frac; and 1,234 without commas.

    Units are dropped as whole words, where the original drops letters anywhere (and so makes \left
    into \le). Answers of more than 4096 characters are returned as they are.
    """
    if len(answer) > _MINERVA_LONGEST:
        return answer
    answer = answer.rpartition("=")[2].replace(r"\$", "")
    parts = answer.split("$")
    answer = parts[1] if len(parts) > 2 else answer
    answer = _MINERVA_REMOVED.sub("", answer)
    # A unit in a wrapper goes with it (\text{cm}^2); other words stay (\text{even}).
    answer = _MINERVA_WRAPPED.sub(lambda match: _MINERVA_WORDS.sub("", match.group(1)), answer)
    answer = re.sub(r"\s+", "", _MINERVA_WORDS.sub("", answer))
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer)
    answer = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\sqrt([^{\[\\])", r"\\sqrt{\1}", answer)
    answer = answer.replace("$", "").rstrip(".")
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer


_LONGEST_EXPRESSION = 256
_DEEPEST_EXPRESSION = 32
_MOST_DIGITS = 20
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")


def evaluate_expression(text: str) -> Fraction | None:
    """Exact value of an expression of integers with + - * / ( ) and signs, or None.

    Never raises and always ends: whatever is no such expression is None, as are a division by
    zero, more than 256 characters, integers of more than 20 digits, and parentheses and signs more
    than 32 deep. There are no powers and no implied products.
    """
    if not isinstance(text, str) or len(text) > _LONGEST_EXPRESSION:
        return None
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(match.group(1)) > _MOST_DIGITS:
            return None
        tokens.append(match.group(1))
        position = match.end()
    try:
        value, used = _sum(tokens, 0, 0)
    except (_NoExpressionError, ZeroDivisionError):
        return None
    return value if used == len(tokens) else None


class _NoExpressionError(Exception):
    """The tokens are no expression."""


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    """Value of the longest sum or difference that starts at `at`, and where it ends."""
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        term, end = _product(tokens, at + 1, depth)
        value, at = (value + term if tokens[at] == "+" else value - term), end
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        factor, end = _factor(tokens, at + 1, depth)
        value, at = (value * factor if tokens[at] == "*" else value / factor), end
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if at >= len(tokens) or depth > _DEEPEST_EXPRESSION:
        raise _NoExpressionError
    token = tokens[at]
    if token.isdigit():
        return Fraction(int(token)), at + 1
    if token in "+-":
        value, end = _factor(tokens, at + 1, depth + 1)
        return (-value if token == "-" else value), end
    if token == "(":
        value, end = _sum(tokens, at + 1, depth + 1)
        if end < len(tokens) and tokens[end] == ")":
            return value, end + 1
    raise _NoExpressionError
