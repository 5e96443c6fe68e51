"""tasks/constraints.py: each rule followed and broken, where it parts from IFEval's, bad rows."""

import json
import sys
import time

import pytest
from test_verifiers import HOSTILE

import tasks.constraints as module
from infra.files import UserError
from tasks.constraints import CONSTRAINTS, verify_constraint
from tasks.conversations import VERIFIERS
from tasks.ifeval import IFEVAL, verify_ifeval

GERMAN = "Das ist ein ganz gewöhnlicher deutscher Satz."
ENGLISH = "This is quite an ordinary English sentence."

# function: (arguments, answers that keep to it, answers that do not)
KEPT = {
    "verify_keywords": ({"keyword_list": ["cat", "Dog"]}, ["A CAT, a dogma"], ["A cat."]),
    "verify_keyword_frequency": (
        {"word": "Cat", "N": 2},
        ["cat CAT", "Cat, cat's"],
        ["cat cat cat", "catcat cat", "cat"],
    ),
    "validate_forbidden_words": ({"forbidden_words": ["cat"]}, ["dog"], ["A Cat", "category"]),
    "verify_letter_frequency": ({"letter": "e", "N": 2}, ["eel", "eEe"], ["eerie", "Eel"]),
    "validate_response_language": ({"language": "de"}, [GERMAN], [ENGLISH, "12"]),
    "verify_paragraph_count": (
        {"N": 2},
        ["a\n* * *\nb", "a* * *b", "a\n  * * *  \n\nb"],
        ["a\n***\nb", "* * *\na\n* * *\nb", "a\n* * *", "a"],
    ),
    "validate_word_constraint": (
        {"N": 20, "quantifier": "around"},
        ["a " * 18, "it's " * 22],
        ["a " * 17, "a " * 23, "a-b " * 11],
    ),
    "verify_sentence_constraint": (
        {"N": 3, "quantifier": "around"},
        ["One. Two? Three. Four.", "Dr. Who came. Two e.g. this.", "One! Two. Three."],
        ["One. Two. Three. Four. Five.", "One! Two! Three!"],
    ),
    "validate_paragraphs": (
        {"N": 2, "first_word": "Be", "i": 2},
        ["a\n\nBe", "a\n\n Before"],
        ["a\n\nbe", "a\n\nBe\n\nc", "Be\n\na", "a\n\n\n\nBe"],
    ),
    "verify_postscript": ({"postscript_marker": "P.S."}, ["x\nP.S. y"], ["x", "x P.S.", "p.s. y"]),
    "validate_placeholders": ({"N": 2}, ["[a] and []", "[[a] b]]]]][c]"], ["[a]", "[a\nb] [c]"]),
    "verify_bullet_points": ({"N": 2}, ["* a\n - b", "** a\n-- b"], ["* a", "- a\n- b\n- c"]),
    "validate_title": ({}, ["<<a>> b", "<<>>", "<<<a>>"], ["<a>", "<<a\n>>", ">> <<"]),
    "validate_choice": ({"options": ["yes", "not at all"]}, ["no", "at all", "yes"], ["yes!", "Y"]),
    "validate_highlighted_sections": (
        {"N": 2},
        ["*a* b *c*", "**a**", "****"],
        ["*a*", "*a\nb* *c\nd*"],
    ),
    "validate_sections": (
        {"N": 2, "section_splitter": "Part"},
        ["Part 1 a Part 2 b", "Before. Part 1"],
        ["Part 1", "Before. Part 1 Part 2", "Part 1 Part 2 Part 3"],
    ),
    "validate_json_format": ({}, ['{"a": 1}', "3"], ["{", '```json\n{"a": 1}\n```']),
    "validate_repeat_prompt": (
        {"original_prompt": "Do it"},
        ["Do it: done"],
        ["do it", "So do it"],
    ),
    "validate_two_responses": (
        {},
        ["a ****** b", "******b"],
        ["a", "a ****** a", "a ****** b ****** c"],
    ),
    "validate_uppercase": ({}, ["ÄÖ X", "12"], ["X x"]),
    "validate_lowercase": ({}, ["äö x", "12"], ["X x"]),
    "validate_frequency_capital_words": (
        {"N": 20, "quantifier": "around"},
        ["UP " * 18, "A-B " * 11],
        ["UP " * 17, "ÄU " * 20, "X1 " * 20],
    ),
    "validate_end": ({"end_phrase": "The End."}, ["It is The End."], ["the end.", '"The End."']),
    "validate_quotation": ({}, ['"x"', '"'], ["x", '"x']),
    "validate_no_commas": ({}, ["x"], [","]),
}


@pytest.mark.parametrize("name", KEPT)
def test_each_rule_as_the_release_had_it(name):
    arguments, kept, broken = KEPT[name]
    others = {"N": None, "word": None, "i": None, "options": None}  # rows name all columns
    label = {**others, "func_name": name, **arguments}
    for answer in kept:
        assert verify_constraint(answer, label) and verify_constraint(f"\n{answer} ", label), answer
    for answer in (*broken, "", " \n"):
        assert not verify_constraint(answer, label), answer
    assert VERIFIERS["ifeval"](kept[0], json.dumps(label))


def test_there_are_25_rules():
    assert KEPT.keys() == CONSTRAINTS.keys() and len(KEPT) == 25


# Where RLVR and the benchmark decide otherwise: (answer, function with its arguments, instruction
# with its arguments, does the answer keep to the function's rule).
PARTED = [
    ("catcat", "verify_keyword_frequency", "keywords:frequency"),
    ("cats", "validate_forbidden_words", "keywords:forbidden_words"),
    ("eE", "verify_letter_frequency", "keywords:letter_frequency"),
    ("a-b a-b", "validate_word_constraint", "length_constraints:number_words"),
    ("One! Two!", "verify_sentence_constraint", "length_constraints:number_sentences"),
    ("a\n\nsecond", "validate_paragraphs", "length_constraints:nth_paragraph_first_word"),
    ("x p.s. y", "verify_postscript", "detectable_content:postscript"),
    ("** a\n** b", "verify_bullet_points", "detectable_format:number_bullet_lists"),
    ("<<>>", "validate_title", "detectable_format:title"),
    ("My answer", "validate_choice", "detectable_format:constrained_response"),
    ("****", "validate_highlighted_sections", "detectable_format:number_highlighted_sections"),
    ("So: Part 1 Part 2", "validate_sections", "detectable_format:multiple_sections"),
    ("```json\n1\n```", "validate_json_format", "detectable_format:json_format"),
    ("do it", "validate_repeat_prompt", "combination:repeat_prompt"),
    ("THE END", "validate_end", "startend:end_checker"),
    ("12", "validate_uppercase", "change_case:english_capital"),
    ("A-B", "validate_frequency_capital_words", "change_case:capital_word_frequency"),
]
ASKED = {
    "word": "cat",
    "forbidden_words": ["cat"],
    "letter": "e",
    "quantifier": "at least",
    "N": 2,
    "first_word": "Second",
    "i": 2,
    "postscript_marker": "P.S.",
    "options": ["My answer is yes."],
    "section_splitter": "Part",
    "original_prompt": "Do it",
    "end_phrase": "The end",
}
BENCHMARK = {
    "keywords:frequency": {"keyword": "cat", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["cat"]},
    "keywords:letter_frequency": {"letter": "e", "let_frequency": 2, "let_relation": "at least"},
    "length_constraints:number_words": {"num_words": 3, "relation": "at least"},
    "length_constraints:number_sentences": {"num_sentences": 2, "relation": "at least"},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": 2,
        "nth_paragraph": 2,
        "first_word": "Second",
    },
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "Part", "num_sections": 2},
    "combination:repeat_prompt": {"prompt_to_repeat": "Do it"},
    "startend:end_checker": {"end_phrase": "The end"},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
}


@pytest.mark.parametrize("answer, name, instruction", PARTED)
def test_where_rlvr_and_the_benchmark_part(answer, name, instruction):
    """Both sides of docs/posttrain.md's table; the benchmark keeps its own rule."""
    asked = {**ASKED, "N": 3} if name == "validate_word_constraint" else ASKED
    kept = verify_constraint(answer, {"func_name": name, **asked})
    assert kept != verify_ifeval(answer, instruction, BENCHMARK.get(instruction, {}))


def test_17_of_25_part():
    assert len({name for _, name, _ in PARTED}) == 17
    assert len({instruction for _, _, instruction in PARTED} & IFEVAL.keys()) == 17


@pytest.mark.parametrize(
    "label, words",
    [
        ({"func_name": "validate_choice", "options": "yes/no"}, "options must be a list of texts"),
        ({"func_name": "validate_choice", "options": []}, "options must be a list"),
        ({"func_name": "verify_keywords", "keyword_list": []}, "keyword_list must be a list"),
        ({"func_name": "verify_keywords", "keyword_list": ["a", " "]}, "keyword_list must be"),
        ({"func_name": "validate_forbidden_words", "forbidden_words": [3]}, "must be a list"),
        ({"func_name": "validate_end", "end_phrase": ""}, "end_phrase must be a text, not empty"),
        ({"func_name": "validate_response_language", "language": "zh"}, "'zh' .*, zh-cn, zh-tw"),
        ({"func_name": "validate_response_language", "language": "EN"}, "did you mean en?"),
        ({"func_name": "validate_response_language", "language": "Chinese"}, "one of af, ar"),
        ({"func_name": "validate_paragraphs", "N": 2, "i": 0, "first_word": "A"}, "no paragraph 0"),
        ({"func_name": "validate_paragraphs", "N": 2, "i": 3, "first_word": "A"}, "no paragraph 3"),
        ({"func_name": "verify_bullet_points", "N": "3"}, "N must be a whole number"),
        ({"func_name": "verify_bullet_points", "N": True}, "N must be a whole number"),
        ({"func_name": "verify_bullet_points", "N": 2.0}, "N must be a whole number"),
        ({"func_name": "validate_placeholders", "N": 0}, "N must be at least 1"),
        ({"func_name": "validate_highlighted_sections", "N": -1}, "N must be"),
        ({"func_name": "validate_word_constraint", "N": 0, "quantifier": "at least"}, "at least 1"),
        (
            {"func_name": "validate_word_constraint", "N": 9, "quantifier": "less than"},
            "quantifier 'less than' must be one of at least, at most, around",
        ),
        ({"func_name": "verify_letter_frequency", "letter": "ab", "N": 2}, "one character"),
        ({"func_name": "verify_bullet_points", "N": None}, "verify_bullet_points lacks N"),
        ({"func_name": "validate_ends", "end_phrase": "x"}, "did you mean validate_end?"),
        ({"N": 3}, "unknown constraint"),
        ("[]", "an object with a func_name, not '\\[\\]'"),
        ("no JSON", "an object with a func_name"),
    ],
)
def test_what_everyone_or_no_one_could_keep_to_is_refused(label, words):
    with pytest.raises(UserError, match=words):
        verify_constraint("x", label)


@pytest.mark.parametrize("name", ["verify_letter_frequency", "verify_bullet_points"])
def test_none_of_them_may_be_asked_for(name):
    assert verify_constraint("x", {"func_name": name, "N": 0, "letter": "e"})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_cost_little_and_raise_nothing(name):
    for function, (arguments, _, _) in KEPT.items():
        before = time.process_time()
        assert verify_constraint(HOSTILE[name], {"func_name": function, **arguments}) in (0, 1)
        assert time.process_time() - before < 1, function


def test_only_languages_need_langdetect(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    assert verify_constraint("TEXT", {"func_name": "validate_uppercase"})
    with pytest.raises(UserError, match="pip install langdetect"):
        verify_constraint("x", {"func_name": "validate_response_language", "language": "fr"})


def test_docstrings():
    import doctest

    assert doctest.testmod(module).failed == 0
