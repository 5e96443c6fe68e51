"""Supervised fine-tuning: imitate answers. Also what all stages with conversations share.

    python posttrain.py sft         # laptop: from runs/tiny/soup; 1 minute
    python posttrain.py sft --data talks.jsonl --val held-out.jsonl --out runs/mine/sft
    torchrun --nproc-per-node 8 posttrain.py sft --size 1B --init allenai/OLMo-2-0425-1B

What this stage teaches: a base model continues text. Trained on conversations, with the loss on the
assistant's words alone, it answers, in the manner of the answers it is shown, good or bad.

Shared with dpo.py and rlvr.py: settings, loading a model, micro-batches, the optimizer step.

Shapes: a row has k conversations (1 for SFT, 2 for pairs); b rows in a micro-batch, T tokens.
Position t of a row of targets holds token t + 1, as in `OLMo2.loss`.
"""

import copy
import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import TokenData, get_tokenizer, mix_files, mix_sources
from infra.checkpoint import Trained, check_unchanged, find_weights, load_tensors
from infra.distributed import (
    all_gather_objects,
    checksum,
    map_over_ranks,
    on_rank_zero,
    patient_group,
    rank_and_world,
    run_on_all_ranks,
    self_check,
    weights_dtype,
)
from infra.files import UserError
from infra.metrics import plot_run
from infra.run import Run
from infra.settings import (
    AboveZero,
    BelowOne,
    Count,
    Length,
    NotNegative,
    Positive,
    Rate,
    RunSettings,
    Seconds,
    Share,
    Temperature,
)
from infra.sharding import all_reduce_when, inference, shard_model
from likelihood import pad_rows
from model import OLMo2, check_finite
from pretrain import adamw, clip_gradients, set_lr, what_is_trained
from recipes import LAPTOP_MIX
from rollouts import (
    Completion,
    Sampling,
    generate_completions,
    sampling_seed,
    score_completions,
    write_answers,
)
from servers import Servers, remove_folder
from shape import ModelConfig, read_config
from tasks.conversations import (
    Example,
    Prompt,
    Source,
    fingerprint,
    read_examples,
    read_prompts,
)
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class StageSettings(RunSettings):
    """What all stages have. Published values: recipes.py."""

    # the model to start from: a run, a checkpoint or a Hugging Face directory; none: what the stage
    # before left in runs/<size>
    init: str = ""
    # .jsonl or .json (also .gz, .zst), .parquet, names of data sets on the Hub, or
    # embedded/{instruct,sums,constraints}
    data: tuple[str, ...] = ()
    # held-out rows, likewise
    val: tuple[str, ...] = ()
    # held-out prompts to answer on the way, each with its verifier: rows as for grpo
    quiz: tuple[str, ...] = ()
    # tulu: use Tulu's chat template, though the model has another one
    template: Literal["", "tulu"] = ""
    # the run's folder; none: runs/<size>/<stage>
    out: str = ""
    # of the order of the rows, and of sampling
    seed: Count = 1
    # length of the run; 0: once through the data, or --epochs times
    steps: Count = 0
    # of these steps: 0.05 for a quick look
    share: Rate = 1.0
    # tokens of an answer at most, where the model writes
    response_length: Positive = 2048
    # held-out rows of each file that take part
    questions: Positive = 200
    # vLLM servers that sample, as http://node1:8000; none: this process samples (servers.py)
    rollouts: tuple[str, ...] = ()
    # folder for the weights on their way to the servers, which must see it; none: the run's
    rollouts_folder: str = ""
    # name of the model on the servers; none: the only one
    rollouts_model: str = ""
    # seconds until a server that does not answer counts as gone
    rollouts_timeout: Seconds = 1800
    # tokens per forward and backward of a process, padding included; a longer row goes alone
    micro_tokens: Positive = 8192

    # peak learning rate
    lr: Rate = 1e-6
    # linear: to 0 at the end
    schedule: Literal["linear", "constant"] = "linear"
    # share of the steps in which the rate rises, from 0 at the first
    warmup: Share = 0.0
    # of AdamW: share of the old mean of gradients that a step keeps (open-instruct finetune.py)
    beta1: BelowOne = 0.9
    # of AdamW: the same for the mean of their squares
    beta2: BelowOne = 0.999
    # of AdamW
    eps: AboveZero = 1e-8
    # of AdamW: decay of all weights, of the input embedding, too
    weight_decay: NotNegative = 0.0


@dataclass(frozen=True)
class SFTSettings(StageSettings):
    """Supervised fine-tuning: rows {messages: [{role, content}, ...]}."""

    # conversations per optimizer step, over all processes
    batch: Positive = 128
    # times that each row is seen
    epochs: Positive = 2
    # tokens of a conversation; what is longer loses its end
    max_length: Length = 4096
    # leave out rows in which that leaves no answer (finetune.py does), instead of naming them
    drop: bool = False
    # conversations begin with <|endoftext|>; the released 32B's do not
    bos: bool = True
    # of the rows of --data and --val; sharegpt: {conversations: [{from, value}, ...]}; alpaca:
    # {instruction, input, output}
    layout: Literal["messages", "sharegpt", "alpaca"] = "messages"
    # ours: share of the rows that are text of the laptop's stage 2, all of it trained on; a tiny
    # model forgets fast
    replay: BelowOne = 0.0


@dataclass(frozen=True)
class SamplingSettings(StageSettings):
    """Rows {messages, ground_truth, dataset}: `dataset` names the verifier, unless you do."""

    # prompts per step, over all processes, which share out the answers to them
    prompts: Positive = 48
    # answers per prompt
    samples: Positive = 16
    # of sampling; log-probabilities are taken at the same
    temperature: Temperature = 1.0
    # tokens of a prompt; longer ones are left out
    prompt_length: Positive = 2048
    # of a right answer; a score between 0 and 1 earns its part
    reward: NotNegative = 10.0
    # rows {question, answer}, GSM8K's own layout, get the first so many of their file as examples
    shots: Count = 8
    # FILE.py:FUNCTION that scores the answers to all rows, whatever their `dataset` names: code
    # that runs in this process (docs/posttrain.md)
    verifier: str = ""


# ------------------------------------------------------------------------------------------
# The loop


def train_sft(c: SFTSettings, run: Run) -> None:
    """Minimise the cross-entropy of what the assistant says; each token of a batch counts the same.

    Source: Tulu 3 (arXiv 2411.15124); open-instruct finetune.py. There the loss is the sum over the
    tokens, not the mean, and the gradient's norm is clipped to 1: so every step's gradient has norm
    1. The gradient of a mean is hardly ever clipped. Both point the same way.
    """
    tokenizer = instruct_tokenizer(c, c.init, c.bos)
    rows = read_sft_rows(c, tokenizer)
    held_out = HeldOut(
        tokenizer,
        run_on_all_ranks(
            read_conversations, c, replace(held_out_rows(c, c.val), layout=c.layout), tokenizer
        ),
        run_on_all_ranks(read_prompts, held_out_rows(c, c.quiz), tokenizer),
    )
    steps = number_of_steps(c, len(rows), c.batch, c.epochs)
    model = load_model(c, c.init, run, longest=c.max_length)
    model.servers = connect_servers(c, run)
    optimizer = make_optimizer(model, c)
    begin_stage(c, run, what_is_trained(model, optimizer, tokenizer), rows, c.batch, steps)
    if run.evaluation_owed(steps):
        evaluate_sft(c, run, model, held_out)

    for step in run.steps(steps):
        # 1. learning rate
        lr = lr_at(step, steps, c)
        set_lr(optimizer, lr)

        # 2. gradient, a micro-batch at a time
        numbers = batch_indices(len(rows), c.batch, step, c.seed)
        batch = [rows[n] for n in numbers]
        n_targets, n_tokens = count_tokens(batch)
        for _, tokens, targets, is_last in micro_batches(batch, c.micro_tokens, run.device):
            all_reduce_when(is_last, model)
            ce_sum, _, _ = model.loss(tokens, targets, z_loss=0.0)  # of [b, T]
            loss = ce_sum / n_targets
            loss.backward()
            run.add(loss=loss)
        sums = run.all_sum()

        # 3. clip and step
        grad_norm = take_step(model, optimizer, c.clip)

        # 4. log, save, evaluate
        run.log(n_tokens, skipped=not math.isfinite(grad_norm), **sums, lr=lr, grad_norm=grad_norm)
        if run.save_due():
            run.save()
        if run.evaluation_due():
            evaluate_sft(c, run, model, held_out)
    finish_stage(run)


def read_sft_rows(c: SFTSettings, tokenizer: Tokenizer) -> list[tuple[Example]]:
    """The conversations to imitate and, with --replay, text of stage 2; on every rank."""
    source = Source(c.data, c.seed, layout=c.layout)
    rows = run_on_all_ranks(read_conversations, c, source, tokenizer)
    n_replayed = round(len(rows) * c.replay / (1 - c.replay))
    if not n_replayed:
        return rows
    replay = (replayed_rows, n_replayed, c.max_length, tokenizer)
    on_rank_zero(*replay)  # builds the embedded corpus, the others find it
    return rows + run_on_all_ranks(*replay)


def read_conversations(
    c: SFTSettings, source: Source, tokenizer: Tokenizer
) -> list[tuple[Example]]:
    return read_examples(source, ("messages",), tokenizer, c.max_length, c.drop)


def replayed_rows(count: int, length: int, tokenizer: Tokenizer) -> list[tuple[Example]]:
    """So many instances of the laptop's stage-2 mix, in which every token counts."""
    files, counts = mix_files(mix_sources(LAPTOP_MIX, "train", tokenizer), count, length)
    data = TokenData(files, length, tokenizer, counts)
    all_of_it = np.ones(length, bool)
    return [(Example(data.instance(i).astype(np.int32), all_of_it),) for i in range(len(data))]


def evaluate_sft(c: SFTSettings, run: Run, model: OLMo2, held_out: "HeldOut") -> None:
    """Record the held-out loss per token, and answers to held-out prompts."""
    columns = {}
    if held_out.rows:
        log_probs = score_rows(model, held_out.rows, c, model.log_probs)
        n_targets, _ = count_tokens(held_out.rows)
        columns["loss"] = -sum(row.sum().item() for row in log_probs) / n_targets
    record_eval(c, run, model, held_out, columns)


# ------------------------------------------------------------------------------------------
# The beginning of a stage


@dataclass(frozen=True)
class HeldOut:
    """What a stage is measured on."""

    tokenizer: Tokenizer
    rows: list[tuple[Example, ...]] = field(default_factory=list)
    questions: list[Prompt] = field(default_factory=list)

    @property
    def prompts(self) -> list[list[int]]:
        """Prompts for a sample, in ids."""
        if self.questions:
            return [question.tokens for question in self.questions]
        return [row[0].prompt for row in self.rows]


def held_out_rows(c: StageSettings, names: tuple[str, ...]) -> Source:
    """--questions rows of each held-out file."""
    return Source(names, c.seed, held_out=c.questions)


def instruct_tokenizer(c: StageSettings, path: str, chat_bos: bool | None = None) -> Tokenizer:
    """The tokenizer of the model at `path`, as that of the instruct model that is being made.

    Raises UserError for one with another chat template than Tulu's, unless --template names ours.
    """
    folder, _ = run_on_all_ranks(find_weights, path)
    tokenizer = copy.copy(run_on_all_ranks(get_tokenizer, folder))
    if tokenizer.foreign_template and not c.template:
        raise UserError(
            f"{path} has another chat template than Tulu's, which is the only one here: go on with "
            "a model without one, or train it to use ours with --template tulu",
            everywhere=True,
        )
    tokenizer.foreign_template = False
    tokenizer.instruct = True
    if chat_bos is not None:
        tokenizer.chat_bos = chat_bos
    return tokenizer


def load_model(
    c: StageSettings,
    path: str,
    run: Run,
    longest: int,
    head: Literal["lm", "score"] = "lm",
    frozen: bool = False,
) -> OLMo2:
    """The model at `path`, sharded as the run's; head "score" gives it a new head of one column.

    longest: tokens of a sequence that it must take. frozen: it is only asked, so on CUDA its
    weights need no fp32 copy. Raises UserError.
    """
    folder, weights = run_on_all_ranks(find_weights, path)
    config = run_on_all_ranks(read_config, folder)
    check_shape(path, config, longest, head)
    run_on_all_ranks(check_unchanged, folder, weights)
    with torch.device("meta"):
        model = OLMo2(replace(config, head=head))
    if frozen:
        model.to(weights_dtype("auto", run.device))
    shard_model(model, model.model.layers, c, run.mesh, bf16=run.device.type == "cuda")
    model.to_empty(device=run.device)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if config.head == head:
        load_tensors(weights, tensors)
    else:
        model.init_weights(c.seed, names=("score.weight",))
        del tensors["score.weight"]
        load_tensors(weights, tensors, leave_out=("lm_head.weight",))
    run_on_all_ranks(check_finite, path, model)
    return model


def check_shape(path: str, config: ModelConfig, longest: int, head: str) -> None:
    """Raise UserError for a model that cannot do what a stage wants of it."""
    if config.head == "score" and head == "lm":
        raise UserError(f"{path} holds a reward model, which cannot write text", everywhere=True)
    if longest > config.context:
        raise UserError(
            f"{path} takes {config.context:,} tokens at most, and {longest:,} are asked for: lower "
            "--max-length, or --prompt-length and --response-length",
            everywhere=True,
        )


def connect_servers(c: StageSettings, run: Run, longest: int = 0) -> Servers | None:
    """The servers of --rollouts, when all of them answer; None without any. All ranks call it.

    longest: tokens of a row that they must take. Raises UserError.
    """
    if not c.rollouts:
        return None
    out = Path(c.out).resolve()
    # Its name is the run's own, as it is removed at the end with all that is in it.
    run_id = hashlib.sha256(bytes(out)).hexdigest()[:8]
    servers = Servers(c.rollouts, c.rollouts_model, c.rollouts_timeout)
    servers.folder = Path(c.rollouts_folder or out).resolve() / f"policy-{run_id}"
    run.on_close.append(functools.partial(remove_folder, servers.folder))
    where = run_on_all_ranks(servers.check, longest)
    print(f"rollouts  {where}; weights by {servers.folder}", flush=True)
    return servers


def number_of_steps(c: StageSettings, rows: int, per_step: int, epochs: int = 1) -> int:
    """Steps of a stage: --share of --steps, or of `epochs` times through the data."""
    if rows < per_step:
        raise UserError(
            f"{rows:,} rows are fewer than the {per_step:,} of a step: give more data, or a "
            "smaller --batch or --prompts",
            everywhere=True,
        )
    return max(1, round(c.share * (c.steps or epochs * (rows // per_step))))


def begin_stage(
    c: StageSettings, run: Run, trained: Trained, rows: list, per_step: int, steps: int
) -> None:
    """Enter and resume the run, check that the ranks agree, and print what is about to happen."""
    data_hash = fingerprint(rows)
    weights = trained.tensors["model"]
    data = {"stage": run.stage, "hash": data_hash, "files": list(c.data), "rows": len(rows)}
    run.enter(data, start=checksum(weights))
    run.resume(trained)
    checked = self_check(c, data_hash, weights, run.device)
    n_parameters = sum(weight.numel() for weight in weights.values())
    print(
        f"run       {run.title()}\n"
        f"model     {c.init}: {n_parameters:,} parameters; {run.device}\n"
        f"check     {checked}"
    )
    print(
        f"data      {' '.join(c.data)}, {data_hash}: {len(rows):,} rows; {steps:,} steps of "
        f"{per_step}, which is {100 * steps * per_step / len(rows):.0f} % of the rows"
    )
    if not (c.val or c.quiz):
        print("          no held-out rows (--val, --quiz): nothing is measured on the way")


# ------------------------------------------------------------------------------------------
# Batches


def batch_indices(rows: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Which rows are in the batch of a step.

    Each epoch is a new permutation; what fills no batch at its end is left out.
    """
    epoch, i = divmod(step, rows // batch)
    order = np.random.Generator(np.random.PCG64(seed + epoch)).permutation(rows)
    return order[i * batch : (i + 1) * batch]


def micro_batches(
    rows: list[tuple[Example, ...]], budget: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor, bool]]:
    """(which rows, tokens [k b, T], targets [k b, T], is it the last) of this rank's share.

    rows: those of all ranks, which divide them. The first conversations of all b rows come first,
    then all second ones; k b T is at most `budget`, or there is one row.
    """
    rank, world = rank_and_world()
    lengths = []
    for row in rows:
        longest = max(len(example.tokens) for example in row)
        lengths.append(padded_width(longest, device))
    rounds = deal_rows(lengths, budget // max(map(len, rows), default=1), world)
    for i, all_rows in enumerate(rounds, 1):
        which = all_rows[rank::world]
        examples = list(itertools.chain(*zip(*[rows[n] for n in which])))
        width = padded_width(max(len(example.tokens) for example in examples), device)
        tokens = pad_rows([example.tokens for example in examples], width=width)
        targets = pad_rows([example.targets for example in examples], value=-100, width=width)
        yield which, tokens.long().to(device), targets.long().to(device), i == len(rounds)


def deal_rows(lengths: list[int], budget: int, world: int) -> list[list[int]]:
    """Rows in rounds, of which each rank takes every world-th one: equally many on all ranks.

    A rank's part of a round has at most `budget` tokens with its padding, or one row. Neighbours in
    length share a round, so there is little padding, and no rank waits long for another. The
    longest come first: what does not fit into memory, shows at once.

    >>> deal_rows([5, 1, 4, 1, 2, 3], budget=6, world=2)
    [[0, 2], [5, 4, 1, 3]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    rounds = []
    while order:
        each = max(1, budget // lengths[order[0]])
        rounds.append(order[: each * world])
        order = order[each * world :]
    return rounds


def padded_width(longest: int, device: torch.device) -> int:
    """Tokens of padded rows: on CUDA a multiple of 128.

    There a kernel may be planned for each new width, which takes longer than a step.

    >>> padded_width(300, torch.device("cuda")), padded_width(300, torch.device("cpu"))
    (384, 300)
    """
    step = 128 if device.type == "cuda" else 1
    return math.ceil(longest / step) * step


def count_tokens(rows: list[tuple[Example, ...]]) -> tuple[int, int]:
    """(targets, tokens) in rows."""
    targets, tokens = 0, 0
    for example in itertools.chain(*rows):
        targets += example.n_targets
        tokens += len(example.tokens)
    return targets, tokens


# ------------------------------------------------------------------------------------------
# The optimizer step


def lr_at(step: int, steps: int, c: StageSettings) -> float:
    """The rate of a step (from 0): linear warm-up, then constant, or a line to 0.

    The warm-up begins at 0, so its first step changes nothing. Source: transformers
    get_scheduler, as open-instruct calls it.

    >>> c = SFTSettings(lr=1.0, warmup=0.25)
    >>> [round(lr_at(step, 10, c), 3) for step in (0, 1, 2, 9)]
    [0.0, 0.5, 1.0, 0.125]
    """
    warmup = int(steps * c.warmup)
    if step < warmup:
        return c.lr * step / warmup
    if c.schedule == "constant":
        return c.lr
    return c.lr * ((steps - step) / (steps - warmup))


def make_optimizer(model: OLMo2, c: StageSettings) -> torch.optim.AdamW:
    """AdamW over all parameters alike; in pretraining the input embedding does not decay."""
    return adamw([{"params": list(model.parameters()), "weight_decay": c.weight_decay}], c)


def take_step(model: OLMo2, optimizer: torch.optim.Optimizer, clip: float) -> float:
    """Clip, step, forget the gradients; returns their norm. If it is not finite, do not step."""
    norm = clip_gradients(model, clip)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ------------------------------------------------------------------------------------------
# What a model says and thinks, without gradients


def sample_groups(
    model: OLMo2, tokenizer: Tokenizer, prompts: list[Prompt], c: SamplingSettings, step: int
) -> list[Completion]:
    """--samples answers to each prompt of a step, all of them on all ranks.

    Row i answers prompt i // samples. Its seed is i's, so the ranks can share out rows as they
    like: the samples of a prompt need not be on one of them.
    """
    rows = range(len(prompts) * c.samples)
    return generate_completions(
        model,
        tokenizer,
        [prompts[row // c.samples] for row in rows],
        [sampling_seed(c.seed, step, row) for row in rows],
        c.temperature,
        c.response_length,
    )


def score_rows(
    model: OLMo2,
    rows: list[tuple[Example, ...]],
    c: StageSettings,
    score: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """Per row of k conversations, `score(tokens, targets)` [k b, ...]: [k, ...], on the CPU.

    All ranks have all rows, share the work, and get all scores.
    """
    _, world = rank_and_world()
    filled = rows + rows[:1] * (-len(rows) % world)
    batches = micro_batches(filled, 4 * c.micro_tokens, next(model.parameters()).device)
    hide = len(rows) < 5000 or rank_and_world()[0] > 0 or None
    found = {}
    with inference(model), tqdm(total=len(rows), desc="scoring", leave=False, disable=hide) as bar:
        for which, tokens, targets, _ in batches:
            scores = score(tokens, targets).cpu()
            for i, n in enumerate(which):
                found[n] = scores[i :: len(which)].clone()  # a view would be sent with its batch
            bar.update(len(which) * world)
    for part in all_gather_objects(found, patient_group()):
        found |= part
    return [found[n] for n in range(len(rows))]


# ------------------------------------------------------------------------------------------
# What is recorded, and the end of a stage


def record_columns(run: Run, columns: dict[str, float]) -> None:
    """Record and show what was measured on held-out rows."""
    if not columns:
        return
    run.record("eval", held_out=columns)
    shown = (f"{name} {value:.4g}" for name, value in columns.items())
    print(f"          held-out: {', '.join(shown)}", flush=True)


def record_eval(
    c: StageSettings, run: Run, model: OLMo2, held_out: HeldOut, columns: dict[str, float]
) -> None:
    """Record and show `columns`, the scores of held-out questions, and an answer to one prompt.

    The answer is drawn at temperature 1; the prompt is always the same.
    """
    tokenizer = held_out.tokenizer
    scores = score_completions(model, tokenizer, held_out.questions, c.response_length)
    record_columns(run, columns | scores)
    if not held_out.prompts:
        return
    prompt = random.Random(c.seed).choice(held_out.prompts)
    longest = min(c.response_length, model.config.context - len(prompt))
    how = Sampling(1.0, longest, tokenizer.eos)
    ((ids, _),) = map_over_ranks([(prompt, c.seed)], functools.partial(write_answers, model, how))
    asked = tokenizer.decode(prompt)
    answer = tokenizer.decode(ids)
    run.record("sample", prompt=asked, text=answer)
    print(f"          sample: {asked[-200:]!r} -> {answer!r}", flush=True)


def finish_stage(run: Run) -> None:
    """Draw the curves, end the process if it was stopped, and say where the results are."""
    on_rank_zero(plot_run, run.folder)
    run.exit_if_stopped()
    run.renew_weights()
    print(f"{run.folder}: finished; weights in hf/, curves in curves.png\n", flush=True)
