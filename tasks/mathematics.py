"""Are two mathematical answers, written in LaTeX, the same?

`verify_math` is a reward, and what can be gamed will be. It compares from the outside in: lists,
relations, unions, intervals and matrices part by part, words as words, and what remains,
expressions, by sympy. sympy's reader of LaTeX alone would not do: it reads as far as it can and
stops, takes words for products of letters, and unknown commands for names. So whatever is not known
to be an expression is compared as text.

A response is data: nothing of it is executed, and one verdict costs less than a second. The rule of
the published tables is another one: tasks/flex_match.py.
"""

import fractions
import functools
import json
import os
import re
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from infra.files import UserError

MAX_CHARACTERS = 1000  # the test set's longest answer has 81; longer ones must be the same text
MAX_DEPTH = 10  # of lists in lists


def verify_math(response: str, answer: str) -> bool:
    """Does the response give an answer that equals `answer`, a piece of LaTeX?

    >>> verify_math("so $x = \\\\boxed{\\\\frac12}$.", "0.5")
    True
    >>> verify_math("Thus $2\\\\sqrt{2}$", "\\\\sqrt{8}"), verify_math("It is $3$", "4")
    (True, False)
    """
    return equal_math(final_answer(response), answer)


# ------------------------------------------------------------------------------------------
# Where a response has its answer


def final_answer(response: str) -> str:
    """The answer of a response: the first of these that it has.

    Its last box; X of "The final answer is X. I hope it is correct."; X of the last "answer is X";
    what stands between the last two $; the whole response.

    >>> final_answer("$1$ or $2$, so the answer is $2$."), final_answer("from $2$ to $x=3$.")
    ('$2$', 'x=3')
    """
    for find in (last_box, minerva_sentence, answer_sentence, last_formula):
        found = find(response)
        if found is not None:
            return found
    return response


def last_box(response: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{} that closes, else what follows a "\\boxed ".

    Of boxes inside each other, the innermost is the last. One pass, since many may never close.
    """
    last = (0, 0)  # where the last box that closes begins and ends
    opened = []  # for each open brace: where its box begins, 0 if it is no box's
    for mark in re.finditer(r"\\(?:boxed|fbox)\s*\{|[{}]", response):
        if mark[0] != "}":
            opened.append(0 if mark[0] == "{" else mark.end())
        elif opened:
            last = max(last, (opened.pop(), mark.start()))
    start, end = last
    if start:
        return response[start:end]
    _, command, rest = response.rpartition("\\boxed ")
    return rest.split("$")[0] if command else None


def minerva_sentence(response: str) -> str | None:
    """X of the first line "... Final Answer: The final answer is X. I hope it is correct. ..."."""
    for line in response.split("\n"):
        _, _, sentence = line.partition("Final Answer: The final answer is")
        answer, ending, _ = sentence.partition("I hope it is correct.")
        if ending:
            return answer.strip().removesuffix(".")
    return None


def answer_sentence(response: str) -> str | None:
    """X of the last "answer is X", up to the end of the sentence or of the line."""
    parts = re.split(r"\banswer is\b:?", response, flags=re.IGNORECASE)
    if len(parts) == 1:
        return None
    line = parts[-1].strip().split("\n")[0]
    return re.split(r"\.(?:\s|$)", line, maxsplit=1)[0]


def last_formula(response: str) -> str | None:
    """What stands between the last two $."""
    if response.count("$") < 2:
        return None
    return response.replace("$$", "$").rsplit("$", 2)[-2]


# ------------------------------------------------------------------------------------------
# Equal


def equal_math(found: str, expected: str) -> bool:
    """Are two pieces of LaTeX the same answer?"""
    if max(len(found), len(expected)) > MAX_CHARACTERS:
        return found == expected
    pairs = open_questions(clean(found), clean(expected))
    return pairs is not None and sympy_equal(tuple(pairs))


class Pair(NamedTuple):
    """Two expressions that sympy is to compare; or, with `sign`, one with the other's negative."""

    first: str
    second: str
    sign: bool = False


def open_questions(found: str, expected: str, depth: int = 0) -> list[Pair] | None:
    """The pairs that must be equal for two clean answers to be equal; None if they are not."""
    words = is_words(found) or is_words(expected)
    if key(found, words) == key(expected, words):
        return [] if found else None
    if words or depth > MAX_DEPTH or not found or not expected:
        return None
    one, other = take_apart(found), take_apart(expected)
    if one.kind != other.kind:
        return unequal_kinds(one, other, depth)
    if one.kind == "":
        return ask_about(found, expected)
    if len(one.parts) != len(other.parts):
        return None
    pairs: list[Pair] = []
    for part, expected_part in zip(one.parts, other.parts):
        more = open_questions(part, expected_part, depth + 1)
        if more is None:
            return moved_terms(one, other)
        pairs += more
    return pairs


def unequal_kinds(one: "Whole", other: "Whole", depth: int) -> list[Pair] | None:
    """As `open_questions`, of two answers of which only one names what it is, as in x = 5."""
    if other.kind in ("=", "\\in"):
        name, value = other.parts
        return open_questions(one.text, value, depth + 1) if is_name(name) else None
    if one.kind == "\\in" and is_name(one.parts[0]):
        return open_questions(one.parts[1], other.text, depth + 1)
    if set(one.kind.split()) == {"="}:  # x = 2 + 3 = 5: all that is no name must be right
        pairs: list[Pair] = []
        for part in one.parts[is_name(one.parts[0]) :]:
            more = open_questions(part, other.text, depth + 1)
            if more is None:
                return None
            pairs += more
        return pairs
    if other.kind == "_" and one.text.isalnum():  # 101 for 101_2: the question named the base
        return [] if one.text == other.parts[0] else None
    return None


def moved_terms(one: "Whole", other: "Whole") -> list[Pair] | None:
    """Equations with other sides are equal where the differences of their sides are, up to sign."""
    if one.kind != "=" or not all(map(is_expression, (*one.parts, *other.parts))):
        return None
    first, second = (f"{left}-({right})" for left, right in (one.parts, other.parts))
    return [Pair(for_sympy(first), for_sympy(second), sign=True)]


def ask_about(found: str, expected: str) -> list[Pair] | None:
    """As `open_questions`, of two values that have no parts."""
    if unit_power(found) and unit_power(expected) and unit_power(found) != unit_power(expected):
        return None
    expected, percent = expected.rstrip("%\\ "), expected.endswith("%")
    if percent:  # the question asked for percent; else 56 % is not 56
        found = found.rstrip("%\\ ")
    a, b = mixed_as_sum(value_of(found)), mixed_as_sum(value_of(expected))
    if key(a) == key(b):
        return [] if a else None
    if is_decimal(a) and is_decimal(b):
        return [] if fractions.Fraction(a) == fractions.Fraction(b) else None
    if is_expression(a) and is_expression(b):
        return [Pair(for_sympy(a), for_sympy(b))]
    return None


# ------------------------------------------------------------------------------------------
# Spelling: what makes no difference goes

THIN = "\u2009\u202f\u00a0"  # thin and no-break spaces
DIGITS = r"(?<=\d)(?:,\\!|\\!,?|\{,\}|\\,|['" + THIN + r"])(?=\d{3}(?!\d))"
GROUP = r"\{[^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*\}"  # braces in braces in braces
ATOM = r"\s*([0-9a-zA-Z]|\\pi(?![a-zA-Z]))"
FRACTION = r"\\frac(?![a-zA-Z])" + ATOM  # \frac12: its 1
DENOMINATOR = rf"(\\frac\s*{GROUP}){ATOM}"
ROOT = r"(\\sqrt(?:\[[^\[\]]*\])?)(?![a-zA-Z\[])" + ATOM
SPELLING = (
    ("[\u2212\u2013]", "-"),
    ("\u00d7", r"\\times "),
    ("\u00b7", r"\\cdot "),
    ("\u03c0", r"\\pi "),
    ("\u221e", r"\\infty "),
    (DIGITS, ""),  # 5\,000
    (r"\\(?:left|right)\s*(?=[()\[\]|\\])", ""),
    (r"\\(?:displaystyle|textstyle)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:mbox|text|textbf|textrm|textit|mathrm|mathbf)\s*\{", r"\\text{"),
    (r"\\(?:geq|geqslant|ge)(?![a-zA-Z])|>=|\u2265", r"\\geq "),
    (r"\\(?:leq|leqslant|le)(?![a-zA-Z])|<=|\u2264", r"\\leq "),
    (r"\\(?:neq|ne)(?![a-zA-Z])", r"\\neq "),
    (r"\\(?:lt)(?![a-zA-Z])", "<"),
    (r"\\(?:gt)(?![a-zA-Z])", ">"),
    (r"(?<!\\)\\(?:[,;:!> ]|q?quad(?![a-zA-Z]))|~", " "),
    (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})", "\u00b0"),
    (FRACTION, r"\\frac{\1}"),
    (DENOMINATOR, r"\1{\2}"),
    (ROOT, r"\1{\2}"),
    (r"([_^])\{\s*(\w)\s*\}", r"\1\2"),
    (r",?\s*\\text\{\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+", ","),
    (r"(?<![\d.])0+(?=\d)", ""),  # 05
    (r"(?<![\d.])\.(?=\d)", "0."),  # .5
    (r"\s+", " "),
)
WRAPPERS = (
    r"\$\$(.*)\$\$",
    r"\$((?:\\\$|[^$])*)\$",
    r"\\\((.*)\\\)",
    r"\\\[(.*)\\\]",
    r"\\boxed\s*\{(.*)\}",
)


def clean(text: str) -> str:
    """An answer in one of the spellings that mean the same.

    >>> clean("$\\\\dfrac12.$"), clean("5\\\\,000"), clean("x >= .5")
    ('\\\\frac{1}{2}', '5000', 'x \\\\geq 0.5')
    """
    for pattern in WRAPPERS:
        inside = re.fullmatch(pattern, text.strip().removesuffix("."), re.DOTALL)
        if inside and is_balanced(inside[1]):
            text = inside[1]
    number = re.fullmatch(r"(\s*-?(?:\\?\$)? ?)(\d{1,3}(?:,\d{3})+)(?![\d,])(.*)", text, re.DOTALL)
    if number:  # 1,000 alone; within a list it might be two numbers
        text = number[1] + number[2].replace(",", "") + number[3]
    for pattern, replacement in SPELLING:
        text = re.sub(pattern, replacement, text)
    text = text.strip().removesuffix(".").strip()
    words = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return as_words(words[1]) if words else text


def as_words(text: str) -> str:
    """The content of a \\text{}: still marked as words, unless it is a number or one letter."""
    text = text.strip().removesuffix(".")
    letter = re.fullmatch(r"\(?([A-Za-z])\)?", text)
    if letter:
        return letter[1]
    return f"\\text{{{text}}}" if re.search(r"[A-Za-z]", text) else text


def key(text: str, words: bool = False) -> str:
    """What two answers share that are the same text: without spaces, and words in small letters.

    The space between two digits stays: 5 6 is not 56.

    >>> key("x + \\\\text{ Two }", True), key("5 6"), key("\\\\text{4:30 p.m.}", True)
    ('x+two', '5 6', '4:30pm')
    """
    if words:
        text = re.sub(r"\\text\{([^{}]*[A-Za-z][^{}]*)\}", r" \1", text).casefold()
        text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    return re.sub(r"(?<!\d) | (?!\d)", "", text.strip())


def is_words(text: str) -> bool:
    """Is it words, and not an expression with a unit? East, ACF, 9 a.m."""
    text = value_of(text)
    plain = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    return "\\text" in text or bool(re.search(r"[A-Za-z]{3}", plain))


UNITS = (
    "square|cubic|units?|ways?|integers?|dollars?|cents?|mph|inch(?:es)?|ft|foot|feet|hours?|hrs?|"
    "minutes?|seconds?|days?|km|cm|mm|kilometers?|meters?|centimeters?|miles?|points?|digits?|"
    "degrees?|gm|grams?|pounds?|meals?|edges?|students?|children|tickets?|multiples|ounces?|years?"
)
# Words behind a number that are more than a unit: 9 a.m., 5 million.
NO_UNIT = r"\s*(?:[ap]\.?\s?m|million|billion|thousand|hundred|dozen|half)\b"
# A number or an expression, then words: what is counted or measured.
UNIT = re.compile(
    r"(?<=[\d})a-z%\u00b0])\s*"
    rf"(?:\\text\{{(?!{NO_UNIT})[^{{}}\d]*\}}|(?:\s*\b(?:{UNITS})\b\.?)+)"
    r"(?:\^\{?[23]\}?)?\.?$",
)


def value_of(text: str) -> str:
    """An answer without its unit: dollars before it; words or degrees behind it.

    >>> value_of("12 \\\\text{ cm}^2"), value_of("-\\\\$5"), value_of("90 degrees")
    ('12', '-5', '90')
    """
    text = re.sub(r"^(-?)\s*\\?\$\s*", r"\1", text.strip())
    text = UNIT.sub("", text)
    if not FUNCTION.search(text):
        text = text.removesuffix("\u00b0")
    return text.strip()


def unit_power(text: str) -> list[str]:
    """The power of the unit behind an answer: cm^2 is not cm^3, nor are cubic feet square ones."""
    unit = UNIT.search(text)
    words = unit[0].replace("square", "2").replace("cubic", "3") if unit else ""
    return re.findall(r"\d", words)


def is_decimal(text: str) -> bool:
    """Is it a number short enough to compare without sympy?"""
    return bool(re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", text))


def is_name(text: str) -> bool:
    """May it stand before "=" without being part of the answer? x, f(x), A_1."""
    return bool(re.fullmatch(r"[A-Za-z](?:_\w)?'*(?:\s?\([a-z]\))?", text))


def mixed_as_sum(text: str) -> str:
    """A mixed number as a sum: 1 4/5 is 9/5, not 4/5. Only a proper fraction makes one.

    >>> mixed_as_sum("-1 \\\\frac{4}{5}"), mixed_as_sum("3\\\\frac{7}{2}")
    ('-(1+\\\\frac{4}{5})', '3\\\\frac{7}{2}')
    """
    found = re.fullmatch(r"(-?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))", text)
    if not found:
        return text
    sign, whole, *fraction = (part for part in found.groups() if part is not None)
    top, bottom = fraction
    if int(top) >= int(bottom):
        return text
    return f"{sign}({whole}+\\frac{{{top}}}{{{bottom}}})"


# ------------------------------------------------------------------------------------------
# Structure


class Whole(NamedTuple):
    """An answer, the parts it has, and what holds them together ("": it has no parts)."""

    text: str
    kind: str
    parts: list[str]


TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
OPENING = ("(", "[", "{", "\\{", "\\begin")
CLOSING = (")", "]", "}", "\\}", "\\end")
RELATIONS = ("=", "<", ">", "\\leq", "\\geq", "\\neq", "\\in", "\\to", "\\rightarrow", "\\subset")


def split(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(the separators that stand outside of brackets, the parts between them).

    >>> split("3,(1,2)", (",",))
    ([','], ['3', '(1,2)'])
    """
    found = []
    parts = [""]
    depth = 0
    for token in TOKEN.findall(text):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0 and token in separators:
            found.append(token)
            parts.append("")
        else:
            parts[-1] += token
    return found, [part.strip() for part in parts]


def is_balanced(text: str) -> bool:
    """Does every bracket that closes follow one that opens, and all of them close?"""
    depth = 0
    for token in TOKEN.findall(text):
        depth += (token in OPENING) - (token in CLOSING)
        if depth < 0:
            return False
    return depth == 0


def take_apart(text: str) -> Whole:
    """The outermost structure of a clean answer.

    >>> take_apart("x \\\\in [-2,7]").parts, take_apart("[2,5)")[1:], take_apart("3:1").kind
    (['x', '[-2,7]'], ('[)', ['2', '5']), ':')
    """
    for separators in ((",", ";"), RELATIONS, ("\\cup", "\\cap"), (":",)):
        found, parts = split(text, separators)
        if found:
            return directed(text, found, parts)
    matrix = re.fullmatch(r"\\begin\{(\w+)\}(.*)\\end\{\1\}", text, re.DOTALL)
    if matrix:
        found, parts = split(matrix[2].strip().removesuffix("\\\\"), ("&", "\\\\"))
        return Whole(text, " ".join((matrix[1], *found)), parts)
    bracket = re.fullmatch(r"(\\?[(\[{])(.*?)(\\?[)\]}])", text, re.DOTALL)
    if bracket:
        found, parts = split(bracket[2], (",", ";"))
        if found:
            return Whole(text, bracket[1] + bracket[3], parts)
    base = re.fullmatch(r"(-?[\dA-Z.]*\d[\dA-Z.]*)_(\d|\{\d+\})", text)
    if base:
        return Whole(text, "_", [base[1], base[2].strip("{}")])
    return Whole(text, "", [text])


def directed(text: str, separators: list[str], parts: list[str]) -> Whole:
    """Parts between separators; of 5 > x and x < 5 both become x < 5."""
    turned = {">": "<", "\\geq": "\\leq"}
    if turned.keys() >= set(separators):
        separators = [turned[sign] for sign in reversed(separators)]
        parts = parts[::-1]
    return Whole(text, " ".join(separators) if separators[0] in RELATIONS else separators[0], parts)


# What sympy's grammar reads as what it means. All other commands are compared as text.
NAMES = "pi infty alpha beta gamma delta theta lambda mu phi omega rho sigma tau".split()
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan log ln exp".split()
BEGIN_FACTOR = {*NAMES, *FUNCTIONS, "frac", "sqrt", "binom"}
KNOWN = BEGIN_FACTOR | {"cdot", "times", "div"}


# What follows one of these is its argument.
FUNCTION = re.compile(rf"\\(?:{'|'.join(FUNCTIONS)})(?![a-zA-Z])")


# sympy reads the x of 3x4 as "times", and the d of d\sqrt{2} as a differential.
OTHER_NAMES = {"x": "\\upsilon", "d": "\\iota"}
LETTERS = ("upsilon", "iota")


def for_sympy(text: str) -> str:
    r"""The same expression without what sympy's reader is known to misread.

    With a sign for each product, as far as the first function: x(x+1) would be a function of x + 1.

    >>> print(for_sympy(r"2y\sqrt{3}"), for_sympy("3x4"), for_sympy("n(n+1)"))
    2\cdot y\cdot \sqrt {3} 3\cdot \upsilon 4 n\cdot (n+1)
    """
    tokens = [token for token in TOKEN.findall(text) if token != " "]
    made = []
    in_function = False
    for token, after in zip(tokens, [*tokens[1:], ""]):
        token = OTHER_NAMES.get(token, token)
        made.append(f"{token} " if token[1:].isalpha() else token)
        in_function |= token[1:] in FUNCTIONS
        is_over = token.isalnum() or token in (")", "}", "!") or token[1:] in (*NAMES, *LETTERS)
        begins = after.isalpha() or after == "(" or after[1:] in BEGIN_FACTOR
        if is_over and begins and not in_function:
            made.append("\\cdot ")
    return "".join(made).strip()


# 5 6; 5. and .; 4210_5; east; 5!6
MISREAD = r"(?<![_^\d])\d+ \d|\.\D|\d_|[A-Za-z]{3}|!\s*[\da-zA-Z(]"


def is_expression(text: str) -> bool:
    """Will sympy read all of it, and as what it means?"""
    commands = re.findall(r"\\([a-zA-Z]+|.)", text)
    rest = re.sub(r"\\[a-zA-Z]+", " ", text)
    return (
        KNOWN.issuperset(commands)
        and bool(re.fullmatch(r"[0-9a-zA-Z+\-*/^_{}()|!.\[\] ]+", rest))
        and is_balanced(text)
        and text.count("|") % 2 == 0
        and not re.search(MISREAD, f"{rest} ")
    )


# ------------------------------------------------------------------------------------------
# sympy, in a process of its own

SYMPY_SERVER = Path(__file__).with_name("sympy_server.py")
SYMPY_LOCK = threading.Lock()  # one question at a time
PATIENCE = 10  # seconds until a server that says nothing is replaced; an answer takes less than one


def sympy_equal(pairs: tuple[Pair, ...], strict: bool = True) -> bool:
    """Does sympy find each pair equal? What it cannot read, or not in time, is not.

    strict: both must be read to their end, and have a value. Raises UserError if sympy's parser is
    missing.
    """
    try:
        return not pairs or remembered(pairs, strict)
    except ServerDied:
        return False


class ServerDied(Exception):
    """The comparing process has died twice, so nothing is known."""


@functools.lru_cache(2**16)
def remembered(pairs: tuple[Pair, ...], strict: bool) -> bool:
    """sympy's verdict. Raises ServerDied, which is not remembered."""
    question = json.dumps([pairs, strict]) + "\n"
    with SYMPY_LOCK:  # the second question goes to a new server, if the first one was found dead
        verdict = ask_sympy(question) or ask_sympy(question)
    if not verdict:
        raise ServerDied
    return verdict == "1\n"


def ask_sympy(question: str) -> str:
    """The server's line; "" if it is dead or silent: the next question then starts another."""
    server = sympy_process(os.getpid())
    verdict = ""
    try:
        server.stdin.write(question)
        server.stdin.flush()
        with selectors.DefaultSelector() as answers:
            answers.register(server.stdout, selectors.EVENT_READ)
            if answers.select(PATIENCE):
                verdict = server.stdout.readline()
    except OSError:
        pass
    except BaseException:  # interrupted: the next question must not get the answer to this one
        end_server(server)
        raise
    if verdict not in ("0\n", "1\n"):
        end_server(server)
        return ""
    return verdict


def end_server(server: subprocess.Popen) -> None:
    """Let the next question start a new one."""
    server.kill()
    server.wait()
    sympy_process.cache_clear()


@functools.cache
def sympy_process(pid: int) -> subprocess.Popen:
    """The server of this process, `pid`: a fork of ours starts its own."""
    server = subprocess.Popen(
        [sys.executable, "-P", str(SYMPY_SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's verdicts on 0/0 depend on it
    )
    if server.stdout.readline() != "ready\n":
        raise UserError(
            "comparing LaTeX needs sympy's parser: pip install sympy antlr4-python3-runtime==4.11.0"
        )
    return server
