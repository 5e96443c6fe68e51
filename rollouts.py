"""Answers of a model to prompts, sampled and verified: what all stages of post-training write.

    completions = generate_completions(model, tokenizer, prompts, seeds, 1.0, 2048)

The ranks share the work, and all get all answers. An answer depends on its prompt, its seed and the
weights alone: not on its company, and not on where it is sampled. Who samples, is one of three:

1. the servers of --rollouts (servers.py), to which the weights go first;
2. each rank, with all weights: gathered once, in bf16 on a GPU, for all answers;
3. each rank, with its shards: every forward gathers the weights anew, a block at a time. It takes
   no memory and much time, and is chosen where the weights do not fit on a GPU.
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from decode import rows_that_fit, whole_copy_fits
from infra.distributed import all_gather_objects, map_over_ranks, rank_and_world
from infra.sharding import inference
from likelihood import length_sorted_batches, say_once
from model import OLMo2
from tasks.conversations import Example, Prompt
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """An answer that a model has written."""

    example: Example  # the prompt with its answer, which is what counts
    log_probs: Tensor  # of the targets, as they were sampled [T], 0 elsewhere
    text: str  # without EOS
    ended: bool  # by EOS, in time
    score: float  # the verifier's, from 0 (wrong) to 1 (right)

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return int(self.example.loss_mask.sum())


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    temperature: float
    max_new_tokens: int
    eos: int
    name: str = ""  # of the progress bar; none: no bar


Written = tuple[list[int], list[float]]  # the ids of an answer, and their log-probabilities

# ------------------------------------------------------------------------------------------
# Verified answers


def generate_completions(
    model: OLMo2,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    seeds: list[int],
    temperature: float,
    max_new_tokens: int,
    name: str = "",
) -> list[Completion]:
    """An answer to each prompt, verified. All ranks share the work, and all get all answers.

    Row i draws from seeds[i] alone. name: of the progress bar; none: no bar.
    """
    how = Sampling(temperature, max_new_tokens, tokenizer.eos, name)
    work = functools.partial(complete_rows, model, tokenizer, how)
    return map_over_ranks(list(zip(prompts, seeds)), work)


def complete_rows(
    model: OLMo2, tokenizer: Tokenizer, how: Sampling, rows: list[tuple[Prompt, int]]
) -> list[Completion]:
    """This rank's part of `generate_completions`: rows of a prompt and a seed."""
    asked = [(prompt.tokens, seed) for prompt, seed in rows]
    written = write_answers(model, how, asked)
    return [complete_prompt(prompt, *made, tokenizer) for (prompt, _), made in zip(rows, written)]


def complete_prompt(
    prompt: Prompt, ids: list[int], log_probs: list[float], tokenizer: Tokenizer
) -> Completion:
    """A verified completion, of what a model has written."""
    n_prompt = len(prompt.tokens)
    tokens = np.array(prompt.tokens + ids, np.int32)
    ended = ids[-1] == tokenizer.eos
    text = tokenizer.decode(ids[:-1] if ended else ids)
    return Completion(
        example=Example(tokens, np.arange(len(tokens)) >= n_prompt),
        log_probs=F.pad(torch.tensor(log_probs), (n_prompt - 1, 1)),
        text=text,
        ended=ended,
        score=prompt.score(text.strip()),
    )


def sampling_seed(seed: int, step: int, row: int) -> int:
    """The seed of an answer: of the run, the step and the answer's place in it, on any rank.

    63 bits of a hash, as servers take no more. No two answers of a run share one, but by a chance
    of one in 10^9 for 100,000 answers.

    >>> sampling_seed(1, 0, 0) == sampling_seed(1, 0, 0), sampling_seed(1, 0, 1) < 2**63
    (True, True)
    """
    digest = hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def score_completions(
    model: OLMo2, tokenizer: Tokenizer, questions: list[Prompt], max_new_tokens: int
) -> dict[str, float]:
    """Scores of greedy answers to held-out prompts; {} without prompts. All ranks share the work.

    <source> %: right. exact %: right word for word, where that is known. format %: ends, and looks
    like an answer in a conversation. length: mean, in tokens.
    """
    if not questions:
        return {}
    seeds = [0] * len(questions)
    completions = generate_completions(
        model, tokenizer, questions, seeds, 0.0, max_new_tokens, "held-out prompts"
    )
    # All sources at once, so that `exact` comes after them.
    hits: dict[str, list[float]] = {f"{question.source} %": [] for question in questions}
    for question, completion in zip(questions, completions):
        hits[f"{question.source} %"].append(completion.score)
        if question.exact:
            hits.setdefault("exact %", []).append(completion.text.strip() == question.exact)
    hits["format %"] = [made.ended and "<|" not in made.text for made in completions]
    columns = {name: 100 * float(np.mean(values)) for name, values in hits.items()}
    return columns | {"length": float(np.mean([made.length for made in completions]))}


# ------------------------------------------------------------------------------------------
# Who samples


def write_answers(model: OLMo2, how: Sampling, rows: list[tuple[list[int], int]]) -> list[Written]:
    """The answers to rows of a prompt and a seed. All ranks call it, with equally many rows."""
    if model.servers:
        model.servers.update(model)
        prompts = [prompt for prompt, _ in rows]
        seeds = [seed for _, seed in rows]
        made = model.servers.generate(
            prompts, how.max_new_tokens, how.temperature, eos=how.eos, seed=seeds
        )
        return list(zip(*made))
    longest = max([len(prompt) for prompt, _ in rows], default=0) + how.max_new_tokens
    whole = all(all_gather_objects(whole_copy_fits(model, longest)))
    if not whole:
        say_once("sampling over the shards, as a GPU cannot hold all weights: slow, see --rollouts")
    return sample_here(model, how, rows, longest, whole)


def sample_here(
    model: OLMo2, how: Sampling, rows: list[tuple[list[int], int]], longest: int, whole: bool
) -> list[Written]:
    """`write_answers` by this process: with all weights, or with its shards.

    With shards all ranks take part in each forward, so they must have equally many: batches of the
    same size, and no rank ends a batch before the others do.
    """
    made: list[Written] = [None] * len(rows)
    lengths = [len(prompt) for prompt, _ in rows]
    hide = not how.name or rank_and_world()[0] > 0 or None
    with inference(model, gather=whole):
        size = rows_that_fit(model, longest)
        if not whole:
            size = min(all_gather_objects(size))
        for which in tqdm(
            length_sorted_batches(lengths, size), how.name, leave=False, disable=hide
        ):
            ids, log_probs = model.generate(
                [rows[n][0] for n in which],
                how.max_new_tokens,
                how.temperature,
                eos=how.eos,
                seed=[rows[n][1] for n in which],
                together=not whole,
            )
            for n, *written in zip(which, ids, log_probs):
                made[n] = tuple(written)
    return made
