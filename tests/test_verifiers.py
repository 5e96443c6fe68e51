"""eval.py's verifiers: gold and perturbed answers, every instruction, lm-eval's verdicts, hostile responses."""
import collections
import concurrent.futures
import json
import logging
import os
import random
import resource
import signal
import sys
import time

import pytest
from conftest import SHARED, needs_shared

import eval as module
from eval import IFEVAL, RLVR_CONSTRAINTS, drop_f1, equal_math, rlvr_constraint, squad_f1, verify_gsm8k, verify_ifeval, verify_math
from infra.files import UserError


def read(name):
    with open(SHARED / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---- GSM8K


@needs_shared
def test_gsm8k_gold_answers_are_right_and_others_wrong():
    rows = read("gsm8k_test.jsonl")
    assert len(rows) == 1319
    for row in rows:
        reasoning, gold = (part.strip() for part in row["answer"].split("####"))
        assert verify_gsm8k(row["answer"], gold) and verify_gsm8k(row["answer"], row["answer"]) and verify_gsm8k(f"So it is ${gold}.", gold)
        number = int(gold.replace(",", ""))
        assert verify_gsm8k(f"{number:,}", gold) and verify_gsm8k(f"{number}", gold)
        for wrong in (number + 1, number - 1, 10 * number + 1, f"{number}.5", f"{number}.0", -number or 1, f"{number} and then 7000001", "many"):
            assert not verify_gsm8k(f"The answer is {wrong}", gold), (wrong, gold)


@pytest.mark.parametrize("response, answer, right", [
    ("1,234,567", "1234567", True), ("1234567", "#### 1,234,567", True), ("It is -5.", "-5", True), ("It is -5.", "5", False), ("3-5", "5", True),
    ("2 x (-3) = -6", "-6", True), ("0.50", "0.50", True), ("0.50", "0.5", False), (".5", ".5", True), ("٣", "3", False), ("", "3", False),
    ("three", "3", False), ("3", "no number", False), ("5 apples, 6", "6", True), ("1,2", "12", True), ("$18.", "18", True)])
def test_last_number(response, answer, right):
    assert verify_gsm8k(response, answer) is right


# ---- MATH

EQUAL = r"""
1/2 | \frac{1}{2}
0.5 | \frac12
\frac{1}{2} | 0.5
\dfrac{3}{4} | \frac34
\tfrac{3}{4} | 0.75
x=5 | 5
5 | 5.0
1,000 | 1000
50^\circ | 50
\$18.50 | 18.5
\sqrt{8} | 2\sqrt{2}
\sqrt8 | 2\sqrt2
\sqrt[3]{8} | 2
\sqrt[3]2 | \sqrt[3]{2}
2^{10} | 1024
2\pi | \pi + \pi
\frac{\pi}{2} | \frac{1}{2}\pi
x+1 | 1+x
(x+1)^2 | x^2+2x+1
x^2-y^2 | (x-y)(x+y)
\sin^2 x + \cos^2 x | 1
(1,2) | (1,2)
[2,5) | [2,5)
\left(1,2\right) | \left(1,2\right)
\{1,2,3\} | \{1,2,3\}
\text{Monday} | Monday
\textbf{B} | B
12\text{ cm} | 12
5 square units | 5
7 dollars | 7
90 degrees | 90
-\frac{2}{3} | \frac{-2}{3}
\frac{2}{-3} | -\frac{2}{3}
\binom{5}{2} | 10
5! | 120
\log_2 8 | 3
3x^2 | 3x^{2}
x_1 | x_{1}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
11\sqrt2 | 11\sqrt{2}
0.25 | \frac14
3 \cdot 4 | 12
3\times 4 | 12
\frac{6}{4} | \frac{3}{2}
2k+1 | 1+2k
y=2x+3 | 2x+3
\frac{1}{3}+\frac{1}{6} | \frac12
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
\frac{1}{1+\sqrt2} | \sqrt2-1
\boxed{5} | 5
6\ \text{feet} | 6
\$\frac12 | 0.5
""".strip().split("\n")
UNEQUAL = r"""
0.333 | \frac13
10,000 | 1000
50^{\circ} | 51
18.90 | 18.5
3\sqrt{2} | 2\sqrt{3}
2^{10} | 1000
\pi | 3.14
(x+1)^2 | x^2+1
(1,2) | (2,1)
[2,5) | (2,5]
1,2 | 12
\text{even} | \text{odd}
7 dollars | 8
-3 | 3
\frac{a}{b} | \frac{b}{a}
|x| | x
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
1e3 | 1000
\frac{6}{4} | 1.6
\infty | -\infty
100! | 99!
4:5 | 5:4
( | 1
\frac{1}{0} | 1
1\frac12 | \frac52
x\le 5 | x\le 6
\{1,2,3\} | \{1,2\}
\emptyset | 0
\text{(A)} | (B)
e^{i\pi} | 1
""".strip().split("\n")


FLEX = [r"12\% | 12", r"12 | 12\%", "0.25 | .25"]  # Hendrycks' normalisation, which minerva_math's exact match leaves out


def test_math_verdicts_equal_minerva_math():
    """Equal and unequal pairs: what we expect, and what lm-eval's minerva_math says of the same response."""
    from lm_eval.tasks.minerva_math import utils as theirs
    assert len(EQUAL) + len(UNEQUAL) >= 80
    for pair in EQUAL + UNEQUAL + FLEX:
        found, gold = pair.split(" | ")
        response = f"Adding up.\nFinal Answer: The final answer is ${found}$. I hope it is correct."
        assert verify_math(response, gold) == (pair not in UNEQUAL), pair
        normalized = theirs.normalize_final_answer(theirs.get_unnormalized_answer(response))
        assert bool(theirs.is_equiv(normalized, theirs.normalize_final_answer(gold))) == (pair in EQUAL), pair
        assert module.normalize_minerva(found) == theirs.normalize_final_answer(found)


@pytest.mark.parametrize("response, right", [
    (r"\boxed{1} no, \boxed{\frac{7}{2}}", True), (r"\boxed{\frac{7}{2}} no, \boxed{1}", False), (r"\fbox{3.5}", True), (r"so $\boxed 3.5$ it is", True),
    (r"$x = 3.5$", True), (r"from $2$ to $x=3.5$.", True), (r"$$3.5$$", True), ("3.5", True), ("7/2", True), ("It is 3.5, I think", False), (r"\boxed{3.5", False),
    (r"\boxed{1} Final Answer: The final answer is $3.5$. I hope it is correct.", True), (r"Final Answer: The final answer is $3.5$.", True), ("", False),
    (r"\boxed{\boxed{3.5}}", True), (r"\boxed{3.5} is in the \boxed{", True), ("Final Answer: The final answer is 3\nFinal Answer: The final answer is $3.5$. "
     "I hope it is correct.", True)])
def test_where_an_answer_is_looked_for(response, right):
    assert verify_math(response, r"\frac{7}{2}") is right


@pytest.mark.parametrize("found, gold, equal", [
    ("1", "1,-2", False), ("1,-2", "1", False), ("3", "3,5,7", False), ("0.5,1", "\\frac12,1", True), ("2,1", "1,2", False), ("5|6", "5", False),
    ("2", "2\\text{ hours }30\\text{ minutes}", False), ("5", "5\\text{ or }6", False), ("\\alpha + 1", "1+\\alpha", True)])
def test_lists_and_words_are_not_cut_short(found, gold, equal):
    """Here minerva_math reads the first element and stops, or loses a letter."""
    assert equal_math(found, gold) is equal


def test_hendrycks_and_minerva_agree_with_sympy_only_when_asked():
    """What neither normalisation equates goes to sympy; what they equate does not (tuples, words, which sympy cannot read)."""
    assert equal_math(r"\text{ even}", "even") and equal_math("(3,\\infty)", "(3, \\infty)") and not equal_math("", "")
    assert equal_math("x" * 2000, "x" * 2000) and not equal_math("1+" * 2000 + "1", "2001")


def test_a_dead_comparer_is_replaced():
    assert not verify_math("$x+3$", "x+4")
    os.kill(module.sympy_process(os.getpid()).pid, signal.SIGKILL)
    assert verify_math("$x+7$", "7+x")


def test_an_interrupted_comparison_does_not_answer_the_next(monkeypatch):
    server = module.sympy_process(os.getpid())
    with monkeypatch.context() as patch:
        patch.setattr(server, "stdout", None)  # raises between question and answer, as a signal's handler might
        with pytest.raises(AttributeError):
            equal_math("y+1", "1+y")
    assert equal_math("y+2", "2+y") and not equal_math("y+2", "y+3")
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda i: equal_math(f"z+{i}", f"{i + i % 2}+z"), range(12))) == [i % 2 == 0 for i in range(12)]
    if (child := os.fork()) == 0:
        os._exit(0 if equal_math("w+1", "1+w") and not equal_math("w+1", "w") else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_missing_parser_is_said(monkeypatch):
    monkeypatch.setattr(module, "SYMPY_SECONDS", "x")
    monkeypatch.setattr(module.inspect, "getsource", lambda function: "import no_such_parser")
    module.sympy_process.cache_clear()
    with pytest.raises(UserError, match="antlr4-python3-runtime==4.11.0"):
        verify_math("$v+1$", "1+v")


# ---- F1


def test_f1_by_hand_and_as_lm_eval():
    from lm_eval.tasks.drop.utils import get_metrics
    assert squad_f1("the Cat sat", ("a cat",)) == pytest.approx(2 / 3) and squad_f1("x", "y") == 0 and squad_f1("The.", ("a",)) == 1
    rng, words = random.Random(0), ["12", "12.0", "1,507", "the", "Smith", "Jones-Smith", "yards,", "a", "U.S.", "-3", "3rd", "(x)"]
    for _ in range(2000):
        response = " ".join(rng.choices(words, k=rng.randint(0, 3)))
        golds = tuple(tuple(" ".join(rng.choices(words, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 3))) for _ in range(2))
        assert drop_f1(response, golds) == max(get_metrics([response], gold)[1] for gold in golds), (response, golds)


# ---- IFEval

FOLLOWED = {  # id: (arguments, responses that follow it, responses that do not)
    "keywords:existence": ({"keywords": ["cat", "Dog"]}, ["A dog and a CAT.", "dogcats"], ["A dog.", "c a t dog"]),
    "keywords:frequency": ({"keyword": "cat", "frequency": 2, "relation": "at least"}, ["Cat, cat", "catcat"], ["a cat", "dog"]),
    "keywords:forbidden_words": ({"forbidden_words": ["cat", "a+b"]}, ["cats", "dog", "aab"], ["The Cat.", "cat"]),
    "keywords:letter_frequency": ({"letter": "E", "let_frequency": 2, "let_relation": "less than"}, ["one", "zig"], ["eel", "Ee"]),
    "language:response_language": ({"language": "de"}, ["Das ist ein ganz gewöhnlicher deutscher Satz."], ["This is quite an ordinary English sentence."]),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "less than"}, ["Dr. Who came.", "One"], ["One. Two.", "Wow! So?"]),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, ["a\n***\nb", "***a *** b***"], ["a", "a***b***c", "a *** *** b"]),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, ["one two three", "it's here"], ["one two", "- - - -"]),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Second"}, ["a\n\nsecond, b", "a\n\n\"Second\" b"], ["a\n\nb", "second\n\nb", "a\n\nsecond\n\nc"]),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[a] and [b]", "[[a] [b]"], ["[a]", "[a\nb] [c]"]),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, ["Bye.\np. p. s more", "P.P.S. x"], ["Bye. P.S. x", "PPS"]),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, ["* a\n- b", "  - a\ntext\n*b"], ["* a", "** a\n* b", "- a\n- b\n- c"]),
    "detectable_format:constrained_response": ({}, ["My answer is no.", "Well: My answer is maybe. So."], ["no", "my answer is yes."]),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, ["*a* *b*", "**a** b *c*", "**a** **b**"], ["*a*", "* * **", "*a\nb* *c*"]),
    "detectable_format:multiple_sections": ({"section_spliter": "PART", "num_sections": 2}, ["PART 1 a PART 2 b", "PART1PART2"], ["PART 1", "Part 1 Part 2"]),
    "detectable_format:json_format": ({}, ['{"a": [1]}', "```json\n[1]\n```", "3"], ["{a: 1}", "text {}"]),
    "detectable_format:title": ({}, ["<<A title>>\ntext", "x <<y>>"], ["<< >>", "<<a\nb>>", "<a>"]),
    "combination:two_responses": ({}, ["a ****** b", "******a******b"], ["a ****** a", "a", "a******b******c", "a ****** ****** b"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it. "}, ["say it. Done.", " Say it.\nOK"], ["Sure! Say it.", "Done."]),
    "startend:end_checker": ({"end_phrase": "The End."}, ["So. the end.", '"x The End."'], ["The End. Bye", "The End"]),
    "startend:quotation": ({}, ['"all"', ' "a" and "b" '], ['"', '"all', "'all'"]),
    "change_case:capital_word_frequency": ({"capital_frequency": 2, "capital_relation": "at least"}, ["NASA and USA", "I AM x"], ["NASA", "Nasa Usa"]),
    "change_case:english_capital": ({}, ["THIS IS CERTAINLY ALL ENGLISH TEXT."], ["This Is English.", "DAS IST NATÜRLICH EIN DEUTSCHER SATZ."]),
    "change_case:english_lowercase": ({}, ["this is certainly all english text."], ["This is english.", "das ist natürlich ein deutscher satz."]),
    "punctuation:no_comma": ({}, ["No commas here.", "a; b"], ["Well, no.", ","]),
}


SENTENCES = {"hi": "यह हिंदी में लिखा गया एक साधारण वाक्य है।", "ru": "Это самое обычное предложение на русском языке.", "ko": "이것은 한국어로 쓰인 평범한 문장입니다.",
             "ar": "هذه جملة عادية مكتوبة باللغة العربية.", "th": "นี่เป็นประโยคธรรมดาที่เขียนเป็นภาษาไทย"}


@pytest.mark.parametrize("instruction", IFEVAL)
def test_every_instruction_has_followers_and_breakers(instruction):
    kwargs, followed, broken = FOLLOWED[instruction]
    for response in followed:
        assert verify_ifeval(response, instruction, kwargs) is True, response
    for response in [*broken, "", " \n "]:
        assert verify_ifeval(response, instruction, kwargs) is False, response
    assert verify_ifeval(followed[0], instruction, {**kwargs, "not_this_ones": None})  # published rows fill theirs up with null


def test_loose_forgives_a_first_and_a_last_line_and_asterisks():
    for response, instruction, kwargs in (("Sure, here:\nno commas", "punctuation:no_comma", {}), ("no\nBye, now", "punctuation:no_comma", {}),
                                          ("Hi, you\nno\nBye, now", "punctuation:no_comma", {}), ('**"all"**', "startend:quotation", {})):
        assert verify_ifeval(response, instruction, kwargs, loose=True) is True and verify_ifeval(response, instruction, kwargs) is False
    assert verify_ifeval("a, b\nc, d\ne, f", "punctuation:no_comma", {}, loose=True) is False


@needs_shared
def test_ifeval_prompts_are_accepted_and_verdicts_equal_lm_evals(monkeypatch):
    """All 541 prompts' arguments, with responses made to follow, to break and to confuse them, strict and loose.

    Two ids count with NLTK's punkt, which is a download: capital words are compared with its splitting into words alone, sentences
    follow a rule of ours. Of letters that are none (#, !) lm-eval checks another, drawn at random.
    """
    monkeypatch.setenv("LOCAL_RANK", "1")  # lm_eval downloads on rank 0
    from lm_eval.tasks.ifeval import instructions_util, utils as theirs
    logging.getLogger().setLevel("WARNING")
    word_tokenize = instructions_util.nltk.word_tokenize
    monkeypatch.setattr(instructions_util.nltk, "word_tokenize", lambda text: word_tokenize(text, preserve_line=True))
    rows = read("ifeval_prompts.jsonl")
    assert len(rows) == 541 and {i for row in rows for i in row["instruction_id_list"]} == set(IFEVAL)
    rng, prompts = random.Random(0), [row["prompt"] for row in rows]
    asked, followed = collections.Counter(), collections.Counter()
    for row in rows * 2:
        for instruction, kwargs in zip(row["instruction_id_list"], row["kwargs"]):
            ours, good, bad = FOLLOWED[instruction]
            response = rng.choice([*good, *bad, rng.choice(prompts), row["prompt"] + "\nDone.", '"quoted, *twice* **over**"', "a\n***\nb\n******\nc"])
            if kwargs and rng.random() < 0.5:  # what is asked for, once too little at times
                n = next((v for v in kwargs.values() if isinstance(v, int)), 1) - rng.randint(0, 1)
                response = {"language:response_language": lambda k: SENTENCES.get(k["language"], "Das ist ein Satz."), "keywords:existence": lambda k: " ".join(k["keywords"]), "keywords:frequency": lambda k: f"{k['keyword']} " * n,
                            "keywords:letter_frequency": lambda k: k["letter"] * n + " ", "length_constraints:number_words": lambda k: "word " * n,
                            "length_constraints:number_paragraphs": lambda k: "\n***\n".join(["x"] * n),
                            "length_constraints:nth_paragraph_first_word": lambda k: "\n\n".join([k["first_word"].title() + "!"] * n),
                            "detectable_format:number_bullet_lists": lambda k: "* x\n" * n, "combination:repeat_prompt": lambda k: k["prompt_to_repeat"] + " x",
                            "startend:end_checker": lambda k: "x " + k["end_phrase"], "keywords:forbidden_words": lambda k: " ".join(k["forbidden_words"]) + "s",
                            "detectable_format:multiple_sections": lambda k: " ".join(f"{k['section_spliter']} {i}" for i in range(n)),
                            "change_case:capital_word_frequency": lambda k: "WORD " * n}.get(instruction, lambda k: "*x* [y] " * n)(kwargs)
            response = rng.choice(["", "", "Sure:\n"]) + response + rng.choice(["", "", "\nBye, now."])
            both = [verify_ifeval(response, instruction, kwargs, loose) for loose in (False, True)]
            if instruction == "length_constraints:number_sentences" or not kwargs.get("letter", "a").isalpha():
                continue
            example = theirs.InputExample(key=0, prompt=row["prompt"], instruction_id_list=[instruction], kwargs=[kwargs])
            assert both == [check(example, response).follow_all_instructions for check in (
                theirs.test_instruction_following_strict, theirs.test_instruction_following_loose)], (instruction, kwargs, response)
            asked[instruction] += 2
            followed[instruction] += sum(both)
    assert len(asked) == 24 and not {i: (followed[i], asked[i]) for i in asked if not 0 < followed[i] < asked[i]}


def test_rlvr_constraints_map_onto_the_same_checks():
    """Each of the 25 functions, with its arguments as RLVR's rows have them, on one response that satisfies it and one that does not."""
    rows = {
        "verify_keywords": ({"keyword_list": ["cat"]}, "A cat.", "A dog."), "verify_keyword_frequency": ({"word": "cat", "N": 2}, "cat cat", "cat cat cat"),
        "validate_forbidden_words": ({"forbidden_words": ["cat"]}, "dog", "cat"), "verify_letter_frequency": ({"letter": "e", "N": 2}, "eel", "eerie"),
        "validate_response_language": ({"language": "en"}, "This is surely an English sentence.", "Das ist ein deutscher Satz."),
        "verify_paragraph_count": ({"N": 2}, "a\n* * *\nb", "a\n***\nb"), "validate_word_constraint": ({"N": 20, "quantifier": "around"}, "a " * 18, "a " * 17),
        "verify_sentence_constraint": ({"N": 2, "quantifier": "at most"}, "One. Two.", "One. Two. Three."),
        "validate_paragraphs": ({"N": 2, "first_word": "B", "i": 2}, "a\n\nb", "b\n\na"), "verify_postscript": ({"postscript_marker": "P.S."}, "x\nP.S. y", "x"),
        "validate_placeholders": ({"N": 1}, "[x]", "x"), "verify_bullet_points": ({"N": 2}, "* a\n* b", "* a"), "validate_title": ({}, "<<x>>", "x"),
        "validate_choice": ({"options": ["yes", "no"]}, "no", "maybe"), "validate_highlighted_sections": ({"N": 1}, "*x*", "x"),
        "validate_sections": ({"N": 2, "section_splitter": "Section"}, "Section 1 a Section 2 b", "Section 1"), "validate_json_format": ({}, "{}", "{"),
        "validate_repeat_prompt": ({"original_prompt": "Do it"}, "Do it: done", "done"), "validate_two_responses": ({}, "a ****** b", "a"),
        "validate_uppercase": ({}, "ÄÖ X", "x"), "validate_lowercase": ({}, "äö x", "X"),
        "validate_frequency_capital_words": ({"N": 1, "quantifier": "at most"}, "ONE two", "ONE TWO"), "validate_end": ({"end_phrase": "End."}, "The End.", "x"),
        "validate_quotation": ({}, '"x"', "x"), "validate_no_commas": ({}, "x", ",")}
    assert rows.keys() == RLVR_CONSTRAINTS.keys() and {i for i, _, _ in RLVR_CONSTRAINTS.values()} == set(IFEVAL)
    nothing = dict.fromkeys(["N", "word", "i", "letter", "quantifier", "keyword_list", "options"])  # their other columns are null
    for name, (arguments, good, bad) in rows.items():
        constraint = rlvr_constraint({**nothing, "func_name": name, **arguments})
        assert verify_ifeval(good, *constraint) and not verify_ifeval(bad, *constraint), name
    with pytest.raises(UserError, match="unknown constraint 'eval'"):
        rlvr_constraint({"func_name": "eval"})
    with pytest.raises(UserError, match="verify_bullet_points lacks N"):
        rlvr_constraint({"func_name": "verify_bullet_points", "N": None})


@pytest.mark.parametrize("instruction, kwargs, words", [
    ("punctuation:no_coma", {}, "did you mean punctuation:no_comma"), ("keywords:existence", {}, "missing a required argument: 'keywords'"),
    ("punctuation:no_comma", {"n": 1}, "unexpected keyword argument 'n'"),
    ("keywords:frequency", {"keyword": "a", "frequency": "3", "relation": "at least"}, "frequency cannot be '3'"),
    ("keywords:existence", {"keywords": "cat"}, "keywords cannot be 'cat'"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "'about' is none of less than, at least")])
def test_bad_instructions_are_named(instruction, kwargs, words):
    with pytest.raises(UserError, match=words):
        verify_ifeval("text", instruction, kwargs)


def test_language_needs_langdetect(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(UserError, match="pip install langdetect"):
        verify_ifeval("text", "change_case:english_capital", {}) or verify_ifeval("TEXT", "change_case:english_capital", {})
    assert verify_ifeval("TEXT", *rlvr_constraint({"func_name": "validate_uppercase"}))


# ---- hostile responses

N = 10**6
HOSTILE = {
    "digits": "1" * N, "thousands": "1," * (N // 2), "decimals": ".1" * (N // 2), "dots": "." * N + "x", "braces": "{" * N, "boxes": "\\boxed{" * (N // 7),
    "nested boxes": "\\boxed{" * (N // 9) + "1" + "}" * (N // 9), "boxed digits": "\\boxed{" + "9" * N + "}", "tower": "\\boxed{9^{9^{9^{9^{9}}}}}",
    "factorial": "\\boxed{10000000!}", "two towers": "\\boxed{9^{9^{9^{9^{9}}}}} Final Answer: The final answer is $8^{8^{8^{8^8}}}$. I hope it is correct.",
    "deep": "\\boxed{" + "\\frac{1}{" * 100 + "1" + "}" * 100 + "}", "parentheses": "$" + "(" * 400 + "1" + ")" * 400 + "$", "dollars": "$" * N, "sum": "$" + "x+" * 450 + "$",
    "heads": "Final Answer: The final answer is" * (N // 33), "brackets": "[" * N, "stars": "*" * N, "spaced stars": "* " * (N // 2), "lines": "\n" * N + "x",
    "angles": "<<" * (N // 2), "quotes": '."' * (N // 2) + "x", "json": "[" * N, "objects": '{"a":' * (N // 5), "control": "\x00\x01\x1b\ud800\ufffe" * (N // 5),
    "words": "word " * (N // 5), "hyphens": "A-" * (N // 2), "sections": "Section " * (N // 8), "ps": "p." * (N // 2), "cjk": "。" * N, "binomial": "\\boxed{\\binom{10^9}{5*10^8}}"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_cost_little_and_raise_nothing(name):
    """Below a second of processor time here and in the process that compares, and little memory, for every verifier."""
    response = HOSTILE[name]
    verify_math("$x$", "y")  # the comparing process is up
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20
    for verify in [lambda: verify_gsm8k(response, "7"), lambda: verify_math(response, "\\frac{x}{7}"),
                   *(lambda i=i: verify_ifeval(response, i, FOLLOWED[i][0], loose=True) for i in IFEVAL)]:
        before = time.process_time()
        assert verify() in (True, False)
        assert time.process_time() - before < 1
    assert verify_math("$x+1$", "1+x")  # and the comparing process is alive


def test_docstrings():
    import doctest
    assert doctest.testmod(module).failed == 0
