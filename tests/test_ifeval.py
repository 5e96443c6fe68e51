"""tasks/ifeval.py: every instruction followed and broken, lm-eval's verdicts, RLVR, errors."""

import collections
import functools
import json
import logging
import random
import sys

import pytest
from conftest import SHARED, needs_shared

import tasks.ifeval as module
from infra.files import UserError
from tasks.ifeval import IFEVAL, verify_ifeval

FOLLOWED = {  # id: (arguments, responses that follow it, responses that do not)
    "keywords:existence": (
        {"keywords": ["cat", "Dog"]},
        ["A dog and a CAT.", "dogcats"],
        ["A dog.", "c a t dog"],
    ),
    "keywords:frequency": (
        {"keyword": "cat", "frequency": 2, "relation": "at least"},
        ["Cat, cat", "catcat"],
        ["a cat", "dog"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["cat", "a+b"]},
        ["cats", "dog", "aab"],
        ["The Cat.", "cat"],
    ),
    "keywords:letter_frequency": (
        {"letter": "E", "let_frequency": 2, "let_relation": "less than"},
        ["one", "zig"],
        ["eel", "Ee"],
    ),
    "language:response_language": (
        {"language": "de"},
        ["Das ist ein ganz gewöhnlicher deutscher Satz."],
        ["This is quite an ordinary English sentence."],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "less than"},
        ["Dr. Who came.", "One"],
        ["One. Two.", "Wow! So?"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a *** b***"],
        ["a", "a***b***c", "a *** *** b"],
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "at least"},
        ["one two three", "it's here"],
        ["one two", "- - - -"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Second"},
        ["a\n\nsecond, b", 'a\n\n"Second" b'],
        ["a\n\nb", "second\n\nb", "a\n\nsecond\n\nc"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[a] and [b]", "[[a] [b]"],
        ["[a]", "[a\nb] [c]"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"},
        ["Bye.\np. p. s more", "P.P.S. x"],
        ["Bye. P.S. x", "PPS"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n- b", "  - a\ntext\n*b"],
        ["* a", "** a\n* b", "- a\n- b\n- c"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is no.", "Well: My answer is maybe. So."],
        ["no", "my answer is yes."],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* *b*", "**a** b *c*", "**a** **b**"],
        ["*a*", "* * **", "*a\nb* *c*"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "PART", "num_sections": 2},
        ["PART 1 a PART 2 b", "PART1PART2"],
        ["PART 1", "Part 1 Part 2"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": [1]}', "```json\n[1]\n```", "3"],
        ["{a: 1}", "text {}"],
    ),
    "detectable_format:title": ({}, ["<<A title>>\ntext", "x <<y>>"], ["<< >>", "<<a\nb>>", "<a>"]),
    "combination:two_responses": (
        {},
        ["a ****** b", "******a******b"],
        ["a ****** a", "a", "a******b******c", "a ****** ****** b"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say it. "},
        ["say it. Done.", " Say it.\nOK"],
        ["Sure! Say it.", "Done."],
    ),
    "startend:end_checker": (
        {"end_phrase": "The End."},
        ["So. the end.", '"x The End."'],
        ["The End. Bye", "The End"],
    ),
    "startend:quotation": ({}, ['"all"', ' "a" and "b" '], ['"', '"all', "'all'"]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and USA", "I AM x"],
        ["NASA", "Nasa Usa"],
    ),
    "change_case:english_capital": (
        {},
        ["THIS IS CERTAINLY ALL ENGLISH TEXT."],
        ["This Is English.", "DAS IST NATÜRLICH EIN DEUTSCHER SATZ."],
    ),
    "change_case:english_lowercase": (
        {},
        ["this is certainly all english text."],
        ["This is english.", "das ist natürlich ein deutscher satz."],
    ),
    "punctuation:no_comma": ({}, ["No commas here.", "a; b"], ["Well, no.", ","]),
}


SENTENCES = {
    "hi": "यह हिंदी में लिखा गया एक साधारण वाक्य है।",
    "ru": "Это самое обычное предложение на русском языке.",
    "ko": "이것은 한국어로 쓰인 평범한 문장입니다.",
    "ar": "هذه جملة عادية مكتوبة باللغة العربية.",
    "th": "นี่เป็นประโยคธรรมดาที่เขียนเป็นภาษาไทย",
}


@pytest.mark.parametrize("instruction", IFEVAL)
def test_every_instruction_has_followers_and_breakers(instruction):
    kwargs, followed, broken = FOLLOWED[instruction]
    for response in followed:
        assert verify_ifeval(response, instruction, kwargs) is True, response
    for response in [*broken, "", " \n "]:
        assert verify_ifeval(response, instruction, kwargs) is False, response
    padded = {**kwargs, "not_this_ones": None}  # published rows fill theirs up with null
    assert verify_ifeval(followed[0], instruction, padded)


def test_loose_forgives_a_first_and_a_last_line_and_asterisks():
    for response, instruction, kwargs in (
        ("Sure, here:\nno commas", "punctuation:no_comma", {}),
        ("no\nBye, now", "punctuation:no_comma", {}),
        ("Hi, you\nno\nBye, now", "punctuation:no_comma", {}),
        ('**"all"**', "startend:quotation", {}),
    ):
        assert verify_ifeval(response, instruction, kwargs, loose=True) is True
        assert verify_ifeval(response, instruction, kwargs) is False
    assert verify_ifeval("a, b\nc, d\ne, f", "punctuation:no_comma", {}, loose=True) is False


def made_to_follow(instruction: str, k: dict, n: int) -> str:
    """A response that follows an instruction with arguments `k`, if n is the number asked for."""
    if instruction == "language:response_language":
        return SENTENCES.get(k["language"], "Das ist ein Satz.")
    if instruction == "length_constraints:nth_paragraph_first_word":
        return "\n\n".join([k["first_word"].title() + "!"] * n)
    made = {
        "keywords:existence": " ".join(k.get("keywords") or ()),
        "keywords:frequency": f"{k.get('keyword')} " * n,
        "keywords:letter_frequency": (k.get("letter") or "") * n + " ",
        "length_constraints:number_words": "word " * n,
        "length_constraints:number_paragraphs": "\n***\n".join(["x"] * n),
        "detectable_format:number_bullet_lists": "* x\n" * n,
        "combination:repeat_prompt": f"{k.get('prompt_to_repeat')} x",
        "startend:end_checker": f"x {k.get('end_phrase')}",
        "keywords:forbidden_words": " ".join(k.get("forbidden_words") or ()) + "s",
        "detectable_format:multiple_sections": " ".join(
            f"{k.get('section_spliter')} {i}" for i in range(n)
        ),
        "change_case:capital_word_frequency": "WORD " * n,
    }
    return made.get(instruction, "*x* [y] " * n)


@needs_shared
def test_ifeval_prompts_are_accepted_and_verdicts_equal_lm_evals(monkeypatch):
    """All 541 prompts' arguments, with responses made to follow, to break and to confuse them.

    Strict and loose. Two ids count with NLTK's punkt, which is a download: capital words are
    compared with its splitting into words alone, sentences follow a rule of ours. Of letters that
    are none (#, !) lm-eval checks another, drawn at random.
    """
    monkeypatch.setenv("LOCAL_RANK", "1")  # lm_eval downloads on rank 0
    from lm_eval.tasks.ifeval import instructions_util, utils as theirs

    logging.getLogger().setLevel("WARNING")
    split = functools.partial(instructions_util.nltk.word_tokenize, preserve_line=True)
    monkeypatch.setattr(instructions_util.nltk, "word_tokenize", split)
    rows = [json.loads(line) for line in (SHARED / "ifeval_prompts.jsonl").open(encoding="utf-8")]
    assert len(rows) == 541
    assert {i for row in rows for i in row["instruction_id_list"]} == set(IFEVAL)
    rng = random.Random(0)
    prompts = [row["prompt"] for row in rows]
    others = ['"quoted, *twice* **over**"', "a\n***\nb\n******\nc"]
    asked, followed = collections.Counter(), collections.Counter()
    for row in rows * 2:
        for instruction, kwargs in zip(row["instruction_id_list"], row["kwargs"]):
            _, good, bad = FOLLOWED[instruction]
            texts = [*good, *bad, rng.choice(prompts), row["prompt"] + "\nDone.", *others]
            response = rng.choice(texts)
            if kwargs and rng.random() < 0.5:  # what is asked for, once too little at times
                n = next((v for v in kwargs.values() if isinstance(v, int)), 1) - rng.randint(0, 1)
                response = made_to_follow(instruction, kwargs, n)
            before = rng.choice(["", "", "Sure:\n"])
            response = before + response + rng.choice(["", "", "\nBye, now."])
            both = [verify_ifeval(response, instruction, kwargs, loose) for loose in (False, True)]
            is_letter = kwargs.get("letter", "a").isalpha()
            if instruction == "length_constraints:number_sentences" or not is_letter:
                continue
            example = theirs.InputExample(
                key=0, prompt=row["prompt"], instruction_id_list=[instruction], kwargs=[kwargs]
            )
            strict = theirs.test_instruction_following_strict(example, response)
            loose = theirs.test_instruction_following_loose(example, response)
            expected = [strict.follow_all_instructions, loose.follow_all_instructions]
            assert both == expected, (instruction, kwargs, response)
            asked[instruction] += 2
            followed[instruction] += sum(both)
    assert len(asked) == 24
    assert not {i: (followed[i], asked[i]) for i in asked if not 0 < followed[i] < asked[i]}


LETTERS = {"let_frequency": 2, "let_relation": "at least"}


@pytest.mark.parametrize(
    "instruction, kwargs, words",
    [
        ("punctuation:no_coma", {}, "did you mean punctuation:no_comma"),
        ("keywords:existence", {}, "missing a required argument: 'keywords'"),
        ("punctuation:no_comma", {"n": 1}, "unexpected keyword argument 'n'"),
        (
            "keywords:frequency",
            {"keyword": "a", "frequency": "3", "relation": "at least"},
            "frequency must be a whole number from 0, not '3'",
        ),
        (
            "keywords:existence",
            {"keywords": "cat"},
            "keywords must be a list of texts, not empty, not 'cat'",
        ),
        (
            "keywords:existence",
            {"keywords": [1]},
            r"keywords must be a list of texts, not empty, not \[1\]",
        ),
        (
            "startend:end_checker",
            {"end_phrase": ["Bye."]},
            r"end_phrase must be a text, not empty, not \['Bye.'\]",
        ),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "about"},
            "relation 'about' must be one of less than, at least",
        ),
        ("keywords:existence", {"keywords": []}, "keywords must be a list of texts, not empty"),
        ("language:response_language", {"language": "zh"}, "language 'zh'.* must be one of af, ar"),
        ("keywords:letter_frequency", LETTERS | {"letter": "ab"}, "letter must be one character"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 0, "first_word": "A"},
            "there is no paragraph 0 of 2",
        ),
    ],
)
def test_bad_instructions_are_named(instruction, kwargs, words):
    with pytest.raises(UserError, match=words):
        verify_ifeval("text", instruction, kwargs)


def test_language_needs_langdetect(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(UserError, match="pip install langdetect"):
        verify_ifeval("TEXT", "change_case:english_capital", {})
    assert not verify_ifeval("text", "change_case:english_capital", {})  # needs no detection


def test_docstrings():
    import doctest

    assert doctest.testmod(module).failed == 0
