"""The laptop's text and questions: held out stays held out, and the answers are true."""

import doctest
import re

import pytest

import tasks.synthetic as module
from infra.files import UserError
from tasks.synthetic import (
    TASKS,
    THINGS,
    Item,
    draw_items,
    embedded_documents,
    is_prose,
    task_items,
)


def paragraphs_of(documents):
    """The paragraphs of all documents, their white space apart."""
    paragraphs = []
    for document in documents:
        paragraphs += [" ".join(p.split()) for p in re.split(r"\n\s*\n", document) if p.strip()]
    return paragraphs


def test_embedded_corpus_is_split_and_deduplicated():
    train, val = embedded_documents("train"), embedded_documents("val")
    assert list(train) == ["docs", "code", "math", "qa"] and all(train.values())
    paragraphs = paragraphs_of(train["docs"] + train["code"])
    long = [p for p in paragraphs if len(p) > 20]
    assert len(long) == len(set(long)) > 10_000
    held = paragraphs_of(val["docs"] + val["code"])
    assert not {p for p in held if len(p) > 20} & set(long)
    assert sum(map(len, train["docs"])) > 1_000_000 and sum(map(len, val["docs"])) > 30_000
    assert embedded_documents("val") == val
    second, second_val = embedded_documents("train", stage=2), embedded_documents("val", stage=2)
    assert list(second) == list(second_val) == ["prose", "math", "qa", "instruct", "sums"]
    sentences = paragraphs_of(second["prose"])
    assert len(sentences) > 1000 and set(sentences) < set(paragraphs)
    assert all(is_prose(p) for p in sentences)
    assert not set(sentences) & set(paragraphs_of(second_val["prose"]))
    for task in ("math", "qa"):
        assert second[task] != train[task] and second_val[task] == val[task]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_share_no_operands_with_training(task):
    pattern = "|".join(THINGS) + r"|\d+" if task == "instruct" else r"\d+"

    def operands(item):
        return tuple(sorted(re.findall(pattern, item["prompt"])))

    train, val = list(task_items(task, "train", 20_000)), list(task_items(task, "val", 600))
    assert len({item["prompt"] for item in val}) == 600
    assert not set(map(operands, train)) & set(map(operands, val))
    assert list(task_items(task, "val", 600)) == val != list(task_items(task, "val", 600, seed=1))
    for item in train[:500]:  # the answers are true
        if task == "instruct":
            a, b, c = re.findall("|".join(THINGS), item["prompt"])
            answers = {
                "capital": f"{a}, {b} and {c}".upper(),
                "other way": f"{c}, {b} and {a}",
                "twice": f"{a} {a} {b}",
                "one per line": f"- {a}\n- {b}\n- {c}",
            }
            assert item["gold"] == answers[re.search("|".join(answers), item["prompt"])[0]]
            continue
        a, b = map(int, re.findall(r"\d+", item["prompt"]))
        if task == "math":
            result = a + b if re.search("[+]|more", item["prompt"]) else a - b
            assert item["gold"] == str(result)
            assert item["answer"].endswith(f"The answer is {result}.")
            steps = re.findall(r"(\d+) ([+-]) (\d+)(?: [+-] (1))? = (\d+)", item["answer"])
            assert len(steps) == 2
            for x, sign, y, carry, result in steps:
                second = int(y) + int(carry or 0)
                assert int(x) + (second if sign == "+" else -second) == int(result)
        else:
            order = re.findall(r"(\w+) has", item["prompt"])[:2]
            if "Which" in item["prompt"]:
                order = [str(a), str(b)]
            assert item["gold"] == order[(a > b) != bool(re.search("larger|more", item["prompt"]))]


def test_more_held_out_questions_than_there_are_is_an_error():
    def make(rng):
        number = rng.randint(1, 300)
        return Item(f"{number}?", "", "", f"key {number}")

    train = draw_items("numbers", make, "train", 1000, 0)
    assert {item.prompt for item in train} < {f"{number}?" for number in range(1, 301)}
    with pytest.raises(UserError, match=r"there are only [23]\d different .* questions of numbers"):
        list(draw_items("numbers", make, "val", 100, 0))


def test_docstrings():
    assert doctest.testmod(module).failed == 0
