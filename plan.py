"""Memory, speed, disk and days of a run on a cluster, without one.

    python plan.py --size 32B --gpus 1024       # 5 seconds, 0.4 GB, no GPU
    python plan.py --size 7B --gpus 64 --gpu H200 --batch 512
    python plan.py --stage grpo --size 32B --gpus 64      # a stage of post-training: does it fit?
    python plan.py --size 7B --gpus 32 --bus-across 20    # a slower network than the reference's

The flags are those of pretrain.py, or of the stage, with those of the cluster. What a forward and
backward takes is counted on shapes without data (counting.py). The time is a model: a step takes
the longer of compute and communication, since one hides behind the other. Compute: a share of the
GPU's peak, fitted to the published speeds of the 1B and 7B. Communication: a share of the links'
peak, as NCCL's own tests show it. Post-training has no time here: it hangs on the length of the
answers, which nobody knows before.
"""

import math
import sys
from collections import Counter
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from counting import COLLECTIVES, MicroStep, Workload, is_compiled
from data import get_tokenizer
from infra.checkpoint import find_config, states_kept
from infra.distributed import run_cli
from infra.files import UserError, did_you_mean
from infra.gpus import GPU, named_gpu
from infra.hub import is_hub_name
from infra.settings import (
    NotNegative,
    Positive,
    check_ranges,
    flag_value,
    flags_in,
    parse_flags,
)
from infra.sharding import BatchLayout, batch_layout, check_divides, shard_size
from posttrain import STAGES, read_round, resolve_settings
from pretrain import number_of_steps, read_size, shape_of_flags
from recipes import PretrainSettings, pretrain_recipe
from sft import SamplingSettings, check_shape
from shape import SIZES, ModelConfig, read_config

# From the published speeds of the 1B and 7B alone (tests/bench.py --plan); the 13B and 32B test
# them. Small models do less FLOP/s: launching kernels takes longer than running them.
EFFICIENCY = 0.48  # FLOP/s done, recomputation and causal attention included, over the peak
# Of a link's peak, what collectives reach: an H100's NVLink of 450 GB/s gives 360 to 370, which is
# what NVIDIA expects (github.com/NVIDIA/nccl-tests issues 212 and 326).
LINK_SHARE = 0.8
# Bytes/s of a GPU's own network card: 400 Gb/s, as in the DGX H100 and Ai2's cluster Jupiter.
NETWORK_CARD = 50e9
USABLE = 0.9  # of a GPU's memory; the rest: CUDA, NCCL, fragmentation
GIB = 2**30
# GPUs (H100, bf16) and tokens/s/GPU, as published.
PUBLISHED = {"1B": (128, 55_000), "7B": (512, 10_000), "13B": (256, 4_600), "32B": (1024, 1_800)}
THRIFTY = "--recompute 1 --recompute-part block --reshard --shard 0"

# ------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class ClusterSettings:
    """The cluster, and what is to run on it."""

    # pretrain, sft, prefs, rm, dpo, ppo, grpo
    stage: str = "pretrain"
    # how many GPUs
    gpus: Positive = 1
    # H100, H200, B200, A100, L40S, ...: all of them are in infra/gpus.py
    gpu: str = "H100"
    # GiB of each; 0: what such a GPU has
    gpu_memory: NotNegative = 0.0
    # GPUs that share a node
    gpus_per_node: Positive = 8
    # GB/s that a collective reaches inside a node (busbw of nccl-tests); 0: 80% of the links' peak
    bus_inside: NotNegative = 0.0
    # the same over several nodes with all their GPUs; 0: 80% of a card of 400 Gb/s for each GPU
    bus_across: NotNegative = 0.0


@dataclass(frozen=True)
class PlanSettings(ClusterSettings, PretrainSettings):
    """Pretraining's settings, and the cluster."""


@dataclass(frozen=True)
class Cluster:
    """GPUs, their nodes and their links."""

    gpu: GPU
    gpus: int
    per_node: int
    memory: float  # bytes that a plan may use of a GPU's
    inside: float  # bytes/s that each GPU sends in a collective inside a node
    across: float  # over several nodes, when all GPUs of each take part

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.per_node)

    def bus(self, ranks: int, stride: int = 1) -> float:
        """Bytes/s that each GPU sends to a group of so many ranks, `stride` apart.

        A ring over several nodes leaves each node once, through all cards of the group's GPUs
        there. If the group has one GPU in a node, the others' cards serve other groups.
        """
        if self.nodes == 1 or self.per_node % (ranks * stride) == 0:
            return self.inside
        in_a_node = max(1, self.per_node // stride)
        return self.across * min(1, in_a_node / self.per_node)


def make_cluster(c: ClusterSettings) -> Cluster:
    """The cluster of the flags. Raises UserError for a GPU that is not known."""
    gpu = named_gpu(c.gpu)
    inside = c.bus_inside * 1e9 or LINK_SHARE * gpu.link
    across = c.bus_across * 1e9 or LINK_SHARE * NETWORK_CARD * c.gpus_per_node
    memory = USABLE * (c.gpu_memory or gpu.memory) * GIB
    return Cluster(gpu, c.gpus, c.gpus_per_node, memory, inside, min(inside, across))


def check_stage(stage: str) -> None:
    """Raise UserError for a stage that there is not."""
    stages = ["pretrain", *STAGES]
    if stage not in stages:
        raise UserError(
            f"--stage {stage} is not known{did_you_mean(stage.lower(), stages)}: name one of "
            f"{', '.join(stages)}; stage 2 (anneal.py) takes what pretrain takes"
        )


def shape_of(c: PlanSettings) -> ModelConfig:
    """The shape of --init or --size; a tokenizer is only looked for where the size has another."""
    if c.stage != "pretrain":  # what it starts from need not be there yet
        known = Path(c.init).exists() or is_hub_name(c.init)
        return read_config(find_config(c.init)) if known else SIZES[c.size]
    if c.init:
        return read_config(find_config(c.init))
    shape = shape_of_flags(c)
    if c.tokenizer not in ("olmo2", pretrain_recipe(c.size).get("tokenizer")):
        shape = replace(shape, vocab=get_tokenizer(c.tokenizer).padded_vocab_size)
    return replace(shape, norm_position=c.norm_position, qk_norm=c.qk_norm, norm=c.norm)


# ------------------------------------------------------------------------------------------
# What a stage runs at a time


def layout_of(c: PlanSettings, shape: ModelConfig) -> BatchLayout:
    """How a step falls on the GPUs. Raises UserError.

    Where answers are written, the GPUs need not divide them. In post-training a micro-batch has
    --micro-tokens, so here as many of the longest rows.
    """
    if c.stage == "pretrain":
        return batch_layout(c.batch, c.micro_batch, c.shard, c.gpus)
    shard = shard_size(c.shard, c.gpus)
    if isinstance(c, SamplingSettings):
        minibatches = getattr(c, "minibatches", 1)
        check_divides("--prompts", c.prompts, minibatches, f"--minibatches {minibatches}")
        rows = math.ceil(c.prompts * c.samples / minibatches / c.gpus)
    else:
        check_divides("--batch", c.batch, c.gpus, f"{c.gpus} processes")
        rows = c.batch // c.gpus
    fit = c.micro_tokens // (sequences_per_row(c.stage) * longest_sequence(c, shape))
    return BatchLayout(shard, rows, min(max(1, fit), rows))


def sequences_per_row(stage: str) -> int:
    """A pair is two conversations."""
    return 2 if stage in ("rm", "dpo") else 1


def longest_sequence(c: PlanSettings, shape: ModelConfig) -> int:
    """Tokens of the longest sequence of a stage. Raises UserError if the model takes fewer."""
    match c.stage:
        case "pretrain":
            return c.seq_len
        case "rm":  # nothing is cut, and what is longer than this is left out
            return shape.context
        case "sft" | "dpo":
            length = c.max_length
        case _:
            length = c.prompt_length + c.response_length
    check_shape(f"--size {c.size}", shape, length, "lm")
    return length


@dataclass(frozen=True)
class Sampling:
    """Memory of a GPU while answers are written, in bytes."""

    resident: Counter  # what training leaves there
    copy: float  # whole weights in bf16; 0: they are gathered from the shards for each token
    answers: int  # that are to be written in a step
    rows: int  # answers at a time
    row: int  # keys and values of one

    @property
    def memory(self) -> Counter:
        """By kind. There are two caches while rows that have ended are dropped."""
        cache = {"keys and values": 2 * self.rows * self.row}
        return self.resident + Counter({"whole copy in bf16": self.copy, **cache})


class Plan:
    """What a step takes on each GPU of the cluster. Raises UserError as `layout_of` does."""

    def __init__(self, shape: ModelConfig, c: PlanSettings):
        self.shape = shape
        self.c = c
        self.cluster = make_cluster(c)
        self.layout = layout_of(c, shape)
        self.length = longest_sequence(c, shape)
        accumulates = self.layout.rows > self.layout.micro_batch
        rows = self.layout.micro_batch * sequences_per_row(c.stage)
        self.micro_step = None  # what writes pairs trains nothing
        if c.stage != "prefs":
            work = Workload(c.stage, shape, c, rows, self.length, accumulates)
            self.micro_step = MicroStep(work, c.gpus)

    def memory(self, micro_batch: int, compiled: bool) -> Counter:
        """Bytes by kind at the peak of training."""
        return self.micro_step.memory(micro_batch * sequences_per_row(self.c.stage), compiled)

    def largest_micro_batch(self) -> int:
        """The largest micro-batch whose memory fits; 0 if none does."""
        whole = self.layout.rows
        largest = 0
        for rows in range(1, whole + 1):
            # In pretraining it divides the rows.
            if whole % rows and self.c.stage == "pretrain":
                continue
            if self.memory(rows, is_compiled(self.c)).total() <= self.cluster.memory:
                largest = rows
        return largest

    def step(self) -> Counter:
        """FLOPs (recomputation included) and bytes sent, by collective, of an optimizer step."""
        layout = self.layout
        counts = self.micro_step.counts()
        if layout.shard > 1 and not (counts["all-gather"] and counts["reduce-scatter"]):
            raise RuntimeError(f"torch {torch.__version__} names its collectives in another way")
        for kind in ("FLOPs", "all-gather", "reduce-scatter"):  # gradients are all-reduced once
            counts[kind] *= layout.rows // layout.micro_batch
        return counts

    def seconds(self, step: Counter) -> tuple[float, float]:
        """(compute, communication) of a step. It takes the longer of the two."""
        shard = self.layout.shard
        replicas = self.c.gpus // shard
        compute = step["FLOPs"] / (EFFICIENCY * self.cluster.gpu.peak)
        gathers = (step["all-gather"] + step["reduce-scatter"]) / self.cluster.bus(shard)
        return compute, gathers + step["all-reduce"] / self.cluster.bus(replicas, stride=shard)

    def sampling(self) -> Sampling | None:
        """How answers are written; None if this stage writes none, or servers do."""
        c = self.c
        if not isinstance(c, SamplingSettings) or getattr(c, "rollouts", ""):
            return None
        resident = self.resident()
        free = self.cluster.memory - resident.total()
        row = self.shape.cache_bytes(self.length, 2)
        copy = 0
        if self.shape.sampling_bytes(self.length) <= free:
            copy = 2 * self.shape.parameters["total"]
        else:
            two_blocks = replace(self.shape, layers=2)  # and what is in no block, in bf16
            resident["gathered weights"] = 2 * two_blocks.parameters["total"]
        left = self.cluster.memory - resident.total() - copy
        answers = math.ceil(c.prompts * c.samples / c.gpus)
        rows = max(1, min(answers, int(left / 3 // row)))
        return Sampling(resident, copy, answers, rows, row)

    def resident(self) -> Counter:
        """What stays between the steps: the models, and the moments of those that are trained."""
        if self.c.stage == "prefs":
            models = 2 if self.c.judge else 1
            frozen = 2 * self.shape.parameters["total"] * models
            return Counter({"parameters": frozen / self.layout.shard})
        counts = self.micro_step.counts()
        kinds = ("parameters", "optimizer moments", "reference")
        return Counter({kind: counts["forward", kind] for kind in kinds})


# ------------------------------------------------------------------------------------------
# What is shown


def show(label: str, *lines: str) -> None:
    """Print lines under a label."""
    for line in lines:
        print(f"{label:10}{line}")
        label = ""


def report(c: PlanSettings) -> None:
    """Print the plan. Raises UserError."""
    plan = Plan(shape_of(c), c)
    report_layout(plan)
    if c.stage == "prefs":
        report_sampling(plan)
        return
    fits = report_memory(plan)
    step = plan.step()
    seconds = 0.0
    if c.stage == "pretrain" and fits:
        seconds = max(plan.seconds(step))
        report_time(plan, step)
    elif c.stage == "pretrain":
        show("time", "none for what does not fit: plan again with what does")
    else:
        report_sampling(plan)
    report_run(plan, step["state"], seconds)


def report_layout(plan: Plan) -> None:
    """Print what runs, on what, and how a step falls on the GPUs."""
    c = plan.c
    shape = plan.shape
    total = shape.parameters["total"]
    shard = plan.layout.shard
    nodes = count(plan.cluster.nodes, "node")
    replicas = c.gpus // shard
    show("model", f"{c.size}: {total:,} parameters, {shape.layers} layers, D {shape.d_model}")
    show(
        "mesh",
        f"{c.gpus:,} {c.gpu} in {nodes}: {replicas} x the weights, each sharded over {shard}",
    )
    show("batch", *describe_batch(plan))


def describe_batch(plan: Plan) -> list[str]:
    """A step, and what of it a GPU has."""
    c = plan.c
    _, rows, micro_batch = astuple(plan.layout)
    if c.stage == "pretrain":
        tokens = c.batch * c.seq_len
        of_gpu = f"{rows // micro_batch} x {micro_batch} instances"
        return [f"{c.batch} x {c.seq_len} = {tokens:,} tokens per step; per GPU {of_gpu}"]
    if isinstance(c, SamplingSettings):
        rows_of_step = f"{c.prompts} x {c.samples} answers"
    else:
        thing = "pair" if sequences_per_row(c.stage) == 2 else "conversation"
        rows_of_step = count(c.batch, thing)
    text = f"{c.stage}, {rows_of_step} per step, of up to {plan.length:,} tokens"
    if c.stage == "prefs":
        return [text]
    return [text, f"in training {rows:,} per GPU and optimizer step, {micro_batch} at a time"]


def count(number: int, thing: str) -> str:
    """A number of things.

    >>> count(1, "node"), count(1024, "node")
    ('1 node', '1,024 nodes')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def report_memory(plan: Plan) -> bool:
    """Print what takes memory at the peak of training, and what fits. Does this?"""
    c = plan.c
    compiled = is_compiled(c)
    memory = plan.memory(plan.layout.micro_batch, compiled)
    eager = plan.memory(plan.layout.micro_batch, compiled=False).total() / GIB
    note = f" ({eager:.1f} counted without torch.compile)" if compiled else ""
    show_memory(plan, f"at the peak of training{note}", memory)
    largest = plan.largest_micro_batch()
    gib = plan.cluster.memory / USABLE / GIB
    flag, unit = "--micro-batch", 1
    if c.stage != "pretrain":
        flag, unit = "--micro-tokens", plan.length * sequences_per_row(c.stage)
    show("fits", f"largest {flag} within {USABLE:.0%} of {gib:g} GiB: {largest * unit:,}")
    if largest:
        return memory.total() <= plan.cluster.memory
    least_flags = f"{flag} {unit} {THRIFTY}"
    thrifty = Plan(plan.shape, parse_flags(c, least_flags.split(), __doc__))
    least = thrifty.memory(1, compiled).total()
    enough = "" if least <= plan.cluster.memory else ": take more GPUs, or larger ones"
    show("", f"{least_flags} takes {least / GIB:.1f} GiB{enough}")
    return False


def show_memory(plan: Plan, when: str, memory: Counter) -> None:
    """Print the bytes by kind, and whether they fit."""
    total = memory.total()
    warning = ": DOES NOT FIT" if total > plan.cluster.memory else ""
    usable = f"of {plan.cluster.memory / GIB:.1f} that may be used"
    show("memory", f"{total / GIB:.1f} GiB per GPU {when}, {usable}{warning}")
    for kind, n_bytes in memory.items():
        if n_bytes:
            show("", f"{kind:20}{n_bytes / GIB:8.2f} GiB")


def report_sampling(plan: Plan) -> None:
    """Print what takes memory while answers are written, how many at a time, and what may help."""
    c = plan.c
    if not isinstance(c, SamplingSettings):
        return
    sampling = plan.sampling()
    if not sampling:
        weights = 2 * plan.shape.parameters["total"] / GIB
        row = plan.shape.cache_bytes(plan.length, 2) / GIB
        show(
            "sampling",
            "servers write the answers, and it takes nothing here",
            f"the GPUs of a server share {weights:.1f} GiB of weights, and {row:.2f} GiB for each "
            "answer at a time",
        )
        return
    show_memory(plan, "while answers are written", sampling.memory)
    least = plan.shape.sampling_bytes(plan.length) / GIB
    free = (plan.cluster.memory - plan.resident().total()) / GIB
    how = "whole weights on each GPU" if sampling.copy else "over the shards, which is slow"
    answers = count(sampling.answers, "answer")
    show(
        "sampling",
        how,
        f"whole weights and one answer take {least:.1f} GiB, and {free:.1f} GiB are free",
        f"{sampling.rows:,} of a GPU's {answers} at a time",
    )
    if not sampling.copy or sampling.rows < sampling.answers:
        show("", "faster: more GPUs, GPUs with more memory, or vLLM servers (--rollouts)")


def report_time(plan: Plan, step: Counter) -> None:
    """Print what is sent and computed, how long it takes, and the speed."""
    c = plan.c
    peak = plan.cluster.gpu.peak
    compute, communication = plan.seconds(step)
    seconds = max(compute, communication)
    sent = ", ".join(f"{kind} {step[kind] / 1e9:,.1f} GB" for kind in COLLECTIVES)
    show("sent", f"per GPU and step: {sent}", *describe_links(plan))
    parts = f"compute {compute:.3g}, communication {communication:.3g}"
    flops = step["FLOPs"] / 1e12
    show(
        "time",
        f"{seconds:.3g} s per step = max({parts})",
        f"compute = {flops:,.1f} TFLOP per GPU, recomputation included, / "
        f"({EFFICIENCY} x {peak / 1e12:.0f} TFLOP/s)",
    )
    tokens = plan.layout.rows * c.seq_len
    speed = tokens / seconds
    useful = plan.shape.flops_per_token(c.seq_len)
    # Of attention in full, causal attention is half.
    causal = useful - 6 * plan.shape.layers * plan.shape.d_model * c.seq_len
    full_mfu = speed * useful / peak
    causal_mfu = speed * causal / peak
    mfu = f"MFU {full_mfu:.1%} with attention in full, {causal_mfu:.1%} causal"
    show("speed", f"{speed:,.0f} tokens/s/GPU; {mfu}")
    if communication > compute:
        most = tokens / compute
        show("", f"up to {most:,.0f} tokens/s/GPU if the network is faster than that")
    gpus, published = PUBLISHED.get(c.size, (0, 0))
    if c == PlanSettings(size=c.size, gpus=gpus, **pretrain_recipe(c.size)):
        off = speed / published - 1
        show("", f"published {published:,} tokens/s/GPU: the plan is {off:+.1%} off")


def describe_links(plan: Plan) -> list[str]:
    """How fast the groups of GPUs send, a line for each kind of group."""
    shard = plan.layout.shard
    replicas = plan.c.gpus // shard
    lines = []
    if shard > 1:
        speed = plan.cluster.bus(shard) / 1e9
        lines.append(f"{speed:,.0f} GB/s among the {shard} GPUs that share the weights")
    if replicas > 1:
        speed = plan.cluster.bus(replicas, stride=shard) / 1e9
        lines.append(f"{speed:,.0f} GB/s among {replicas} replicas")
    return lines


def steps_of(c: PlanSettings) -> int:
    """Steps of the run; 0 where the rows of the data decide."""
    if c.stage == "pretrain":
        return number_of_steps(c)
    return round(c.share * c.steps)


def report_run(plan: Plan, state: float, seconds: float) -> None:
    """Print days and GPU hours of the whole run, what it leaves on the disk, and host memory.

    state: bytes of a training state. seconds: of a step, 0 if that is not known.
    """
    c = plan.c
    steps = steps_of(c)
    if seconds:
        days = steps * seconds / 86_400
        hours = 24 * days * c.gpus
        took = f"{days:,.1f} days, {hours:,.0f} GPU hours"
        show("run", f"{steps:,} steps: {took}, without evaluations, saves and faults")
    kept = states_kept(steps, c.save_every, c.keep) if steps else c.keep
    weights = 4 * plan.shape.parameters["total"]
    disk = size(kept * state + weights)
    states = f"{count(kept, 'state')} of {size(state)}"
    flags = f"--save-every {c.save_every} --keep {c.keep}"
    show("disk", f"{disk}: {states} ({flags}), and hf/ of {size(weights)}")
    show("host", f"{size(host_bytes(plan, state))} of a node's memory to save a state")


def size(n_bytes: float) -> str:
    """Bytes in words.

    >>> size(386.8e9), size(279.4e12)
    ('386.8 GB', '279.4 TB')
    """
    if n_bytes < 1e12:
        return f"{n_bytes / 1e9:,.1f} GB"
    return f"{n_bytes / 1e12:,.1f} TB"


def host_bytes(plan: Plan, state: float) -> float:
    """Bytes of a node's memory that a save takes, about.

    A model's moments are the largest part that is written at once: as tensors, and as the bytes of
    the file. --async-save copies the whole state before, and pinned memory comes in powers of two.
    """
    c = plan.c
    ranks = min(c.gpus, c.gpus_per_node)
    share = ranks / plan.layout.shard  # of a state, on this node; replicas write it once
    moments = 8 * plan.shape.parameters["total"]
    copy = state * share if c.async_save else 0
    return copy + 2 * moments * min(1, share)


# ------------------------------------------------------------------------------------------
# The command line


def read_settings(arguments: list[str] | None) -> PlanSettings:
    """The settings of a command line: class < recipe of --size < flags. Raises UserError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    stage = flag_value(arguments, "stage", "pretrain")
    check_stage(stage)
    size = read_size(arguments)
    if stage == "pretrain":
        default = PlanSettings(size=size, **pretrain_recipe(size))
    else:
        default = stage_settings(stage, size, arguments)
    return parse_flags(default, arguments, __doc__)


def stage_settings(stage: str, size: str, arguments: list[str]) -> ClusterSettings:
    """The recipe of a stage, with a cluster's settings beside its own."""
    words = ["--size", size]
    if "round" in flags_in(arguments):
        words += ["--round", str(read_round(arguments))]
    recipe, _ = resolve_settings(stage, words)

    @dataclass(frozen=True)
    class StagePlanSettings(ClusterSettings, STAGES[stage]):
        """The stage's settings, and the cluster."""

    return StagePlanSettings(**vars(recipe), stage=stage)


def main(arguments: list[str] | None = None) -> None:
    c = read_settings(arguments)
    check_ranges(c)
    report(c)


if __name__ == "__main__":
    run_cli(main)
