"""Conversations to imitate, pairs to prefer, prompts to answer: from rows to arrays of ids.

The layouts are the published ones:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
        SFT
    {"chosen": messages, "rejected": messages}
        reward model, DPO
    {"messages": messages, "ground_truth": "42", "dataset": "gsm8k"}
        preference pairs, RLVR: `dataset` names the verifier
    {"question": "…", "answer": "… #### 42"}
        GSM8K's own, which become RLVR's

They come from .jsonl and .parquet files, from data sets on the Hub, or from the laptop's generators
(embedded/…). Rows that do not fit are named with file and line before anything runs.
"""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from infra.files import (
    ROWS,
    UserError,
    check_library,
    did_you_mean,
    ending,
    join_problems,
    json_lines,
)
from tasks.constraints import verify_constraint
from tasks.own_reward import load_reward, own_score
from tasks.synthetic import instruct_rows, rlvr_rows
from tasks.verifiers import is_right, verify_gsm8k, verify_math
from tokenizer import Tokenizer, check_message


@dataclass(frozen=True)
class Example:
    """A conversation in ids: tokens [T], and which of them count in the loss [T]."""

    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # bool: what the assistant has written

    @property
    def targets(self) -> np.ndarray:
        """The next token where the assistant wrote it, else -100: [T].

        >>> Example(np.array([7, 8, 9]), np.array([False, True, True])).targets.tolist()
        [8, 9, -100]
        """
        targets = np.where(self.loss_mask[1:], self.tokens[1:], -100)
        return np.append(targets, -100)

    @property
    def n_targets(self) -> int:
        return int(self.loss_mask[1:].sum())

    @property
    def n_prompt(self) -> int:
        """Tokens before the assistant's last words."""
        others = np.flatnonzero(~self.loss_mask)
        return int(others[-1]) + 1 if len(others) else 0

    @property
    def prompt(self) -> list[int]:
        """What stands before the assistant's first word."""
        return self.tokens[: int(self.loss_mask.argmax())].tolist()


@dataclass(frozen=True)
class Prompt:
    """What to answer, and how to check the answer."""

    messages: list[dict]
    tokens: list[int]  # rendered, up to and with the assistant's header
    verifier: str  # one of VERIFIERS, or FILE.py:FUNCTION
    label: object  # the right answer, as the verifier takes it
    source: str  # by which it is counted
    exact: str = ""  # the answer word for word, where there is one

    def score(self, answer: str) -> float:
        """The verdict on an answer, from 0 (wrong) to 1 (right)."""
        if self.verifier in VERIFIERS:
            return float(VERIFIERS[self.verifier](answer, self.label))
        return own_score(self.verifier, self.messages, answer, self.label)


# ------------------------------------------------------------------------------------------
# Rows: of files, of the Hub, embedded

# The laptop's data sets, from seeded generators, and their numbers of rows for training.
EMBEDDED = {"embedded/instruct": 16_000, "embedded/sums": 4000, "embedded/constraints": 4000}

Row = tuple[str, dict]  # (where it stands, its content)


@dataclass(frozen=True)
class Source:
    """Which rows to read: files, data sets on the Hub, embedded ones."""

    names: tuple[str, ...]
    seed: int  # of embedded training rows
    # so many rows of each, of an embedded one its held-out split; 0: all, to train on
    held_out: int = 0
    layout: str = "messages"  # of the rows: one of LAYOUTS

    def rows(self) -> list[Row]:
        """All rows, each with the place where it stands. Raises UserError."""
        rows = []
        for name in self.names:
            rows += self.rows_of(name)[: self.held_out or None]
        if self.layout == "messages":
            return rows
        convert = LAYOUTS[self.layout]
        made = parse_rows(rows, lambda row: {"messages": convert(row)})
        return [(where, row) for (where, _), row in zip(rows, made)]

    def rows_of(self, name: str) -> list[Row]:
        if ending(Path(name)) in ROWS:
            if not Path(name).exists():
                raise UserError(f"{name} does not exist")
            return [(f"{name}, line {number}", row) for number, row in json_lines(Path(name))]
        if name in EMBEDDED:
            rows = embedded_rows(name, self.seed, self.held_out)
        else:
            rows = read_table(name)
        return [(f"{name}, row {i}", row) for i, row in enumerate(rows, 1)]


def embedded_rows(name: str, seed: int, held_out: int) -> Iterator[dict]:
    """Rows of a generator: its training rows, or some held-out ones, always the same."""
    place = ("val", held_out, 0) if held_out else ("train", EMBEDDED[name], seed)
    if name == "embedded/instruct":
        return instruct_rows(*place)
    return rlvr_rows("gsm8k" if name == "embedded/sums" else "ifeval", *place)


def read_table(name: str) -> Iterable[dict]:
    """A .parquet file, or the training split of a data set on the Hub. Raises UserError."""
    is_file = name.endswith(".parquet")
    is_hub_name = name.count("/") == 1 and not name.startswith("embedded/")
    if not is_file and (Path(name).exists() or not is_hub_name):
        raise UserError(
            f"{name}{did_you_mean(name, EMBEDDED)}: expected lines of JSON (.jsonl, .json, "
            f".gz, .zst), a .parquet, one of {', '.join(EMBEDDED)}, or a data set on the Hub, as "
            "allenai/RLVR-GSM"
        )
    check_library("datasets", f"{name}: reading .parquet and the Hub")
    import datasets

    try:
        if is_file:
            return datasets.Dataset.from_parquet(name)
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # of the many libraries below
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{name} cannot be read: {reason[:200]}") from None


def parse_rows(rows: list[Row], parse: Callable[[dict], object]) -> list:
    """`parse` of each row. Raises UserError that names the rows of which it does."""
    parsed, problems = [], []
    for where, row in rows:
        try:
            parsed.append(parse(row))
        except UserError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise UserError(join_problems(problems))
    return parsed


def read_messages(row: dict, key: str) -> list[dict]:
    """The conversation under a key of a row. Raises UserError."""
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        hint = ""
        if "conversations" in row:
            hint = ": ShareGPT's layout, see sft's --layout sharegpt"
        elif "instruction" in row:
            hint = ": Alpaca's layout, see sft's --layout alpaca"
        raise UserError(f'expected a list of messages under "{key}", got {str(row)[:60]}{hint}')
    for i, message in enumerate(messages):
        check_message(f'"{key}", message {i}', message)
    return messages


def from_sharegpt(row: dict) -> list[dict]:
    """The messages of {"conversations": [{"from": "human", "value": …}, …]}. Raises UserError."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    roles["system"] = "system"
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise UserError(f'expected a list under "conversations", got {str(row)[:60]}')
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in roles:
            raise UserError(f'expected "from" human, gpt or system, got {str(turn)[:60]}')
        messages.append({"role": roles[turn["from"]], "content": turn.get("value")})
    return messages


def from_alpaca(row: dict) -> list[dict]:
    """The messages of {"instruction": …, "input": …, "output": …}. Raises UserError."""
    asked, more, answer = (row.get(key) or "" for key in ("instruction", "input", "output"))
    if not (asked and all(isinstance(text, str) for text in (asked, more, answer))):
        raise UserError(f"expected texts under instruction and output, got {str(row)[:60]}")
    question = f"{asked}\n\n{more}" if more else asked
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


LAYOUTS: dict[str, Callable[[dict], list[dict]]] = {
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
}

# ------------------------------------------------------------------------------------------
# Examples: SFT, reward model, DPO


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[list[dict]], max_length: int | None
) -> list[Example]:
    """Conversations in ids; the loss mask is on the assistant's words and the EOS after them.

    What the assistant says is encoded apart from what stands before it, as when a model writes it.
    So an answer that begins with a line break does not change the header's last id, as it does when
    all is encoded at once (open-instruct sft_tulu_tokenize_and_truncate_v1; all other conversations
    get the same ids either way). What exceeds max_length is cut on the right; None: nothing.
    """
    examples = []
    hide = int(os.environ.get("RANK", 0)) > 0 or None
    for start in tqdm(range(0, len(conversations), 1000), "encoding", leave=False, disable=hide):
        batch = conversations[start : start + 1000]
        pieces = [tokenizer.chat_pieces(messages) for messages in batch]
        ids = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(pieces))))
        for row in pieces:
            examples.append(join_pieces(list(itertools.islice(ids, len(row))), max_length))
    return examples


def join_pieces(pieces: list[list[int]], max_length: int | None) -> Example:
    """An example of pieces of ids, of which every second one is the assistant's.

    >>> join_pieces([[1, 2], [3], [4]], 9).loss_mask.tolist()
    [False, False, True, False]
    """
    tokens = list(itertools.chain.from_iterable(pieces))
    spoken = [i % 2 == 1 for i in range(len(pieces))]
    mask = np.repeat(np.array(spoken, bool), [len(piece) for piece in pieces])
    return Example(np.array(tokens[:max_length], np.int32), mask[:max_length])


def read_examples(
    source: Source,
    keys: tuple[str, ...],
    tokenizer: Tokenizer,
    max_length: int | None,
    drop: bool,
) -> list[tuple[Example, ...]]:
    """Per row the conversations under `keys`, encoded: ("messages",), or ("chosen", "rejected").

    Raises UserError that names the rows that do not fit and, of those to train on, unless `drop`,
    rows in which there is nothing to learn. Otherwise these are left out.
    """
    rows = source.rows()
    places = [where for where, _ in rows]
    conversations = parse_rows(rows, lambda row: [read_messages(row, key) for key in keys])
    strict = not (drop or source.held_out)
    same = [fault_of_pair(row) for row in conversations]
    if strict and any(same):
        raise UserError(
            f"{name_faults(places, same)}: expected two conversations that differ in their last "
            "message; --drop leaves such rows out"
        )
    flat = list(itertools.chain.from_iterable(conversations))
    encoded = iter(encode_conversations(tokenizer, flat, max_length))
    examples = [tuple(itertools.islice(encoded, len(keys))) for _ in rows]
    empty = [fault_of_labels(*row, max_length) for row in zip(conversations, examples)]
    if strict and any(empty):
        raise UserError(
            f"{name_faults(places, empty)}: remove such rows, lengthen --max-length, or leave "
            "them out with --drop"
        )
    if any(empty):
        print(
            f"          {sum(map(bool, empty)):,} of {len(rows):,} rows teach nothing "
            "and are left out"
        )
    cut = [is_same_pair(row) for row in examples]
    if any(cut):
        print(
            f"          {sum(cut):,} of {len(rows):,} pairs are the same in their first "
            f"{max_length:,} tokens, and are left out"
        )
    return [row for row, *faults in zip(examples, same, empty, cut) if not any(faults)]


def is_same_pair(row: tuple[Example, ...]) -> bool:
    """Is nothing left of what two conversations differ in?"""
    return len(row) == 2 and np.array_equal(row[0].tokens, row[1].tokens)


def name_faults(places: list[str], faults: list[str]) -> str:
    """Where the first faults are, in one line."""
    return join_problems([f"{where}: {fault}" for where, fault in zip(places, faults) if fault])


def fault_of_pair(row: list[list[dict]]) -> str:
    """Why two conversations cannot be compared, or ""."""
    if len(row) == 1:
        return ""
    chosen, rejected = row
    if chosen[:-1] != rejected[:-1]:
        return "the two answer different prompts"
    return "the two answers are the same" if chosen == rejected else ""


def fault_of_labels(
    row: list[list[dict]], examples: tuple[Example, ...], max_length: int | None
) -> str:
    """Why there is nothing to learn from a row, or ""."""
    if all(example.n_targets for example in examples):
        return ""
    for messages in row:
        if not any(message["role"] == "assistant" for message in messages):
            return "no assistant speaks in it"
    return f"no word of the assistant is left in the first {max_length} tokens"


# ------------------------------------------------------------------------------------------
# Prompts: preference pairs, RLVR, held-out questions


# The verifiers by the names in the rows' `dataset`: (answer, label) -> is it right?
VERIFIERS: dict[str, Callable[..., bool]] = {
    "gsm8k": verify_gsm8k,
    "math": verify_math,
    "ifeval": verify_constraint,
    "qa": functools.partial(is_right, "qa"),
    "instruct": functools.partial(is_right, "instruct"),
}


def read_prompts(
    source: Source,
    tokenizer: Tokenizer,
    prompt_length: int = 10**9,
    shots: int = 0,
    verifier: str = "",
) -> list[Prompt]:
    """The prompts of at most `prompt_length` tokens, without a last message of the assistant.

    shots: worked examples before each of GSM8K's own rows, see `with_worked_examples`. verifier:
    FILE.py:FUNCTION that scores all of them, see tasks/own_reward.py. Raises UserError.
    """
    if verifier:
        load_reward(verifier)  # raises if there is none
    rows = with_worked_examples(source.rows(), shots)
    prompts = parse_rows(rows, functools.partial(parse_prompt, tokenizer, verifier))
    if source.names and not prompts:
        raise UserError(f"{', '.join(source.names)}: no row")
    short = [prompt for prompt in prompts if len(prompt.tokens) <= prompt_length]
    if prompts and not short:
        shortest = min(len(prompt.tokens) for prompt in prompts)
        raise UserError(
            f"none of {len(prompts):,} prompts has at most {prompt_length} tokens, the shortest "
            f"has {shortest}: raise --prompt-length, or lower --shots, GSM8K's worked examples"
        )
    if len(short) < len(prompts):
        print(
            f"          {len(prompts) - len(short):,} prompts exceed {prompt_length} tokens "
            "and are left out"
        )
    return short


def parse_prompt(tokenizer: Tokenizer, own_verifier: str, row: dict) -> Prompt:
    """The prompt of a row {messages, ground_truth, dataset}. Raises UserError.

    With a verifier of one's own, `dataset` need not be there, and the label may be anything.
    """
    messages = read_messages(row, "messages")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError("there is no prompt before the assistant's message")
    label = row.get("ground_truth")
    verifier = own_verifier
    if not verifier:
        verifier = str(row.get("dataset", "")).lower()
        label = str(label) if type(label) is int else label
        check_label(verifier, label)
    return Prompt(
        messages=messages,
        tokens=tokenizer.apply_chat_template(messages, add_generation_prompt=True),
        verifier=verifier,
        label=label,
        source=str(row.get("source") or verifier),
        exact=row.get("worked_answer", "") if verifier == "ifeval" else "",
    )


def check_label(verifier: str, label) -> None:
    """Raise UserError for an unknown verifier or a label that it cannot check, before all work."""
    if verifier not in VERIFIERS:
        raise UserError(
            f'"dataset" names the verifier {verifier!r}{did_you_mean(verifier, VERIFIERS)}: '
            f"there are {', '.join(VERIFIERS)}; your own scores all rows with --verifier "
            "my_rewards.py:score (see tasks/own_reward.py)"
        )
    is_constraint = verifier == "ifeval" and isinstance(label, dict)
    if not is_constraint and (not isinstance(label, str) or not label):
        raise UserError(f'expected the right answer, a text, under "ground_truth", got {label!r}')
    if verifier == "gsm8k" and not verify_gsm8k(label, label):
        raise UserError(f'"ground_truth" holds no number for gsm8k to compare: {label[:40]!r}')
    try:
        VERIFIERS[verifier]("x" if verifier == "ifeval" else "", label)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f'"ground_truth" cannot be checked: {error}. A constraint is written as in '
            '{"func_name": "validate_end", "end_phrase": "Bye."}'
        ) from None


def with_worked_examples(rows: list[Row], shots: int) -> list[Row]:
    """GSM8K's own rows as RLVR rows, with the first rows of their file as worked examples.

    The release's prompts have eight (open-instruct create_ground_truth_data.py). The examples are
    not asked. All other rows stay what they are.
    """
    files: dict[str, list[Row]] = {}
    for where, row in rows:
        files.setdefault(where.rpartition(",")[0], []).append((where, row))
    made = []
    for part in files.values():
        if all(is_gsm8k(row) for _, row in part):
            made += gsm8k_prompts(part, shots)
        else:
            made += part
    return made


def is_gsm8k(row: dict) -> bool:
    """Is it {question, answer}, both texts?"""
    return isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)


def gsm8k_prompts(rows: list[Row], shots: int) -> list[Row]:
    """The rows of one file after the first `shots`, which become the examples before each."""
    examples = ""
    for _, row in rows[:shots]:
        examples += f"Question: {row['question']}\nAnswer: {worked_answer(row['answer'])}\n\n"
    made = []
    for where, row in rows[shots:]:
        content = f"{examples}Question: {row['question']}\nAnswer:"
        label = row["answer"].rpartition("####")[2].strip()
        messages = [{"role": "user", "content": content}]
        made.append((where, {"messages": messages, "dataset": "gsm8k", "ground_truth": label}))
    return made


def worked_answer(solution: str) -> str:
    """A solution of GSM8K in one line, without its calculator notes.

    >>> worked_answer("She sold 48/2 = <<48/2=24>>24 clips.\\n#### 24")
    'She sold 48/2 = 24 clips. So the answer is 24.'
    """
    steps, _, result = solution.partition("####")
    plain = " ".join(re.sub(r"<<[^<>]*>>", "", steps).split())
    return f"{plain} So the answer is {result.strip()}."


def fingerprint(rows: Sequence[Prompt] | Sequence[tuple[Example, ...]]) -> str:
    """12 hex digits of what is trained on."""
    digest = hashlib.sha256()
    for row in rows:
        if isinstance(row, Prompt):
            text = json.dumps([row.tokens, row.verifier, row.label], default=str)
            digest.update(text.encode())
        else:
            for example in row:
                digest.update(example.tokens.tobytes() + example.loss_mask.tobytes())
    return digest.hexdigest()[:12]
