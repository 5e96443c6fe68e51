"""How a model answers the questions of a benchmark, and what its answers are worth.

Multiple choice and TruthfulQA are log-likelihoods (likelihood.py); all else is generated, greedily.
An instruct model is asked in a conversation. The questions come from tasks/benchmarks.py.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from data import Tokenizer
from decode import decode_steps, rows_that_fit
from infra.files import UserError
from likelihood import (
    MAX_LENGTH,
    batch_tokens,
    length_sorted_batches,
    loglikelihoods,
    note_shortened,
    say_once,
)
from model import OLMo2
from tasks.benchmarks import (
    Part,
    Questions,
    Task,
    choice_columns,
    mean_columns,
    multiple_choice,
    truthful_columns,
)
from tasks.flex_match import flex_math
from tasks.ifeval import verify_ifeval
from tasks.mathematics import final_answer, verify_math
from tasks.requests import Request, as_conversation

SERVED_ROWS = 1024  # answers that servers are asked for at a time: so often the bar moves
Done = Callable[[Sequence[int]], None]  # is told which requests of a part are done

# ------------------------------------------------------------------------------------------
# Generation


def complete(
    model: OLMo2,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: tuple[str, ...] = (),
    name: str = "prompts",
    done: Done | None = None,
) -> list[str]:
    """The greedy continuation of each prompt (ids), up to EOS, a stop string or max_new_tokens.

    A prompt keeps its last tokens where the context has no room for all of it and the answer; how
    many prompts this shortens is printed under `name`. done: is told of each batch, else a bar is
    shown.
    """
    if not prompts:
        return []
    max_new_tokens = min(max_new_tokens, model.config.context // 2)
    room = min(MAX_LENGTH, model.config.context - max_new_tokens)
    note_shortened(name, [len(prompt) > room for prompt in prompts], room)
    prompts = [prompt[-room:] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths) + max_new_tokens
    rows = min(max(16, batch_tokens(model) // longest), rows_that_fit(model, longest))
    if model.servers:
        rows = SERVED_ROWS
    batches = length_sorted_batches(lengths, rows)
    texts = [""] * len(prompts)
    for batch in tqdm(batches, desc=name, leave=False, disable=True if done else None):
        asked = [prompts[i] for i in batch]
        for i, text in zip(batch, complete_batch(model, tokenizer, asked, max_new_tokens, stops)):
            texts[i] = text
        if done:
            done(batch)
    return texts


def complete_batch(
    model: OLMo2,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: tuple[str, ...],
) -> list[str]:
    """`complete` for prompts that are continued together."""
    stops = tuple(filter(None, stops))
    if model.servers:
        made, _ = model.servers.generate(
            prompts, max_new_tokens, 0.0, eos=tokenizer.eos, stops=stops
        )
        answers = []
        for ids in made:
            kept = [token for token in ids if token != tokenizer.eos]
            answers.append(b"".join(map(tokenizer.token_bytes, kept)))
    else:
        answers = complete_here(model, tokenizer, prompts, max_new_tokens, stops)
    texts = [answer.decode("utf-8", errors="replace") for answer in answers]
    if stops:
        first_stop = "|".join(map(re.escape, stops))
        texts = [re.split(first_stop, text, maxsplit=1)[0] for text in texts]
    return texts


def complete_here(
    model: OLMo2,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: tuple[str, ...],
) -> list[bytes]:
    """The bytes of each continuation, up to EOS or the token that completes a stop string."""
    ends = [stop.encode() for stop in stops]
    answers = [bytearray() for _ in prompts]

    def ended(row: int, token: int) -> bool:
        return any(end in answers[row] for end in ends)

    steps = decode_steps(
        model, prompts, max_new_tokens, temperature=0, eos=tokenizer.eos, ended=ended
    )
    for rows, tokens, _ in steps:
        for row, token in zip(rows, tokens):
            if token != tokenizer.eos:
                answers[row] += tokenizer.token_bytes(token)
    return [bytes(answer) for answer in answers]


# ------------------------------------------------------------------------------------------
# Prompts


def prompt_text(tokenizer: Tokenizer, request: Request, turns: tuple[str, str] | None) -> str:
    """What a model is given: a request's context or, of an instruct model, a rendered conversation.

    turns: how shots and answers begin, see `as_conversation`. Raises UserError for a request that
    is a conversation, if the model is no instruct model.
    """
    messages = [{"role": role, "content": content} for role, content in request.messages]
    if messages and not tokenizer.instruct:
        raise UserError("its requests are conversations, which only an instruct model can be asked")
    if not messages and turns and tokenizer.instruct:
        messages = as_conversation(request.context, *turns)
    if not messages:
        return request.context
    return tokenizer.render_chat(messages, add_generation_prompt=True) + request.prefix


def stops_of(tokenizer: Tokenizer, task: Task, request: Request) -> tuple[str, ...]:
    """The strings that end an answer."""
    if request.messages:
        return request.stops
    if tokenizer.instruct and task.turns:
        return ()  # an instruct model ends its turn itself, and may leave lines blank
    return task.stops or request.stops


# ------------------------------------------------------------------------------------------
# The columns of a benchmark


def answer_questions(
    model: OLMo2, tokenizer: Tokenizer, questions: Questions, done: Callable[[float], None]
) -> dict[str, float]:
    """The columns of a benchmark; names with ":" are details. Raises UserError.

    done: is told how much more of the work (see `work_of`) is done.
    """
    missing = questions.missing()
    if missing:
        expected = questions.task.expected()
        kind = "subjects" if questions.name.startswith("mmlu") else "subtasks"
        say_once(f"{questions.name}: {expected - missing} of {expected} {kind}")
    match questions.task.form:
        case "choice" | "letters":
            return answer_choices(model, tokenizer, questions, done)
        case "truth":
            return answer_truthfully(model, tokenizer, questions, done)
        case "program":
            return answer_ifeval(model, tokenizer, questions, done)
    return answer_freely(model, tokenizer, questions, done)


def name_of(questions: Questions, part: Part) -> str:
    """What to call a part in a note or an error."""
    name = f"{questions.name}:{part.form}" if part.form else questions.name
    return f"{name} {part.subtask}".strip()


def reporter(part: Part, task: Task, done: Callable[[float], None]) -> Done:
    """What tells `done` of requests by their numbers."""
    work = work_of(part, task)

    def report(indices: Sequence[int]) -> None:
        done(sum(work[i] for i in indices))

    return report


def answer_choices(
    model: OLMo2, tokenizer: Tokenizer, questions: Questions, done: Callable[[float], None]
) -> dict[str, float]:
    """The columns of multiple choice: the better form counts, each the mean over its subtasks."""
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    details = {}
    for part in questions.parts:
        pairs = [(request.context, request.continuation) for request in part.requests]
        report = reporter(part, questions.task, done)
        values = loglikelihoods(model, tokenizer, pairs, name_of(questions, part), report)
        columns = multiple_choice(part.requests, values, tokenizer)
        scores.setdefault((part.form, part.selector), []).append(columns)
        if part.subtask:
            detail = f"{questions.name}:{part.form} {part.subtask} %"
            details[detail] = columns[f"{part.selector} %"]
    mean = questions.task.mean
    forms = [(*form, mean_columns(subtasks, mean)) for form, subtasks in scores.items()]
    return choice_columns(questions.name, forms) | details


def answer_truthfully(
    model: OLMo2, tokenizer: Tokenizer, questions: Questions, done: Callable[[float], None]
) -> dict[str, float]:
    """The columns of TruthfulQA: MC2."""
    (part,) = questions.parts
    pairs = []
    for request in part.requests:
        text = prompt_text(tokenizer, request, None)
        # After a template there is no space before an answer, as olmes has it.
        bare = request.messages and not request.prefix
        continuation = request.continuation.lstrip() if bare else request.continuation
        pairs.append((text, continuation))
    report = reporter(part, questions.task, done)
    values = loglikelihoods(model, tokenizer, pairs, questions.name, report)
    columns = truthful_columns(part.requests, values)
    name = questions.name
    return {f"{name} %": columns["mc2 %"], f"{name}:questions": columns["questions"]}


def answer_freely(
    model: OLMo2, tokenizer: Tokenizer, questions: Questions, done: Callable[[float], None]
) -> dict[str, float]:
    """The mean score of generated answers, over subtasks if there are any."""
    scores = []
    details = {}
    for part in questions.parts:
        columns = generate_part(model, tokenizer, questions, part, done)
        scores.append(columns)
        if part.subtask:
            details[f"{questions.name}:{part.subtask} %"] = columns["%"]
    means = mean_columns(scores, questions.task.mean)
    name = questions.name
    # MATH has beside the published rule the one that rewards use.
    mended = {f"{name}:mended %": means["mended %"]} if "mended %" in means else {}
    columns = {f"{name} %": means["%"], f"{name}:questions": means["questions"]}
    return columns | mended | details


def generate_part(
    model: OLMo2,
    tokenizer: Tokenizer,
    questions: Questions,
    part: Part,
    done: Callable[[float], None],
) -> dict[str, float]:
    """{"%": mean score of a part's responses, "questions"}, of MATH also {"mended %"}."""
    task = questions.task
    requests = part.requests
    limits = [task.max_new_tokens or request.max_new_tokens for request in requests]
    if 0 in limits:
        raise UserError(
            f"question {requests[limits.index(0)].doc} has no max_gen_toks, so it is not for "
            f"generation: see {questions.files[0]}"
        )
    texts = [prompt_text(tokenizer, request, task.turns) for request in requests]
    prompts = [tokenizer.encode(text) for text in texts]
    stops = stops_of(tokenizer, task, requests[0])
    name = name_of(questions, part)
    report = reporter(part, task, done)
    responses = complete(model, tokenizer, prompts, max(limits), stops, name, report)
    is_math = task.score is flex_math
    labels = [math_label(request) if is_math else request.label for request in requests]
    answers = list(zip([response.strip() for response in responses], labels))
    columns = {"%": mean_percent(task.score, answers), "questions": len(answers)}
    if is_math:
        columns["mended %"] = mean_percent(verify_math, answers)
    return columns


def math_label(request: Request) -> str:
    """The answer in a solution: labels went through an old normalisation (\\infty is \\iny)."""
    return final_answer(request.continuation) if request.continuation else request.label


def mean_percent(verify: Callable, answers: list[tuple[str, str]]) -> float:
    """100 times the mean verdict of a verifier on pairs of response and label."""
    return 100 * float(np.mean([float(verify(*answer)) for answer in answers]))


def answer_ifeval(
    model: OLMo2, tokenizer: Tokenizer, questions: Questions, done: Callable[[float], None]
) -> dict[str, float]:
    """IFEval: % of prompts with all instructions followed, loosely, as OLMo 2 reports it.

    The details: also strictly, and % of instructions.
    """
    (part,) = questions.parts
    rows = part.requests
    prompts = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.render_chat(messages, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text if tokenizer.instruct else row["prompt"]))
    report = reporter(part, questions.task, done)
    longest = questions.task.max_new_tokens
    responses = complete(model, tokenizer, prompts, longest, name="ifeval", done=report)
    columns = {}
    for mode in ("loose", "strict"):
        followed = [
            follow(row, response, mode == "loose") for row, response in zip(rows, responses)
        ]
        columns[f"ifeval:prompt {mode} %"] = 100 * float(np.mean(list(map(all, followed))))
        columns[f"ifeval:instruction {mode} %"] = 100 * float(np.mean(sum(followed, [])))
    columns["ifeval:questions"] = len(rows)
    return {"ifeval %": columns["ifeval:prompt loose %"], **columns}


def follow(row: dict, response: str, loose: bool) -> list[bool]:
    """Which of the instructions of a prompt a response follows."""
    instructions = zip(row["instruction_id_list"], row["kwargs"])
    return [verify_ifeval(response, *instruction, loose) for instruction in instructions]


# ------------------------------------------------------------------------------------------
# How much work it is

CHARACTERS = 4  # of a token, about


def work_of(part: Part, task: Task) -> list[float]:
    """About how many tokens each request of a part costs: those to read, and those to write.

    What a context shares with the one before it, as few-shot examples, is read once.
    """
    work = []
    before = ""
    for request in part.requests:
        if isinstance(request, dict):  # IFEval
            work.append(len(request["prompt"]) / CHARACTERS + task.max_new_tokens)
            continue
        spoken = request.context or "".join(content for _, content in request.messages)
        shared = 0 if task.score else shared_length(before, spoken)
        new = len(spoken) - shared + len(request.continuation) * (not task.score)
        written = (task.max_new_tokens or request.max_new_tokens) if task.score else 0
        work.append(new / CHARACTERS + written)
        before = spoken
    return work


def shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common.

    >>> shared_length("abc", "abd"), shared_length("abc", "abc"), shared_length("", "a")
    (2, 3, 0)
    """
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves, as slices compare faster than characters one by one
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def total_work(questions: Questions) -> float:
    """About how many tokens a benchmark costs."""
    return sum(sum(work_of(part, questions.task)) for part in questions.parts)
