"""Stage 1, and the one training loop of the project.

    python pretrain.py                                        # laptop: the embedded corpus, 3 to 4 minutes on 2 cores
    python pretrain.py --data tokens/shakespeare --out runs/shakespeare             # your own text (data.py makes tokens)
    python pretrain.py --size 190M --data tokens/mine                               # one GPU: bf16, fp32 master weights
    torchrun --nproc-per-node 8 pretrain.py --size 7B --data tokens/mine            # one node; many: see the README
    python pretrain.py --size 7B --help                                             # the published values of a size
    python pretrain.py --size 32B --gpus 1024 --plan                                # memory, communication and speed, without a GPU

What this stage teaches: AdamW as OLMo 2 sets it (everything decays but the input embedding), a cosine whose horizon lies
beyond the end of the run (stage 2 goes on from the rate where this one stops), SkipStep, and a run that can be killed at
any moment. The same command again goes on from the newest good state, bit for bit as if it had never stopped.

A run is a folder, runs/<size>/pretrain: run.json (every value and where it came from), metrics.jsonl (one object per
step), curves.png, step<N>-tokens<T>/ (training states) and hf/ (the weights, for transformers, sample.py and eval.py).
"""
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import weakref
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from infra.files import UserError, make_folder, read_json, replace_folder, sha256, sync, write_json
from data import SOURCES, TokenData, Tokenizer, embedded_corpus, get_tokenizer, mix_files, mix_shares, mix_sources, token_files
from eval import accuracy, bits_per_byte_by_source, by_source
from model import PEAK_FLOPS, SIZES, ChunkedLoss, ModelConfig, OLMo2, StoredWeights, best_device, check_tensors, checksum, find_weights, from_all, keep_freed_memory, load_tensors, one_process_is_fine, peak_flops, rank_and_world, read_config, run_cli, together, write_config, write_weights


def parse_count(text: str) -> int:
    """A whole number, written 1000000, 1_000_000 or 1e6."""
    value = float(text.replace("_", ""))
    if value != int(value):
        raise ValueError(f"{text} is not a whole number")
    return int(value)


Count = Annotated[int, tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="INT", instance_from_str=lambda args: parse_count(args[0]),
    is_instance=lambda value: isinstance(value, int), str_from_instance=lambda value: [str(value)])]


@dataclass(frozen=True)
class Config:
    # ---- what is trained, on what
    size: str = "tiny"  # tiny, 14M, 30M, 60M, 190M, 370M, 760M, 1B, 7B, 13B, 32B
    data: tuple[str, ...] = ()  # token files (.npy) or folders made by data.py; none: the embedded corpus (tiny to 760M)
    mix: tuple[str, ...] = ()  # instead of --data: source=weight, …, which --tokens then holds by these shares; sources are paths, or docs code prose math qa instruct sums
    val: tuple[str, ...] = ()  # held-out token files or folders; none: the val/ of --data
    tokenizer: str = "olmo2"  # laptop, olmo2, or a folder with tokenizer.json
    init: str = ""  # start from the weights of a run, checkpoint or Hugging Face directory; none: random
    moments: bool = False  # and from Adam's moments that stand beside them (a training state has them)
    out: str = ""  # the run's folder; none: runs/<size>/pretrain
    # ---- batches
    seq_len: Count = 4096  # tokens of an instance (paper Table 1)
    batch: Count = 512  # instances per optimizer step, over all processes
    micro_batch: Count = 4  # at most so many instances per forward and backward of a process; fewer take less memory, other last bits
    tokens: Count = 0  # length of the run, rounded up to whole steps (the schedule does not follow: see horizon)
    seed: Count = 6198  # of the data order (official yamls)
    init_seed: Count = 6198  # of the random weights (official yamls)
    first_epoch: Count = 0  # index of the first epoch in the order's seed: OLMo 0, OLMo-core 1
    mask_repeats: bool = True  # no loss on instances with an n-gram 32 times in a row (paper section 3.1)
    # ---- optimizer (paper section 3.3; OLMo olmo/optim.py)
    lr: float = 4e-4  # peak learning rate
    warmup: Count = 8_388_608_000  # tokens of linear warm-up from 0 (official yamls)
    schedule: str = "cosine"  # cosine, linear: how the rate falls after the warm-up
    horizon: Count = 5 * 10**12  # tokens at which it would reach its floor; may lie beyond the end of the run
    lr_floor: float = 0.1  # the floor, as a share of lr
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    eps: float = 1e-8  # AdamW; 1e-5 was OLMo-0424's (paper Fig. 9)
    weight_decay: float = 0.1  # of everything, norms and head too, but the input embedding (paper Fig. 10)
    clip: float = 1.0  # largest global L2 norm of the gradient
    z_loss: float = 1e-5  # coefficient of the squared log-normaliser (paper Table 1)
    skip_sigma: float = 0.0  # SkipStep: skip when loss or gradient norm is so many standard deviations above the last 128; 0: only if not finite
    # ---- ablations of the architecture (paper section 3; model.py): the first of each is OLMo 2
    norm_position: str = "reordered"  # reordered, pre
    qk_norm: bool = True  # RMSNorm on queries and keys
    norm: str = "rms"  # rms, layernorm (without parameters)
    init_scheme: str = "olmo2"  # olmo2, olmo0424 (scaled by width and depth)
    embed_std: float = 0.02  # of the input embedding, under olmo2
    # ---- on the way
    save_every: Count = 1000  # steps between training states (official yamls); the last step is always saved
    keep: Count = 0  # newest states to keep; 0: all
    eval_every: Count = 1000  # steps between evaluations and samples
    val_tokens: Count = 131_072  # held-out tokens per source, always the same ones
    questions: Count = 500  # held-out questions per task at the end of a run on the embedded corpus; 0: none
    log_every: Count = 10  # steps between lines on the terminal (metrics.jsonl has every step)
    sample: str = "The"  # text that the samples continue; none: no samples
    wandb: str = ""  # Weights & Biases project; none: nothing is sent
    # ---- machines
    device: str = "auto"  # auto, cpu, mps, cuda
    threads: Count = 0  # CPU threads (they change the last bits of sums); 0: torch's choice
    compile: bool = False  # torch.compile each block: slow start, faster steps
    shard: Count = 0  # at most so many processes share one copy of the weights (FSDP), the others hold replicas (HSDP); 0: all share one
    reshard: bool = True  # free a block's gathered weights between its forward and its backward (ZeRO-3); no: keep them (ZeRO-2)
    recompute: float = 0.0  # activation checkpointing: share of the blocks that run their forward again in the backward pass
    recompute_part: str = "block"  # block, mlp: what of such a block runs again
    async_save: bool = False  # write states while training goes on; takes CPU memory for a copy
    timeout: Count = 600  # seconds that a process waits for another one before it gives up
    # ---- planning
    plan: bool = False  # train nothing: print what --gpus of these would need and do
    gpus: Count = 1  # H100s of the plan
    gpu_memory: float = 80.0  # GiB of each GPU of the plan


# Published values: official yamls and launch scripts of OLMo (1B, 7B, 13B) and OLMo-core (32B); paper Table 3. Where the
# sources disagree: the 13B ran at 9e-4 (paper Table 3 and its launch script; the yaml says 3e-4), and 1B to 13B warmed up
# over 8.39B tokens (yamls; the paper says 2,000 steps). Steps are those of the last released stage-1 checkpoint.
# Layouts (launch scripts): 1B and 13B sharded within a node of 8, the 7B's 512 GPUs held 2 replicas, the 32B's 1,024 held 4; 32B
# recomputed the MLPs there, whole blocks on fewer GPUs.
LARGE = dict(compile=True, sample="The meaning of life is")
RECIPES: dict[str, dict] = {
    "1B": dict(LARGE, lr=4e-4, batch=512, micro_batch=4, tokens=1_907_359 * 512 * 4096,  # 4.0T
               shard=8, reshard=False),
    "7B": dict(LARGE, lr=3e-4, batch=1024, micro_batch=2, tokens=928_646 * 1024 * 4096,  # 3.9T, one epoch
               shard=256, recompute=0.25),
    "13B": dict(LARGE, lr=9e-4, batch=2048, micro_batch=2, tokens=596_057 * 2048 * 4096,  # 5.0T
                shard=8, recompute=0.5),
    "32B": dict(LARGE, lr=6e-4, batch=2048, micro_batch=2, tokens=721_901 * 2048 * 4096,  # 6.1T
                warmup=2000 * 2048 * 4096, horizon=774_861 * 2048 * 4096,  # 2,000 steps; 6.5T
                seed=34_521, init_seed=12_536, first_epoch=1, skip_sigma=6.0, mask_repeats=False,
                shard=256, recompute=1.0, recompute_part="mlp"),
    # Ours, for a laptop: see the README for what each choice was measured against. As in the release, the cosine's
    # horizon is a quarter beyond the end of the run.
    "tiny": dict(tokenizer="laptop", seq_len=128, batch=8, micro_batch=8, tokens=2500 * 1024, lr=1e-2, warmup=50 * 1024,
                 horizon=3125 * 1024, skip_sigma=6.0, save_every=625, keep=3, eval_every=625, log_every=50),
}
# Ours, for the ladder, after OLMo's own (OLMo scripts/ladder.py): lr 4.7e-3 (N / 108M)^(-1/3) and 20 tokens per parameter.
for name, millions in {"14M": 14, "30M": 30, "60M": 60, "190M": 190, "370M": 370, "760M": 760}.items():
    RECIPES[name] = dict(seq_len=1024, batch=128, micro_batch=8, tokens=20_000_000 * millions, warmup=1_000_000 * millions,
                         horizon=25_000_000 * millions, lr=round(4.7e-3 * (millions / 108) ** (-1 / 3), 5), skip_sigma=6.0,
                         save_every=500, keep=3, eval_every=500)

MAY_CHANGE = {"tokens", "val", "save_every", "keep", "eval_every", "val_tokens", "questions", "log_every", "sample", "wandb", "out",
              "data",  # on resuming; the data must still be the same ones (their hash is compared)
              "device", "threads", "compile", "micro_batch", "shard", "reshard", "recompute", "recompute_part",  # change the last bits
              "async_save", "timeout", "plan", "gpus", "gpu_memory"}


def read_flags(arguments: list[str] | None) -> tuple[Config, dict[str, str]]:
    """(the config, where each value came from): class defaults < recipe of --size < flags. Raises UserError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    size = size_of(arguments)
    recipe = Config(size=size, **RECIPES[size])
    config = parse(recipe, arguments, __doc__)
    return config, {f.name: "flag" if getattr(config, f.name) != getattr(recipe, f.name) else
                    f"recipe {size}" if f.name in RECIPES[size] else "default" for f in dataclasses.fields(Config)}


def size_of(arguments: list[str]) -> str:
    """The --size among command-line arguments: known before the rest is read, against its recipe. Raises UserError."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    size = next((after for word, after in reversed(list(zip(words, words[1:]))) if word == "--size"), Config.size)
    if size not in SIZES:
        close = difflib.get_close_matches(size, SIZES, 1, cutoff=0.3)
        raise UserError(f"unknown size {size!r}: {f'did you mean {close[0]}? ' if close else ''}sizes are {', '.join(SIZES)}")
    return size


def parse(default: Config, arguments: list[str], description: str, prog: str | None = None) -> Config:
    """The settings of a command line, over defaults; its own errors end the process with status 2."""
    with one_voice(errors=True):
        return tyro.cli(type(default), default=default, args=arguments, description=description, prog=prog)


def check(c: Config) -> None:
    """Raise UserError with every value that is out of range (NaN is), before anything is made."""
    rules = [(f"--{name.replace('_', '-')} {getattr(c, name)} must be {words}", holds(getattr(c, name)))
             for names, words, holds in [
                 ("seq_len batch micro_batch tokens horizon save_every eval_every log_every val_tokens timeout gpus", "at least 1", lambda v: v >= 1),
                 ("questions warmup seed init_seed first_epoch keep threads shard weight_decay z_loss skip_sigma", "at least 0", lambda v: 0 <= v < math.inf),
                 ("lr clip eps embed_std gpu_memory", "above 0", lambda v: 0 < v < math.inf),
                 ("recompute", "from 0 to 1", lambda v: 0 <= v <= 1),
                 ("lr_floor beta1 beta2", "from 0 to below 1", lambda v: 0 <= v < 1)] for name in names.split()]
    rules += [(f"--norm-position {c.norm_position} must be reordered or pre", c.norm_position in ("reordered", "pre")),
              (f"--norm {c.norm} must be rms or layernorm", c.norm in ("rms", "layernorm")),
              (f"--init-scheme {c.init_scheme} must be olmo2 or olmo0424", c.init_scheme in ("olmo2", "olmo0424")),
              (f"--schedule {c.schedule} must be cosine or linear", c.schedule in ("cosine", "linear")),
              ("--mix takes the place of --data: give one of them", not (c.mix and c.data)),
              ("--moments takes Adam's moments from --init: name a training state with it", bool(c.init) or not c.moments),
              (f"--recompute-part {c.recompute_part} must be block or mlp", c.recompute_part in ("block", "mlp")),
              (f"--seq-len {c.seq_len} must be at least 2: a token and the next", c.seq_len >= 2)]
    if problems := [text for text, holds in rules if not holds]:
        raise UserError("; ".join(problems))
    if c.gpus > 1 and not c.plan:
        raise UserError(f"--gpus {c.gpus} belongs to --plan; to train on {c.gpus}, start with torchrun --nproc-per-node (see the README)")
    layout(c, c.gpus if c.plan else int(os.environ.get("WORLD_SIZE", 1)))
    if c.plan:
        return
    mix_shares(c.mix)
    if not (c.data or c.mix) and c.size in ("1B", "7B", "13B", "32B"):
        raise UserError(f"--size {c.size} needs --data: the token files of OLMo-mix-1124 (the Hub's allenai/olmo-mix-1124, "
                        "tokenised by: python data.py FOLDER --tokenizer olmo2), or your own")


def layout(c: Config, world: int) -> tuple[int, int, int]:
    """(processes per copy of the weights, instances per process and step, of these per forward). UserError: what does not divide."""
    micro_batch = min(c.micro_batch, max(1, c.batch // world))
    unit = world if c.batch % world else world * micro_batch
    if c.batch % unit:
        below = c.batch // unit * unit
        parts = f"{world} processes" if unit == world else f"{f'{world} processes x ' if world > 1 else ''}--micro-batch {micro_batch}"
        raise UserError(f"--batch {c.batch} = {c.batch / unit:.2f} x {parts} does not divide: "
                        f"use --batch {' or '.join(str(b) for b in (below, below + unit) if b)}")
    return shard_size(c, world), c.batch // world, micro_batch


def shard_size(c: Config, world: int) -> int:
    """Processes per copy of the weights. UserError: what does not divide."""
    shard = min(c.shard or world, world)
    if world % shard:
        near = [n for n in range(world, 0, -1) if world % n == 0]
        raise UserError(f"{world} processes = {world / shard:.2f} x --shard {shard} does not divide: use --shard "
                        f"{next(n for n in near if n < shard)} or {min(n for n in near if n > shard)}")
    return shard


# ----------------------------------------------------------------------------------------------------------------------
# Many processes: torch.distributed and FSDP2


@contextlib.contextmanager
def one_voice(errors: bool = False):
    """Ranks other than 0 print nothing, and with `errors` not even on standard error: all ranks would say the same.

    What goes to standard error beside this: a UserError, once (model.py's run_cli), and the rank that is cut off from rank 0.
    """
    with contextlib.ExitStack() as quiet:
        if int(os.environ.get("RANK", 0)):
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            if errors:
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def start_ranks(c: Config) -> torch.device:
    """Meet the other processes of a torchrun, if this is one; returns this process' device. Raises UserError.

    On CUDA a single process is a world of one, so that there is one way to compute in bf16; on a CPU it stays plain.
    """
    device, env = best_device(c.device), os.environ
    if distributed.is_initialized():  # by the run before this one, of the same process
        return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    if "RANK" not in env and device.type != "cuda":
        return device
    rank, world, local = (int(env.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device.type == "mps":
        raise UserError("torchrun on a Mac needs --device cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"{local + 1} processes or more on a node with {torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")

    def lonely(text: str) -> UserError:
        """Rank 0, who speaks for all, may be the one that is missing."""
        if rank:
            print(f"rank {rank}: error: {text}", file=sys.stderr)
        return UserError(text)

    store = distributed.HashStore()
    if "RANK" in env:
        # torchrun may lend us its own store, which outlives a restart: what the dead processes left there must not be read.
        lent, one_node = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True", env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
        if lent and not one_node and int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("torchrun on several nodes can restart (--max-restarts) only with a store of each attempt's own: "
                            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun")
        wait = datetime.timedelta(seconds=c.timeout)
        try:
            store = distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=rank == 0 and not lent, timeout=wait)
        except (KeyError, RuntimeError) as error:
            raise lonely(f"rank {rank} of {world} did not reach rank 0 at {env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')} "
                         f"within {c.timeout} s ({str(error).splitlines()[0]}): start with torchrun, and see whether rank 0 lives") from None
        store = distributed.PrefixStore(f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', 0) if lent else 0}", store)
        store.set(f"rank {rank}", socket.gethostname())
        try:
            store.wait([f"rank {r}" for r in range(world)], wait)
        except RuntimeError:
            missing = [r for r in range(world) if not store.check([f"rank {r}"])]
            text = (f"rank {', '.join(map(str, missing[:8]))} of {world} did not come within {c.timeout} s: look at what it says, and "
                    "whether its node is up; --timeout changes the wait")
            raise (lonely if rank == min(set(range(world)) - set(missing)) else UserError)(text) from None
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                   timeout=datetime.timedelta(seconds=c.timeout), device_id=device if device.type == "cuda" else None)
    return device


def make_mesh(c: Config, device: torch.device) -> DeviceMesh | None:
    """None for one plain process; one dimension for FSDP; replicas x shards for HSDP."""
    if not distributed.is_initialized():
        return None
    world = distributed.get_world_size()
    shard = shard_size(c, world)
    sizes, names = ((world // shard, shard), ("replicate", "shard")) if shard < world else ((shard,), ("shard",))
    return init_device_mesh(device.type, sizes, mesh_dim_names=names)


def prepare(model: OLMo2, c: Config, mesh: DeviceMesh | None, bf16: bool) -> None:
    """Set up activation checkpointing, compilation and sharding, in this order; the model is still without weights (meta).

    Sharded, `loss`, `generate` and a forward gather what they need, in bf16 if asked; parameters, gradients and their sum
    over ranks are fp32. Embedding, last norm and head form one group, each block another.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()
    for i, layer in enumerate(model.model.layers):
        if math.ceil((i + 1) * c.recompute - 1e-6) > math.ceil(i * c.recompute - 1e-6):  # evenly spread: 0.25 is blocks 0, 4, 8 …
            part = layer if c.recompute_part == "block" else layer.mlp
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
        if c.compile:
            layer.compile()
        if mesh:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=c.reshard)
    if not mesh:
        return
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # gradients are sums: the loss is divided by the global count of targets
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for method in ("loss", "log_probs", "scores", "generate"):
        register_fsdp_forward_method(model, method)


def self_check(c: Config, data_hash: str, weights: dict[str, Tensor], device: torch.device) -> str:
    """Do all ranks add up, and run the same code on the same data from the same weights? One line; UserError says who differs."""
    rank, world = rank_and_world()
    known = all_sum(torch.arange(1, 5, device=device) * (rank + 1))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    settings = hashlib.sha256(json.dumps(dataclasses.asdict(c)).encode())
    mine = {"sum of 1 to 4 over ranks": known.tolist(), "torch": torch.__version__, "code": code.hexdigest()[:12],
            "settings": settings.hexdigest()[:12], "data": data_hash, "weights": checksum(weights)}
    everyone = from_all({**mine, "host": socket.gethostname()})
    right = [world * (world + 1) // 2 * n for n in range(1, 5)]
    wrong = [] if everyone[0]["sum of 1 to 4 over ranks"] == right else [f"the links between ranks do not add up: {known.tolist()}, not {right}"]
    wrong += [f"rank {r} on {other['host']} has {key} {other[key]}, rank 0 on {everyone[0]['host']} has {mine_0}"
              for key, mine_0 in everyone[0].items() if key != "host" for r, other in enumerate(everyone) if other[key] != mine_0]
    if wrong:
        raise UserError(f"the ranks differ: {'; '.join(wrong[:4])}{f' (and {len(wrong) - 4} more)' if len(wrong) > 4 else ''}", everywhere=True)
    return (f"{world} {'process' if world == 1 else 'processes agree'}: " +
            ", ".join(f"{key} {mine[key]}" for key in ("code", "settings", "data", "weights")))


# ----------------------------------------------------------------------------------------------------------------------
# Optimization


def lr_at(tokens: int, c: Config) -> float:
    """The rate of the step that brings the run to `tokens`: so the first step's is above 0 (OLMo olmo/optim.py).

    1. linear warm-up from 0;  2. a cosine or a straight line from lr to lr * lr_floor at the horizon;  3. the floor.
    """
    floor = c.lr * c.lr_floor
    if tokens < c.warmup:  # 1
        return c.lr * tokens / c.warmup
    if tokens >= c.horizon:  # 3
        return floor
    done = (tokens - c.warmup) / (c.horizon - c.warmup)
    return floor + (c.lr - floor) * ((1 + math.cos(math.pi * done)) / 2 if c.schedule == "cosine" else 1 - done)  # 2


def make_optimizer(model: OLMo2, c: Config) -> torch.optim.AdamW:
    """AdamW in OLMo 2's two groups: the input embedding, which does not decay, and all the rest, which does."""
    groups = [{"params": [p for n, p in model.named_parameters() if ("embed_tokens" in n) == is_embedding],
               "weight_decay": 0.0 if is_embedding else c.weight_decay} for is_embedding in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    for p in model.parameters():  # what AdamW makes at its first step; here, so that a state can be saved before that
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def clip_gradients(model: OLMo2, largest: float) -> float:
    """Scale the gradients, in place, to a global L2 norm of at most `largest`; returns the norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm.item()


class SkipStep:
    """Should the optimizer take this step? (OLMo-core optim/skip_step_optimizer.py)

    No, if the loss or the gradient's norm before clipping is more than `sigma` standard deviations above its mean over the
    last 128 steps, from the 64th step on. A skipped step changes no weight and no moment and does not advance Adam; its
    values stay in the history. Other than upstream, what is not finite is always skipped and never enters the history,
    where one NaN would make all 128 following steps be skipped.
    """

    def __init__(self, sigma: float, history: list[tuple[float, float]] = ()):
        self.sigma, self.history = sigma, deque(history, maxlen=128)

    def __call__(self, loss: float, grad_norm: float) -> bool:
        """True: take the step."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        good = True
        if self.sigma and len(self.history) + 1 >= 64:
            for value, past in zip((loss, grad_norm), torch.tensor(list(self.history), dtype=torch.float64).T):
                good &= value - past.mean().item() <= self.sigma * past.std().item()
        self.history.append((loss, grad_norm))
        return good


# ----------------------------------------------------------------------------------------------------------------------
# Training states: torch writes and reads the tensors; the manifest, the rename and the verification are ours


def count_name(tokens: int) -> str:
    """Tokens in the name of a checkpoint: rounded up, with a unit.

    >>> count_name(2_621_440), count_name(4_000_022_593_536), count_name(2048)
    ('3M', '4001B', '3K')
    """
    unit, letter = (10**9, "B") if tokens >= 10**9 else (10**6, "M") if tokens >= 10**6 else (10**3, "K")
    return f"{-(-tokens // unit)}{letter}"


def tensors_of(model: OLMo2, optimizer: torch.optim.AdamW) -> dict[str, dict[str, Tensor]]:
    """model: name to weight. optim: Adam's two moments and step per weight, as <kind>.<name>. Each rank has its shards."""
    return {"model": {name: p.detach() for name, p in model.named_parameters()},
            "optim": {f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}}


def save_state(run: Path, state: dict, tensors: dict[str, dict], config: ModelConfig, tokenizer: Tokenizer, keep: int = 0,
               group=None) -> Path:
    """Write run/step<N>-tokens<T>/: all of it or nothing, whichever process dies when; then renew run/hf. Raises UserError.

    All ranks call it. Each writes its shards (no pickle: given anything but tensors, torch's writer would quietly make one), and
    hashes its share of the files. What else a run needs is in state.json, the size and sha256 of every file in
    manifest.json; the rename at the end commits. `group` has a connection of its own, so that a thread can do all this.
    """
    rank, world = rank_and_world()
    final = run / f"step{state['step']}-tokens{count_name(state['tokens'])}"
    aside = run / f".saving-{final.name}"

    def describe() -> None:
        write_config(aside, config, torch.float32)
        tokenizer.save(aside)
        write_json(aside / "state.json", state)

    def hash_files() -> dict:
        files = sorted(p for p in aside.rglob("*") if p.is_file())[rank::world]
        for path in files:
            sync(path)
        return {str(p.relative_to(aside)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}

    def commit() -> None:
        write_json(aside / "manifest.json", {name: entry for part in hashes for name, entry in part.items()})
        for path in (aside / "manifest.json", *(aside / part for part in tensors), aside):
            sync(path)
        if final.exists():  # a damaged state of the same step, which was not resumed from
            shutil.rmtree(final)
        aside.rename(final)
        sync(run)

    def first(work) -> None:  # on rank 0 alone, while the others wait for it
        together(work if rank == 0 else lambda: None, group)

    try:
        first(lambda: make_folder(aside))
        for part, values in tensors.items():
            with one_process_is_fine():
                dcp.save(values, storage_writer=dcp.HuggingFaceStorageWriter(str(aside / part), save_distributed=True), process_group=group)
            first(lambda: check_tensors(aside / part, values))  # reads the files' headers back before they count
        first(describe)
        hashes = from_all(together(hash_files, group), group)
        first(commit)
    except (UserError, dcp.api.CheckpointException) as error:  # torch wraps what the disk says; its wrapper is no Exception
        reason = str(error).strip().splitlines()[-1]
        first(lambda: shutil.rmtree(aside, ignore_errors=True))
        raise UserError(f"could not save {final}: {reason}. The states before it are untouched; make room, and the same "
                        "command goes on from the newest", everywhere=True) from None
    try:
        export(run, final, tensors["model"], config, tokenizer, group)
    except UserError as error:
        raise UserError(f"could not write {run / 'hf'}: {error}. The training state of step {state['step']} is safe", everywhere=True) from None
    first(lambda: [shutil.rmtree(old) for old in (list_states(run)[keep:] if keep else ())])
    return final


def export(run: Path, state: Path, weights: dict[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, group=None) -> None:
    """Make run/hf, a Hugging Face directory, from a training state's files; a reader finds the old one or the new one."""
    aside = run / ".saving-hf"

    def write() -> None:
        write_weights(aside, config, weights, read=StoredWeights(state / "model").whole)

    def swap() -> None:
        tokenizer.save(aside)
        replace_folder(aside, run / "hf")

    rank, _ = rank_and_world()
    together(lambda: rank or make_folder(aside), group)
    together(write, group)
    together(lambda: rank or swap(), group)


class Saver:
    """Saves training states, at once or in a thread while training goes on."""

    def __init__(self, run: Path, config: ModelConfig, tokenizer: Tokenizer, keep: int, in_background: bool):
        self.run, self.config, self.tokenizer, self.keep, self.in_background = run, config, tokenizer, keep, in_background
        self.thread, self.pending, self.group = ThreadPoolExecutor(1), None, None
        if in_background:
            if rank_and_world()[1] > 1:  # a connection of the thread's own, whose messages do not mix with those of the loop
                self.group = distributed.new_group(backend="gloo", timeout=datetime.timedelta(hours=1))
            self.stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())  # cached: pinned memory

    def save(self, state: dict, tensors: dict[str, dict], wait: bool) -> None:
        """Raises UserError: of this state, or of the one before, which is waited for."""
        self.wait()
        if self.in_background:
            tensors = self.stager.stage(tensors)  # a copy in CPU memory: training goes on with the original
        self.pending = self.thread.submit(save_state, self.run, state, tensors, self.config, self.tokenizer, self.keep, self.group)
        if wait or not self.in_background:
            self.wait()

    @property
    def failed(self) -> bool:
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a training state, against its manifest, or None. Each rank reads its share of the files."""
    rank, world = rank_and_world()

    def look() -> str | None:
        try:
            manifest = read_json(folder / "manifest.json")
            present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
            for name in sorted(manifest.keys() | present)[rank::world]:
                if name not in present:
                    return f"{name} is missing"
                if name not in manifest:
                    return f"{name} is not in the manifest"
                if (folder / name).stat().st_size != manifest[name]["bytes"] or sha256(folder / name) != manifest[name]["sha256"]:
                    return f"{name} has changed since it was written"
        except (UserError, OSError, TypeError, KeyError, AttributeError) as error:
            return f"the manifest cannot be used: {error}"
        return None

    return next((damage for damage in from_all(look()) if damage), None)


def list_states(run: Path) -> list[Path]:
    """The committed training states of a run, newest first."""
    states = [p for p in run.glob("step*-tokens*") if p.is_dir() and p.name[4:].split("-")[0].isdigit()]
    return sorted(states, key=lambda p: int(p.name[4:].split("-")[0]), reverse=True)


def newest_state(run: Path) -> Path | None:
    """The newest state that verifies; each damaged one before it is named on standard error."""
    rank, _ = rank_and_world()
    for folder in from_all(list_states(run))[0]:
        if not (damage := find_damage(folder)):
            return folder
        if rank == 0:
            print(f"{folder} is damaged ({damage}): trying the one before", file=sys.stderr)
    return None


def load_state(folder: Path, config: ModelConfig, tensors: dict[str, dict[str, Tensor]]) -> dict:
    """Fill the tensors of a model, of this shape, and of its optimizer from a verified training state; returns its state.json."""
    stored, own = (dataclasses.asdict(c) for c in (read_config(folder), config))
    different = [f"{key} {stored[key]}, not {own[key]}" for key in own if stored[key] != own[key] and key not in ("init", "embed_std")]
    if different:  # how a model was initialised is not kept
        raise UserError(f"{folder} holds another model ({'; '.join(different)}): choose another folder with --out")
    for part, values in tensors.items():
        load_tensors(folder / part, values)
    return read_json(folder / "state.json")


# ----------------------------------------------------------------------------------------------------------------------
# The run: what is recorded, printed and drawn


def describe_data(data: TokenData) -> dict:
    return {"hash": data.hash, "files": [str(path) for path in data.files], "tokens": sum(s["tokens"] for s in data.sidecars)}


def enter_run(c: Config, origin: dict[str, str], data: dict, start: str | None) -> None:
    """`open_run` on rank 0, and all see it. Raises UserError."""
    rank, _ = rank_and_world()
    together(lambda: rank or open_run(c, origin, data, start))
    if not all(from_all((Path(c.out) / "run.json").exists())):
        raise UserError(f"not all nodes see {c.out}: --out must lie on a disk that they share", everywhere=True)


def open_run(c: Config, origin: dict[str, str], data: dict, start: str | None) -> Path:
    """Make the run's folder and run.json, or check that the one there was started with the same settings.

    `data` has a hash, which must stay, too; so must `start`, which stands for what is in --init.
    """
    run = Path(c.out)
    config = {f.name: {"value": getattr(c, f.name), "from": origin[f.name]} for f in dataclasses.fields(c)}
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror}; choose another folder with --out") from None
    for left in [*run.glob(".saving-*"), *run.glob(".old-hf")]:  # of a process that died while saving
        shutil.rmtree(left)
    if (run / "run.json").exists() and (list_states(run) or read_metrics(run)):  # else nothing has come of it yet
        before = read_json(run / "run.json")
        changed = [f"{name} {before['config'][name]['value']} -> {config[name]['value']}" for name in config
                   if name not in MAY_CHANGE and before["config"].get(name, config[name])["value"] != json.loads(json.dumps(config[name]["value"]))]
        if before["data"]["hash"] != data["hash"]:
            changed.append(f"data {before['data']['hash']} -> {data['hash']}")
        if before.get("start") != start:
            changed.append(f"what is in {c.init}, which has been made anew")
        if changed:
            raise UserError(f"{run} was started with other settings ({', '.join(changed)}): go on with the old ones, or "
                            "choose another folder with --out")
    git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                                 cwd=Path(__file__).parent).stdout.strip()
    write_json(run / "run.json", {
        "config": config, "command": sys.argv, "git": git or None, "start": start,
        "data": data, "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": {"processes": rank_and_world()[1], "machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
                     "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                     "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}})
    return run


@contextlib.contextmanager
def sole_writer(run: Path):
    """Refuse a run that a living process writes: workers, for one, outlive a torchrun that is killed by SIGKILL. By rank 0."""
    lock, first = None, int(os.environ.get("RANK", 0)) == 0
    with contextlib.suppress(OSError):  # open_run will say it
        if first:
            run.mkdir(parents=True, exist_ok=True)
    if first and run.is_dir():
        lock = os.open(run, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it when the process ends, however that happens
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"another process is writing to {run}: wait for it, stop it (pgrep -f {Path(sys.argv[0]).name}), or choose another --out") from None
        except OSError:  # a disk without locks
            pass
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
            with contextlib.suppress(OSError):  # empty, if nothing has come of it
                run.rmdir()


class Run:
    """A run while it lives: how far it is, what it records and saves, and whether it shall stop. A context, on all ranks; rank 0 writes.

    A signal asks all ranks to stop after the same step. A second one ends the process at once, but not under torchrun, which
    passes on what the terminal has already sent to all.
    """

    def __init__(self, c: Config, config: ModelConfig, tokenizer: Tokenizer, state: dict):
        """`state`: what `load_state` gave; {} for a run that begins."""
        self.folder, self.step, self.tokens, self.stop = Path(c.out), state.get("step", 0), state.get("tokens", 0), False
        self.rank, self.world = rank_and_world()
        if self.rank == 0:  # a resumed run repeats the steps after its state: their rows are dropped, so that each step has one
            kept = [row for row in read_metrics(self.folder) if row["step"] <= self.step] if state else []
            (self.folder / "metrics.jsonl.tmp").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(self.folder / "metrics.jsonl.tmp", self.folder / "metrics.jsonl")
        self.metrics = open(self.folder / "metrics.jsonl" if self.rank == 0 else os.devnull, "a", encoding="utf-8", buffering=1)
        self.wandb = start_wandb(c, self.folder) if self.rank == 0 else None
        self.saver = Saver(self.folder, config, tokenizer, c.keep, c.async_save)
        self.stopped_by: list[int] = []
        self.under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> "Run":
        def stop_soon(number: int, _) -> None:
            self.stopped_by.append(number)
            if not self.under_torchrun:
                signal.signal(number, signal.SIG_DFL)

        self.handlers = {number: signal.signal(number, stop_soon) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_) -> None:
        self.saver.thread.shutdown()
        self.metrics.close()
        if self.wandb:
            self.wandb.finish()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def record(self, event: str, **values) -> None:
        row = {"event": event, "step": self.step, "tokens": self.tokens, **values}
        self.metrics.write(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}) + "\n")
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=self.step)

    def save(self, tensors: dict[str, dict], wait: bool, **state) -> None:
        self.metrics.flush()
        if self.rank == 0:
            os.fsync(self.metrics.fileno())
        self.saver.save({"step": self.step, "tokens": self.tokens, "world": self.world, **state}, tensors, wait)

    def share(self, *values: Tensor) -> list[float]:
        """The sums of scalars over ranks. With them goes what one rank knows and all must know at the same step: a signal came
        (`stop` is set), or the last state could not be written (raises UserError)."""
        news = torch.tensor((len(self.stopped_by), self.saver.failed), dtype=torch.float32, device=values[0].device)
        *sums, stop, failed = all_sum(torch.stack((*values, *news))).tolist()
        self.stop |= bool(stop)
        if failed:
            self.saver.wait()
        return sums

    def leave_if_stopped(self) -> None:
        """End the process, if a signal has stopped the run."""
        if not self.stop:
            return
        number = next(numbers[0] for numbers in from_all(self.stopped_by) if numbers)
        if self.rank == 0:
            reason = f"stopped by {signal.Signals(number).name} at step {self.step}, saved; the same command goes on from there"
            write_json(self.folder / "run.json", {**read_json(self.folder / "run.json"), "stopped": reason})
            print(reason, file=sys.stderr)
        # torchrun takes any status but 0 for a failure, and would start all over
        sys.exit(0 if self.under_torchrun else 128 + number)


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line cut short by a crash is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot(run: Path) -> None:
    """Draw curves.png from metrics.jsonl: loss, held-out bits per byte, learning rate and gradient norm against tokens."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_metrics(run)
    steps = [row for row in rows if row["event"] == "step" and row["loss"] is not None]
    evals = [row for row in rows if row["event"] == "eval"]
    if not steps:
        return
    unit, letter = (1e9, "billion") if steps[-1]["tokens"] > 2e9 else (1e6, "million")
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
    x = [row["tokens"] / unit for row in steps]
    losses, smooth, average = [row["loss"] for row in steps], [], steps[0]["loss"]
    for loss in losses:
        average += 0.05 * (loss - average)
        smooth.append(average)
    axes[0, 0].plot(x, losses, color="C0", alpha=0.25, linewidth=0.8)
    axes[0, 0].plot(x, smooth, color="C0", label="training loss, smoothed")
    axes[0, 0].set(title="Training loss (nats per token)", ylim=(0.95 * min(losses), 1.02 * max(losses)))
    for source in evals[-1]["bpb"] if evals else ():
        axes[0, 1].plot([row["tokens"] / unit for row in evals], [row["bpb"].get(source) for row in evals], marker=".", label=source)
    axes[0, 1].set(title="Held-out bits per byte", ylim=(0, None))
    axes[1, 0].plot(x, [row["lr"] for row in steps], color="C2")
    axes[1, 0].set(title="Learning rate", ylim=(0, None))
    axes[1, 1].plot(x, [row["grad_norm"] or math.nan for row in steps], color="C3", linewidth=0.8)
    axes[1, 1].set(title="Gradient norm before clipping", yscale="log")
    if skipped := [row["tokens"] / unit for row in rows if row.get("skipped")]:
        for position in skipped:
            axes[1, 1].axvline(position, color="black", linewidth=0.6, alpha=0.5)
        axes[1, 1].set(title=f"Gradient norm before clipping ({len(skipped)} steps skipped)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set(xlim=(0, None))
    for axis in axes[1]:
        axis.set(xlabel=f"tokens ({letter})")
    if evals and evals[-1]["bpb"]:
        axes[0, 1].legend()
    figure.suptitle(str(run))
    figure.savefig(run / "curves.png.tmp", format="png", dpi=110)
    os.replace(run / "curves.png.tmp", run / "curves.png")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def open_data(c: Config, tokenizer: Tokenizer) -> tuple[TokenData, dict[str, list[Path]], dict[str, float]]:
    """The training data, the held-out files by source ({}: none) and the sources' shares, if there is a mix. All are checked.

    On every rank; raises UserError.
    """
    rank, _ = rank_and_world()

    def look() -> tuple[TokenData, dict[str, list[Path]], dict[str, float]]:
        shares = {}
        if c.mix:
            mix = mix_sources(c.mix, "train", tokenizer)
            files, counts = mix_files(mix, -(-c.tokens // (c.batch * c.seq_len)) * c.batch, c.seq_len)
            data = TokenData(files, c.seq_len, tokenizer, counts)
            val = {source: files for source, (_, files) in mix_sources(c.mix, "val", tokenizer).items() if files}
            shares = {source: share for source, (share, _) in mix.items()}
        else:
            sources = c.data or [embedded_corpus(tokenizer)]
            data = TokenData(token_files(sources, "train"), c.seq_len, tokenizer)
            val = by_source([f for s in sources if Path(s, "val").is_dir() for f in token_files([s], "val")])
        data.positions(0, c.batch, c.seed)  # raises if there is less than a batch
        val = by_source(token_files(c.val, "val")) if c.val else val
        for files in val.values():
            TokenData(files, c.seq_len, tokenizer)
        return data, val, shares

    together(lambda: rank or look())  # the embedded corpus is made by one, found by the others
    return together(look)


def start_machine(c: Config) -> torch.device:
    """Meet the other ranks, with the threads and the memory of a fresh process. Raises UserError."""
    keep_freed_memory(True)
    device = start_ranks(c)
    if device.type == "cuda":  # of a run before this one, in the same process
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if c.threads:
        torch.set_num_threads(c.threads)
    return device


def train(c: Config, origin: dict[str, str]) -> Path:
    """Train, or go on with, the run that `c` describes; returns its folder. Raises UserError. Under torchrun, all ranks do."""
    check(c)
    device = start_machine(c)
    rank, world = rank_and_world()
    # ---- tokens per step
    shard, rows, micro_batch = layout(c, world)
    tokens_per_step = c.batch * c.seq_len
    steps = -(-c.tokens // tokens_per_step)
    # ---- data
    tokenizer = together(lambda: get_tokenizer(c.tokenizer))
    data, val, shares = open_data(c, tokenizer)
    folder = Path(c.out)
    start = Path(c.init) / "manifest.json"  # a state of the same name may be of another run by now
    enter_run(c, origin, describe_data(data), sha256(start)[:12] if c.moments and start.exists() else None)
    # ---- model and optimizer: shapes first, so that no process ever holds more than its shards
    if c.init:
        source, weights = together(lambda: find_weights(c.init))
        shape = together(lambda: read_config(source))
        if c.moments and not (source / "state.json").exists():
            raise UserError(f"{c.init} has no optimizer state: name a training state (a run's step<N>-tokens<T>)", everywhere=True)
        if together(lambda: get_tokenizer(c.init)).fingerprint != tokenizer.fingerprint:
            raise UserError(f"{c.init} was trained with another tokenizer than {c.tokenizer}: pass --tokenizer {c.init}, and data made with it",
                            everywhere=True)
    else:
        shape = dataclasses.replace(
            SIZES[c.size], vocab=tokenizer.padded_vocab_size, eos=tokenizer.eos, pad=tokenizer.pad, norm_position=c.norm_position,
            context=max(c.seq_len, SIZES[c.size].context), qk_norm=c.qk_norm, norm=c.norm, init=c.init_scheme, embed_std=c.embed_std)
    with torch.device("meta"):
        model = OLMo2(shape)
    prepare(model, c, make_mesh(c, device), bf16=device.type == "cuda")
    model.to_empty(device=device)
    optimizer = make_optimizer(model, c)
    skip_step = SkipStep(c.skip_sigma)
    step = 0
    if state_folder := newest_state(folder):
        state = load_state(state_folder, model.config, tensors_of(model, optimizer))
        step, skip_step = state["step"], SkipStep(c.skip_sigma, state["skip_history"])
    elif c.moments:
        if damage := find_damage(source):
            raise UserError(f"{source} is damaged ({damage}): start from another state", everywhere=True)
        load_state(source, model.config, tensors_of(model, optimizer))
    elif c.init:
        load_tensors(weights, tensors_of(model, optimizer)["model"])
    else:
        model.init_weights(c.init_seed)
    checked = self_check(c, data.hash, tensors_of(model, optimizer)["model"], device)
    # ---- what is about to happen
    peak, flops = (peak_flops(device) or 0) * world, model.config.flops_per_token(c.seq_len)
    print(f"run       {folder}{f', going on from {state_folder.name}' if state_folder else ''}")
    print(f"model     {c.size}: {model.config.parameters['total']:,} parameters, {model.config.layers} layers, D {model.config.d_model}, "
          f"vocabulary {model.config.vocab:,}; {device}, {torch.get_num_threads()} threads")
    if world > 1:
        print(f"mesh      {world} processes: {world // shard} {'copy' if world == shard else 'replicas'} of the weights, each sharded over {shard}")
    print(f"check     {checked}")
    if state_folder and state.get("world", 1) != world:
        print(f"          {state_folder.name} was saved by {state.get('world', 1)} processes: with {world}, sums have other last bits")
    print(f"data      {data.hash}: {sum(s['tokens'] for s in data.sidecars):,} tokens in {len(data.files)} files, {len(data):,} instances; "
          f"the run sees them {steps * c.batch / len(data):.2f} times")
    print(f"batch     {c.batch} instances x {c.seq_len} tokens = {tokens_per_step:,} tokens per step "
          f"({f'{world} processes x ' if world > 1 else ''}{rows // micro_batch} x {micro_batch}); {steps:,} steps = {steps * tokens_per_step:,} tokens")
    if not val:
        print("          no held-out text (val/ or --val): the run is not evaluated on the way")
    if step > steps:
        print(f"          the run is already {step:,} steps long; --tokens asks for {steps:,}")
    if c.wandb:
        print(f"wandb     {c.wandb}")
    run = Run(c, model.config, tokenizer, state if state_folder else {})

    def evaluate() -> None:
        with torch.compiler.set_stance("force_eager"):  # other shapes than the loop's: compiling for them would take longer
            bpb = bits_per_byte_by_source(model, val, c.seq_len, tokenizer, c.val_tokens, shares)
            text = write_sample(model, tokenizer, c.sample) if c.sample else ""
        if isinstance(model, FSDPModule):
            model.reshard()  # no backward pass does it here
        run.record("eval", bpb=bpb)
        print("          held-out bits per byte: " + ", ".join(f"{source} {value:.3f}" for source, value in bpb.items()))
        if text:
            run.record("sample", text=text)
            print(f"          sample: {text!r}")

    def ask() -> None:
        """Held-out questions, of a model that has seen the embedded corpus. After the last save; again if that was the end of it."""
        embedded = not c.data and (not c.mix or shares.keys() & SOURCES.keys())
        if embedded and c.questions and not from_all(any(row["event"] == "questions" and row["step"] == step for row in read_metrics(folder)))[0]:
            with torch.compiler.set_stance("force_eager"):
                right = {task: 100 * accuracy(model, tokenizer, task, c.questions) for task in ("math", "qa")}
            run.record("questions", accuracy=right, questions=c.questions)

    skipped_in_a_row = 0
    with run:
        if c.init and step == 0 and val:  # what there was before
            evaluate()
        first_step, start = step, time.perf_counter()
        then = start
        while step < steps and not run.stop:
            # ---- 1. the learning rate
            lr = lr_at((step + 1) * tokens_per_step, c)
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr
            # ---- 2. gradients: sums over micro-batches and ranks, divided by the targets of the whole step
            tokens, targets = (torch.from_numpy(a) for a in data.batch(step, c.batch, c.seed, c.first_epoch, rank, world, c.mask_repeats))
            n = all_sum((targets != -100).sum().to(device)).clamp(min=1)
            ce, z = torch.zeros(2, device=device)
            for i in range(0, rows, micro_batch):
                x, y = (a[i : i + micro_batch].to(device, non_blocking=True) for a in (tokens, targets))
                if isinstance(model, FSDPModule):  # gradients stay sharded; replicas add theirs up once, at the end
                    model.set_requires_all_reduce(i + micro_batch == rows)
                ce_sum, z_sum, _ = model.loss(x, y, c.z_loss)
                ((ce_sum + z_sum) / n).backward()
                ce, z = ce + ce_sum.detach(), z + z_sum.detach()
            # ---- 3. clip and step, unless the gradient is not to be trusted
            grad_norm = clip_gradients(model, c.clip)
            loss, z = run.share(ce / n, z / n)
            take = skip_step(loss, grad_norm)
            if take:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # ---- 4. log
            run.step, run.tokens = run.step + 1, run.tokens + tokens_per_step
            step, now = run.step, time.perf_counter()
            speed = tokens_per_step / (now - then)
            mfu = speed * flops / peak if peak else None
            run.record("step", loss=loss, z_loss=z, lr=lr, grad_norm=grad_norm, skipped=not take, tokens_per_s=round(speed, 1),
                   mfu=mfu, seconds=round(now - start, 3))
            then = now
            if step % c.log_every == 0 or step == steps or not take:
                speed = (step - first_step) * tokens_per_step / (now - start)
                left = (steps - step) * tokens_per_step / speed
                print(f"step {step:>{len(str(steps))}}/{steps}  loss {loss:7.4f}  lr {lr:.2e}  grad {grad_norm:7.3f}  {speed / 1000:7.1f}k tok/s  "
                    f"MFU {f'{100 * speed * flops / peak:.1f}%' if peak else 'n/a'}  {format_seconds(left)} left{'' if take else '  SKIPPED'}", flush=True)
            skipped_in_a_row = 0 if take else skipped_in_a_row + 1
            if skipped_in_a_row == 20:
                raise UserError(f"20 steps in a row were skipped, up to step {step} (loss {loss}, gradient norm {grad_norm}; instances "
                                f"{data.positions(step - 1, c.batch, c.seed, c.first_epoch)[:4].tolist()}…): lower --lr, lengthen --warmup, or look at "
                                f"the data; the newest state is {next((s.name for s in list_states(folder)), 'none')}", everywhere=True)
            # ---- 5. evaluate, save
            if val and (step % c.eval_every == 0 or step == steps):
                evaluate()
                then = time.perf_counter()
            if step % c.save_every == 0 or step == steps or run.stop:
                run.save(tensors_of(model, optimizer), wait=step == steps or run.stop, skip_history=list(skip_step.history))
                then = time.perf_counter()
        if not run.stop:
            ask()
    if device.type == "cuda":
        print(f"memory    {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most on {device}")
    if rank == 0:
        plot(folder)
    run.leave_if_stopped()
    if not list((folder / "hf").glob("*.safetensors")):  # someone removed them, and the run was finished
        export(folder, newest_state(folder), tensors_of(model, optimizer)["model"], model.config, tokenizer)
    finish(c, folder, first_step >= steps)
    return folder


def finish(c: Config, run: Path, was_done: bool) -> None:
    """Print what the run has come to, and where everything lies."""
    rows = read_metrics(run)
    last = {row["event"]: row for row in rows}
    print(f"\n{run}: {'was finished already' if was_done else 'finished'}, {rows[-1]['tokens']:,} tokens")
    for source, value in last.get("eval", {"bpb": {}})["bpb"].items():
        print(f"  held-out bits per byte  {source:8} {value:.3f}")
    for task, value in last.get("questions", {"accuracy": {}})["accuracy"].items():
        print(f"  held-out questions      {task:8} {value:.1f} % right of {last['questions']['questions']}")
    print(f"  weights {run / 'hf'}   curves {run / 'curves.png'}   next: python sample.py {run} \"{c.sample}\"")


def write_sample(model: OLMo2, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 60) -> str:
    # Always all the tokens, cut afterwards: ranks that disagreed about where to end would wait for each other for ever.
    tokens, _ = model.generate([tokenizer.encode(prompt) or [tokenizer.eos]], max_new_tokens, temperature=0.7, top_p=0.95)
    end = tokens[0].index(tokenizer.eos) if tokenizer.eos in tokens[0] else len(tokens[0])
    return prompt + tokenizer.decode(tokens[0][:end])


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(75), format_seconds(3 * 86400 + 3600)
    ('1:15', '3d 01:00:00')
    """
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}d " if days else "") + (f"{h:02d}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}")


def start_wandb(c: Config, run: Path):
    if not c.wandb:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb library: pip install wandb") from None
    return wandb.init(project=c.wandb, name=str(run), config=dataclasses.asdict(c), resume="allow", id=str(run).replace("/", "-"))


# ----------------------------------------------------------------------------------------------------------------------
# Planning: the model, prepared and sharded as above, runs one forward and backward on fake tensors (shapes without data) and
# fake collectives, and every operation is counted: what is alive, what is computed, what is sent. That is done at two
# small depths and two micro-batches, and continued in straight lines. The time alone is a model, of two constants.

# Two constants, from the published speeds of the 1B and 7B alone (tests/bench.py --plan); the 13B and 32B test them.
EFFICIENCY = 0.48  # FLOPs done per second, recomputation and causal attention included, over the peak: mean of 0.472 and 0.486
BUS = 69e9  # bytes/s sent per GPU. A lower bound: the 7B sent so many, and compute alone explains its time
USABLE = 0.9  # share of a GPU's memory for what is counted here; the rest: CUDA, NCCL, fragmentation
KINDS = ("parameters", "optimizer moments", "gradients", "gathered weights", "gradients in flight", "activations", "temporaries")
PUBLISHED = {"1B": (128, 55_000), "7B": (512, 10_000), "13B": (256, 4_600), "32B": (1024, 1_800)}  # GPUs, tokens/s/GPU (H100, bf16)


class Ledger(TorchDispatchMode):
    """Sees every operation: what is alive at the worst moment of each phase, by kind, and what is computed and sent."""

    def __init__(self):
        super().__init__()
        self.kind_of = weakref.WeakKeyDictionary()  # living storage -> [kind]: a list, since a later operation may know better
        self.phase, self.worst, self.counts = "setup", {}, Counter()  # worst: phase -> (bytes, what is alive)

    def mark(self, kind: str, tensors) -> None:
        for t in tree_leaves(tensors):
            self.kind_of.setdefault(getattr(t, "_local_tensor", t).untyped_storage(), [kind])[0] = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes again, for this rank's shard
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, made = func._schema.name, [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for t in made:
            self.kind_of.setdefault(t.untyped_storage(), ["activations" if self.phase == "forward" else "temporaries"])
        if name == "c10d::_allgather_base_":  # in a ring, each GPU sends all but one part
            self.mark("gathered weights", args[0])
            self.counts["all-gather"] += args[0].nbytes - args[1].nbytes
        elif name == "fsdp::split_with_sizes_copy":  # what was gathered becomes a tensor per weight
            self.mark("gathered weights", kwargs["out"])
        elif name == "fsdp::chunk_cat":  # a block's gradients become one buffer, in fp32
            self.mark("gradients in flight", (args[0], kwargs["out"]))
        elif name == "c10d::_reduce_scatter_base_":
            self.mark("gradients", args[0])
            self.counts["reduce-scatter"] += args[1].nbytes - args[0].nbytes
        elif name == "c10d::allreduce_":
            ranks = distributed.ProcessGroup.unbox(args[1]).size()
            self.counts["all-reduce"] += sum(2 * t.nbytes * (ranks - 1) / ranks for t in args[0])
        elif func._overloadpacket in flop_registry:
            self.counts["FLOPs"] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif "scaled_dot_product" in name:  # the CPU's kernel is not in the registry: 2 products forward, 4 backward, of 2 FLOPs
            q, products = (args[1], 4) if "backward" in name else (args[0], 2)  # per entry of T x T x K, causally half of them
            self.counts["FLOPs"] += products * q.numel() * q.shape[-2]
        if made or name.startswith("fsdp::"):  # summed anew, since FSDP frees a gathered weight by resizing its storage, unseen here
            now = sum(storage.nbytes() for storage in self.kind_of)
            if now > self.worst.get(self.phase, (0,))[0]:
                self.worst[self.phase] = now, [(kind, storage.nbytes()) for storage, kind in self.kind_of.items()]
        return out


def count_micro_step(shape: ModelConfig, c: Config, mesh: DeviceMesh, rows: int, accumulate: bool) -> Counter:
    """Counts of one forward and backward on `rows` instances; under (phase, kind), the bytes alive at the phase's worst moment."""
    from torch._subclasses import FakeTensorMode
    with torch.device("meta"):
        model = OLMo2(shape)
    prepare(model, c, mesh, bf16=True)  # before the mode: FSDP cuts each weight in as many views as there are ranks
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        model.to_empty(device="cpu")
        optimizer = make_optimizer(model, c)
        ledger.mark("parameters", list(model.parameters()))
        ledger.mark("optimizer moments", list(optimizer.state.values()))
        if accumulate:  # what the micro-steps before have summed
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            ledger.mark("gradients", [p.grad for p in model.parameters()])
        tokens = torch.zeros(rows, c.seq_len, dtype=torch.long)
        ledger.phase = "forward"
        ce, z, _ = model.loss(tokens, tokens)
        ledger.phase = "backward"
        (ce + z).backward()
    # Clipping and AdamW work in place, when activations are gone: they are never the peak.
    counts = Counter(ledger.counts, parameters=sum(p.numel() for p in model.parameters()))
    for phase, (_, alive) in ledger.worst.items():
        for [kind], size in alive:
            counts[phase, kind] += size
    return counts


def line(x: float, xs: tuple[float, float], ys: list[Counter]) -> Counter:
    """The straight line through two points, at x."""
    share = (x - xs[0]) / (xs[1] - xs[0])
    return Counter({key: ys[0][key] * (1 - share) + ys[1][key] * share for key in ys[0].keys() | ys[1].keys()})


def plan(shape: ModelConfig, c: Config) -> dict:
    """Of one step: parameters, memory and bytes sent per GPU, FLOPs, seconds, tokens/s/GPU, MFU. Raises UserError as `layout` does.

    seconds = max(FLOPs / (EFFICIENCY * peak), bytes / BUS): communication hides behind compute, or the other way round.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore
    shard, rows, micro_batch = layout(c, c.gpus)
    eager = dataclasses.replace(c, compile=False)  # torch.compile does nothing under a dispatch mode: see `kept`
    # Two depths: whole periods of recomputation, from three blocks on, when all of FSDP's buffers are in use.
    period = Fraction(c.recompute).limit_denominator(16).denominator
    depths = (-(-3 // period) * period, -(-3 // period) * period + period)
    micro_batches = (micro_batch, 2 * micro_batch)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # ChunkedLoss asks if two gradients are one
    chunk, ChunkedLoss.CHUNK["cpu"] = ChunkedLoss.CHUNK["cpu"], ChunkedLoss.CHUNK["cuda"]
    distributed.init_process_group("fake", rank=0, world_size=c.gpus, store=FakeStore())
    try:
        mesh = make_mesh(c, torch.device("cpu"))
        counted = {(depth, m): count_micro_step(dataclasses.replace(shape, layers=depth), eager, mesh, m, rows > micro_batch)
                   for depth in depths for m in micro_batches}
    finally:
        distributed.destroy_process_group()
        ChunkedLoss.CHUNK["cpu"] = chunk

    def counts(layers: int, m: int) -> Counter:
        return line(layers, depths, [line(m, micro_batches, [counted[depth, n] for n in micro_batches]) for depth in depths])

    def kept(m: int) -> float:
        """Bytes that compiled blocks keep from forward to backward, in bf16: the block's input, q and k before norm and after
        RoPE, v, the outputs of attention and of o_proj, the MLP's input, gate, up, their product and its output."""
        block = 2 * (7 * shape.d_model + 3 * shape.kv_heads * shape.head_dim + 3 * shape.ffn) + 4 * shape.heads  # per token
        recomputed = block - 6 * shape.ffn if c.recompute_part == "mlp" else 2 * shape.d_model
        return shape.layers * m * c.seq_len * (c.recompute * recomputed + (1 - c.recompute) * block)

    def memory(m: int, compiled: bool) -> dict[str, float]:
        """Bytes by kind at the peak, with micro-batches of m."""
        whole, no_blocks, phases = counts(shape.layers, m), counts(0, m), []
        for phase in ("forward", "backward"):
            phases.append({kind: whole[phase, kind] for kind in KINDS})
            if compiled:
                phases[-1]["activations"] = no_blocks[phase, "activations"] + kept(m)
        return max(phases, key=lambda kinds: sum(kinds.values()))

    step = counts(shape.layers, micro_batch)
    if shard > 1 and not (step["all-gather"] and step["reduce-scatter"]):
        raise RuntimeError(f"torch {torch.__version__} names its collectives otherwise than `Ledger` does")
    micro_steps = rows // micro_batch
    sent = {kind: step[kind] * (1 if kind == "all-reduce" else micro_steps) for kind in ("all-gather", "reduce-scatter", "all-reduce")}
    flops, peak = step["FLOPs"] * micro_steps, PEAK_FLOPS["H100"]
    compute, communication = flops / (EFFICIENCY * peak), sum(sent.values()) / BUS
    speed = rows * c.seq_len / max(compute, communication)
    fitting = [m for m in range(1, rows + 1) if rows % m == 0 and sum(memory(m, c.compile).values()) <= USABLE * c.gpu_memory * 2**30]
    full = shape.flops_per_token(c.seq_len)
    return dict(parameters=round(step["parameters"]), memory=memory(micro_batch, c.compile),
                eager=sum(memory(micro_batch, False).values()), largest_micro_batch=max(fitting, default=0), sent=sent,
                flops=flops, compute=compute, communication=communication, tokens_per_s=speed, mfu=speed * full / peak,
                mfu_causal=speed * (full - 6 * shape.layers * shape.d_model * c.seq_len) / peak)


def report(c: Config) -> None:
    """Print the plan of `c` on --gpus H100."""
    if c.init:
        shape = read_config(find_weights(c.init)[0])
    else:
        vocab = SIZES[c.size].vocab if c.tokenizer in ("olmo2", RECIPES[c.size].get("tokenizer")) else get_tokenizer(c.tokenizer).padded_vocab_size
        shape = dataclasses.replace(SIZES[c.size], vocab=vocab, norm_position=c.norm_position, qk_norm=c.qk_norm, norm=c.norm)
    p, (shard, rows, micro_batch) = plan(shape, c), layout(c, c.gpus)
    GiB, usable = 2**30, USABLE * c.gpu_memory
    peak, best = sum(p["memory"].values()) / GiB, p["largest_micro_batch"]
    counted = f"blocks compiled: an estimate, {p['eager'] / GiB:.1f} counted without torch.compile" if c.compile else "without torch.compile"
    fits = f"largest micro-batch within {USABLE:.0%} of {c.gpu_memory:g} GiB: "
    if best:
        fits += f"{best} instance{'s' * (best > 1)}{', all that a GPU has of the batch' if best == rows else ''}"
    else:
        thrifty = dataclasses.replace(c, micro_batch=1, recompute=1.0, recompute_part="block", reshard=True, shard=0)
        fits += (f"none; --micro-batch 1 --recompute 1 --recompute-part block --reshard --shard 0 takes {sum(plan(shape, thrifty)['memory'].values()) / GiB:.1f} GiB"
                 if c != thrifty else "none: more GPUs are needed, or larger ones")
    print(f"model     {c.size}: {p['parameters']:,} parameters, {shape.layers} layers, D {shape.d_model}\n"
          f"mesh      {c.gpus:,} H100, {c.gpus // shard} replica{'s' * (c.gpus > shard)} of the weights, each sharded over {shard}\n"
          f"batch     {c.batch} x {c.seq_len} = {c.batch * c.seq_len:,} tokens per step; per GPU {rows // micro_batch} x {micro_batch} instances\n"
          f"memory    {peak:.1f} GiB per GPU at the peak{'' if peak <= usable else f': DOES NOT FIT in {USABLE:.0%} of {c.gpu_memory:g}'} "
          f"({counted})")
    for kind in KINDS:
        print(f"          {kind:20}{p['memory'][kind] / GiB:8.2f} GiB")
    print(f"fits      {fits}\n"
          f"sent      per GPU and step: {', '.join(f'{kind} {size / 1e9:,.1f} GB' for kind, size in p['sent'].items())}\n"
          f"time      {max(p['compute'], p['communication']):.3g} s per step = max(compute {p['compute']:.3g}, communication {p['communication']:.3g}): "
          "one hides behind the other\n"
          f"          compute = {p['flops'] / 1e12:,.1f} TFLOP per GPU, recomputation included, / ({EFFICIENCY} x 989 TFLOP/s)\n"
          f"          communication = {sum(p['sent'].values()) / 1e9:,.1f} GB / {BUS / 1e9:.0f} GB/s\n"
          f"          from the published 1B and 7B: {EFFICIENCY} of the peak in large compiled blocks (small models do less: launching kernels "
          f"takes longer than\n          running them), and {BUS / 1e9:.0f} GB/s, the least that the 7B sent across nodes (within a node it is faster)\n"
          f"speed     {p['tokens_per_s']:,.0f} tokens/s/GPU; MFU {p['mfu']:.1%} with attention in full, {p['mfu_causal']:.1%} causal")
    if p["communication"] > p["compute"]:
        print(f"          up to {p['tokens_per_s'] * p['communication'] / p['compute']:,.0f} tokens/s/GPU if the network is faster than that")
    gpus, speed = PUBLISHED.get(c.size, (0, 0))
    if gpus == c.gpus and all(getattr(c, name) == getattr(Config(size=c.size, **RECIPES[c.size]), name)
                              for name in ("batch", "seq_len", "tokenizer", "micro_batch", "shard", "reshard", "recompute", "recompute_part", "compile", "init")):
        print(f"          published {speed:,} tokens/s/GPU: the plan is {p['tokens_per_s'] / speed - 1:+.1%} off"
              f"{' (it is calibrated on this one)' if c.size in ('1B', '7B') else ''}")


def run_training(c: Config, origin: dict[str, str]) -> None:
    """`train`, by the only process that writes the run; a lost rank ends this one with a line."""
    with sole_writer(Path(c.out)):
        try:
            train(c, origin)
        except RuntimeError as error:
            lost_rank(error)
            raise


def lost_rank(error: RuntimeError) -> None:
    """End this process with a line, if the error means that another one is gone."""
    if rank_and_world()[1] > 1 and any(word in str(error) for word in ("gloo", "NCCL", "TCPStore")):  # not a bug of ours
        sys.exit(f"rank {distributed.get_rank()} lost the others, one of them has ended or hangs: {str(error).strip().splitlines()[0]}")


def leave_ranks() -> None:
    """Take leave of the other processes, when all are done."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    c, origin = read_flags(arguments)
    check(c)
    with one_voice():
        if c.plan:
            return report(c)
        run_training(dataclasses.replace(c, out=c.out or f"runs/{c.size}/pretrain"), origin)
    leave_ranks()


if __name__ == "__main__":
    run_cli(main)
