"""The published tables' way to compare mathematical answers: "flex" exact match.

Its verdicts are kept to the letter, so that columns can be compared. It is too kind to be a reward:
sympy reads as far as it can and stops, words are products of letters, and only what follows the
last "=" counts. tasks/mathematics.py has the mended comparison.
"""

import fractions
import re

from tasks.mathematics import (
    MAX_CHARACTERS,
    Pair,
    is_decimal,
    last_box,
    last_formula,
    minerva_sentence,
    sympy_equal,
)


def flex_math(response: str, answer: str) -> bool:
    """Does one of the response's candidates match by the rule of the published tables?

    Source: open-instruct ground_truth_utils.py; lm_eval tasks/minerva_math/utils.py.

    >>> flex_math("\\\\boxed{5}", "5"), flex_math("\\\\boxed{east}", "seat")
    (True, True)
    """
    return any(flex_equal(candidate, answer) for candidate in candidates(response))


def candidates(response: str) -> list[str]:
    """All answers that the published rule tries: box and sentence, or else one of the others."""
    found = [text for text in (last_box(response), minerva_sentence(response)) if text is not None]
    if not found:
        formula = last_formula(response)
        found = [response if formula is None else formula]
    return found


def flex_equal(found: str, expected: str) -> bool:
    """The same text after Hendrycks' normalisation, or equal to sympy after Minerva's."""
    if max(len(found), len(expected)) > MAX_CHARACTERS:
        return found == expected
    if normalize_hendrycks(found) == normalize_hendrycks(expected):
        return True
    first, second = normalize_minerva(found), normalize_minerva(expected)
    if is_decimal(first) and is_decimal(second):
        return fractions.Fraction(first) == fractions.Fraction(second)
    return first == second or sympy_equal((Pair(first, second),), strict=False)


def rewrite(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Apply rules (regular expression, replacement), each to what the ones before it have made."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def remove(text: str, pieces: list[str]) -> str:
    for piece in pieces:
        text = text.replace(piece, "")
    return text


HENDRYCKS_SPELLING = (
    (r"\n", ""),
    (r"\\!", ""),  # a negative space
    (r"\\\\", r"\\"),
    (r"tfrac", "frac"),
    (r"dfrac", "frac"),
    (r"\\left", ""),
    (r"\\right", ""),
    (r"\^\{\\circ\}", ""),  # degrees
    (r"\^\\circ", ""),
    (r"\\\$", ""),
    (r"\$", ""),
    (r"\\text\{ [^{}]*\}(\^\d)?$", ""),  # units on the right
    (r"\\%", ""),
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."),  # .5
)
HENDRYCKS_FRACTIONS = (
    (r" ", ""),
    (r"\\sqrt([^{\[])", r"\\sqrt{\1}"),  # \sqrt2
    (r"\\frac([^{])", r"\\frac{\1}"),  # \frac12: its 1
    (r"(\\frac\{[^{}]\})([^{])", r"\1{\2}"),  # \frac{1}2: its 2
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),  # 1/2
)


def normalize_hendrycks(text: str) -> str:
    """LaTeX without what makes no difference to MATH's authors.

    Source: hendrycks/math modeling/math_equivalence.py.

    >>> normalize_hendrycks("x = \\\\dfrac12"), normalize_hendrycks("12\\\\text{ cm}^2")
    ('\\\\frac{1}{2}', '12')
    """
    text = rewrite(text, HENDRYCKS_SPELLING)
    left, _, right = text.partition("=")
    if len(left.strip()) <= 2 and right and "=" not in right:  # x = 5
        text = right
    return rewrite(text, HENDRYCKS_FRACTIONS)


UNITS = (
    "square ways integers dollars mph inches ft hours km units sue points feet minutes digits cents"
    " degrees cm gm pounds meters meals edges students childrentickets multiples"
).split()
MINERVA_WORDS = (
    (r"(?<![\\a-zA-Z])an? ", ""),  # articles, but not the end of \alpha
    (r"\.\$", "$"),
    (r"\\\$", ""),
    (r"\\ ", ""),
    (r" ", ""),
    (r"mbox", "text"),
    (r",\\text\{and\}", ","),
    (r"\\text\{and\}", ","),
    (r"\\text\{m\}", r"\\text{}"),
)
MINERVA_REMOVED = [
    "\\ldots",
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    "\\mathrm{th}",
    "^\\circ",
    "^{\\circ}",
    "\\;",
    ",\\!",
    "{,}",
    '"',
    "\\dots",
]
MINERVA_SPELLING = (
    (r".*?\$(.*?)\$.*", r"$\1$"),  # what stands between $
    (r"\\text\{(.*?)\}", r"\1"),
    (r"\\textbf\{(.*?)\}", r"\1"),
    (r"\\overline\{(.*?)\}", r"\1"),
    (r"\\boxed\{(.*)\}", r"\1"),
    (r"frac([^{])(.)", r"frac{\1}{\2}"),  # \frac12
    (r"sqrt(\[[^\]]*\])(\w)", r"sqrt\1{\2}"),  # \sqrt[3]2
    (r"sqrt(?!\[)([^{])", r"sqrt{\1}"),  # \sqrt2
    (r"\$", ""),
)


def normalize_minerva(text: str) -> str:
    """A final answer without units, articles, $, wrappers and spaces.

    Source: Lewkowycz et al. 2022, appendix D, as lm_eval tasks/minerva_math/utils.py has it.

    >>> normalize_minerva("x = 5 square units"), normalize_minerva("\\\\text{Monday}")
    ('5', 'Monday')
    """
    text = text.split("=")[-1]
    text = re.sub(rf"(?<!\\)\b({'|'.join(UNITS)})\b", "", text)
    text = rewrite(text, MINERVA_WORDS)
    parts = re.split(r"(\\[a-zA-Z]+)", text)  # every second one is a command:
    parts[::2] = [remove(part, UNITS) for part in parts[::2]]  # "ft" of \left is no unit
    text = remove("".join(parts), MINERVA_REMOVED)
    text = rewrite(text, MINERVA_SPELLING)
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text) else text
