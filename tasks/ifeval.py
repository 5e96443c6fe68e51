"""Does a response follow an instruction? 25 instructions that a program checks, without a judge.

IFEval (arXiv 2311.07911) asks for things like "no commas" or "exactly three bullet points". The
table IFEVAL has one small function for each instruction. As in tasks/verifiers.py, a hostile
response of a million characters costs less than a second. Source of the checks: google-research
instruction_following_eval/instructions.py.
"""

import inspect
import json
import operator
import re
import string
from collections.abc import Callable
from pathlib import Path

from infra.files import UserError, did_you_mean


def verify_ifeval(response: str, instruction_id: str, kwargs: dict, loose: bool = False) -> bool:
    """Does the response follow the instruction, an id in IFEVAL, with its arguments?

    An argument that is None counts as absent: the published rows name all arguments of all
    instructions. `loose`: or does it without its first line, its last line, or both, or one of
    these four without asterisks? An empty response follows nothing. Raises UserError for an unknown
    id or argument, and if langdetect is needed but not installed; never because of the response.

    >>> verify_ifeval("Yes, and no.", "punctuation:no_comma", {})
    False
    >>> verify_ifeval("* a\\n* b", "detectable_format:number_bullet_lists", {"num_bullets": 2})
    True
    """
    check, arguments = ifeval_check(instruction_id, kwargs)
    variants = [response]
    if loose:
        lines = response.split("\n")
        for part in (lines[1:], lines[:-1], lines[1:-1]):
            variants.append("\n".join(part).strip())
        variants += [variant.replace("*", "") for variant in variants]
    return any(variant.strip() and check(variant, **arguments) for variant in variants)


def ifeval_check(instruction_id: str, kwargs: dict) -> tuple[Callable[..., bool], dict]:
    """The function of an instruction, and its arguments without those that are None.

    The function's signature says which arguments there must be, of which types. Raises UserError.
    """
    if instruction_id not in IFEVAL:
        raise UserError(
            f"unknown instruction {instruction_id!r}{did_you_mean(instruction_id, IFEVAL)}"
        )
    check = IFEVAL[instruction_id]
    arguments = {name: value for name, value in kwargs.items() if value is not None}
    signature = inspect.signature(check)
    try:
        signature.bind("", **arguments)
        for name, value in arguments.items():
            check_argument(name, value, signature.parameters[name].annotation)
        check_place(arguments.get("nth_paragraph", 1), arguments.get("num_paragraphs", 1))
    except TypeError as error:
        raise UserError(f"instruction {instruction_id} with {arguments}: {error}") from None
    return check, arguments


# What an argument may be.
KINDS = {int: "a whole number from 0", str: "a text, not empty", list: "a list of texts, not empty"}
CHOICES = {"relation": ("less than", "at least"), "quantifier": ("at least", "at most", "around")}


def check_argument(name: str, value, kind: type) -> None:
    """Raise TypeError for a value that cannot be meant: every answer, or none, would follow it."""
    if not is_kind(value, kind):
        raise TypeError(f"{name} must be {KINDS[kind]}, not {value!r}")
    if name == "letter" and len(value) != 1:
        raise TypeError(f"letter must be one character, not {value!r}")
    choices = CHOICES.get(name.rpartition("_")[2], (value,))
    if name == "language":
        choices = known_languages()
    if value not in choices:
        near = did_you_mean(value.lower(), choices)
        raise TypeError(f"{name} {value!r}{near} must be one of {', '.join(choices)}")


def is_kind(value, kind: type) -> bool:
    """Is it of one of the KINDS?"""
    if kind is int:
        return type(value) is int and value >= 0
    if kind is list:
        return isinstance(value, list) and value != [] and all(is_kind(v, str) for v in value)
    return isinstance(value, str) and value.strip() != ""


def check_place(i: int, count: int) -> None:
    """Raise TypeError unless there is an i-th of so many paragraphs, counted from 1."""
    if not 1 <= i <= max(1, count):
        raise TypeError(f"there is no paragraph {i} of {count}")


RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": operator.lt,
    "at least": operator.ge,
}


# --------------------------------------------------------------------------------------------------
# Keywords and letters: case does not matter


def has_keywords(text: str, keywords: list) -> bool:
    return all(word.lower() in text.lower() for word in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return RELATIONS[relation](text.lower().count(keyword.strip().lower()), frequency)


def has_no_forbidden_word(text: str, forbidden_words: list) -> bool:
    """Whole words only: "cats" has no "cat"."""
    patterns = (rf"\b{re.escape(word)}\b" for word in forbidden_words)
    return not any(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return RELATIONS[let_relation](text.lower().count(letter.lower()), let_frequency)


# --------------------------------------------------------------------------------------------------
# Language and case


def import_langdetect():
    """The library that detects languages. Raises UserError where it is not installed."""
    try:
        import langdetect
    except ImportError:
        raise UserError(
            "instructions on language and case need langdetect: pip install langdetect"
        ) from None
    langdetect.DetectorFactory.seed = 0  # it draws samples of the text
    return langdetect


def known_languages() -> list[str]:
    """The codes of the 55 languages that can be detected: ISO 639-1, and zh-cn and zh-tw."""
    folder = import_langdetect().detector_factory.PROFILES_DIRECTORY
    return sorted(path.name for path in Path(folder).iterdir())


def detect_language(text: str) -> str | None:
    """The code of a text's language; None where there is none to be seen, as in "12"."""
    langdetect = import_langdetect()
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def in_language(text: str, language: str) -> bool:
    """Yes, too, if no language can be detected."""
    return detect_language(text) in (language, None)


def is_english_upper(text: str) -> bool:
    return text.isupper() and in_language(text, "en")


def is_english_lower(text: str) -> bool:
    return text.islower() and in_language(text, "en")


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words in capital letters; A-1 is one word."""
    words = re.findall(r"\w+(?:[-.&]\w+)*", text)
    return RELATIONS[capital_relation](sum(map(str.isupper, words)), capital_frequency)


# --------------------------------------------------------------------------------------------------
# Length


def number_of_words(text: str, num_words: int, relation: str) -> bool:
    return RELATIONS[relation](len(re.findall(r"\w+", text)), num_words)


def number_of_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return RELATIONS[relation](count_sentences(text), num_sentences)


# A full stop after one of these ends no sentence.
NO_END = {*"mr mrs ms dr prof st jr sr vs etc e.g i.e a.m p.m".split(), *string.ascii_lowercase}


def count_sentences(text: str) -> int:
    """A sentence ends with . ! ? or their like, before a space or the end of the text.

    Quotes and brackets that close belong to the end. What follows the last end counts as one more.
    Upstream asks NLTK's punkt, which is a download.

    >>> count_sentences('Dr. J. Doe came. He said: "Hi!" And left... quietly')
    4
    >>> count_sentences("Version 2.5 works")
    1
    """
    sentences = 0
    rest = 0  # where the last sentence ended
    for end in re.finditer(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+", text):
        before = text[max(0, end.start() - 8) : end.start()]
        word = re.search(r"[\w.]*$", before)[0]
        if end[0] != "." or word.lower() not in NO_END:
            sentences += 1
            rest = end.end()
    return sentences + bool(re.search(r"\w", text[rest:]))


def number_of_paragraphs(text: str, num_paragraphs: int) -> bool:
    return len(parts_between(text, "***")) == num_paragraphs


def parts_between(text: str, divider: str) -> list[str]:
    """What dividers separate; none if two dividers have nothing between them.

    >>> parts_between("*** a *** b", "***"), parts_between("a *** *** b", "***")
    (['a', 'b'], [])
    """
    parts = [part.strip() for part in text.split(divider)]
    if not parts[0]:
        del parts[0]
    if parts and not parts[-1]:
        del parts[-1]
    return parts if all(parts) else []


def nth_paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """So many, separated by blank lines, of which the nth begins with this word, in any case."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    count = sum(map(bool, paragraphs))
    if count != num_paragraphs or nth_paragraph > count or not paragraphs[nth_paragraph - 1]:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# --------------------------------------------------------------------------------------------------
# Content and form


def has_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many [placeholders]."""
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def has_postscript(text: str, postscript_marker: str) -> bool:
    """In the two usual markers, spaces may stand between the letters."""
    marker = postscript_marker.strip()
    pattern = POSTSCRIPTS.get(marker, re.escape(marker.lower()))
    return bool(re.search(pattern, text.lower()))


def number_of_bullets(text: str, num_bullets: int) -> bool:
    """Lines that begin with - or *, but not with **."""
    return len(re.findall(r"^[^\S\n]*(?:-|\*(?!\*))", text, re.MULTILINE)) == num_bullets


ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def has_answer(text: str) -> bool:
    return any(answer in text for answer in ANSWERS)


def has_highlights(text: str, num_highlights: int) -> bool:
    """At least so many *highlighted* and **highlighted** pieces on a line.

    Of **this**, the inner *this* is not counted again: there ** has nothing between its asterisks.
    """
    pieces = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(1 for piece in pieces if piece.strip("*").strip()) >= num_highlights


def has_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings like "Section 1"."""
    heading = rf"{re.escape(section_spliter.strip())}\s?\d+"
    return len(re.findall(heading, text)) >= num_sections


def is_json(text: str) -> bool:
    """JSON, bare or in a Markdown code block."""
    text = re.sub(r"^```(json|Json|JSON)?|```$", "", text.strip())
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    """<<title>> on one line, with something in it. A regex would take quadratic time on "<<<<"."""
    for line in text.split("\n"):
        _, _, rest = line.partition("<<")
        title, _, _ = rest.rpartition(">>")
        if title.lstrip("<").rstrip(">").strip():
            return True
    return False


def is_two_responses(text: str) -> bool:
    """Two different ones, separated by six asterisks."""
    parts = parts_between(text, "******")
    return len(parts) == 2 and parts[0] != parts[1]


def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def has_no_comma(text: str) -> bool:
    return "," not in text


# Instruction id -> function(response, the instruction's arguments). The names of ids and arguments
# are the benchmark's, misspelling included.
IFEVAL: dict[str, Callable[..., bool]] = {
    "keywords:existence": has_keywords,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": has_no_forbidden_word,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": in_language,
    "length_constraints:number_sentences": number_of_sentences,
    "length_constraints:number_paragraphs": number_of_paragraphs,
    "length_constraints:number_words": number_of_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": has_placeholders,
    "detectable_content:postscript": has_postscript,
    "detectable_format:number_bullet_lists": number_of_bullets,
    "detectable_format:constrained_response": has_answer,
    "detectable_format:number_highlighted_sections": has_highlights,
    "detectable_format:multiple_sections": has_sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": is_two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": ends_with,
    "startend:quotation": is_quoted,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": is_english_upper,
    "change_case:english_lowercase": is_english_lower,
    "punctuation:no_comma": has_no_comma,
}
