"""Is an answer right? Numbers, spans of text, LaTeX. (tasks/ifeval.py looks at how it is written.)

A model's response is data: nothing of it is executed, and a response of a million characters costs
less than a second.
"""

import fractions
import functools
import json
import os
import re
import string
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from infra.files import UserError


def is_right(task: str, response: str, gold: str) -> bool:
    """Does the response answer a question of the embedded tasks?

    math: the last number of the response is the gold one. qa, instruct: the response is the gold
    answer; only a final full stop is forgiven.

    >>> is_right("math", " 5 + 7 = 12. 4 + 2 + 1 = 7. The answer is 72.", "72")
    True
    >>> is_right("math", " 72 or 73", "72")
    False
    >>> is_right("qa", " Ada.", "Ada"), is_right("qa", " Ada has the cups.", "Ada")
    (True, False)
    """
    if task == "math":
        return re.findall(r"\d+", response)[-1:] == [gold]
    return response.strip().removesuffix(".") == gold


# --------------------------------------------------------------------------------------------------
# Numbers: GSM8K


def verify_gsm8k(response: str, answer: str) -> bool:
    """Is the last number of the response the last number of the answer, digit for digit?

    18.0 is not 18; only commas between digits are ignored. `answer`: the number, or the whole
    reference solution. Source: olmes gsm8k task; open-instruct ground_truth_utils.py, except that
    the minus sign counts here.

    >>> verify_gsm8k("48 / 2 = 24, so she earns $1,024.", "#### 1,024")
    True
    >>> verify_gsm8k("It is -5", "5"), verify_gsm8k("16-5", "5")
    (False, True)
    """
    found = last_number(response)
    return found is not None and found == last_number(answer)


def last_number(text: str) -> str | None:
    """The last number as written, commas apart; a - right after a letter, digit, ) or . is no sign.

    >>> last_number("2 - 1,000 = -998"), last_number("16-5"), last_number("none")
    ('-998', '5', None)
    """
    text = re.sub(r"(?<=[0-9]),(?=[0-9])", "", text)
    numbers = re.findall(r"(?:(?<![\w).])-)?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", text)
    return numbers[-1] if numbers else None


# --------------------------------------------------------------------------------------------------
# Spans of text: SQuAD and DROP


def without_articles(text: str) -> str:
    return re.sub(r"\b(a|an|the)\b", " ", text)


def without_punctuation(text: str) -> str:
    return "".join(c for c in text if c not in string.punctuation)


def squad_f1(response: str, answers: tuple[str, ...] | str) -> float:
    """The best F1 of the response's words against the words of one of the answers, in [0, 1].

    In lower case, without punctuation and articles. Source: SQuAD's evaluation script.

    >>> squad_f1("The Eiffel Tower, in Paris", ("Eiffel Tower", "Rome"))
    0.6666666666666666
    """
    golds = [answers] if isinstance(answers, str) else answers
    found = squad_words(response)
    return max((squad_overlap(found, squad_words(gold)) for gold in golds), default=0.0)


def squad_words(text: str) -> list[str]:
    return without_articles(without_punctuation(text.lower())).split()


def squad_overlap(found: list[str], gold: list[str]) -> float:
    """F1 = 2 common / (found + gold), repeated words counted as often; 1 if both are empty."""
    common = (Counter(found) & Counter(gold)).total()
    return 2 * common / (len(found) + len(gold)) if common else float(found == gold)


def drop_f1(response: str, answers: tuple[tuple[str, ...], ...]) -> float:
    """DROP's F1 of the response against the best of several answers, each of some spans.

    In [0, 1]. The response is one bag of words; of an answer's spans only the best counts, divided
    by their number. Source: lm_eval tasks/drop/utils.py.

    >>> drop_f1("1,507 soldiers", (("1507",), ("1477",))), drop_f1("12 yards", (("13",),))
    (0.67, 0.0)
    >>> drop_f1("Smith", (("Smith", "Jones"),))
    0.5
    """
    found = drop_words(response)
    best = 0.0
    for spans in answers:
        score = max(drop_overlap(found, drop_words(span)) for span in spans)
        best = max(best, round(score / len(spans), 2))
    return best


def drop_words(span: str) -> set[str]:
    """Its words, numbers as floats: "12" and "12.0" are the same.

    >>> sorted(drop_words("The 1,507 half-hours"))
    ['1507.0', 'half', 'hours']
    """
    words = set()
    for token in set(re.split(" |-", span.lower())):
        plain = without_punctuation(token)
        number = as_number(token) or as_number(plain)
        words.update(without_articles(number or plain).split())
    return words


def as_number(text: str) -> str | None:
    try:
        return str(float(text))
    except ValueError:
        return None


def drop_overlap(found: set[str], gold: set[str]) -> float:
    """F1 of two sets of words; 0 if the gold one has numbers and `found` has none of them."""
    common = gold & found
    if any(map(as_number, gold)) and not any(map(as_number, common)):
        return 0.0
    precision = len(common) / len(found) if found else 1.0
    recall = len(common) / len(gold) if gold else 1.0
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


# --------------------------------------------------------------------------------------------------
# LaTeX: MATH


def verify_math(response: str, answer: str) -> bool:
    """Does the response give an answer that equals `answer`, a piece of LaTeX?

    `final_answers` says where in the response one is looked for, `equal_math` what equal means: the
    "flex" exact match (open-instruct ground_truth_utils.py, lm_eval tasks/minerva_math/utils.py).

    >>> verify_math("so $x = \\\\boxed{\\\\frac12}$.", "0.5")
    True
    >>> verify_math("Thus $2\\\\sqrt{2}$", "\\\\sqrt{8}"), verify_math("It is $3$", "4")
    (True, False)
    """
    return any(equal_math(candidate, answer) for candidate in final_answers(response))


def final_answers(response: str) -> list[str]:
    """Where a response may have its answer: the last box, and the sentence of Minerva's prompt.

    Without both: what stands between the last two $; without these: the whole response.

    >>> final_answers("\\\\boxed{\\\\frac{1}{2}}"), final_answers("from $2$ to $x=3$.")
    (['\\\\frac{1}{2}'], ['x=3'])
    """
    found = [text for text in (last_box(response), minerva_sentence(response)) if text is not None]
    if not found and response.count("$") > 1:
        found.append(response.replace("$$", "$").rsplit("$", 2)[-2])
    return found or [response]


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


MATH_CHARACTERS = 1000  # the test set's longest answer has 81; longer ones must be the same text


def equal_math(found: str, expected: str) -> bool:
    """Are two pieces of LaTeX the same answer?

    Yes if they are the same text after Hendrycks' or after Minerva's normalisation, or if sympy
    finds them equal. Lists are compared element by element: sympy reads the first one and stops.
    """
    if max(len(found), len(expected)) > MATH_CHARACTERS:
        return found == expected
    hendrycks = normalize_hendrycks(found)
    if hendrycks and hendrycks == normalize_hendrycks(expected):
        return True
    found = normalize_minerva(found)
    expected = normalize_minerva(expected)
    if found and found == expected:
        return True
    parts = top_level_parts(found)
    expected_parts = top_level_parts(expected)
    return len(parts) == len(expected_parts) and all(map(equal_part, parts, expected_parts))


def equal_part(found: str, expected: str) -> bool:
    return found != "" and (found == expected or sympy_equal(found, expected))


def top_level_parts(text: str) -> list[str]:
    """The parts that commas outside of brackets separate.

    >>> top_level_parts("3,(1,2),\\\\frac{1}{2}")
    ['3', '(1,2)', '\\\\frac{1}{2}']
    """
    parts = [""]
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


# --------------------------------------------------------------------------------------------------
# LaTeX: the same answer in different spellings becomes the same text


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


# --------------------------------------------------------------------------------------------------
# LaTeX that sympy compares, in a process of its own


SYMPY_SERVER = Path(__file__).with_name("sympy_server.py")
SYMPY_LOCK = threading.Lock()  # one question at a time


@functools.lru_cache(2**16)
def sympy_equal(first: str, second: str) -> bool:
    """Does sympy read both as LaTeX and find that their difference is 0?

    What it cannot read is not equal. Raises UserError if sympy's parser is missing.
    """
    if is_decimal(first) and is_decimal(second):
        return fractions.Fraction(first) == fractions.Fraction(second)
    if first.count("|") % 2 or second.count("|") % 2:  # sympy would read up to the odd one
        return False
    with SYMPY_LOCK:  # the second question goes to a new server, if the first one was found dead
        verdict = ask_sympy(first, second) or ask_sympy(first, second)
    return verdict == "1\n"


def is_decimal(text: str) -> bool:
    """Is it a number short enough to compare without sympy?"""
    return bool(re.fullmatch(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?", text))


def ask_sympy(first: str, second: str) -> str:
    """The server's line; "" if the server is dead: the next question then starts another."""
    server = sympy_process(os.getpid())
    try:
        server.stdin.write(json.dumps([first, second]) + "\n")
        server.stdin.flush()
        verdict = server.stdout.readline()
    except OSError:
        verdict = ""
    except BaseException:  # interrupted: the next question must not get the answer to this one
        server.kill()
        sympy_process.cache_clear()
        raise
    if not verdict:
        sympy_process.cache_clear()
    return verdict


@functools.cache
def sympy_process(pid: int) -> subprocess.Popen:
    """The server of this process, `pid`: a fork of ours starts its own."""
    server = subprocess.Popen(
        [sys.executable, "-P", str(SYMPY_SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if server.stdout.readline() != "ready\n":
        raise UserError(
            "comparing LaTeX needs sympy's parser: pip install sympy antlr4-python3-runtime==4.11.0"
        )
    return server
