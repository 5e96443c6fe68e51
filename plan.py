"""Memory, traffic and speed of a cluster, without one.

    python plan.py --size 32B --gpus 1024       # 7 seconds, 0.4 GB, no GPU
    python plan.py --size 7B --gpus 64 --batch 512 --gpu-memory 141

The flags are those of pretrain.py, with --gpus and --gpu-memory. The model, sharded as it will be,
runs one forward and backward on fake tensors (shapes without data) with fake collectives, and every
operation is counted: what is alive, what is computed, what is sent. That is done at two small
depths and two micro-batches, and continued in straight lines, which meet the whole model. What
torch.compile saves is an estimate. The time is a model of two constants, fitted to the published
speeds of the 1B and 7B: a step takes the longer of compute and communication, since one hides
behind the other.
"""

import math
import sys
import warnings
import weakref
from collections import Counter
from dataclasses import astuple, dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from data import get_tokenizer
from infra.checkpoint import find_config
from infra.distributed import PEAK_FLOPS, run_cli
from infra.settings import AboveZero, Positive, check_ranges, parse_flags
from infra.sharding import BatchLayout, batch_layout, make_mesh, shard_model
from model import ChunkedLoss, OLMo2
from pretrain import make_optimizer, read_size, shape_of_flags
from recipes import PretrainSettings, pretrain_recipe
from shape import ModelConfig, read_config

# From the published speeds of the 1B and 7B alone (tests/bench.py --plan); the 13B and 32B test
# them. Small models do less FLOP/s: launching kernels takes longer than running them.
EFFICIENCY = 0.48  # FLOP/s done, recomputation and causal attention included, over the peak
BUS = 69e9  # bytes/s sent per GPU: the least that the 7B sent across nodes
PEAK = PEAK_FLOPS["H100"]
USABLE = 0.9  # of a GPU's memory; the rest: CUDA, NCCL, fragmentation
GIB = 2**30
# GPUs (H100, bf16) and tokens/s/GPU, as published.
PUBLISHED = {"1B": (128, 55_000), "7B": (512, 10_000), "13B": (256, 4_600), "32B": (1024, 1_800)}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")
KINDS = (
    "parameters",
    "optimizer moments",
    "gradients",
    "gathered weights",
    "gradients in flight",
    "activations",
    "temporaries",
)


@dataclass(frozen=True)
class PlanSettings(PretrainSettings):
    """Pretraining's settings, and the cluster."""

    # H100s of the plan
    gpus: Positive = 1
    # GiB of each
    gpu_memory: AboveZero = 80.0


# ------------------------------------------------------------------------------------------
# What is counted


class OpCounter(TorchDispatchMode):
    """Counts what is computed and sent, and what is alive at the worst moment of each phase."""

    def __init__(self):
        super().__init__()
        self.phase = "setup"
        self.counts = Counter()  # FLOPs, and bytes sent by each collective
        # Living storage -> [kind]: a list, since a later operation may know better.
        self.kind_of = weakref.WeakKeyDictionary()
        self.peak = Counter()  # phase -> most bytes alive
        self.alive = {}  # phase -> ([kind], bytes) of each storage at that moment

    def mark(self, kind: str, tensors) -> None:
        """Say of what kind these tensors are."""
        for tensor in tree_leaves(tensors):
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            self.kind_of.setdefault(storage, [kind])[0] = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it comes again, for this rank's shard
        kwargs = kwargs or {}
        phase = self.phase
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                kind = "activations" if phase == "forward" else "temporaries"
                self.kind_of.setdefault(leaf.untyped_storage(), [kind])
        self.count(func, args, kwargs, out)
        # FSDP frees a gathered weight by resizing its storage, unseen here: sum it all anew.
        total = sum(storage.nbytes() for storage in self.kind_of)
        if total > self.peak[phase]:
            self.peak[phase] = total
            self.alive[phase] = [(kind, s.nbytes()) for s, kind in self.kind_of.items()]
        return out

    def count(self, func, args: tuple, kwargs: dict, out) -> None:
        """Count the bytes that this GPU sends (in a ring, all but one part), or the FLOPs."""
        match func._schema.name:
            case "c10d::_allgather_base_":
                self.mark("gathered weights", args[0])
                self.counts["all-gather"] += args[0].nbytes - args[1].nbytes
            case "fsdp::split_with_sizes_copy":  # what was gathered becomes weights
                self.mark("gathered weights", kwargs["out"])
            case "fsdp::chunk_cat":  # a block's gradients become one buffer, in fp32
                self.mark("gradients in flight", (args[0], kwargs["out"]))
            case "c10d::_reduce_scatter_base_":
                self.mark("gradients", args[0])
                self.counts["reduce-scatter"] += args[1].nbytes - args[0].nbytes
            case "c10d::allreduce_":
                ranks = distributed.ProcessGroup.unbox(args[1]).size()
                sent = sum(tensor.nbytes for tensor in args[0])
                self.counts["all-reduce"] += 2 * sent * (ranks - 1) / ranks
            case _ if func._overloadpacket in flop_registry:
                flops = flop_registry[func._overloadpacket]
                self.counts["FLOPs"] += flops(*args, **kwargs, out_val=out)
            case name if "scaled_dot_product" in name:
                # The CPU's kernel is not in the registry: 2 products forward, 4 backward, of 2
                # FLOPs per entry of T x T x K, of which causal attention does half.
                products = 4 if "backward" in name else 2
                q = args[0]  # backward: the gradient of the output, of the same shape
                self.counts["FLOPs"] += products * q.numel() * q.shape[-2]


def count_micro_step(
    shape: ModelConfig, c: PlanSettings, layout: BatchLayout, times: int = 1
) -> Counter:
    """Counts of one forward and backward on a micro-batch, or `times` as many instances.

    Under (phase, kind): the bytes alive at the phase's worst moment. Clipping and AdamW work in
    place, when the activations are gone: they are never the peak.
    """
    from torch._subclasses import FakeTensorMode

    with torch.device("meta"):
        model = OLMo2(shape)
    # Before the mode: FSDP cuts each weight in as many views as there are ranks.
    mesh = make_mesh(c.shard, torch.device("cpu"))
    # Compilation does nothing here: see `compiled_bytes`.
    shard_model(model, model.model.layers, replace(c, compile="no"), mesh, bf16=True)
    with FakeTensorMode(allow_non_fake_inputs=True), OpCounter() as counter:
        model.to_empty(device="cpu")
        parameters = list(model.parameters())
        counter.mark("parameters", parameters)
        optimizer = make_optimizer(model, c)  # must live: what is alive is counted
        counter.mark("optimizer moments", list(optimizer.state.values()))
        if layout.rows > layout.micro_batch:  # gradients of the micro-batches before
            for p in parameters:
                p.grad = torch.zeros_like(p)
                counter.mark("gradients", p.grad)
        tokens = torch.zeros(times * layout.micro_batch, c.seq_len, dtype=torch.long)
        counter.phase = "forward"
        ce, z, _ = model.loss(tokens, tokens)
        counter.phase = "backward"
        (ce + z).backward()
    counts = counter.counts
    counts["parameters"] = sum(p.numel() for p in parameters)
    for phase, alive in counter.alive.items():
        for [kind], n_bytes in alive:
            counts[phase, kind] += n_bytes
    return counts


# ------------------------------------------------------------------------------------------
# What is interpolated


def interpolate(a: Counter, b: Counter, share: float) -> Counter:
    """The point on the straight line through a and b at a share of the way; it may lie beyond.

    >>> interpolate(Counter(x=10), Counter(x=20), 3)
    Counter({'x': 40})
    """
    return Counter({key: a[key] * (1 - share) + b[key] * share for key in {**a, **b}})


class Plan:
    """Counts of a step on --gpus H100, per GPU. Raises UserError as `batch_layout` does.

    They are made at two depths and two micro-batches, and by straight lines at any others.
    """

    def __init__(self, shape: ModelConfig, c: PlanSettings):
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.shape = shape
        self.c = c
        self.compiled = c.compile != "no"  # a plan is for GPUs
        self.layout = batch_layout(c.batch, c.micro_batch, c.shard, c.gpus)
        # Whole periods of recomputation, from three blocks on: then all of FSDP's buffers are used.
        self.period = Fraction(c.recompute).limit_denominator(16).denominator
        self.depth = math.ceil(3 / self.period) * self.period
        self.counted = []  # of each depth: [of this micro-batch, of twice as many rows]
        # ChunkedLoss asks if two gradients are one tensor.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        chunk = ChunkedLoss.CHUNK["cpu"]
        ChunkedLoss.CHUNK["cpu"] = ChunkedLoss.CHUNK["cuda"]
        distributed.init_process_group("fake", rank=0, world_size=c.gpus, store=FakeStore())
        try:
            for depth in (self.depth, self.depth + self.period):
                small = replace(shape, layers=depth)
                self.counted.append(
                    [count_micro_step(small, c, self.layout, times) for times in (1, 2)]
                )
        finally:
            distributed.destroy_process_group()
            ChunkedLoss.CHUNK["cpu"] = chunk

    def at(self, layers: int, rows: int) -> Counter:
        """The counts of a forward and backward of so many layers on so many instances."""
        share = rows / self.layout.micro_batch - 1
        a, b = (interpolate(*pair, share) for pair in self.counted)
        return interpolate(a, b, (layers - self.depth) / self.period)

    def memory(self, rows: int, compiled: bool) -> Counter:
        """Bytes by kind at the peak, with micro-batches of `rows`."""
        counts = self.at(self.shape.layers, rows)
        phases = []
        for phase in ("forward", "backward"):
            kinds = Counter({kind: counts[phase, kind] for kind in KINDS})
            if compiled:
                outside_blocks = self.at(0, rows)[phase, "activations"]
                kinds["activations"] = outside_blocks + rows * compiled_bytes(self.shape, self.c)
            phases.append(kinds)
        return max(phases, key=Counter.total)

    def largest_micro_batch(self) -> int:
        """The largest micro-batch whose memory fits; 0 if none does."""
        whole = self.layout.rows
        usable = USABLE * self.c.gpu_memory * GIB
        largest = 0
        for i in range(1, math.isqrt(whole) + 1):
            for rows in (i, whole // i):  # the divisors, in pairs
                if whole % rows == 0 and self.memory(rows, self.compiled).total() <= usable:
                    largest = max(largest, rows)
        return largest

    def step(self) -> Counter:
        """FLOPs (recomputation included) and bytes sent, by collective, of an optimizer step."""
        layout = self.layout
        counts = self.at(self.shape.layers, layout.micro_batch)
        if layout.shard > 1 and not (counts["all-gather"] and counts["reduce-scatter"]):
            raise RuntimeError(f"torch {torch.__version__} names its collectives in another way")
        for kind in ("FLOPs", "all-gather", "reduce-scatter"):  # gradients are all-reduced once
            counts[kind] *= layout.rows // layout.micro_batch
        return counts


def compiled_bytes(shape: ModelConfig, c: PlanSettings) -> float:
    """Bytes that compiled blocks keep of an instance for the backward, in bf16 (estimated).

    A block keeps its input, q and k before norm and after RoPE, v, the outputs of attention and of
    o_proj, the MLP's input, gate, up, their product and its output; and a number per head, fp32.
    """
    kv_width = shape.kv_heads * shape.head_dim
    widths = 7 * shape.d_model + 3 * kv_width + 3 * shape.ffn
    block = 2 * widths + 4 * shape.heads  # per token
    recomputed = 2 * shape.d_model
    if c.recompute_part == "mlp":
        recomputed = block - 6 * shape.ffn
    mean = block - c.recompute * (block - recomputed)
    return shape.layers * c.seq_len * mean


def seconds_of(step: Counter) -> tuple[float, float]:
    """(compute, communication) of a step, in seconds. It takes the longer of the two."""
    sent = sum(step[kind] for kind in COLLECTIVES)
    return step["FLOPs"] / (EFFICIENCY * PEAK), sent / BUS


# ------------------------------------------------------------------------------------------
# What is shown


def report(c: PlanSettings) -> None:
    """Print the plan of a step on --gpus H100. Raises UserError."""
    shape = shape_of(c)
    plan = Plan(shape, c)
    step = plan.step()
    shard, rows, micro_batch = astuple(plan.layout)
    print(
        f"model     {c.size}: {round(step['parameters']):,} parameters, {shape.layers} layers, "
        f"D {shape.d_model}\n"
        f"mesh      {c.gpus:,} H100: {c.gpus // shard} x the weights, each sharded over {shard}"
    )
    print(
        f"batch     {c.batch} x {c.seq_len} = {c.batch * c.seq_len:,} tokens per step; per GPU "
        f"{rows // micro_batch} x {micro_batch} instances"
    )
    report_memory(plan)
    report_time(plan, step)


def shape_of(c: PlanSettings) -> ModelConfig:
    """The shape of --init or --size; a tokenizer is only looked for where the size has another."""
    if c.init:
        return read_config(find_config(c.init))
    shape = shape_of_flags(c)
    if c.tokenizer not in ("olmo2", pretrain_recipe(c.size).get("tokenizer")):
        shape = replace(shape, vocab=get_tokenizer(c.tokenizer).padded_vocab_size)
    return replace(shape, norm_position=c.norm_position, qk_norm=c.qk_norm, norm=c.norm)


def report_memory(plan: Plan) -> None:
    """Print what takes memory at the peak, and what fits."""
    c = plan.c
    rows = plan.layout.micro_batch
    memory = plan.memory(rows, plan.compiled)
    peak = memory.total() / GIB
    eager = plan.memory(rows, compiled=False).total() / GIB
    warning = ": DOES NOT FIT" if peak > USABLE * c.gpu_memory else ""
    print(
        f"memory    {peak:.1f} GiB per GPU at the peak{warning} "
        f"({eager:.1f} counted without torch.compile)"
    )
    for kind, size in memory.items():
        print(f"          {kind:20}{size / GIB:8.2f} GiB")
    largest = plan.largest_micro_batch()
    print(
        f"fits      largest micro-batch within {USABLE:.0%} of {c.gpu_memory:g} GiB: "
        f"{largest} instances"
    )
    if not largest:
        flags = "--micro-batch 1 --recompute 1 --recompute-part block --reshard --shard 0"
        thrifty = parse_flags(c, flags.split(), __doc__)
        least = Plan(plan.shape, thrifty).memory(1, plan.compiled).total() / GIB
        print(f"          {flags} takes {least:.1f} GiB")


def report_time(plan: Plan, step: Counter) -> None:
    """Print what is sent and computed, how long it takes, and the speed."""
    c = plan.c
    shape = plan.shape
    compute, communication = seconds_of(step)
    seconds = max(compute, communication)
    sent = ", ".join(f"{kind} {step[kind] / 1e9:,.1f} GB" for kind in COLLECTIVES)
    print(
        f"sent      per GPU and step: {sent}\n"
        f"time      {seconds:.3g} s per step = max(compute {compute:.3g}, communication "
        f"{communication:.3g})"
    )
    print(
        f"          compute = {step['FLOPs'] / 1e12:,.1f} TFLOP per GPU, recomputation included, / "
        f"({EFFICIENCY} x {PEAK / 1e12:.0f} TFLOP/s)\n"
        f"          communication = {communication * BUS / 1e9:,.1f} GB / {BUS / 1e9:.0f} GB/s"
    )
    speed = plan.layout.rows * c.seq_len / seconds
    useful = shape.flops_per_token(c.seq_len)
    causal = useful - 6 * shape.layers * shape.d_model * c.seq_len  # attention is half of that
    print(
        f"speed     {speed:,.0f} tokens/s/GPU; MFU {speed * useful / PEAK:.1%} with attention in "
        f"full, {speed * causal / PEAK:.1%} causal"
    )
    if communication > compute:
        most = plan.layout.rows * c.seq_len / compute
        print(f"          up to {most:,.0f} tokens/s/GPU if the network is faster than that")
    gpus, published = PUBLISHED.get(c.size, (0, 0))
    if c == PlanSettings(size=c.size, gpus=gpus, **pretrain_recipe(c.size)):
        off = speed / published - 1
        print(f"          published {published:,} tokens/s/GPU: the plan is {off:+.1%} off")


# ------------------------------------------------------------------------------------------
# The command line


def read_settings(arguments: list[str] | None) -> PlanSettings:
    """The settings of a command line: class < recipe of --size < flags. Raises UserError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    size = read_size(arguments)
    return parse_flags(PlanSettings(size=size, **pretrain_recipe(size)), arguments, __doc__)


def main(arguments: list[str] | None = None) -> None:
    c = read_settings(arguments)
    check_ranges(c)
    report(c)


if __name__ == "__main__":
    run_cli(main)
