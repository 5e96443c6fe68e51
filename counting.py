"""A forward and backward, counted on shapes without data: memory, FLOPs, bytes sent.

    MicroStep(Workload("pretrain", SIZES["7B"], settings, rows=2, length=4096), gpus=64)

The models of a stage, sharded as they will be, run on fake tensors with fake collectives, and every
operation is counted: what is alive, what is computed, what is sent. That is done at two small
depths and two micro-batches, and continued in straight lines, which meet the whole model. What
torch.compile saves is an estimate. Used by plan.py.
"""

import contextlib
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from infra.checkpoint import state_bytes, state_tensors
from infra.settings import RunSettings
from infra.sharding import make_mesh, shard_model
from model import ChunkedLoss, OLMo2
from pretrain import adamw
from shape import ModelConfig

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")
KINDS = (
    "parameters",
    "optimizer moments",
    "reference",
    "gradients",
    "gathered weights",
    "gradients in flight",
    "activations",
    "temporaries",
)
# Heads of the models that a stage trains; all other stages train one that writes text.
HEADS = {"rm": ("score",), "ppo": ("lm", "score")}
WITH_REFERENCE = ("ppo", "grpo")  # a frozen model that stays


@dataclass(frozen=True)
class Workload:
    """What each GPU runs forward and backward at a time."""

    stage: str
    shape: ModelConfig
    settings: RunSettings  # how it is sharded and recomputed, and AdamW's numbers
    rows: int  # sequences
    length: int  # tokens of each
    accumulates: bool = False  # gradients of other micro-batches are there already

    @property
    def heads(self) -> tuple[str, ...]:
        return HEADS.get(self.stage, ("lm",))


def is_compiled(c: RunSettings) -> bool:
    """Will blocks and loss be compiled on a GPU?"""
    return c.compile != "no"


def not_compiled(c: RunSettings) -> RunSettings:
    """The settings for a count, in which compilation does nothing: see `compiled_bytes`."""
    return replace(c, compile="no")


# ------------------------------------------------------------------------------------------
# One count


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
        out = take_all(func, args)
        if out is None:
            out = func(*args, **kwargs)
        may_grow = func._schema.is_mutable
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self.kind_of:
                kind = "activations" if phase == "forward" else "temporaries"
                self.kind_of[leaf.untyped_storage()] = [kind]
                may_grow = True
        self.count(func, args, kwargs, out)
        if not may_grow:
            return out
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
            case "aten::copy_" if args[0].ndim == 1:  # so does, on one GPU, a copy in bf16
                self.mark("gathered weights", args[0])
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


def take_all(func, args: tuple) -> Tensor | None:
    """All of x, for x[mask] and its gradient: which tokens count is data, so here all do.

    None for any other operation.
    """
    aten = torch.ops.aten
    is_mask = func is aten.index.Tensor and args[1][0].dtype == torch.bool
    if is_mask:
        return args[0].flatten(0, args[1][0].ndim - 1).clone()
    return args[0].flatten().clone() if func is aten.masked_select.default else None


def forward(stage: str, models: list[OLMo2], tokens: Tensor) -> Tensor:
    """What the backward of a stage starts from, but for the formula of its loss: a sum."""
    match stage:
        case "pretrain" | "sft":
            ce_sum, z_sum, _ = models[0].loss(tokens, tokens)
            return ce_sum + z_sum
        case "rm":
            return models[0].scores(tokens)[:, -1].sum()
        case "ppo":
            policy, value = models
            return policy.log_probs(tokens, tokens).sum() + value.scores(tokens).sum()
        case _:
            return models[0].log_probs(tokens, tokens).sum()


def make_model(work: Workload, head: str, mesh: DeviceMesh, frozen: bool = False) -> OLMo2:
    """A model of the stage without values, sharded."""
    with torch.device("meta"):
        model = OLMo2(replace(work.shape, head=head))
    if frozen:
        model.to(torch.bfloat16)
    shard_model(model, model.model.layers, not_compiled(work.settings), mesh, bf16=True)
    return model


def prepare(model: OLMo2, work: Workload, counter: OpCounter) -> torch.optim.AdamW:
    """Its optimizer, and the gradients of the micro-batches before."""
    parameters = list(model.parameters())
    counter.mark("parameters", parameters)
    groups = [{"params": parameters, "weight_decay": 0.0}]
    optimizer = adamw(groups, work.settings)
    counter.mark("optimizer moments", list(optimizer.state.values()))
    if work.accumulates:
        for p in parameters:
            p.grad = torch.zeros_like(p)
            counter.mark("gradients", p.grad)
    return optimizer


def count_micro_step(work: Workload, times: int = 1) -> Counter:
    """Counts of one forward and backward on `times` as many rows, in a `fake_cluster`.

    Under (phase, kind): the bytes alive at the phase's worst moment. Clipping and AdamW work in
    place, when the activations are gone: they are never the peak.
    """
    from torch._subclasses import FakeTensorMode

    # Before the mode: FSDP cuts each weight in as many views as there are ranks.
    mesh = make_mesh(work.settings.shard, torch.device("cpu"))
    models = [make_model(work, head, mesh) for head in work.heads]
    references = []
    if work.stage in WITH_REFERENCE:
        references.append(make_model(work, "lm", mesh, frozen=True))
    with FakeTensorMode(allow_non_fake_inputs=True), OpCounter() as counter:
        for model in (*models, *references):
            model.to_empty(device="cpu")
        counter.mark("reference", [list(model.parameters()) for model in references])
        optimizers = []  # they must live: what is alive is counted
        for model in models:
            optimizers.append(prepare(model, work, counter))
        tokens = torch.zeros(times * work.rows, work.length, dtype=torch.long)
        counter.phase = "forward"
        loss = forward(work.stage, models, tokens)
        counter.phase = "backward"
        loss.backward()
    counts = counter.counts
    counts["parameters"] = sum(p.numel() for p in models[0].parameters())
    states = map(state_tensors, models, optimizers)
    counts["state"] = sum(map(state_bytes, states))
    for phase, alive in counter.alive.items():
        for [kind], n_bytes in alive:
            counts[phase, kind] += n_bytes
    return counts


# ------------------------------------------------------------------------------------------
# Two depths, two micro-batches, and the lines through them


@contextlib.contextmanager
def fake_cluster(gpus: int) -> Iterator[None]:
    """So many ranks, of which this process is the first and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # ChunkedLoss asks if two gradients are one tensor.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    chunk = ChunkedLoss.CHUNK["cpu"]
    ChunkedLoss.CHUNK["cpu"] = ChunkedLoss.CHUNK["cuda"]
    distributed.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()
        ChunkedLoss.CHUNK["cpu"] = chunk


def interpolate(a: Counter, b: Counter, share: float) -> Counter:
    """The point on the straight line through a and b at a share of the way; it may lie beyond.

    >>> interpolate(Counter(x=10), Counter(x=20), 3)
    Counter({'x': 40})
    """
    return Counter({key: a[key] * (1 - share) + b[key] * share for key in {**a, **b}})


class MicroStep:
    """The counts of a workload on one of so many GPUs, at any depth and micro-batch."""

    def __init__(self, work: Workload, gpus: int):
        self.work = work
        # Whole periods of recomputation, from three blocks on: then all of FSDP's buffers are used.
        self.period = Fraction(work.settings.recompute).limit_denominator(16).denominator
        self.depth = math.ceil(3 / self.period) * self.period
        self.counted = []  # of each depth: [of this micro-batch, of twice as many rows]
        with fake_cluster(gpus):
            for depth in (self.depth, self.depth + self.period):
                small = replace(work, shape=replace(work.shape, layers=depth))
                self.counted.append([count_micro_step(small, times) for times in (1, 2)])

    def at(self, layers: int, rows: int) -> Counter:
        """The counts of a forward and backward of so many layers on so many rows."""
        share = rows / self.work.rows - 1
        a, b = (interpolate(*pair, share) for pair in self.counted)
        return interpolate(a, b, (layers - self.depth) / self.period)

    def counts(self) -> Counter:
        """The counts of the workload itself."""
        return self.at(self.work.shape.layers, self.work.rows)

    def memory(self, rows: int, compiled: bool) -> Counter:
        """Bytes by kind at the peak, with micro-batches of `rows`."""
        work = self.work
        counts = self.at(work.shape.layers, rows)
        outside_blocks = self.at(0, rows)
        phases = []
        for phase in ("forward", "backward"):
            kinds = Counter({kind: counts[phase, kind] for kind in KINDS})
            if compiled:
                in_blocks = compiled_bytes(work.shape, work.settings, work.length)
                kinds["activations"] = outside_blocks[phase, "activations"]
                kinds["activations"] += rows * in_blocks * len(work.heads)
            phases.append(kinds)
        return max(phases, key=Counter.total)


def compiled_bytes(shape: ModelConfig, c: RunSettings, length: int) -> float:
    """Bytes that compiled blocks keep of `length` tokens for the backward, in bf16 (estimated).

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
    return shape.layers * length * mean
