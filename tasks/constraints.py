"""Does an answer keep to a constraint? The 25 instruction rewards of RLVR.

A row of the release's RLVR data names a function and its arguments, as in
{"func_name": "validate_end", "end_phrase": "Bye."}. The functions are open-instruct's own. They ask
for what IFEval's instructions ask for (tasks/ifeval.py), but 17 of the 25 decide by another rule:
docs/posttrain.md has both side by side. A reward follows the rule that OLMo 2 was trained with.
Source: open-instruct open_instruct/if_functions.py, as of the release.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable

from infra.files import UserError, did_you_mean
from tasks.ifeval import check_argument, check_place, detect_language


def verify_constraint(answer: str, label: str | dict) -> bool:
    """Does an answer keep to a constraint, {"func_name": …, "N": …} or the same as JSON text?

    An answer without a word keeps to none: "no commas" would be earned by silence. Raises
    UserError for what is no constraint; never because of the answer.

    >>> verify_constraint("So it is. Bye.", {"func_name": "validate_end", "end_phrase": "Bye."})
    True
    """
    text = label if isinstance(label, str) else json.dumps(label)
    function, arguments = read_constraint(text)
    answer = answer.strip()
    return answer != "" and function(answer, **arguments)


@functools.lru_cache(2**16)
def read_constraint(text: str) -> tuple[Callable[..., bool], dict]:
    """(function, its arguments) of a constraint in JSON. Other keys of it are ignored.

    Raises UserError for an unknown function, and for arguments that are missing, of another type,
    or such that every answer or no answer could keep to them.
    """
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"a constraint is an object with a func_name, not {text[:40]!r}")
    name = str(row.get("func_name"))
    if name not in CONSTRAINTS:
        raise UserError(
            f"unknown constraint {name!r}{did_you_mean(name, CONSTRAINTS)}: expected func_name to "
            f"be one of {', '.join(CONSTRAINTS)}"
        )
    function = CONSTRAINTS[name]
    _, *parameters = inspect.signature(function).parameters.values()
    missing = [p.name for p in parameters if row.get(p.name) is None]
    if missing:
        raise UserError(f"the constraint {name} lacks {', '.join(missing)}")
    arguments = {p.name: row[p.name] for p in parameters}
    try:
        for parameter in parameters:
            check_argument(parameter.name, arguments[parameter.name], parameter.annotation)
        check_together(name, arguments)
    except TypeError as error:
        raise UserError(f"the constraint {name} with {arguments}: {error}") from None
    return function, arguments


# Those that may ask for nothing at all: no such word, no bullet point.
MAY_BE_ZERO = (
    "verify_keyword_frequency",
    "verify_letter_frequency",
    "verify_bullet_points",
    "validate_frequency_capital_words",
)


def check_together(name: str, arguments: dict) -> None:
    """Raise TypeError for numbers that ask for nothing, or for what cannot be."""
    least = 0 if name in MAY_BE_ZERO and arguments.get("quantifier") != "at least" else 1
    if arguments.get("N", least) < least:
        raise TypeError(f"N must be at least {least}")
    if "i" in arguments:
        check_place(arguments["i"], arguments["N"])


# ------------------------------------------------------------------------------------------
# Words and letters


def verify_keywords(text: str, keyword_list: list) -> bool:
    """In any case, and inside of words, too."""
    return all(word.lower() in text.lower() for word in keyword_list)


def verify_keyword_frequency(text: str, word: str, N: int) -> bool:
    """Whole words, in any case, exactly N."""
    return re.findall(r"\w+", text.lower()).count(word.lower()) == N


def validate_forbidden_words(text: str, forbidden_words: list) -> bool:
    """In any case, and inside of words, too: "cats" has "cat"."""
    return not any(word.lower() in text.lower() for word in forbidden_words)


def verify_letter_frequency(text: str, letter: str, N: int) -> bool:
    """Exactly N; "e" is not "E"."""
    return text.count(letter) == N


def validate_response_language(text: str, language: str) -> bool:
    return detect_language(text) == language


def validate_frequency_capital_words(text: str, N: int, quantifier: str) -> bool:
    """Words of the letters A to Z."""
    return compare(len(re.findall(r"\b[A-Z]+\b", text)), N, quantifier, tenth_of(N))


def validate_uppercase(text: str) -> bool:
    return text == text.upper()


def validate_lowercase(text: str) -> bool:
    return text == text.lower()


def validate_no_commas(text: str) -> bool:
    return "," not in text


# ------------------------------------------------------------------------------------------
# Length


def compare(count: int, N: int, quantifier: str, tolerance: int) -> bool:
    """Is the count at least N, at most N, or within the tolerance around N?"""
    if quantifier == "around":
        return abs(count - N) <= tolerance
    return count >= N if quantifier == "at least" else count <= N


def tenth_of(N: int) -> int:
    return max(1, round(N / 10))


def validate_word_constraint(text: str, N: int, quantifier: str) -> bool:
    """Words are what white space separates; around: within 10 %."""
    return compare(len(text.split()), N, quantifier, tenth_of(N))


def verify_sentence_constraint(text: str, N: int, quantifier: str) -> bool:
    """A sentence ends with . or ? before white space, but not after "Dr." or "e.g."; around: 1."""
    sentences = re.split(r"(?<=[.?])(?<!\w\.\w.)(?<![A-Z][a-z]\.)\s", text)
    return compare(len(sentences), N, quantifier, tolerance=1)


def verify_paragraph_count(text: str, N: int) -> bool:
    """Paragraphs are separated by * * *, and none is empty."""
    lines = [line.strip() for line in text.splitlines()]
    paragraphs = "\n".join(lines).split("* * *")
    return len(paragraphs) == N and all(map(str.strip, paragraphs))


def validate_paragraphs(text: str, N: int, first_word: str, i: int) -> bool:
    """Empty lines separate N paragraphs; the i-th begins with the word, in this very case."""
    paragraphs = text.split("\n\n")
    return len(paragraphs) == N and paragraphs[i - 1].strip().startswith(first_word)


# ------------------------------------------------------------------------------------------
# Form


def verify_postscript(text: str, postscript_marker: str) -> bool:
    """The marker as it is written, and something behind it."""
    _, marker, rest = text.partition(postscript_marker)
    return bool(marker and rest.strip())


def validate_placeholders(text: str, N: int) -> bool:
    """At least N pieces in square brackets, each on one line."""
    count = 0
    for line in text.split("\n"):
        closed = line[: line.rfind("]") + 1]  # else a search for each "[" would go to its end
        count += len(re.findall(r"\[[^\]]*\]", closed))
    return count >= N


def verify_bullet_points(text: str, N: int) -> bool:
    """Exactly N lines that begin with * or -."""
    bullets = [line for line in text.split("\n") if line.strip().startswith(("*", "-"))]
    return len(bullets) == N


def validate_title(text: str) -> bool:
    """<<title>> on one line; it may be empty."""
    return any(">>" in line.partition("<<")[2] for line in text.split("\n"))


def validate_choice(text: str, options: list) -> bool:
    """The whole answer lies in one of the options."""
    return any(text in option for option in options)


def validate_highlighted_sections(text: str, N: int) -> bool:
    """At least N pairs of asterisks on a line, with or without something between them."""
    return sum(line.count("*") // 2 for line in text.split("\n")) >= N


def validate_sections(text: str, N: int, section_splitter: str) -> bool:
    """Exactly N parts; what stands before the first splitter is one of them."""
    parts = text.split(section_splitter)
    return len(parts) - (parts[0] == "") == N


def validate_json_format(text: str) -> bool:
    """Bare JSON, not in a block of code."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def validate_repeat_prompt(text: str, original_prompt: str) -> bool:
    return text.startswith(original_prompt)


def validate_two_responses(text: str) -> bool:
    """Six asterisks once, and before and after them something different."""
    first, _, second = text.partition("******")
    return text.count("******") == 1 and first.strip() != second.strip()


def validate_end(text: str, end_phrase: str) -> bool:
    return text.endswith(end_phrase)


def validate_quotation(text: str) -> bool:
    return text.startswith('"') and text.endswith('"')


# The name in a row's label -> the function.
CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "verify_keywords": verify_keywords,
    "verify_keyword_frequency": verify_keyword_frequency,
    "validate_forbidden_words": validate_forbidden_words,
    "verify_letter_frequency": verify_letter_frequency,
    "validate_response_language": validate_response_language,
    "verify_paragraph_count": verify_paragraph_count,
    "validate_word_constraint": validate_word_constraint,
    "verify_sentence_constraint": verify_sentence_constraint,
    "validate_paragraphs": validate_paragraphs,
    "verify_postscript": verify_postscript,
    "validate_placeholders": validate_placeholders,
    "verify_bullet_points": verify_bullet_points,
    "validate_title": validate_title,
    "validate_choice": validate_choice,
    "validate_highlighted_sections": validate_highlighted_sections,
    "validate_sections": validate_sections,
    "validate_json_format": validate_json_format,
    "validate_repeat_prompt": validate_repeat_prompt,
    "validate_two_responses": validate_two_responses,
    "validate_uppercase": validate_uppercase,
    "validate_lowercase": validate_lowercase,
    "validate_frequency_capital_words": validate_frequency_capital_words,
    "validate_end": validate_end,
    "validate_quotation": validate_quotation,
    "validate_no_commas": validate_no_commas,
}
