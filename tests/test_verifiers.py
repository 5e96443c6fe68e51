"""tasks/verifiers.py: gold and perturbed answers, lm-eval's verdicts, hostile responses."""

import concurrent.futures
import json
import os
import random
import resource
import signal
import time

import pytest
from conftest import SHARED, needs_shared
from test_ifeval import FOLLOWED

import tasks.verifiers as module
from infra.files import UserError
from tasks.ifeval import IFEVAL, verify_ifeval
from tasks.verifiers import drop_f1, equal_math, squad_f1, verify_gsm8k, verify_math


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
        for right in (row["answer"], f"So it is ${gold}."):
            assert verify_gsm8k(right, gold)
        assert verify_gsm8k(row["answer"], row["answer"])
        number = int(gold.replace(",", ""))
        assert verify_gsm8k(f"{number:,}", gold) and verify_gsm8k(f"{number}", gold)
        for wrong in (
            number + 1,
            number - 1,
            10 * number + 1,
            f"{number}.5",
            f"{number}.0",
            -number or 1,
            f"{number} and then 7000001",
            "many",
        ):
            assert not verify_gsm8k(f"The answer is {wrong}", gold), (wrong, gold)


@pytest.mark.parametrize(
    "response, answer, right",
    [
        ("1,234,567", "1234567", True),
        ("1234567", "#### 1,234,567", True),
        ("It is -5.", "-5", True),
        ("It is -5.", "5", False),
        ("3-5", "5", True),
        ("2 x (-3) = -6", "-6", True),
        ("0.50", "0.50", True),
        ("0.50", "0.5", False),
        (".5", ".5", True),
        ("٣", "3", False),
        ("", "3", False),
        ("three", "3", False),
        ("3", "no number", False),
        ("5 apples, 6", "6", True),
        ("1,2", "12", True),
        ("$18.", "18", True),
    ],
)
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


# Hendrycks' normalisation, which minerva_math's exact match leaves out.
FLEX = [r"12\% | 12", r"12 | 12\%", "0.25 | .25"]


def test_math_verdicts_equal_minerva_math():
    """Equal and unequal pairs: what we expect, and what lm-eval's minerva_math says of the same."""
    from lm_eval.tasks.minerva_math import utils as theirs

    assert len(EQUAL) + len(UNEQUAL) >= 80
    for pair in EQUAL + UNEQUAL + FLEX:
        found, gold = pair.split(" | ")
        response = f"Adding up.\nFinal Answer: The final answer is ${found}$. I hope it is correct."
        assert verify_math(response, gold) == (pair not in UNEQUAL), pair
        normalized = theirs.normalize_final_answer(theirs.get_unnormalized_answer(response))
        their_verdict = theirs.is_equiv(normalized, theirs.normalize_final_answer(gold))
        assert bool(their_verdict) == (pair in EQUAL), pair
        assert module.normalize_minerva(found) == theirs.normalize_final_answer(found)


@pytest.mark.parametrize(
    "response, right",
    [
        (r"\boxed{1} no, \boxed{\frac{7}{2}}", True),
        (r"\boxed{\frac{7}{2}} no, \boxed{1}", False),
        (r"\fbox{3.5}", True),
        (r"so $\boxed 3.5$ it is", True),
        (r"$x = 3.5$", True),
        (r"from $2$ to $x=3.5$.", True),
        (r"$$3.5$$", True),
        ("3.5", True),
        ("7/2", True),
        ("It is 3.5, I think", False),
        (r"\boxed{3.5", False),
        (r"\boxed{1} Final Answer: The final answer is $3.5$. I hope it is correct.", True),
        (r"Final Answer: The final answer is $3.5$.", True),
        ("", False),
        (r"\boxed{\boxed{3.5}}", True),
        (r"\boxed{3.5} is in the \boxed{", True),
        (
            "Final Answer: The final answer is 3\nFinal Answer: The final answer is $3.5$. "
            "I hope it is correct.",
            True,
        ),
    ],
)
def test_where_an_answer_is_looked_for(response, right):
    assert verify_math(response, r"\frac{7}{2}") is right


@pytest.mark.parametrize(
    "found, gold, equal",
    [
        ("1", "1,-2", False),
        ("1,-2", "1", False),
        ("3", "3,5,7", False),
        ("0.5,1", "\\frac12,1", True),
        ("2,1", "1,2", False),
        ("5|6", "5", False),
        ("2", "2\\text{ hours }30\\text{ minutes}", False),
        ("5", "5\\text{ or }6", False),
        ("\\alpha + 1", "1+\\alpha", True),
    ],
)
def test_lists_and_words_are_not_cut_short(found, gold, equal):
    """Here minerva_math reads the first element and stops, or loses a letter."""
    assert equal_math(found, gold) is equal


def test_hendrycks_and_minerva_agree_with_sympy_only_when_asked():
    """Only what neither normalisation equates goes to sympy, which cannot read tuples and words."""
    assert equal_math(r"\text{ even}", "even")
    assert equal_math("(3,\\infty)", "(3, \\infty)")
    assert not equal_math("", "")
    assert equal_math("x" * 2000, "x" * 2000)
    assert not equal_math("1+" * 2000 + "1", "2001")


def test_a_dead_comparer_is_replaced():
    assert not verify_math("$x+3$", "x+4")
    os.kill(module.sympy_process(os.getpid()).pid, signal.SIGKILL)
    assert verify_math("$x+7$", "7+x")


def test_an_interrupted_comparison_does_not_answer_the_next(monkeypatch):
    server = module.sympy_process(os.getpid())
    with monkeypatch.context() as patch:
        # It raises between question and answer, as a signal's handler might.
        patch.setattr(server, "stdout", None)
        with pytest.raises(AttributeError):
            equal_math("y+1", "1+y")
    assert equal_math("y+2", "2+y") and not equal_math("y+2", "y+3")
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        verdicts = threads.map(lambda i: equal_math(f"z+{i}", f"{i + i % 2}+z"), range(12))
        assert list(verdicts) == [i % 2 == 0 for i in range(12)]
    if (child := os.fork()) == 0:
        os._exit(0 if equal_math("w+1", "1+w") and not equal_math("w+1", "w") else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_missing_parser_is_said(monkeypatch, tmp_path):
    program = tmp_path / "server.py"
    program.write_text("import no_such_parser")
    monkeypatch.setattr(module, "SYMPY_SERVER", program)
    module.sympy_process.cache_clear()
    with pytest.raises(UserError, match="antlr4-python3-runtime==4.11.0"):
        verify_math("$v+1$", "1+v")


# ---- F1


def test_f1_by_hand_and_as_lm_eval():
    from lm_eval.tasks.drop.utils import get_metrics

    assert squad_f1("the Cat sat", ("a cat",)) == pytest.approx(2 / 3)
    assert squad_f1("x", "y") == 0 and squad_f1("The.", ("a",)) == 1
    rng = random.Random(0)
    words = "12 12.0 1,507 the Smith Jones-Smith yards, a U.S. -3 3rd (x)".split()

    def span(least, most):
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    for _ in range(2000):
        response = span(0, 3)
        golds = tuple(tuple(span(1, 2) for _ in range(rng.randint(1, 3))) for _ in range(2))
        expected = max(get_metrics([response], gold)[1] for gold in golds)
        assert drop_f1(response, golds) == expected, (response, golds)


# ---- hostile responses

N = 10**6
HOSTILE = {
    "digits": "1" * N,
    "thousands": "1," * (N // 2),
    "decimals": ".1" * (N // 2),
    "dots": "." * N + "x",
    "braces": "{" * N,
    "boxes": "\\boxed{" * (N // 7),
    "nested boxes": "\\boxed{" * (N // 9) + "1" + "}" * (N // 9),
    "boxed digits": "\\boxed{" + "9" * N + "}",
    "tower": "\\boxed{9^{9^{9^{9^{9}}}}}",
    "factorial": "\\boxed{10000000!}",
    "two towers": "\\boxed{9^{9^{9^{9^{9}}}}} Final Answer: The final answer is $8^{8^{8^{8^8}}}$."
    " I hope it is correct.",
    "deep": "\\boxed{" + "\\frac{1}{" * 100 + "1" + "}" * 100 + "}",
    "parentheses": "$" + "(" * 400 + "1" + ")" * 400 + "$",
    "dollars": "$" * N,
    "sum": "$" + "x+" * 450 + "$",
    "heads": "Final Answer: The final answer is" * (N // 33),
    "brackets": "[" * N,
    "stars": "*" * N,
    "spaced stars": "* " * (N // 2),
    "lines": "\n" * N + "x",
    "angles": "<<" * (N // 2),
    "quotes": '."' * (N // 2) + "x",
    "json": "[" * N,
    "objects": '{"a":' * (N // 5),
    "control": "\x00\x01\x1b\ud800\ufffe" * (N // 5),
    "words": "word " * (N // 5),
    "hyphens": "A-" * (N // 2),
    "sections": "Section " * (N // 8),
    "ps": "p." * (N // 2),
    "cjk": "。" * N,
    "binomial": "\\boxed{\\binom{10^9}{5*10^8}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_cost_little_and_raise_nothing(name):
    """Every verifier takes less than a second of processor time, and little memory."""
    response = HOSTILE[name]
    verify_math("$x$", "y")  # the comparing process is up
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the tests before this one
    for verify in [
        lambda: verify_gsm8k(response, "7"),
        lambda: verify_math(response, "\\frac{x}{7}"),
        lambda: squad_f1(response, "zz 77"),
        lambda: drop_f1(response, (("zz", "77"),)),
        *(lambda i=i: verify_ifeval(response, i, FOLLOWED[i][0], loose=True) for i in IFEVAL),
    ]:
        before = time.process_time()
        assert verify() in (True, False)
        assert time.process_time() - before < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < max(4 * 2**20, peak + 1)
    assert verify_math("$x+1$", "1+x")  # and the comparing process is alive


def test_docstrings():
    import doctest

    assert doctest.testmod(module).failed == 0
