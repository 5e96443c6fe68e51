"""Many processes that act as one: ranks, errors, devices, a check that they agree.

`torchrun` starts the ranks. Without it there is one plain process, and every function here still
works: rank 0 of a world of 1. How a model falls on the ranks is in sharding.py.
"""

import contextlib
import ctypes
import datetime
import functools
import gc
import hashlib
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from infra.files import UserError, first_line, join_problems
from infra.gpus import find_gpu
from infra.settings import RunSettings

# ------------------------------------------------------------------------------------------
# One command line, one voice: errors in one line however many ranks there are


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's main. A UserError becomes one line on standard error and exit status 2.

    So does an OSError: a disk that is full, a path that is too long. What a terminal cannot show is
    printed as an escape, and what nobody reads any more is lost: a closed pipe does not end a run.
    """
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Unbreakable):
            setattr(sys, name, Unbreakable(getattr(sys, name)))
    try:
        check_system(sys.platform)
        check_encoding(sys.argv[1:])
        main()
    except (UserError, OSError, MemoryError) as error:
        rank = int(os.environ.get("RANK", 0))
        # Before the ranks have met, all of them read the same command line and find the same error.
        everywhere = getattr(error, "everywhere", False)
        if rank == 0 or (distributed.is_initialized() and not everywhere):
            who = f"rank {rank}: " if rank else ""
            print(f"{who}error: {words_of(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted" if int(os.environ.get("RANK", 0)) == 0 else 1)


def words_of(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory {error}".strip()
    named = isinstance(error, OSError) and error.strerror and error.filename
    return f"{error.filename}: {error.strerror}" if named else str(error)


def check_system(platform: str) -> None:
    """Raise UserError on Windows, which lacks what a run takes for granted: locks, forks, gloo."""
    if platform == "win32":
        raise UserError(
            "nanOLMo runs on Linux and macOS; on Windows, in WSL (wsl --install, then the same "
            "commands there)"
        )


def check_encoding(arguments: list[str]) -> None:
    """Raise UserError for bytes that are no UTF-8: neither a model nor run.json could take them."""
    for word in arguments:
        if not word.isprintable() and re.search("[\ud800-\udfff]", word):
            raise UserError(f"{word!a} on the command line is no UTF-8")


class Unbreakable:
    """A stream to which a write never fails."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        return self.attempt(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, work: Callable, *arguments):
        """Do it; if the reader has gone away, write to nowhere from now on."""
        try:
            return work(*arguments)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            return None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes); (0, 1) without a process group."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def all_gather_objects(value, group=None) -> list:
    """The values of all ranks, by rank."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group)
    return values


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def run_on_all_ranks(work: Callable, *arguments, group=None):
    """Run `work(*arguments)` on every rank and return its result here.

    If it raises UserError or OSError on any rank, all ranks raise UserError, so that none waits for
    another.
    """
    result, problem = None, None
    try:
        result = work(*arguments)
    except (UserError, OSError) as error:
        problem = words_of(error)
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(all_gather_objects(problem, group)):
        if text:
            ranks_of.setdefault(text, []).append(rank)
    if ranks_of:
        texts = [name_ranks(text, ranks) for text, ranks in ranks_of.items()]
        raise UserError("; ".join(texts), everywhere=True)
    return result


def name_ranks(text: str, ranks: list[int]) -> str:
    """An error with the ranks that met it; what rank 0 met needs no name."""
    return text if 0 in ranks else f"rank {', '.join(map(str, ranks[:8]))}: {text}"


def on_rank_zero(work: Callable, *arguments, group=None):
    """Run `work(*arguments)` on rank 0 alone, while the others wait for it.

    Returns its value on rank 0, None elsewhere.
    """
    rank, _ = rank_and_world()
    if rank == 0:
        return run_on_all_ranks(work, *arguments, group=group)
    return run_on_all_ranks(type(None), group=group)  # does nothing, and hears of rank 0's errors


def map_over_ranks(rows: list, work: Callable[[list], list]) -> list:
    """`work(rows)` with the rows shared out over the ranks; all ranks get all results, in order.

    Every rank gets equally many rows, since under FSDP all must run the same number of forwards.
    If one raises UserError, all do.
    """
    rank, world = rank_and_world()
    filled = rows + rows[:1] * (-len(rows) % world)
    # They may take very different times, as answers do that a model writes.
    group = patient_group()
    parts = all_gather_objects(run_on_all_ranks(work, filled[rank::world], group=group), group)
    return [parts[i % world][i // world] for i in range(len(rows))]


# ------------------------------------------------------------------------------------------
# Devices


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of an accelerator, for MFU; None where it is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.peak if gpu else None


def best_device(name: str = "auto") -> torch.device:
    """The device `name`; of `auto`: CUDA, else Apple's MPS, else the CPU. Raises UserError."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    try:
        device = torch.device(name)
        known = device.type in available and (device.index or 0) < count_devices(device.type)
    except RuntimeError:  # of torch, with two lines of all devices that there are
        known = False
    if not known:
        raise UserError(f"no device {name!r} here: use one of auto, {', '.join(available)}")
    return device


def count_devices(kind: str) -> int:
    """How many devices of a kind this machine has."""
    return torch.cuda.device_count() if kind == "cuda" else 1


def keep_freed_memory(keep: bool) -> None:
    """Let glibc keep large freed buffers for the next step, or return each one at once.

    A step needs the same buffers again, and the kernel would have to clear them each time.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**30 if keep else 2**20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1 if keep else 2**20)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------------
# Meeting and parting


def make_patient_group() -> distributed.ProcessGroup:
    """A connection of all ranks, over gloo, on which they wait for each other for an hour.

    On that of training they wait for --timeout; on GPUs NCCL then ends the process.
    """
    return distributed.new_group(backend="gloo", timeout=datetime.timedelta(hours=1))


@functools.cache
def patient_group() -> distributed.ProcessGroup | None:
    """The one on which ranks meet after uneven work; None without other ranks."""
    return make_patient_group() if rank_and_world()[1] > 1 else None


def be_deterministic() -> None:
    """Let the same run have the same bits twice, on GPUs, too; slower. Before they are used.

    Without it, attention's backward and sums over ranks may add in another order each time.
    """
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)


def init_process(device_name: str, threads: int, timeout: int) -> torch.device:
    """Prepare this process for a run and meet the other ranks; returns its device.

    threads: of the CPU, 0 for torch's choice. timeout: seconds to wait for another rank.
    """
    keep_freed_memory(True)
    device = init_distributed(device_name, timeout)
    if device.type == "cuda":  # an earlier run in the same process may have left its memory
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    set_threads(threads)
    return device


def set_threads(threads: int) -> None:
    """Compute with so many threads of the CPU; 0: torch's choice."""
    if threads:
        torch.set_num_threads(threads)


def init_distributed(device_name: str, timeout: int) -> torch.device:
    """Join the process group of torchrun, if there is one; returns this process' device.

    On CUDA a single process is a world of one, so that bf16 is computed in one way. On a CPU it
    stays plain.
    """
    device = best_device(device_name)
    on_cuda = device.type == "cuda"
    if distributed.is_initialized():  # by an earlier run of the same process
        return torch.device("cuda", torch.cuda.current_device()) if on_cuda else device
    under_torchrun = "RANK" in os.environ
    if not under_torchrun and not on_cuda:
        return device
    if device.type == "mps":
        raise UserError("torchrun on a Mac needs --device cpu")
    if on_cuda:
        device = claim_gpu(int(os.environ.get("LOCAL_RANK", 0)))
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=meet(rank, world, timeout) if under_torchrun else distributed.HashStore(),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
        device_id=device if on_cuda else None,
    )
    return device


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of a model that is only run, by its setting; auto: bfloat16 on CUDA, else float32."""
    half = name == "bfloat16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def is_compiled(setting: str, device: torch.device) -> bool:
    """Does --compile ask for it? auto: on CUDA. A CPU would need a C++ compiler, and minutes."""
    return setting == "yes" or (setting == "auto" and device.type == "cuda")


def let_segments_grow() -> None:
    """Let the GPU's allocator extend its segments: buffers of ever other sizes leave no holes.

    PYTORCH_ALLOC_CONF, if it is set, says otherwise. torch reads it when it is imported.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that can be had: what is free, and what torch keeps for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def claim_gpu(local_rank: int) -> torch.device:
    """This process' GPU on its node."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"{local_rank + 1} processes or more on a node with {count} GPUs: lower "
            "--nproc-per-node"
        )
    device = torch.device("cuda", local_rank)
    let_segments_grow()
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def meet(rank: int, world: int, timeout: int) -> distributed.Store:
    """The store through which the ranks of a torchrun find each other. Raises UserError."""
    env = os.environ
    # torchrun may lend its own store, which outlives a restart: what dead processes left there must
    # not be read.
    lent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    check_restarts(lent)
    wait = datetime.timedelta(seconds=timeout)
    try:
        store = distributed.TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            is_master=rank == 0 and not lent,
            timeout=wait,
        )
    except (KeyError, RuntimeError) as error:
        address = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"another process listens at {address}: choose another port (torchrun "
                "--master-port, or MASTER_PORT); torchrun --standalone finds a free one"
            ) from None
        raise error_of_absence(
            f"rank {rank} of {world} did not reach rank 0 at {address} within {timeout} s "
            f"({first_line(error)}): start with torchrun, and see whether rank 0 lives",
            speak=rank > 0,
        ) from None
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", 0) if lent else 0
    store = distributed.PrefixStore(f"attempt {attempt}", store)
    store.set(f"rank {rank}", socket.gethostname())
    wait_for_ranks(store, rank, world, timeout)
    return store


def check_restarts(lent: bool) -> None:
    """Refuse restarts over several nodes with a store that outlives them. Raises UserError."""
    env = os.environ
    one_node = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    if lent and not one_node and int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UserError(
            "torchrun on several nodes can restart (--max-restarts) only with a store of each "
            "attempt's own: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )


def wait_for_ranks(store: distributed.Store, rank: int, world: int, timeout: int) -> None:
    """Wait until all ranks have come to the store. Raises UserError that names the missing ones."""
    names = [f"rank {r}" for r in range(world)]
    try:
        store.wait(names, datetime.timedelta(seconds=timeout))
    except RuntimeError:
        there = [r for r in range(world) if store.check([names[r]])]
        missing = [str(r) for r in range(world) if r not in there]
        raise error_of_absence(
            f"rank {', '.join(missing[:8])} of {world} did not come within {timeout} s: look at "
            "what it says, and whether its node is up; --timeout changes the wait",
            speak=rank > 0 and rank == min(there),
        ) from None


def error_of_absence(text: str, speak: bool) -> UserError:
    """An error of ranks that never met; `speak`: rank 0, who speaks for all, may be missing."""
    if speak:
        print(f"rank {os.environ['RANK']}: error: {text}", file=sys.stderr)
    return UserError(text)


def shutdown_distributed() -> None:
    """Leave the process group, when all ranks are done."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
        patient_group.cache_clear()


@contextlib.contextmanager
def exit_if_peer_lost() -> Iterator[None]:
    """End this process with one line if an error means that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "NCCL", "TCPStore")
        rank, world = rank_and_world()
        if world == 1 or not any(word in str(error) for word in words):
            raise
        sys.exit(f"rank {rank} lost the others, which have ended or hang: {first_line(error)}")


# ------------------------------------------------------------------------------------------
# Do the ranks agree?


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """The part of a tensor on this rank, and the index of its first element in the flattened whole.

    FSDP shards the first dimension, so a part is one contiguous stretch of the whole.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), offset[0] * math.prod(tensor.shape[1:])


@torch.no_grad()
def checksum(tensors: dict[str, Tensor]) -> str:
    """12 hex digits of the bits of tensors in fp32, the same at any world size and sharding.

    Per tensor: the sum over elements of bits x (2 index + 1), modulo 2^64, so that swapped values
    show. Shards add up over the mesh; each replica makes its own checksum, and `self_check`
    compares them.
    """
    meshes = [t.device_mesh for t in tensors.values() if isinstance(t, DTensor)]
    mesh = meshes[0] if meshes else None
    is_first_shard = mesh is None or mesh.get_local_rank("shard") == 0
    sums = []
    for tensor in tensors.values():
        part_sum = sum_of_bits(tensor)
        counts = isinstance(tensor, DTensor) or is_first_shard  # what is not sharded counts once
        sums.append(part_sum if counts else torch.zeros_like(part_sum))
    total = torch.stack([s.to(sums[0].device) for s in sums])
    if mesh:
        distributed.all_reduce(total, group=mesh.get_group("shard"))
    named = json.dumps(dict(zip(tensors, total.tolist())))
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def sum_of_bits(tensor: Tensor) -> Tensor:
    """The sum of bits x (2 index + 1) over this rank's part, int64, which wraps around."""
    part, start = local_part(tensor)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for i in range(0, part.numel(), 2**22):  # a piece at a time
        bits = part.reshape(-1)[i : i + 2**22].float().view(torch.int32).long()
        index = torch.arange(start + i, start + i + len(bits), device=bits.device)
        total += (bits * (2 * index + 1)).sum()
    return total


def self_check(
    settings: RunSettings, data_hash: str, weights: dict[str, Tensor], device: torch.device
) -> str:
    """Check that the links work and that all ranks have equal code, settings, data and weights.

    Returns one line to print. Raises UserError that says who differs in what.
    """
    rank, world = rank_and_world()
    known = all_sum(torch.tensor(rank + 1, device=device)).item()
    expected = world * (world + 1) // 2
    if all_gather_objects(known)[0] != expected:
        raise UserError(
            f"the links between ranks do not add up: {known}, not {expected}", everywhere=True
        )
    mine = {
        "code": hash_of_code(),
        "settings": hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12],
        "data": data_hash,
        "weights": checksum(weights),
    }
    check_agreement({"sum over ranks": known, "torch": torch.__version__, **mine})
    who = "1 process" if world == 1 else f"{world} processes agree"
    return f"{who}: " + ", ".join(f"{name} {value}" for name, value in mine.items())


def check_agreement(mine: dict) -> None:
    """Raise UserError if ranks hold different values under a name."""
    hosts = all_gather_objects(socket.gethostname())
    everyone = all_gather_objects(mine)
    problems = []
    for name, value in everyone[0].items():
        for rank, other in enumerate(everyone):
            if other[name] != value:
                problems.append(
                    f"rank {rank} on {hosts[rank]} has {name} {other[name]}, "
                    f"rank 0 on {hosts[0]} has {value}"
                )
    if problems:
        raise UserError(f"the ranks differ: {join_problems(problems, 4)}", everywhere=True)


def hash_of_code() -> str:
    """12 hex digits of all code that a run can use: the scripts, infra/ and tasks/."""
    root = Path(__file__).parent.parent
    files = [*root.glob("*.py"), *root.glob("infra/*.py"), *root.glob("tasks/*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]
