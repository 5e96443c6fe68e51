"""The laptop's text and questions: nothing is downloaded.

Text is what every Python installation carries: `embedded_documents`. Questions come from seeded
generators: `task_items` (for evaluation and pretraining), `rlvr_rows` and `instruct_rows` (for
post-training). The same arguments give the same items on every machine.

    from tasks.synthetic import task_items
    for item in task_items("math", "val", 3):
        print(item["prompt"], item["answer"])

What is held out is chosen by hash, not by chance: the same at every stage. `data.py` makes token
files of the documents.
"""

import ast
import functools
import hashlib
import json
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from infra.files import UserError

# data.py hashes this file: with other generators it builds the corpus again.
VERSION_SOURCE = Path(__file__)

# Source of the embedded corpus -> its stage, for --mix. Where both stages have it, stage 2's.
SOURCES = {"docs": 1, "code": 1, "prose": 2, "math": 2, "qa": 2, "instruct": 2, "sums": 2}

# Stage -> source -> (task, items to train on, seed). Each source has 500 held-out items.
GENERATED = {
    1: {
        "math": ("math", 18_000, 1),
        "qa": ("qa", 16_000, 1),
    },
    2: {
        "math": ("math", 18_000, 2),
        "qa": ("qa", 16_000, 2),
        "instruct": ("instruct", 8_000, 2),
        "sums": ("math", 2_000, 3),
    },
}


def is_held_out(key: str, one_in: int) -> bool:
    """Is what `key` names kept from training? By its hash: the same at every stage and place."""
    return int(hashlib.md5(key.encode()).hexdigest(), 16) % one_in == 0


def embedded_documents(split: str, stage: int = 1) -> dict[str, list[str]]:
    """source -> documents of a split (train or val), without duplicates.

    Stage 1. docs: English reference prose and docstrings of the standard library. code: its source
    without them. math, qa: items of the generators below.
    Stage 2. prose: what `is_prose` keeps of docs. math, qa: more items. instruct: instructions and
    what they ask for. sums: a small source of the kind of math.
    """
    library = library_documents()[split]
    if stage == 1:
        documents = {source: list(texts) for source, texts in library.items()}
    else:
        documents = {"prose": keep_prose(library["docs"])}
    for source, (task, count, seed) in GENERATED[stage].items():
        if split == "val":
            items = task_items(task, split, 500)
        else:
            items = task_items(task, split, count, seed)
        documents[source] = [item["prompt"] + item["answer"] for item in items]
    return documents


# ------------------------------------------------------------------------------------------
# Text: the standard library's

# Folders of the library that are left out: tests, tables of characters, old tools.
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "__pycache__",
    "turtledemo",
}


@functools.cache
def library_documents() -> dict[str, dict[str, list[str]]]:
    """split -> {docs, code} -> documents: what this Python installation carries.

    One page in 20 is held out, its prose and its code together. A paragraph that stands on both
    sides is kept on train's alone.
    """
    pages = library_pages()
    seen: set[str] = set()
    documents = {}
    for split in ("train", "val"):
        documents[split] = {"docs": [], "code": []}
        for name, prose, code in pages:
            if is_held_out(name, one_in=20) != (split == "val"):
                continue
            for source, text in (("docs", prose), ("code", code)):
                fresh = drop_seen(text, seen)
                if fresh:
                    documents[split][source].append(fresh + "\n")
    return documents


def library_pages() -> list[tuple[str, str, str]]:
    """(name, prose, code) of each topic of Python's help, then of each module by its path."""
    from pydoc_data.topics import topics

    pages = [(f"topic {name}", text, "") for name, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        package = inside.parts[0].split(".")[0]
        if package in sys.stdlib_module_names and SKIPPED.isdisjoint(inside.parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            prose, code = split_docstrings(source, path.stem)
            if len(code) >= 10_000:
                code = ""  # else code would outweigh everything else
            pages.append((str(inside), prose, code))
    return pages


def split_docstrings(source: str, module: str) -> tuple[str, str]:
    """(docstrings, each under the name of what it documents; the source without them).

    Two empty texts for what is no Python.

    >>> split_docstrings('def f(x):\\n    "Return x."\\n    return x', "m")
    ('m.f(x)\\n\\nReturn x.', 'def f(x):\\n    return x')
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return "", ""
    lines = source.splitlines()
    prose = []
    nodes = [(tree, module)]
    while nodes:
        node, name = nodes.pop()
        text = ast.get_docstring(node)
        if text:
            prose.append(f"{name}{signature(node)}\n\n{text}")
            string = node.body[0]
            for i in range(string.lineno - 1, string.end_lineno):
                lines[i] = None
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                nodes.append((child, f"{name}.{child.name}"))
    return "\n\n".join(prose), "\n".join(line for line in lines if line is not None)


def signature(node: ast.AST) -> str:
    """The arguments of a function in parentheses; "" for a class or a module."""
    if not hasattr(node, "args"):
        return ""
    return f"({', '.join(argument.arg for argument in node.args.args)})"


def drop_seen(text: str, seen: set[str]) -> str:
    """The text without the paragraphs in `seen`; those that stay are added to `seen`.

    Paragraphs that differ in white space alone are the same. Short ones, as "import os", may recur.
    """
    fresh = []
    for paragraph in paragraphs(text):
        key = " ".join(paragraph.split())
        if key not in seen:
            fresh.append(paragraph.rstrip())
            if len(key) > 20:
                seen.add(key)
    return "\n\n".join(fresh).strip()


def keep_prose(texts: list[str]) -> list[str]:
    """The texts with only those paragraphs that read as sentences."""
    kept = ["\n\n".join(filter(is_prose, paragraphs(text))) for text in texts]
    return [text + "\n" for text in kept if text]


def paragraphs(text: str) -> list[str]:
    """The text, cut at empty lines."""
    return re.split(r"\n\s*\n", text)


def is_prose(paragraph: str) -> bool:
    """Does it read as sentences?

    Our stand-in for the classifiers that chose Dolmino's web pages (paper section 4.2).

    >>> is_prose("The operator compares two objects. It is true if both are the same one, "
    ...          "and in no other case.")
    True
    >>> is_prose("key  -- the value to look up"), is_prose("Return 2.")
    (False, False)
    """
    words = paragraph.split()
    if len(words) < 15 or not words[0][0].isupper() or words[-1][-1] not in ".!?":
        return False
    plain = sum(word.strip(".,;:()'\"‘’“”").isalpha() for word in words)
    return plain >= 0.8 * len(words)


# ------------------------------------------------------------------------------------------
# Questions: items of seeded generators

NAMES = "Ada Ben Carl Dora Emma Finn Gina Hugo Iris Jack Kira Liam Mona Nils Olga Paul".split()
THINGS = (
    "apples books coins cups eggs hats keys maps nuts pens pots rings shoes stamps stones toys"
).split()


class Item(NamedTuple):
    """A question with its answers."""

    prompt: str
    # What a model should say.
    answer: str
    # What a verifier compares with.
    gold: str
    # Decides on which side of the split the item is. 27 + 45 and 45 + 27 share it in any wording.
    key: str
    # What a writer in a hurry says.
    short_answer: str = ""


def draw_items(
    task: str, make: Callable[[random.Random], Item], split: str, count: int, seed: int
) -> Iterator[Item]:
    """`count` items that `make` draws for a side of the split; within val all prompts differ.

    Raises UserError where val has no more.
    """
    rng = random.Random(f"{task} {split} {seed}")
    seen: set[str] = set()
    for _ in range(count):
        for _ in range(10_000):
            item = make(rng)
            on_this_side = is_held_out(item.key, one_in=10) == (split == "val")
            if on_this_side and item.prompt not in seen:
                break
        else:  # no `break`: 10,000 in a row did not fit
            raise UserError(f"there are only {len(seen):,} different held-out questions of {task}")
        if split == "val":
            seen.add(item.prompt)
        yield item


def task_items(task: str, split: str, count: int, seed: int = 0) -> Iterator[dict]:
    """`count` items {prompt, answer, gold} of one of TASKS. Raises UserError, see `draw_items`."""
    for item in draw_items(task, TASKS[task], split, count, seed):
        prompt = f"Question: {item.prompt}\nAnswer:"
        yield {"prompt": prompt, "answer": f" {item.answer}", "gold": item.gold}


def math_item(rng: random.Random) -> Item:
    """A sum or difference of two-digit numbers, one in three as a story, worked digit by digit."""
    a = rng.randint(10, 99)
    b = rng.randint(10, 99)
    name = rng.choice(NAMES)
    thing = rng.choice(THINGS)
    is_story = rng.random() < 1 / 3
    if rng.random() < 0.5:
        sign = "+"
        result = a + b
        story = f"gets {b} more. How many {thing} are there?"
    else:
        if a < b:
            a, b = b, a
        sign = "-"
        result = a - b
        story = f"loses {b}. How many {thing} are left?"
    prompt = f"{name} has {a} {thing} and {story}" if is_story else f"What is {a} {sign} {b}?"
    short_answer = f"The answer is {result}."
    answer = f"{work_out(a, b, sign, result)} {short_answer}"
    return Item(prompt, answer, str(result), f"math {sorted([a, b])}", short_answer)


def work_out(a: int, b: int, sign: str, result: int) -> str:
    """The steps of a + b = result, or of a - b = result for a >= b: first the ones, then the tens.

    >>> work_out(27, 45, "+", 72), work_out(72, 45, "-", 27)
    ('7 + 5 = 12. 2 + 4 + 1 = 7.', '12 - 5 = 7. 7 - 4 - 1 = 2.')
    """
    a_tens, a_ones = divmod(a, 10)
    b_tens, b_ones = divmod(b, 10)
    if sign == "+":
        ones = a_ones + b_ones
        carry = ones // 10
    else:
        carry = int(a_ones < b_ones)
        a_ones += 10 * carry
        ones = a_ones - b_ones
    one_more = f" {sign} 1" * carry
    tens = f"{a_tens} {sign} {b_tens}{one_more} = {result // 10}"
    return f"{a_ones} {sign} {b_ones} = {ones}. {tens}."


def qa_item(rng: random.Random) -> Item:
    """Which of two numbers is larger or smaller, or who has more or fewer: answered in a word."""
    a, b = rng.sample(range(10, 100), 2)
    first, second = rng.sample(NAMES, 2)
    asks_for_larger = rng.random() < 0.5
    if rng.random() < 0.5:
        prompt = f"Which is {'larger' if asks_for_larger else 'smaller'}, {a} or {b}?"
        choices = (str(a), str(b))
    else:
        word = "more" if asks_for_larger else "fewer"
        thing = rng.choice(THINGS)
        prompt = f"{first} has {a} {thing} and {second} has {b}. Who has {word}?"
        choices = (first, second)
    gold = choices[0] if (a > b) == asks_for_larger else choices[1]
    return Item(prompt, f"{gold}.", gold, f"qa {sorted([a, b])}")


def instruct_item(rng: random.Random) -> Item:
    """An instruction about three words, and exactly what it asks for."""
    a, b, c = rng.sample(THINGS, 3)
    words = f"{a}, {b} and {c}"
    backwards = f"{c}, {b} and {a}"
    lines = f"- {a}\n- {b}\n- {c}"
    pairs = [
        (f"Write {words} in capital letters.", words.upper()),
        (f"Write {words} the other way round.", backwards),
        (f"Write {a} twice and end with {b}. Do not write {c}.", f"{a} {a} {b}"),
        (f"List {words}, one per line.", lines),
    ]
    prompt, answer = rng.choice(pairs)
    return Item(prompt, answer, answer, f"instruct {sorted([a, b, c])}")


# What evaluation can ask: task -> generator.
TASKS = {"math": math_item, "qa": qa_item, "instruct": instruct_item}

# ------------------------------------------------------------------------------------------
# Rows for post-training

# (words, label as in the release's RLVR data, the function that makes a sentence keep to it)
CONSTRAINTS = [
    ("Use capital letters only.", {"func_name": "validate_uppercase"}, str.upper),
    ("Use no capital letters.", {"func_name": "validate_lowercase"}, str.lower),
    ("Put it in double quotation marks.", {"func_name": "validate_quotation"}, '"{}"'.format),
    ("Make it a bullet point.", {"func_name": "verify_bullet_points", "N": 1}, "* {}".format),
    (
        "Highlight it with asterisks.",
        {"func_name": "validate_highlighted_sections", "N": 1},
        "*{}*".format,
    ),
    (
        "End with the words: That is all.",
        {"func_name": "validate_end", "end_phrase": "That is all."},
        "{} That is all.".format,
    ),
]


def constraint_item(rng: random.Random) -> Item:
    """A sentence to say under a constraint; the short answer overlooks the constraint."""
    name = rng.choice(NAMES)
    number = rng.randint(10, 99)
    thing = rng.choice(THINGS)
    words, label, comply = rng.choice(CONSTRAINTS)
    text = f"{name} has {number} {thing}."
    return Item(
        prompt=f"Say that {text} {words}",
        answer=comply(text),
        gold=json.dumps(label),
        key=str((name, number, thing)),
        short_answer=text,
    )


# Verifier, as the rows' `dataset` names it -> (generator, source).
RLVR_TASKS = {"gsm8k": (math_item, "sums"), "ifeval": (constraint_item, "constraints")}


def rlvr_rows(task: str, split: str, count: int, seed: int = 0) -> Iterator[dict]:
    """`count` rows {messages, ground_truth, dataset, source} as in the release's RLVR data.

    task: `gsm8k` (sums) or `ifeval` (constraints).
    Also in each row: two answers to learn from. `worked_answer` works the sum out, or keeps to the
    constraint; `short_answer` says just the result, or overlooks the constraint.
    Raises UserError, see `draw_items`.
    """
    make, source = RLVR_TASKS[task]
    for item in draw_items(task, make, split, count, seed):
        yield {
            "messages": [{"role": "user", "content": item.prompt}],
            "ground_truth": item.gold,
            "dataset": task,
            "source": source,
            "worked_answer": item.answer,
            "short_answer": item.short_answer,
        }


def instruct_rows(
    split: str, count: int, seed: int = 0, short_share: float = 0.6
) -> Iterator[dict]:
    """`count` conversations {messages, source} to imitate.

    Two kinds of writers: a share `short_share` gives short answers, the others work them out. Half
    are sums, half constraints; one in eight goes on with a comparison of two numbers.
    """
    rng = random.Random(f"instruct {split} {seed}")
    items = {}
    for task, (make, source) in RLVR_TASKS.items():
        items[source] = draw_items(task, make, split, count, seed)
    comparisons = draw_items("qa", qa_item, split, 500 if split == "val" else count, seed)
    for _ in range(count):
        source = rng.choice(list(items))
        item = next(items[source])
        answer = item.short_answer if rng.random() < short_share else item.answer
        messages = turns(item.prompt, answer)
        if rng.random() < 1 / 8:
            item = next(comparisons, None)
            if item:
                messages += turns(item.prompt, item.answer)
        yield {"messages": messages, "source": source}


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """The messages of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
