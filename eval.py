"""How good is a model? Held-out bits per byte, and exact answers to held-out questions.

    python eval.py                                   # the laptop's pretraining run
    python eval.py runs/tiny/pretrain some/hf/folder --data tokens/shakespeare --json scores.json

One row a model, one column a task. Bits per byte compares models with different tokenizers: the cross-entropy of the
held-out tokens, in bits, over the bytes of text that they stand for (predicting an EOS costs bits and brings no byte).
`math`, `qa` and `instruct` are the generators of data.py on operands that no stage trains on; answers are greedy.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from data import TASKS, TokenData, Tokenizer, embedded_corpus, get_tokenizer, make_targets, task_items, token_files
from model import OLMo2, UserError, best_device, from_all, rank_and_world, run_cli, write_json


@torch.no_grad()
def held_out_sums(model: OLMo2, data: TokenData, max_tokens: int | None = None, batch_tokens: int = 8192) -> tuple[float, int, int]:
    """(cross-entropy in nats, bytes, targets), each summed over the first `max_tokens` tokens of `data` (None: all).

    Every instance is scored alone: its first token is given and not scored, so T - 1 targets per instance. Under torchrun
    the ranks share the instances, and all get the result.
    """
    device = model.lm_head.weight.device
    count = len(data) if max_tokens is None else min(len(data), max(1, max_tokens // data.seq_len))
    if count == 0:
        raise UserError(f"the held-out files hold no instance of {data.seq_len} tokens: {', '.join(map(str, data.files))}")
    (rank, world), batch = rank_and_world(), max(1, batch_tokens // data.seq_len)
    nats, n_bytes, n_targets = 0.0, 0, 0
    for i in range(0, count, batch * world):  # the same number of forwards on every rank, as FSDP needs it
        mine = range(i, min(i + batch * world, count))[rank::world]
        tokens = np.stack([data.instance(j) for j in mine or [0]])
        targets = make_targets(tokens)
        if not mine:
            targets[:] = -100
        ce_sum, _, _ = model.loss(torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device))
        nats += ce_sum.item()
        n_bytes += int(data.tokenizer.byte_counts[tokens[:, 1:]].sum()) if mine else 0
        n_targets += int((targets != -100).sum())
    return tuple(sum(values) for values in zip(*from_all((nats, n_bytes, n_targets))))


def by_source(files: list[Path]) -> dict[str, list[Path]]:
    """{source: files}, the source being the file's name before its number."""
    sources: dict[str, list[Path]] = {}
    for path in files:
        sources.setdefault(re.sub(r"-\d+$", "", path.stem), []).append(path)
    return sources


def bits_per_byte_by_source(model: OLMo2, sources: dict[str, list[Path]], seq_len: int, tokenizer: Tokenizer,
                            max_tokens: int | None = None, shares: dict[str, float] | None = None) -> dict[str, float]:
    """{source: bits per byte}; with `shares` of the tokens, `mix` too, the bits over the bytes of text so composed.

    Raises UserError for a source too short for one instance.
    """
    sums = {source: held_out_sums(model, TokenData(files, seq_len, tokenizer), max_tokens) for source, files in sources.items()}
    bpb = {source: nats / math.log(2) / n_bytes for source, (nats, n_bytes, _) in sums.items()}
    if not (shares and shares.keys() <= sums.keys()):
        return bpb
    per_token = [(share * sums[source][0] / sums[source][2], share * sums[source][1] / sums[source][2]) for source, share in shares.items()]
    nats, n_bytes = map(sum, zip(*per_token))
    return {"mix": nats / math.log(2) / n_bytes, **bpb}


def is_right(task: str, response: str, gold: str) -> bool:
    """math: the last number of the response is the gold one. qa, instruct: the response is the gold answer, a final stop apart.

    >>> is_right("math", " 5 + 7 = 12. 4 + 2 + 1 = 7. The answer is 72.", "72"), is_right("math", " 72 or 73", "72")
    (True, False)
    >>> is_right("qa", " Ada.", "Ada"), is_right("qa", " Ada has the cups.", "Ada")
    (True, False)
    """
    if task == "math":
        return re.findall(r"\d+", response)[-1:] == [gold]
    return response.strip().removesuffix(".") == gold


def accuracy(model: OLMo2, tokenizer: Tokenizer, task: str, count: int = 500, seed: int = 0, batch: int = 250) -> float:
    """Share of `count` held-out items of `task` that the model answers exactly, greedily, in at most 48 tokens."""
    items = list(task_items(task, "val", count, seed))
    right = 0
    for i in tqdm(range(0, count, batch), desc=task, leave=False, disable=rank_and_world()[0] > 0 or None):
        part = items[i : i + batch]
        answers, _ = model.generate([tokenizer.encode(item["prompt"]) for item in part], 48, temperature=0, eos=tokenizer.eos)
        right += sum(is_right(task, tokenizer.decode(t for t in answer if t != tokenizer.eos), item["gold"])
                     for item, answer in zip(part, answers))
    return right / count


@dataclass(frozen=True)
class Config:
    models: tyro.conf.Positional[tuple[str, ...]] = ("runs/tiny/pretrain",)  # runs, checkpoints, Hugging Face directories
    tasks: tuple[str, ...] = ("bpb", "math", "qa")  # bpb: bits per byte of each held-out source; math, qa, instruct: accuracy, %
    data: tuple[str, ...] = ()  # for bpb: token folders (their val/) or files; none: the embedded corpus
    seq_len: int = 0  # tokens of an instance; 0: 256, or the model's context where that is shorter
    questions: int = 500  # held-out questions per task
    device: str = "auto"  # auto, cpu, mps, cuda
    json: str = ""  # write the table here as well


def evaluate(path: str, config: Config) -> dict[str, float]:
    """The columns of one model."""
    model = OLMo2.load(path, device=best_device(config.device))
    tokenizer = get_tokenizer(path)
    columns = {}
    if "bpb" in config.tasks:
        files = by_source(token_files(config.data or [embedded_corpus(tokenizer)], "val"))
        seq_len = config.seq_len or min(256, model.config.context)
        columns |= {f"{source} bpb": bpb for source, bpb in bits_per_byte_by_source(model, files, seq_len, tokenizer).items()}
    for task in config.tasks:
        if task in TASKS:
            columns[f"{task} %"] = 100 * accuracy(model, tokenizer, task, config.questions)
    return columns


def print_table(rows: dict[str, dict[str, float]], digits: int = 3) -> None:
    """One line per row; a column for every name that any row has, % with one digit and all else with `digits`."""
    width = max(len(row) for row in rows)
    names = list(dict.fromkeys(name for columns in rows.values() for name in columns))
    print(" " * width + "".join(f"{name:>{max(10, len(name) + 2)}}" for name in names))
    for row, columns in rows.items():
        print(f"{row:{width}}" + "".join(
            f"{format(columns[name], '.1f' if '%' in name else f'.{digits}f') if name in columns else '-':>{max(10, len(name) + 2)}}"
            for name in names))


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    if unknown := set(config.tasks) - {"bpb", *TASKS}:
        raise UserError(f"unknown task {', '.join(sorted(unknown))}: choose from bpb, {', '.join(TASKS)}")
    if config.questions < 1 or config.seq_len < 0:
        raise UserError(f"--questions {config.questions} must be at least 1, --seq-len {config.seq_len} at least 0")
    if config.json:  # before the work, not after it
        try:
            Path(config.json).parent.mkdir(parents=True, exist_ok=True)
            open(config.json, "a").close()  # what stands there stays until there is something better
        except OSError as error:
            raise UserError(f"cannot write {config.json}: {error.strerror}") from None
    table = {path: evaluate(path, config) for path in config.models}
    print_table(table)
    if config.json:
        write_json(Path(config.json), table)


if __name__ == "__main__":
    run_cli(main)
