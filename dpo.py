"""Prefer answers: preference pairs, the reward model, DPO.

    python posttrain.py prefs       # laptop: pairs from the SFT model's own answers
    python posttrain.py dpo         # raise the better answer above the other
    python posttrain.py rm          # a reward model, from which PPO's value model starts
    python posttrain.py dpo --data pairs.jsonl --init runs/mine/sft --out runs/mine/dpo

What these stages teach: which of two answers is better is easier to say than what a good answer is.
DPO moves the policy itself by such pairs; a reward model turns them into a number for any answer.

Shapes: B pairs, T tokens; a mask [B, T] is 1.0 where a token counts.
"""

import functools
import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.checkpoint import find_weights
from infra.distributed import (
    all_gather_objects,
    checksum,
    on_rank_zero,
    run_on_all_ranks,
)
from infra.files import UserError, json_lines, write_text
from infra.run import Run
from infra.settings import Length, NotNegative, Positive
from infra.sharding import all_reduce_when
from model import OLMo2
from pretrain import set_lr, what_is_trained
from rollouts import Completion, sampling_seed
from sft import (
    HeldOut,
    SamplingSettings,
    StageSettings,
    batch_indices,
    begin_stage,
    connect_servers,
    count_tokens,
    finish_stage,
    held_out_rows,
    instruct_tokenizer,
    load_model,
    lr_at,
    make_optimizer,
    micro_batches,
    number_of_steps,
    record_columns,
    record_eval,
    sample_groups,
    score_rows,
    take_step,
)
from shape import read_config
from tasks.conversations import (
    Example,
    Prompt,
    Source,
    fingerprint,
    read_examples,
    read_prompts,
)
from tokenizer import Tokenizer

Pairs = list[tuple[Example, Example]]  # (chosen, rejected)

# ------------------------------------------------------------------------------------------
# Objectives


def sequence_scores(log_probs: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """S(y) [B] of log-probabilities [B, T]: their sum over the mask or, if `normalize`, their mean.

    OLMo 2's `dpo_norm` takes the mean.

    >>> sequence_scores(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1.0, 1.0, 0.0]]), True)
    tensor([-1.5000])
    """
    total = (log_probs * mask).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if normalize else total


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, reward of the chosen, reward of the rejected, [B] each, from scores S(y) [B].

        loss = -log sigmoid(reward(chosen) - reward(rejected)),  reward(y) = beta (S(y) - S_ref(y))

    Source: DPO (arXiv 2305.18290) equations 5 and 7; open-instruct dpo_utils.py. With S the mean
    over tokens it is `dpo_norm` (TRL: sigmoid_norm), where beta 5 is what some 0.05 to 0.1 is with
    sums.

    >>> scores = [torch.tensor([x]) for x in (-1.0, -2.0, -1.5, -1.5)]
    >>> loss, chosen_reward, rejected_reward = dpo_loss(*scores, beta=5.0)
    >>> chosen_reward, rejected_reward, loss            # -log sigmoid(5 * 1)
    (tensor([2.5000]), tensor([-2.5000]), tensor([0.0067]))
    """
    chosen_reward = beta * (chosen - reference_chosen)
    rejected_reward = beta * (rejected - reference_rejected)
    loss = -F.logsigmoid(chosen_reward - rejected_reward)
    return loss, chosen_reward.detach(), rejected_reward.detach()


def reward_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry, [B]: -log sigmoid(r(chosen) - r(rejected)), without margin or centring.

    Source: Tulu 3 (arXiv 2411.15124) equation 2; open-instruct reward_modeling.py.

    >>> reward_loss(torch.tensor([1.0]), torch.tensor([1.0]))         # that of a coin
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen - rejected)


# ------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class PairSettings(StageSettings):
    """Rows {chosen: messages, rejected: messages}."""

    # pairs per optimizer step, over all processes
    batch: Positive = 128
    # times that each row is seen
    epochs: Positive = 1
    # leave out rows in which there is nothing to compare, instead of naming them
    drop: bool = False


@dataclass(frozen=True)
class RewardModelSettings(PairSettings):
    """Reward model (open-instruct reward_modeling.py)."""

    # pairs per optimizer step, over all processes
    batch: Positive = 256
    # tokens of a prompt; pairs with a longer one are left out, and nothing is cut
    prompt_length: Positive = 2048
    # of AdamW: decay of all weights (torch's default, which was left as it is)
    weight_decay: NotNegative = 0.01


@dataclass(frozen=True)
class DPOSettings(PairSettings):
    """Direct preference optimization (open-instruct dpo_tune_cache.py)."""

    # tokens of a conversation; what is longer loses its end
    max_length: Length = 2048
    # with --normalize; 0.1 is usual without
    beta: NotNegative = 5.0
    # scores are means over tokens (dpo_norm), not sums
    normalize: bool = True


@dataclass(frozen=True)
class PrefsSettings(SamplingSettings):
    """Preference pairs from the model's own answers: the best one against a worse one."""

    # answers per prompt (open-instruct synth_pref/README.md)
    samples: Positive = 4
    # a reward model that scores the answers; none: each row's verifier
    judge: str = ""


# ------------------------------------------------------------------------------------------
# DPO


def train_dpo(c: DPOSettings, run: Run) -> None:
    """Raise the chosen answers above the rejected ones, as seen from a fixed reference.

    The reference is the model at the start; its scores are computed once (open-instruct
    dpo_tune_cache.py).
    """
    tokenizer = instruct_tokenizer(c, c.init)
    pairs = read_pairs(Source(c.data, c.seed), c, tokenizer, c.max_length)
    val = read_pairs(held_out_rows(c, c.val), c, tokenizer, c.max_length)
    questions = run_on_all_ranks(read_prompts, held_out_rows(c, c.quiz), tokenizer)
    held_out = HeldOut(tokenizer, val, questions)
    steps = number_of_steps(c, len(pairs), c.batch, c.epochs)
    model = load_model(c, c.init, run, longest=c.max_length)
    model.servers = connect_servers(c, run)
    optimizer = make_optimizer(model, c)
    score = functools.partial(dpo_scores, model, c.normalize)
    # [2, pairs]: now, a state may replace the weights
    reference = score_pairs(model, pairs, c, score)
    reference_val = score_pairs(model, val, c, score)
    begin_stage(c, run, what_is_trained(model, optimizer, tokenizer), pairs, c.batch, steps)

    def evaluate() -> None:
        columns = {}
        if val:
            scores = score_pairs(model, val, c, score)
            columns = pair_columns(*dpo_loss(*scores, *reference_val, c.beta))
        record_eval(c, run, model, held_out, columns)

    if run.evaluation_owed(steps):
        evaluate()
    for step in run.steps(steps):
        # 1. learning rate
        lr = lr_at(step, steps, c)
        set_lr(optimizer, lr)

        # 2. gradient, a micro-batch at a time
        numbers = batch_indices(len(pairs), c.batch, step, c.seed)
        batch = [pairs[n] for n in numbers]
        _, n_tokens = count_tokens(batch)
        for which, *inputs, is_last in micro_batches(batch, c.micro_tokens, run.device):
            all_reduce_when(is_last, model)
            chosen, rejected = score(*inputs).chunk(2)  # [b] each, of [2 b, T]
            reference_scores = reference[:, numbers[which]].to(run.device)  # [2, b]
            loss, chosen_reward, rejected_reward = dpo_loss(
                chosen, rejected, *reference_scores, c.beta
            )
            (loss.sum() / c.batch).backward()
            add_pairs(run, loss, chosen_reward, rejected_reward, c.batch)
        sums = run.all_sum()

        # 3. clip and step
        grad_norm = take_step(model, optimizer, c.clip)

        # 4. log, save, evaluate
        log_pairs(run, n_tokens, sums, lr, grad_norm)
        if run.save_due():
            run.save()
        if run.evaluation_due():
            evaluate()
    finish_stage(run)


def dpo_scores(model: OLMo2, normalize: bool, tokens: Tensor, targets: Tensor) -> Tensor:
    """S(y) of b chosen, then of b rejected conversations [2 b]: one forward for both."""
    return sequence_scores(model.log_probs(tokens, targets), (targets != -100).float(), normalize)


# ------------------------------------------------------------------------------------------
# The reward model


def train_reward_model(c: RewardModelSettings, run: Run) -> None:
    """Train a head of one column, read at the last token of a conversation, on the SFT model.

    Conversations are whole, and without BOS. Source: open-instruct reward_modeling.py.
    """
    tokenizer = instruct_tokenizer(c, c.init, chat_bos=False)
    model = load_model(c, c.init, run, longest=c.prompt_length, head="score")
    pairs = read_whole_pairs(Source(c.data, c.seed), c, tokenizer, model.config.context)
    val = read_whole_pairs(held_out_rows(c, c.val), c, tokenizer, model.config.context)
    steps = number_of_steps(c, len(pairs), c.batch, c.epochs)
    optimizer = make_optimizer(model, c)
    score = functools.partial(reward_scores, model)
    begin_stage(c, run, what_is_trained(model, optimizer, tokenizer), pairs, c.batch, steps)

    def evaluate() -> None:
        if val:
            chosen, rejected = score_pairs(model, val, c, score)
            record_columns(run, pair_columns(reward_loss(chosen, rejected), chosen, rejected))

    if run.evaluation_owed(steps):
        evaluate()
    for step in run.steps(steps):
        # 1. learning rate
        lr = lr_at(step, steps, c)
        set_lr(optimizer, lr)

        # 2. gradient, a micro-batch at a time
        numbers = batch_indices(len(pairs), c.batch, step, c.seed)
        batch = [pairs[n] for n in numbers]
        _, n_tokens = count_tokens(batch)
        for _, *inputs, is_last in micro_batches(batch, c.micro_tokens, run.device):
            all_reduce_when(is_last, model)
            chosen, rejected = score(*inputs).chunk(2)  # [b] each, of [2 b, T]
            loss = reward_loss(chosen, rejected)
            (loss.sum() / c.batch).backward()
            add_pairs(run, loss, chosen, rejected, c.batch)
        sums = run.all_sum()

        # 3. clip and step
        grad_norm = take_step(model, optimizer, c.clip)

        # 4. log, save, evaluate
        log_pairs(run, n_tokens, sums, lr, grad_norm)
        if run.save_due():
            run.save()
        if run.evaluation_due():
            evaluate()
    finish_stage(run)


def reward_scores(model: OLMo2, tokens: Tensor, targets: Tensor) -> Tensor:
    """[2 b], at the assistant's last token, the final EOS."""
    last = last_target_index(targets) + 1  # position t of the targets holds token t + 1
    return model.scores(tokens).gather(1, last[:, None])[:, 0]


def last_target_index(targets: Tensor) -> Tensor:
    """Where each row of targets [B, T] has its last one: [B].

    >>> last_target_index(torch.tensor([[-100, 7, 8, -100]]))
    tensor([2])
    """
    return (targets != -100).long().cumsum(1).argmax(1)


# ------------------------------------------------------------------------------------------
# What both share


def read_pairs(
    source: Source, c: PairSettings, tokenizer: Tokenizer, max_length: int | None
) -> Pairs:
    """Chosen and rejected conversations, on every rank. Raises UserError."""
    return run_on_all_ranks(
        read_examples, source, ("chosen", "rejected"), tokenizer, max_length, c.drop
    )


def read_whole_pairs(
    source: Source, c: RewardModelSettings, tokenizer: Tokenizer, context: int
) -> Pairs:
    """Pairs of which nothing is cut; those with a long prompt, or too long at all, are left out."""
    pairs = read_pairs(source, c, tokenizer, max_length=None)
    kept = []
    for pair in pairs:
        prompt = max(example.n_prompt for example in pair)
        longest = max(len(example.tokens) for example in pair)
        if prompt <= c.prompt_length and longest <= context:
            kept.append(pair)
    if len(kept) < len(pairs):
        print(
            f"          {len(pairs) - len(kept):,} of {len(pairs):,} pairs have a prompt of more "
            f"than {c.prompt_length:,} tokens, or more than the model's {context:,} in all, and "
            "are left out"
        )
    return kept


def score_pairs(model: OLMo2, pairs: Pairs, c: StageSettings, score) -> Tensor:
    """[2, pairs]: the scores of all chosen, then of all rejected ones; all ranks share the work."""
    rows = score_rows(model, pairs, c, score)
    return torch.stack(rows, dim=1) if rows else torch.empty(2, 0)


def add_pairs(run: Run, loss: Tensor, chosen: Tensor, rejected: Tensor, batch: int) -> None:
    """Add a micro-batch's loss and rewards [b], as shares of the mean over the step's pairs."""
    run.add(
        loss=loss.sum() / batch,
        chosen_reward=chosen.sum() / batch,
        rejected_reward=rejected.sum() / batch,
        accuracy=(chosen > rejected).sum() / batch,
    )


def log_pairs(
    run: Run, n_tokens: float, sums: dict[str, float], lr: float, grad_norm: float
) -> None:
    """Log a step: means over its pairs, and the margin between the rewards."""
    margin = sums["chosen_reward"] - sums["rejected_reward"]
    run.log(
        n_tokens,
        skipped=not math.isfinite(grad_norm),
        **sums,
        margin=margin,
        lr=lr,
        grad_norm=grad_norm,
    )


def pair_columns(loss: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Of held-out pairs: means of loss and margin, and how often the chosen one is ahead."""
    return {
        "loss": loss.mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "accuracy %": 100 * (chosen > rejected).float().mean().item(),
    }


# ------------------------------------------------------------------------------------------
# Preference pairs


def make_preference_pairs(c: PrefsSettings, run: Run) -> None:
    """Let the model answer each prompt several times; pair the best answer with a worse one.

    Writes train.jsonl and, where there are held-out prompts, val.jsonl, in the layout of the
    released mixes (parse_preferences.py). A step is the answers to --prompts prompts; what is
    written is not made again.
    """
    tokenizer = instruct_tokenizer(c, c.init)
    splits = read_splits(c, tokenizer)
    longest = c.prompt_length + c.response_length
    model = load_model(c, c.init, run, longest, frozen=True)
    model.servers = connect_servers(c, run, longest)
    judge = load_judge(c, run, longest) if c.judge else None
    weights = [checksum(dict(m.named_parameters())) for m in (model, judge) if m]
    prompts = list(itertools.chain.from_iterable(splits.values()))
    data = {"hash": fingerprint(prompts), "files": list(c.data), "rows": len(splits["train"])}
    run.enter({"stage": "prefs", **data}, start="-".join(weights))

    parts = list_parts(run.folder, splits, c.prompts)
    merged = {split: run.folder / f"{split}.jsonl" for split in splits}
    run.begin(all_gather_objects(count_done(merged, parts))[0])
    maker = PairMaker(c, model, judge, tokenizer)
    print(
        f"run       {run.folder}{', going on' if run.step else ''}\n"
        f"model     {c.init}: {c.samples} answers to each of {len(prompts):,} prompts",
        flush=True,
    )
    for step in run.steps(len(parts)):
        part = parts[step]
        rows = maker.build_pairs(part.prompts, step)
        run.all_sum()  # no sums, but news of signals
        run.log(0, skipped=False, pairs=len(rows) / len(part.prompts))
        on_rank_zero(part.write, rows)  # the last: what is there is not made again
    run.exit_if_stopped()
    on_rank_zero(merge_parts, merged, parts)
    if not (run.folder / "train.jsonl").stat().st_size:
        raise UserError(
            f"{run.folder}/train.jsonl has no pair: the answers to each prompt were all right or "
            "all wrong. Ask for more --samples, or other prompts",
            everywhere=True,
        )
    print(flush=True)


def read_splits(c: PrefsSettings, tokenizer: Tokenizer) -> dict[str, list[Prompt]]:
    """split -> prompts, on every rank: whole steps of --data, --questions of --val."""
    limits = (tokenizer, c.prompt_length, c.shots, c.verifier)
    train = run_on_all_ranks(read_prompts, Source(c.data, c.seed), *limits)
    steps = max(1, round(c.share * (c.steps or math.ceil(len(train) / c.prompts))))
    splits = {"train": train[: steps * c.prompts]}
    if c.val:
        splits["val"] = run_on_all_ranks(read_prompts, held_out_rows(c, c.val), *limits)
    return splits


def load_judge(c: PrefsSettings, run: Run, longest: int) -> OLMo2:
    """The reward model at --judge. Raises UserError for another model."""
    folder, _ = run_on_all_ranks(find_weights, c.judge)
    if run_on_all_ranks(read_config, folder).head != "score":
        raise UserError(
            f"--judge {c.judge} is no reward model: train one with python posttrain.py rm",
            everywhere=True,
        )
    return load_model(c, c.judge, run, longest, head="score", frozen=True)


@dataclass(frozen=True)
class Part:
    """A step's prompts, and the file of their pairs until all steps are done."""

    split: str
    start: int  # its first prompt in the split
    prompts: list[Prompt]
    path: Path

    def write(self, rows: list[dict]) -> None:
        """Write the rows of the pairs, atomically."""
        text = ""
        for i, row in enumerate(rows, self.start):
            row = {"id": f"{self.split}-{i}", **row}
            text += json.dumps(row, ensure_ascii=False) + "\n"
        write_text(self.path, text)


def list_parts(folder: Path, splits: dict[str, list[Prompt]], size: int) -> list[Part]:
    """The steps, each with at most `size` prompts of one split."""
    parts = []
    for split, prompts in splits.items():
        for start in range(0, len(prompts), size):
            path = folder / f".{split}-{start:08d}.jsonl"
            parts.append(Part(split, start, prompts[start : start + size], path))
    return parts


def count_done(merged: dict[str, Path], parts: list[Part]) -> int:
    """How many steps, from the first on, have their rows; all of them once the files are merged."""
    if all(path.exists() for path in merged.values()):
        return len(parts)
    return len(list(itertools.takewhile(lambda part: part.path.exists(), parts)))


def merge_parts(merged: dict[str, Path], parts: list[Part]) -> None:
    """Make one file of each split of the files of its steps, and print how many pairs it holds."""
    there = [part for part in parts if part.path.exists()]
    if len(there) == len(parts):  # else a crash came while they were removed, after the merge
        for split, path in merged.items():
            texts = [part.path.read_text(encoding="utf-8") for part in there if part.split == split]
            write_text(path, "".join(texts))
    for part in there:
        part.path.unlink()
    for path in merged.values():
        print(f"          {sum(1 for _ in json_lines(path)):,} pairs: {path}")


@dataclass(frozen=True)
class PairMaker:
    """Answers prompts, judges the answers, and pairs them."""

    c: PrefsSettings
    model: OLMo2
    judge: OLMo2 | None  # None: the verifiers judge
    tokenizer: Tokenizer

    def build_pairs(self, asked: list[Prompt], step: int) -> list[dict]:
        """The rows of the pairs from a step's prompts, made by all ranks together."""
        c = self.c
        completions = sample_groups(self.model, self.tokenizer, asked, c, step)
        scores = self.score(completions)
        rows = []
        for n, prompt in enumerate(asked):
            group = slice(n * c.samples, (n + 1) * c.samples)
            pair = choose_pair(scores[group], random.Random(sampling_seed(c.seed, step, n)))
            if pair:
                rows.append(pair_row(prompt, completions[group], scores[group], pair, c.init))
        return rows

    def score(self, completions: list[Completion]) -> list[float]:
        """Of each answer: its verifier's verdict, or the reward model's at its last token."""
        if self.judge is None:
            return [self.c.reward * answer.score * answer.ended for answer in completions]
        # A reward model reads no BOS, if it was trained without one.
        judge_bos = instruct_tokenizer(self.c, self.c.judge).chat_bos
        skip = int(self.tokenizer.chat_bos and not judge_bos)
        rows = []
        for answer in completions:
            tokens, mask = answer.example.tokens, answer.example.loss_mask
            rows.append((Example(tokens[skip:], mask[skip:]),))
        values = score_rows(self.judge, rows, self.c, lambda x, _: self.judge.scores(x))
        ends = [len(example.tokens) - 1 for (example,) in rows]
        return [value[0, end].item() for value, end in zip(values, ends)]


def choose_pair(scores: list[float], chance: random.Random) -> tuple[int, int] | None:
    """(one of the best, one of those that are worse), or None where all are equal."""
    best = max(scores)
    worse = [i for i, score in enumerate(scores) if score < best]
    if not worse:
        return None
    chosen = chance.choice([i for i, score in enumerate(scores) if score == best])
    return chosen, chance.choice(worse)


def pair_row(
    prompt: Prompt,
    completions: list[Completion],
    scores: list[float],
    pair: tuple[int, int],
    model: str,
) -> dict:
    """A row in the layout of the released preference mixes."""
    chosen, rejected = pair
    answers = [{"role": "assistant", "content": answer.text} for answer in completions]
    return {
        "prompt": prompt.messages[-1]["content"],
        "chosen": [*prompt.messages, answers[chosen]],
        "rejected": [*prompt.messages, answers[rejected]],
        "chosen_rating": scores[chosen],
        "rejected_rating": scores[rejected],
        "chosen_model": model,
        "rejected_model": model,
        "source": prompt.source,
    }
