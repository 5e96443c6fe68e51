"""How a model and a batch fall on the ranks: FSDP2 shards weights, gradients and moments.

`shard` ranks share one copy of the weights; more ranks than that hold replicas (HSDP). A forward
gathers the weights of one group of layers at a time, and a backward leaves each rank the sum of its
own part of the gradients. Without torchrun nothing is sharded, and every function still works.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from infra.distributed import is_compiled
from infra.files import UserError
from infra.settings import RunSettings

# ------------------------------------------------------------------------------------------
# Which rank takes which part


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch falls on the ranks."""

    shard: int  # ranks that share one copy of the weights
    rows: int  # instances per rank and step
    micro_batch: int  # of these, instances per forward and backward


def batch_layout(batch: int, micro_batch: int, shard: int, world: int) -> BatchLayout:
    """The layout of `batch` instances on `world` ranks. Raises UserError."""
    micro_batch = min(micro_batch, max(1, batch // world))
    ranks = f"{world} processes"
    check_divides("--batch", batch, world, ranks)
    times = f"{ranks} x " if world > 1 else ""
    check_divides("--batch", batch, world * micro_batch, f"{times}--micro-batch {micro_batch}")
    return BatchLayout(shard_size(shard, world), batch // world, micro_batch)


def check_divides(flag: str, value: int, unit: int, parts: str) -> None:
    """Raise UserError, with the nearest values, unless `unit` divides a flag's value."""
    if value % unit == 0:
        return
    below = value // unit * unit
    near = " or ".join(str(n) for n in (below, below + unit) if n)
    raise UserError(
        f"{flag} {value} = {value / unit:.2f} x {parts} does not divide: use {flag} {near}"
    )


def shard_size(shard: int, world: int) -> int:
    """Ranks per copy of the weights, from --shard (0: all). Raises UserError."""
    size = min(shard or world, world)
    if world % size:
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        below = max(n for n in divisors if n < size)
        above = min(n for n in divisors if n > size)
        raise UserError(
            f"{world} processes = {world / size:.2f} x --shard {size} does not divide: "
            f"use --shard {below} or {above}"
        )
    return size


def make_mesh(shard: int, device: torch.device) -> DeviceMesh | None:
    """None for one plain process; one dimension for FSDP; replicas x shards for HSDP."""
    if not distributed.is_initialized():
        return None
    world = distributed.get_world_size()
    size = shard_size(shard, world)
    if size == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=names)


def shard_model(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    settings: RunSettings,
    mesh: DeviceMesh | None,
    bf16: bool,
) -> None:
    """Set up activation checkpointing, compilation and sharding, before there are weights.

    blocks: the model's equal layers, which run again in the backward pass what their `recompute`
    names. bf16: what a forward gathers and computes in; parameters, gradients and their sums over
    ranks are fp32.

    FSDP gathers a group of weights at a time, while the layer before it computes, and sums up a
    group's gradients while the backward goes on. A group is a block, one of the two `model.ends`,
    or all the rest. The methods in a module's FORWARD_METHODS gather its group, as a forward does.
    """
    device = torch.device(mesh.device_type if mesh else "cpu")  # on CUDA there always is one
    first, last = model.ends
    for i, block in enumerate(blocks):
        if is_recomputed(i, settings.recompute):
            block.recompute = settings.recompute_part
    if is_compiled(settings.compile, device):
        for module in (*blocks, last):
            module.compile()
    if not mesh:
        return
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (first, *blocks, last, model):
        # The last layer's backward follows at once. FSDP keeps what the whole model holds, too.
        module.reshards = settings.reshard and module not in (last, model)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module.reshards)
        module.set_gradient_divide_factor(1.0)  # the loss is divided by the global count already
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        for method in getattr(module, "FORWARD_METHODS", ()):
            register_fsdp_forward_method(module, method)
    first.set_unshard_in_backward(False)  # the gradient of an embedding takes none of its weights


def is_recomputed(i: int, share: float) -> bool:
    """Is block i in the evenly spread share that runs its forward again in the backward pass?

    >>> [i for i in range(12) if is_recomputed(i, 0.25)]
    [0, 4, 8]
    """
    return math.ceil((i + 1) * share - 1e-6) > math.ceil(i * share - 1e-6)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The groups that FSDP gathers one at a time; none where the model is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def inference(model: nn.Module, gather: bool = False) -> Iterator[None]:
    """Forwards without gradients, compiled for no shape. All ranks enter it together.

    gather: every rank holds all weights meanwhile, in the computing dtype, at its own pace.
    No backward pass follows that would free what FSDP has gathered, so it is freed here.
    """
    shards = fsdp_modules(model)
    if gather:
        for module in shards:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
    # A forward without gradients needs nothing of this, and drawing tokens (cumsum) would raise.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    # Compiling for every other shape than the loop's would take longer than it saves.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    torch.use_deterministic_algorithms(deterministic)
    for module in shards:
        module.set_reshard_after_forward(module.reshards, recurse=False)
        module.reshard()


def all_reduce_when(is_last: bool, model: nn.Module) -> None:
    """Let replicas add up their gradients once a step, after its last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)
