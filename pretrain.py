"""Stage 1, pretraining: the loop that turns random weights into a language model.

    python pretrain.py                                  # laptop: the embedded corpus, 3 minutes
    python pretrain.py --data tokens/mine --out runs/mine   # your own text, made by data.py
    python pretrain.py --size 190M --data tokens/mine   # one GPU: bf16, fp32 master weights
    torchrun --nproc-per-node 8 pretrain.py --size 7B --data tokens/mine    # see docs/cluster.md
    python pretrain.py --size 7B --help                 # the published values of a size
    python plan.py --size 32B --gpus 1024               # what a cluster needs, without a GPU

What this stage teaches: one optimizer step, written out in `train`; AdamW as OLMo 2 sets it, which
decays everything but the input embedding; a cosine whose horizon lies beyond the end of the run,
since stage 2 goes on from the rate where this one stops; SkipStep. A run can be killed at any
moment: the same command again goes on from the newest good state, on a CPU bit for bit.

A run is a folder, runs/<size>/pretrain: run.json (every value and where it came from),
metrics.jsonl (one row per step), curves.png, step<N>-tokens<T>/ (training states) and hf/ (the
weights, for transformers, sample.py and eval.py).

Shapes: B rows of the global batch, b of them in a micro-batch, T tokens of an instance.
"""

import functools
import itertools
import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data import (
    TokenData,
    Tokenizer,
    embedded_corpus,
    get_tokenizer,
    mix_files,
    mix_shares,
    mix_sources,
    read_ahead,
    token_files,
)
from eval import ask_questions
from infra.checkpoint import (
    Trained,
    check_unchanged,
    find_config,
    find_weights,
    load_state,
    load_tensors,
    state_tensors,
    verify_state,
)
from infra.distributed import (
    all_gather_objects,
    on_rank_zero,
    run_cli,
    run_on_all_ranks,
    self_check,
    shutdown_distributed,
)
from infra.files import UserError, sha256
from infra.metrics import plot_run, read_metrics, rows_of
from infra.run import Run, has_begun, open_run, read_record, settings_of_run, stage_of
from infra.settings import (
    check_ranges,
    flag_value,
    flags_in,
    parse_flags,
    silence_other_ranks,
    where_from,
)
from infra.sharding import all_reduce_when, batch_layout, inference, shard_model
from likelihood import bits_per_byte_by_source, by_source, held_out_data
from lists import implies_olmo2, lists_in
from model import OLMo2, check_finite
from recipes import (
    ANNEAL_LR,
    RELEASED,
    PretrainSettings as Config,
    pretrain_recipe,
)
from released import translate_name
from shape import (
    SIZES,
    ModelConfig,
    check_size,
    hf_config,
    nearest_size,
    read_config,
    write_config,
)
from tasks.synthetic import SOURCES

# ------------------------------------------------------------------------------------------
# The loop


def train(c: Config, run: Run) -> None:
    """Train, or go on with, the run that `c` describes. All ranks call it. Raises UserError.

    A step: the gradient of the mean loss over all targets of the global batch, clipped; AdamW.
    """
    tokenizer = run_on_all_ranks(get_tokenizer, c.tokenizer)
    text = open_data(c, tokenizer)
    run.enter(describe(text.train), start=fingerprint_of_start(c))
    model = make_model(c, tokenizer, run)  # without values
    optimizer = make_optimizer(model, c)
    skip_step = SkipStep(c.skip_sigma)
    trained = what_is_trained(model, optimizer, tokenizer)
    state = run.resume(trained)
    if state:
        skip_step.history.extend(state["skip_history"])
    else:
        initialize(model, trained, tokenizer, c)
    steps = number_of_steps(c)
    announce(c, run, model, text, steps)
    run.name_batch = functools.partial(name_instances, text.train, c)
    if run.evaluation_owed(steps) and (run.step or c.init):  # not of random weights
        evaluate(c, run, model, tokenizer, text)

    tokens_per_step = c.batch * c.seq_len
    # Those of instances without loss (--mask-repeats) count, too, as upstream.
    n_targets = c.batch * (c.seq_len - 1)  # of all ranks
    was_finished = run.step >= steps
    batches = read_batches(text.train, c, run, steps)
    for step in run.steps(steps, model.config.flops_per_token(c.seq_len)):
        # 1. learning rate
        lr = lr_at((step + 1) * tokens_per_step, c)
        set_lr(optimizer, lr)

        # 2. gradient, a micro-batch at a time
        tokens, targets = next(batches)  # [B / ranks, T]
        for x, y, is_last in micro_batches(tokens, targets, c.micro_batch, run.device):  # [b, T]
            all_reduce_when(is_last, model)
            ce_sum, z_sum, _ = model.loss(x, y, c.z_loss)
            ((ce_sum + z_sum) / n_targets).backward()
            run.add(loss=ce_sum, z_loss=z_sum)

        # 3. clip, and step unless loss or gradient spikes
        grad_norm = clip_gradients(model, c.clip)
        sums = run.all_sum(divide_by=n_targets)  # and hears of signals, see run.stop
        accepted = skip_step(sums["loss"], grad_norm)
        if accepted:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. log, save, evaluate
        run.log(tokens_per_step, skipped=not accepted, **sums, lr=lr, grad_norm=grad_norm)
        if run.save_due():
            run.save(skip_history=list(skip_step.history))
        if run.evaluation_due():
            evaluate(c, run, model, tokenizer, text)

    if not run.stop:
        ask_at_the_end(c, run, model, tokenizer, text)
    finish(c, run, was_finished)


# ------------------------------------------------------------------------------------------
# Learning rate, optimizer, SkipStep


def lr_at(tokens: int, c: Config) -> float:
    """The learning rate of the step that brings the run to `tokens` (OLMo olmo/optim.py).

    1. linear warm-up from 0; 2. a cosine or a line from lr to lr * lr_floor at the horizon;
    3. the floor. The first step's rate is above 0.
    """
    floor = c.lr * c.lr_floor
    if tokens < c.warmup:  # 1
        return c.lr * tokens / c.warmup
    if tokens >= c.horizon:  # 3
        return floor
    done = (tokens - c.warmup) / (c.horizon - c.warmup)  # 2
    above = (1 + math.cos(math.pi * done)) / 2 if c.schedule == "cosine" else 1 - done
    return floor + (c.lr - floor) * above


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(model: OLMo2, c: Config) -> torch.optim.AdamW:
    """AdamW in OLMo 2's two groups: the input embedding does not decay, all the rest does.

    c: weight_decay, lr, beta1, beta2, eps. Source: paper section 3.3, Fig. 10.
    """
    embedding = model.model.embed_tokens.weight
    rest = [p for p in model.parameters() if p is not embedding]
    groups = [
        {"params": [embedding], "weight_decay": 0.0},
        {"params": rest, "weight_decay": c.weight_decay},
    ]
    return adamw(groups, c)


def adamw(groups: list[dict], c) -> torch.optim.AdamW:
    """AdamW of groups {"params", "weight_decay"}, with moments of zero; c: as for make_optimizer.

    Its first step would make them; here, they can be saved or loaded before.
    """
    betas = (c.beta1, c.beta2)
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=betas, eps=c.eps, fused=True)
    for p in itertools.chain(*[group["params"] for group in groups]):
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale the gradients to a global L2 norm of at most `largest`; returns the norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm.item()


class SkipStep:
    """Should the optimizer take this step? (OLMo-core optim/skip_step_optimizer.py)

    No, if the loss or the norm of the gradient before clipping is more than `sigma` standard
    deviations above its mean over the last 128 steps, from the 64th step on. A skipped step changes
    no weight and no moment and does not advance Adam; its values stay in the history.
    Unlike upstream, what is not finite is always skipped and never enters the history: there, one
    NaN would make all 128 following steps be skipped.
    """

    WINDOW = 128
    FIRST = 64

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.history: deque[tuple[float, float]] = deque(maxlen=self.WINDOW)

    def __call__(self, loss: float, grad_norm: float) -> bool:
        """True: take the step."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        accepted = True
        if self.sigma and len(self.history) + 1 >= self.FIRST:
            past = torch.tensor(list(self.history), dtype=torch.float64)  # [steps, 2]
            for value, column in zip((loss, grad_norm), past.T):
                above = value - column.mean().item()
                accepted &= above <= self.sigma * column.std().item()
        self.history.append((loss, grad_norm))
        return accepted


# ------------------------------------------------------------------------------------------
# Text and batches


@dataclass(frozen=True)
class Text:
    """What is trained on, and what is held out."""

    train: TokenData
    val: dict[str, list[Path]]  # source -> held-out files; {}: none
    shares: dict[str, float]  # source -> share of the tokens, of a mix; {} without one


def open_data(c: Config, tokenizer: Tokenizer) -> Text:
    """Open and check all files, on every rank. Raises UserError."""
    # Rank 0 builds the embedded corpus, and the others find it. It keeps what it has: to shuffle
    # the real mix takes a minute.
    text = on_rank_zero(find_text, c, tokenizer)
    return run_on_all_ranks(lambda: text or find_text(c, tokenizer))


def find_text(c: Config, tokenizer: Tokenizer) -> Text:
    """The text of --mix, of --data, or the embedded corpus. Raises UserError."""
    text = mixed_text(c, tokenizer) if c.mix else plain_text(c, tokenizer)
    text.train.positions(0, c.batch, c.seed)  # raises if there is less than a batch
    if c.val:
        text = replace(text, val=by_source(token_files(c.val, "val")))
    for files in text.val.values():
        held_out_data(files, c.seq_len, tokenizer)  # raises for files that are damaged or empty
    return text


def mixed_text(c: Config, tokenizer: Tokenizer) -> Text:
    """As many instances as the run takes, of several sources by their shares."""
    mix = mix_sources(c.mix, "train", tokenizer)
    chunks = math.ceil(number_of_steps(c) * c.batch / c.chunk)
    files, counts = mix_files(mix, chunks, c.chunk * c.seq_len)
    held_out = mix_sources(c.mix, "val", tokenizer)
    return Text(
        train=TokenData(files, c.seq_len, tokenizer, counts, c.chunk),
        val={source: files for source, (_, files) in held_out.items() if files},
        shares={source: share for source, (share, _) in mix.items()},
    )


def plain_text(c: Config, tokenizer: Tokenizer) -> Text:
    """All of the token files."""
    sources = c.data or [embedded_corpus(tokenizer)]
    held_out = [source for source in sources if Path(source, "val").is_dir()]
    files = token_files(sources, "train", c.data_root, c.take, c.data_cache)
    return Text(
        train=TokenData(files, c.seq_len, tokenizer, chunk=c.chunk),
        val=by_source(token_files(held_out, "val")),
        shares={},
    )


def describe(data: TokenData) -> dict:
    """What run.json keeps of the data."""
    tokens = sum(sidecar["tokens"] for sidecar in data.sidecars)
    return {"hash": data.hash, "files": [str(path) for path in data.files], "tokens": tokens}


def read_batches(
    data: TokenData, c: Config, run: Run, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows of each step that is to come: tokens and targets [B / ranks, T]."""

    def read(step: int) -> tuple[Tensor, Tensor]:
        rows = (c.batch, c.seed, c.first_epoch, run.rank, run.world, c.mask_repeats)
        return tuple(map(torch.from_numpy, data.batch(step, *rows)))

    to_come = range(run.step, steps)
    return read_ahead(read, to_come) if run.device.type == "cuda" else map(read, to_come)


def name_instances(data: TokenData, c: Config, step: int) -> str:
    """The first instances of a step's batch, for an error."""
    positions = data.positions(step, c.batch, c.seed, c.first_epoch)
    return f"; instances {positions[:4].tolist()}…"


def micro_batches(
    tokens: Tensor, targets: Tensor, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """(tokens [b, T], targets [b, T], is it the last) on the device, `size` rows at a time.

    All rows go there at once: between two backwards a copy would wait for the first.
    """
    parts = torch.stack((tokens, targets)).to(device).split(size, dim=1)  # [2, b, T] each
    for i, (x, y) in enumerate(parts, 1):
        yield x, y, i == len(parts)


# ------------------------------------------------------------------------------------------
# The model


def make_model(c: Config, tokenizer: Tokenizer, run: Run) -> OLMo2:
    """The model, sharded, without values: no process ever holds more than its shards."""
    if c.init:
        shape = run_on_all_ranks(shape_of_init, c, tokenizer)
    else:
        shape = shape_of_size(c, tokenizer)
    with torch.device("meta"):
        model = OLMo2(shape)
    shard_model(model, model.model.layers, c, run.mesh, bf16=run.device.type == "cuda")
    return model.to_empty(device=run.device)


SHAPE_FLAGS = ("layers", "d_model", "heads", "kv_heads", "ffn")


def shape_of_flags(c: Config) -> ModelConfig:
    """The shape of --size, but for what --layers, --d-model and so on say. Raises UserError."""
    given = {name: getattr(c, name) for name in SHAPE_FLAGS if getattr(c, name)}
    if "heads" in given:  # as many keys and values, unless they are named
        given.setdefault("kv_heads", given["heads"])
    return replace(SIZES[c.size], **given)


def shape_of_size(c: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of the flags, for this tokenizer, with the ablations that are asked for."""
    size = shape_of_flags(c)
    return replace(
        size,
        vocab=tokenizer.padded_vocab_size,
        eos=tokenizer.eos,
        pad=tokenizer.pad,
        context=max(c.seq_len, size.context),
        norm_position=c.norm_position,
        qk_norm=c.qk_norm,
        norm=c.norm,
        init=c.init_scheme,
        embed_std=c.embed_std,
    )


def shape_of_init(c: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of the model at --init. Raises UserError if it does not go with the settings."""
    folder, _ = find_weights(c.init)
    shape = read_config(folder)
    if c.moments and not (folder / "state.json").exists():
        raise UserError(
            f"{c.init} has no optimizer state: name a training state (a run's step<N>-tokens<T>)"
        )
    if get_tokenizer(c.init).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{c.init} was trained with another tokenizer than {c.tokenizer}: leave out "
            f"--tokenizer, and make data with its own (data.py TEXT --tokenizer {c.init})"
        )
    return shape


def initialize(model: OLMo2, trained: Trained, tokenizer: Tokenizer, c: Config) -> None:
    """Give a new run its first weights: random ones, those of --init, or a whole training state."""
    if not c.init:
        model.init_weights(c.init_seed)
        return
    folder, weights = run_on_all_ranks(find_weights, c.init)
    if not c.moments:
        run_on_all_ranks(check_unchanged, folder, weights)
        load_tensors(weights, trained.tensors["model"])
        run_on_all_ranks(check_finite, c.init, model)
        return
    damage = verify_state(folder)
    if damage:
        raise UserError(
            f"{folder} is damaged ({damage}): start from another state", everywhere=True
        )
    load_state(folder, trained)


def fingerprint_of_start(c: Config) -> str | None:
    """Of the state that --moments starts from: a state of the same name may be made anew."""
    manifest = Path(c.init) / "manifest.json"
    return sha256(manifest)[:12] if c.moments and manifest.exists() else None


def what_is_trained(
    model: OLMo2, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer
) -> Trained:
    """What a run saves: weights, moments, and the files that make them open as a model."""

    def describe_model(folder: Path) -> None:
        write_config(folder, model.config, torch.float32)
        tokenizer.save(folder)

    config = hf_config(model.config, torch.float32)
    return Trained(state_tensors(model, optimizer), config, describe_model)


# ------------------------------------------------------------------------------------------
# What is shown on the way and at the end


def announce(c: Config, run: Run, model: OLMo2, text: Text, steps: int) -> None:
    """Check that the ranks agree, and print what is about to happen."""
    data = text.train
    checked = self_check(c, data.hash, run.trained.tensors["model"], run.device)
    total = model.config.parameters["total"]
    changed = [f"{name} {getattr(c, name)}" for name in SHAPE_FLAGS if getattr(c, name)]
    name = c.init or ", ".join([c.size, *changed])
    print(
        f"run       {run.title()}\n"
        f"model     {name}: {total:,} parameters; {run.device}, {torch.get_num_threads()} threads"
    )
    times = steps * c.batch / len(data)
    warning = "; warning: so often, a model learns it by heart" if times > 10 else ""
    print(
        f"check     {checked}\ndata      {data.hash}: seen {times:.2f} times in this run{warning}"
    )
    if c.init:
        moments = "and Adam's moments" if c.moments else "alone; Adam's moments begin at zero"
        print(f"begins    with the weights of {c.init} {moments}")
    few = "; warning: so few teach little, lower --batch" if steps < 3 else ""
    print(
        f"batch     {describe_batch(c, run)}; {steps:,} steps{few}\n"
        f"schedule  {describe_schedule(c, steps * c.batch * c.seq_len)}"
    )
    if not text.val:
        print("          no held-out text (val/ or --val): the run is not evaluated on the way")
    if run.step > steps:
        print(f"          the run is already {run.step:,} steps long; --tokens asks for {steps:,}")


def describe_schedule(c: Config, tokens: int) -> str:
    """The learning rate of a run of so many tokens, in words."""
    warmup = f"after {c.warmup:,} tokens of warm-up" if c.warmup else "at once"
    end = lr_at(tokens, c)
    share = f"{tokens / c.horizon:.0%} of the way to its horizon"
    words = f"{c.lr:.2e} {warmup}, {c.schedule} to {end:.2e} at the end, {share}"
    if tokens < c.warmup:
        words += "; warning: the run ends inside the warm-up, lower --warmup"
    rounded = c.batch * c.seq_len + 0.01 * c.horizon  # to whole steps; the 7B's last ten
    if tokens > 1.5 * c.horizon or (tokens > c.horizon + rounded and c.lr_floor == 0):
        words += (
            f"; warning: from {c.horizon:,} tokens on the rate is at its lowest (a run keeps its "
            "schedule, a new --out has one for this length)"
        )
    return words


def describe_batch(c: Config, run: Run) -> str:
    """How a batch falls on the ranks, in words."""
    layout = batch_layout(c.batch, c.micro_batch, c.shard, run.world)
    words = f"{c.batch} x {c.seq_len} tokens"
    if run.world > 1:
        words += f" over {run.world} ranks, {layout.shard} to each copy of the weights"
    return f"{words}; {layout.micro_batch} at a time"


def evaluate(c: Config, run: Run, model: OLMo2, tokenizer: Tokenizer, text: Text) -> None:
    """Record and show held-out bits per byte, and a sample."""
    if not text.val:
        return
    with inference(model):
        bpb = bits_per_byte_by_source(
            model, text.val, c.seq_len, tokenizer, c.val_tokens, text.shares
        )
        sample = write_sample(model, tokenizer, c.sample) if c.sample else ""
    run.record("eval", bpb=bpb)
    print("          held-out bits per byte:", *(f"{name} {bpb[name]:.3f}" for name in bpb))
    if sample:
        run.record("sample", text=sample)
        print(f"          sample: {sample!r}")


def write_sample(model: OLMo2, tokenizer: Tokenizer, prompt: str) -> str:
    """A continuation of the prompt, with the prompt."""
    ids = tokenizer.encode(prompt) or [tokenizer.eos]
    # Without `eos`: ranks that disagreed about where to end would wait for each other for ever.
    (tokens,), _ = model.generate([ids], 60, temperature=0.7, top_p=0.95)
    if tokenizer.eos in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos)]
    return prompt + tokenizer.decode(tokens)


def ask_at_the_end(c: Config, run: Run, model: OLMo2, tokenizer: Tokenizer, text: Text) -> None:
    """Ask held-out questions, at the end, once, of a model that has seen the embedded corpus."""
    of_corpus = text.shares.keys() & SOURCES.keys() if c.mix else not c.data
    if not (of_corpus and c.questions):
        return
    asked = [row["step"] for row in rows_of(run.folder, "questions")]
    if all_gather_objects(run.step in asked)[0]:
        return
    with inference(model):
        right = ask_questions(model, tokenizer, c.questions)
    run.record("questions", accuracy=right, questions=c.questions)


def finish(c: Config, run: Run, was_finished: bool) -> None:
    """Draw the curves, end the process if a signal has stopped the run, and print the results."""
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"memory    {peak:.1f} GiB at most on {run.device}")
    on_rank_zero(plot_run, run.folder)
    run.exit_if_stopped()
    run.renew_weights()
    rows = read_metrics(run.folder)
    last = {row["event"]: row for row in rows}
    done = "was finished already" if was_finished else "finished"
    print(f"\n{run.folder}: {done}, {rows[-1]['tokens']:,} tokens")
    if "eval" in last:
        for source, value in last["eval"]["bpb"].items():
            print(f"  held-out bits per byte  {source:8} {value:.3f}")
    if "questions" in last:
        asked = last["questions"]
        for task, value in asked["accuracy"].items():
            print(f"  held-out questions      {task:8} {value:.1f} % right of {asked['questions']}")
    print(
        f"  weights {run.folder}/hf   curves {run.folder}/curves.png   "
        f'next: python sample.py {run.folder} "{c.sample}"'
    )


# ------------------------------------------------------------------------------------------
# The command line


def read_settings(arguments: list[str] | None) -> tuple[Config, dict[str, str]]:
    """(the settings, where each came from): class < recipe of --size < flags. Raises UserError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    refuse_plan(arguments)
    given = flags_in(arguments)
    init = translate_name(flag_value(arguments, "init", ""))
    size = read_size(arguments)
    if init and given & set(SHAPE_FLAGS):
        raise UserError(f"the shape is that of the weights in {init}: leave out what names another")
    if init and "size" not in given:
        size = nearest_size(read_config(find_config(init)))
    recipe = default_settings(size)
    c = parse_flags(recipe, arguments, __doc__)
    origin = where_from(c, recipe, {f"recipe {size}": pretrain_recipe(size)})
    c = replace(c, init=init, out=c.out or f"runs/{size}/{'continued' if init else 'pretrain'}")
    changes = {}
    if init and "tokenizer" not in given:
        name = get_tokenizer(init).name
        changes = {"tokenizer": name if name == c.tokenizer else init}
        origin["tokenizer"] = "init"
    elif "tokenizer" not in given and any(map(implies_olmo2, lists_in(c.data))):
        changes = {"tokenizer": "olmo2"}
        origin["tokenizer"] = "the list of --data"
    check_ranges(c)
    schedule, why = find_schedule(c, recipe, given)
    return replace(c, **changes, **schedule), origin | dict.fromkeys(schedule, why)


def find_schedule(c: Config, recipe: Config, given: set[str]) -> tuple[dict, str]:
    """(what no flag says of the schedule, why it is so). Raises UserError.

    A run that has begun keeps its schedule, however long it becomes. At its start a schedule is the
    recipe's, in the recipe's proportions to --tokens; or, with --fresh-schedule, that of stage 2
    behind a warm-up.
    """
    tokens = number_of_steps(c) * c.batch * c.seq_len
    fresh = {
        "lr": ANNEAL_LR.get(c.size, lr_at(recipe.tokens, recipe)),
        "warmup": tokens // 20,
        "schedule": "linear",
        "lr_floor": 0.0,
        "horizon": tokens,
    }
    if c.fresh_schedule and "tokens" not in given:
        raise UserError("--fresh-schedule needs the length of the run: give it with --tokens")
    names = fresh.keys() if c.fresh_schedule else {"warmup", "horizon"}
    run = Path(c.out)
    if has_begun(run) and stage_of(read_record(run)) == "pretrain":
        before = settings_of_run(run)
        return {name: before[name] for name in names - given if name in before}, "run.json"
    if c.fresh_schedule:
        return {name: value for name, value in fresh.items() if name not in given}, "fresh schedule"
    if names & given or c.tokens == recipe.tokens:
        return {}, ""
    share = tokens / recipe.tokens
    scaled = {"warmup": round(recipe.warmup * share), "horizon": round(recipe.horizon * share)}
    return scaled, "scaled with --tokens"


def default_settings(size: str) -> Config:
    """Class and recipe: the settings of a size without any flag."""
    return Config(size=size, **pretrain_recipe(size))


def read_size(arguments: list[str]) -> str:
    """The --size of a command line, known before all else: it picks the recipe."""
    return check_size(flag_value(arguments, "size", "tiny"))


def refuse_plan(arguments: list[str]) -> None:
    """Planning has a script of its own. Raises UserError with the command to type."""
    if "--plan" in arguments:
        others = " ".join(word for word in arguments if word != "--plan")
        raise UserError(f"plans are made by another script: python plan.py {others}")


def number_of_steps(c: Config) -> int:
    """Steps of the run: --tokens, rounded up to whole steps."""
    return math.ceil(c.tokens / (c.batch * c.seq_len))


def check(c: Config) -> None:
    """Raise UserError for settings out of range, or that do not go together, before all work."""
    check_ranges(c)
    problems = []
    if c.mix and c.data:
        problems.append("--mix takes the place of --data: give one of them")
    if c.moments and not c.init:
        problems.append("--moments takes Adam's moments from --init: name a training state with it")
    if not lists_in(c.data) and (c.take or c.data_cache or c.data_root):
        problems.append("--take, --data-cache and --data-root are for lists: --data @LIST")
    if c.fresh_schedule and not c.init:
        problems.append(
            "--fresh-schedule is for weights that have been trained: name them (--init)"
        )
    if problems:
        raise UserError("; ".join(problems))
    shape_of_flags(c)
    batch_layout(c.batch, c.micro_batch, c.shard, int(os.environ.get("WORLD_SIZE", 1)))
    mix_shares(c.mix)
    if c.size in RELEASED and not (c.data or c.mix):
        raise UserError(
            f"--size {c.size} needs --data: the token files of OLMo-mix-1124, by their list "
            "(--data @OLMo2-7B-stage1.yaml), or made by python data.py allenai/olmo-mix-1124 "
            "--tokenizer olmo2 --take-each 1B, or your own"
        )


def main(arguments: list[str] | None = None) -> None:
    c, origin = read_settings(arguments)
    check(c)
    with silence_other_ranks(), open_run("pretrain", c, origin) as run:
        train(c, run)
    shutdown_distributed()


if __name__ == "__main__":
    run_cli(main)
