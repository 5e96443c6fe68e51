"""Stage 1, and the one training loop of the project.

    python pretrain.py                                        # laptop: the embedded corpus, about 3 minutes on 2 cores
    python pretrain.py --data tokens/shakespeare --out runs/shakespeare             # your own text (data.py makes tokens)
    python pretrain.py --size 190M --data tokens/mine                               # one GPU: bf16, fp32 master weights
    python pretrain.py --size 7B --help                                             # the published values of a size

What this stage teaches: AdamW as OLMo 2 sets it (everything decays but the input embedding), a cosine whose horizon lies
beyond the end of the run (stage 2 goes on from the rate where this one stops), SkipStep, and a run that can be killed at
any moment. The same command again goes on from the newest good state, bit for bit as if it had never stopped.

A run is a folder, runs/<size>/pretrain: run.json (every value and where it came from), metrics.jsonl (one object per
step), curves.png, step<N>-tokens<T>/ (training states) and hf/ (the weights, for transformers, sample.py and eval.py).
"""
import dataclasses
import difflib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch.distributed import checkpoint as dcp

from data import TokenData, Tokenizer, embedded_corpus, get_tokenizer, make_folder, token_files
from eval import accuracy, bits_per_byte_by_source
from model import (SIZES, OLMo2, UserError, best_device, check_tensors, load_tensors, one_process_is_fine, peak_flops, read_config,
                   read_json, run_cli, sha256, write_json)


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
    val: tuple[str, ...] = ()  # held-out token files or folders; none: the val/ of --data
    tokenizer: str = "olmo2"  # laptop, olmo2, or a folder with tokenizer.json
    init: str = ""  # start from the weights of a run, checkpoint or Hugging Face directory; none: random
    out: str = ""  # the run's folder; none: runs/<size>/pretrain
    # ---- batches
    seq_len: Count = 4096  # tokens of an instance (paper Table 1)
    batch: Count = 512  # instances per optimizer step, over all processes
    micro_batch: Count = 4  # at most so many instances per forward and backward of a process; fewer take less memory, same result
    tokens: Count = 0  # length of the run, rounded up to whole steps (the schedule does not follow: see horizon)
    seed: Count = 6198  # of the data order (official yamls)
    init_seed: Count = 6198  # of the random weights (official yamls)
    first_epoch: Count = 0  # index of the first epoch in the order's seed: OLMo 0, OLMo-core 1
    mask_repeats: bool = True  # no loss on instances with an n-gram 32 times in a row (paper section 3.1)
    # ---- optimizer (paper section 3.3; OLMo olmo/optim.py)
    lr: float = 4e-4  # peak learning rate
    warmup: Count = 8_388_608_000  # tokens of linear warm-up from 0 (official yamls)
    horizon: Count = 5 * 10**12  # tokens at which the cosine would reach its floor; may lie beyond the end of the run
    lr_floor: float = 0.1  # the cosine's floor, as a share of lr
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
    log_every: Count = 10  # steps between lines on the terminal (metrics.jsonl has every step)
    sample: str = "The"  # text that the samples continue
    wandb: str = ""  # Weights & Biases project; none: nothing is sent
    # ---- machine
    device: str = "auto"  # auto, cpu, mps, cuda
    threads: Count = 0  # CPU threads (they change the last bits of sums); 0: torch's choice
    compile: bool = False  # torch.compile each block: slow start, faster steps


# Published values: official yamls and launch scripts of OLMo (1B, 7B, 13B) and OLMo-core (32B); paper Table 3. Where the
# sources disagree: the 13B ran at 9e-4 (paper Table 3 and its launch script; the yaml says 3e-4), and 1B to 13B warmed up
# over 8.39B tokens (yamls; the paper says 2,000 steps). Steps are those of the last released stage-1 checkpoint.
LARGE = dict(compile=True, sample="The meaning of life is")
RECIPES: dict[str, dict] = {
    "1B": dict(LARGE, lr=4e-4, batch=512, micro_batch=4, tokens=1_907_359 * 512 * 4096),  # 4.0T
    "7B": dict(LARGE, lr=3e-4, batch=1024, micro_batch=2, tokens=928_646 * 1024 * 4096),  # 3.9T, one epoch
    "13B": dict(LARGE, lr=9e-4, batch=2048, micro_batch=2, tokens=596_057 * 2048 * 4096),  # 5.0T
    "32B": dict(LARGE, lr=6e-4, batch=2048, micro_batch=2, tokens=721_901 * 2048 * 4096,  # 6.1T
                warmup=2000 * 2048 * 4096, horizon=774_861 * 2048 * 4096,  # 2,000 steps; 6.5T
                seed=34_521, init_seed=12_536, first_epoch=1, skip_sigma=6.0, mask_repeats=False),
    # Ours, for a laptop: see the README for what each choice was measured against. As in the release, the cosine's
    # horizon is a quarter beyond the end of the run.
    "tiny": dict(tokenizer="laptop", seq_len=128, batch=8, micro_batch=8, tokens=2500 * 1024, lr=1e-2, warmup=50 * 1024, embed_std=1.0,
                 horizon=3125 * 1024, skip_sigma=6.0, save_every=625, keep=3, eval_every=625, log_every=50),
}
# Ours, for the ladder, after OLMo's own (OLMo scripts/ladder.py): lr 4.7e-3 (N / 108M)^(-1/3) and 20 tokens per parameter.
for name, millions in {"14M": 14, "30M": 30, "60M": 60, "190M": 190, "370M": 370, "760M": 760}.items():
    RECIPES[name] = dict(seq_len=1024, batch=128, micro_batch=8, tokens=20_000_000 * millions, warmup=1_000_000 * millions,
                         horizon=25_000_000 * millions, lr=round(4.7e-3 * (millions / 108) ** (-1 / 3), 5), skip_sigma=6.0,
                         save_every=500, keep=3, eval_every=500)

MAY_CHANGE = {"tokens", "val", "save_every", "keep", "eval_every", "val_tokens", "log_every", "sample", "wandb", "device",
              "threads", "compile", "out", "data"}  # on resuming; the data must still be the same ones (their hash is compared)


def read_flags(arguments: list[str] | None) -> tuple[Config, dict[str, str]]:
    """(the config, where each value came from): class defaults < recipe of --size < flags. Raises UserError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    words = [word for argument in arguments for word in argument.split("=", 1)]
    size = words[words.index("--size") + 1] if "--size" in words[:-1] else Config.size
    if size not in SIZES:  # before tyro, which would read the other flags against the wrong recipe
        close = difflib.get_close_matches(size, SIZES, 1, cutoff=0.3)
        raise UserError(f"unknown size {size!r}: {f'did you mean {close[0]}? ' if close else ''}sizes are {', '.join(SIZES)}")
    recipe = Config(size=size, **RECIPES[size])
    config = tyro.cli(Config, default=recipe, args=arguments, description=__doc__)
    origin = {f.name: "flag" if getattr(config, f.name) != getattr(recipe, f.name) else
              f"recipe {size}" if f.name in RECIPES[size] else "default" for f in dataclasses.fields(Config)}
    return config, origin


def check(c: Config) -> None:
    """Raise UserError with every value that is out of range (NaN is), before anything is made."""
    rules = [(f"--{name.replace('_', '-')} {getattr(c, name)} must be {words}", holds(getattr(c, name)))
             for names, words, holds in [
                 ("seq_len batch micro_batch tokens horizon save_every eval_every log_every val_tokens", "at least 1", lambda v: v >= 1),
                 ("warmup seed init_seed first_epoch keep threads weight_decay z_loss skip_sigma", "at least 0", lambda v: 0 <= v < math.inf),
                 ("lr clip eps embed_std", "above 0", lambda v: 0 < v < math.inf),
                 ("lr_floor beta1 beta2", "from 0 to below 1", lambda v: 0 <= v < 1)] for name in names.split()]
    rules += [(f"--norm-position {c.norm_position} must be reordered or pre", c.norm_position in ("reordered", "pre")),
              (f"--norm {c.norm} must be rms or layernorm", c.norm in ("rms", "layernorm")),
              (f"--init-scheme {c.init_scheme} must be olmo2 or olmo0424", c.init_scheme in ("olmo2", "olmo0424")),
              (f"--seq-len {c.seq_len} must be at least 2: a token and the next", c.seq_len >= 2)]
    if problems := [text for text, holds in rules if not holds]:
        raise UserError("; ".join(problems))
    if c.batch % min(c.batch, c.micro_batch):
        below = c.batch // c.micro_batch * c.micro_batch
        raise UserError(f"--batch {c.batch} = {c.batch / c.micro_batch:.2f} x --micro-batch {c.micro_batch} does not divide: "
                        f"use --batch {' or '.join(str(b) for b in (below, below + c.micro_batch) if b)}")
    if not c.data and c.size in ("1B", "7B", "13B", "32B"):
        raise UserError(f"--size {c.size} needs --data: the token files of OLMo-mix-1124 (the Hub's allenai/olmo-mix-1124, "
                        "tokenised by: python data.py FOLDER --tokenizer olmo2), or your own")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("more than one process is not supported yet: start pretrain.py without torchrun")


# ----------------------------------------------------------------------------------------------------------------------
# Optimization


def lr_at(tokens: int, c: Config) -> float:
    """The rate of the step that brings the run to `tokens`: so the first step's is above 0 (OLMo olmo/optim.py).

    1. linear warm-up from 0;  2. cosine from lr to lr * lr_floor at the horizon;  3. the floor.
    """
    floor = c.lr * c.lr_floor
    if tokens < c.warmup:  # 1
        return c.lr * tokens / c.warmup
    if tokens >= c.horizon:  # 3
        return floor
    return floor + (c.lr - floor) * (1 + math.cos(math.pi * (tokens - c.warmup) / (c.horizon - c.warmup))) / 2  # 2


def make_optimizer(model: OLMo2, c: Config) -> torch.optim.AdamW:
    """AdamW in OLMo 2's two groups: the input embedding, which does not decay, and all the rest, which does."""
    groups = [{"params": [p for n, p in model.named_parameters() if ("embed_tokens" in n) == is_embedding],
               "weight_decay": 0.0 if is_embedding else c.weight_decay} for is_embedding in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    for p in model.parameters():  # what AdamW makes at its first step; here, so that a state can be saved before that
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


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


def tensors_of(model: OLMo2, optimizer: torch.optim.AdamW) -> tuple[dict, dict]:
    """Flat names to tensors: the weights, and Adam's two moments and step per weight."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}
    return weights, moments


def save_state(run: Path, state: dict, model: OLMo2, optimizer: torch.optim.AdamW, tokenizer: Tokenizer) -> Path:
    """Write run/step<N>-tokens<T>/: all of it or nothing, whenever the process dies. Raises UserError when it cannot.

    model/ and optim/ hold tensors only: given any number, torch's writer would quietly pickle it. What else a run needs
    to go on is in state.json. manifest.json has the size and sha256 of every file; the rename at the end commits.
    """
    final = run / f"step{state['step']}-tokens{count_name(state['tokens'])}"
    aside = make_folder(run / f".saving-{final.name}")
    try:
        for name, tensors in zip(("model", "optim"), tensors_of(model, optimizer)):
            with one_process_is_fine():
                dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(aside / name), save_distributed=True))
            check_tensors(aside / name, tensors)  # reads the files' headers back before they count
        model.save_config(aside)
        tokenizer.save(aside)
        write_json(aside / "state.json", state)
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        write_json(aside / "manifest.json", {str(p.relative_to(aside)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files})
        for path in [*files, aside / "manifest.json", aside / "model", aside / "optim", aside]:
            sync(path)
        if final.exists():  # a damaged state of the same step, which was not resumed from
            shutil.rmtree(final)
        aside.rename(final)
        sync(run)
    except (Exception, dcp.api.CheckpointException) as error:  # torch wraps what the disk says; its wrapper is no Exception
        shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"could not save {final}: {reason}. The states before it are untouched; make room, and the same "
                        "command goes on from the newest") from None
    return final


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a training state, against its manifest, or None."""
    try:
        manifest = read_json(folder / "manifest.json")
        present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
        for name in sorted(manifest.keys() | present):
            if name not in present:
                return f"{name} is missing"
            if name not in manifest:
                return f"{name} is not in the manifest"
            if (folder / name).stat().st_size != manifest[name]["bytes"] or sha256(folder / name) != manifest[name]["sha256"]:
                return f"{name} has changed since it was written"
    except (UserError, OSError, TypeError, KeyError, AttributeError) as error:
        return f"the manifest cannot be used: {error}"
    return None


def list_states(run: Path) -> list[Path]:
    """The committed training states of a run, newest first."""
    states = [p for p in run.glob("step*-tokens*") if p.is_dir() and p.name[4:].split("-")[0].isdigit()]
    return sorted(states, key=lambda p: int(p.name[4:].split("-")[0]), reverse=True)


def newest_state(run: Path) -> Path | None:
    """The newest state that verifies; each damaged one before it is named on standard error."""
    for folder in list_states(run):
        if not (damage := find_damage(folder)):
            return folder
        print(f"{folder} is damaged ({damage}): trying the one before", file=sys.stderr)
    return None


def load_state(folder: Path, model: OLMo2, optimizer: torch.optim.AdamW) -> dict:
    """Fill the model and the optimizer from a verified training state; returns its state.json."""
    stored, own = (dataclasses.asdict(config) for config in (read_config(folder), model.config))
    different = [f"{key} {stored[key]}, not {own[key]}" for key in own if stored[key] != own[key] and key not in ("init", "embed_std")]
    if different:  # how a model was initialised is not kept
        raise UserError(f"{folder} holds another model ({'; '.join(different)}): choose another folder with --out")
    for name, tensors in zip(("model", "optim"), tensors_of(model, optimizer)):
        load_tensors(folder / name, tensors)
    return read_json(folder / "state.json")


# ----------------------------------------------------------------------------------------------------------------------
# The run: what is recorded, printed and drawn


def open_run(c: Config, origin: dict[str, str], data: TokenData) -> Path:
    """Make the run's folder and run.json, or check that the one there was started with the same settings."""
    run = Path(c.out)
    config = {f.name: {"value": getattr(c, f.name), "from": origin[f.name]} for f in dataclasses.fields(c)}
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror}; choose another folder with --out") from None
    for left in run.glob(".saving-*"):  # of a process that died while saving
        shutil.rmtree(left)
    if (run / "run.json").exists():
        before = read_json(run / "run.json")
        changed = [f"{name} {before['config'][name]['value']} -> {config[name]['value']}" for name in config
                   if name not in MAY_CHANGE and before["config"].get(name, config[name])["value"] != json.loads(json.dumps(config[name]["value"]))]
        if before["data"]["hash"] != data.hash:
            changed.append(f"data {before['data']['hash']} -> {data.hash}")
        if changed:
            raise UserError(f"{run} was started with other settings ({', '.join(changed)}): go on with the old ones, or "
                            "choose another folder with --out")
    git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                                 cwd=Path(__file__).parent).stdout.strip()
    write_json(run / "run.json", {
        "config": config, "command": sys.argv, "git": git or None,
        "data": {"hash": data.hash, "files": [str(path) for path in data.files], "tokens": sum(s["tokens"] for s in data.sidecars)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
                     "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                     "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}})
    return run


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


def keep_freed_memory() -> None:
    """Let glibc reuse freed buffers; by default it returns each large one to the kernel, which must clear it again."""
    if sys.platform == "linux":
        import ctypes
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(c: Config, origin: dict[str, str]) -> Path:
    """Train, or go on with, the run that `c` describes; returns its folder. Raises UserError."""
    check(c)
    keep_freed_memory()
    device = best_device(c.device)
    if c.threads:
        torch.set_num_threads(c.threads)
    # ---- tokens per step
    tokens_per_step, micro_batch = c.batch * c.seq_len, min(c.batch, c.micro_batch)
    steps = -(-c.tokens // tokens_per_step)
    # ---- data
    tokenizer = get_tokenizer(c.tokenizer)
    sources = c.data or [embedded_corpus(tokenizer)]
    data = TokenData(token_files(sources, "train"), c.seq_len, tokenizer)
    data.positions(0, c.batch, c.seed)  # raises now if there is less than a batch
    val_files = token_files(c.val, "val") if c.val else [f for s in sources if Path(s, "val").is_dir() for f in token_files([s], "val")]
    TokenData(val_files, c.seq_len, tokenizer) if val_files else None  # checks them before the first step
    run = open_run(c, origin, data)
    # ---- model and optimizer
    if c.init:
        model = OLMo2.load(c.init, device=device)
        if get_tokenizer(c.init).fingerprint != tokenizer.fingerprint:
            raise UserError(f"{c.init} was trained with another tokenizer than {c.tokenizer}: pass --tokenizer {c.init}, and data made with it")
    else:
        shape = dataclasses.replace(
            SIZES[c.size], vocab=tokenizer.padded_vocab_size, eos=tokenizer.eos, pad=tokenizer.pad, norm_position=c.norm_position,
            context=max(c.seq_len, SIZES[c.size].context), qk_norm=c.qk_norm, norm=c.norm, init=c.init_scheme, embed_std=c.embed_std)
        with torch.device(device):
            model = OLMo2(shape, seed=c.init_seed)
    optimizer = make_optimizer(model, c)
    skip_step = SkipStep(c.skip_sigma)
    step = 0
    rows = read_metrics(run)
    if folder := newest_state(run):
        state = load_state(folder, model, optimizer)
        step, skip_step = state["step"], SkipStep(c.skip_sigma, state["skip_history"])
    # A resumed run repeats the steps after its state: their rows are dropped, so that each step has one.
    kept = [row for row in rows if row["step"] <= step]
    (run / "metrics.jsonl.tmp").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(run / "metrics.jsonl.tmp", run / "metrics.jsonl")
    metrics = open(run / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
    # ---- what is about to happen
    peak, flops = peak_flops(device), model.config.flops_per_token(c.seq_len)
    print(f"run       {run}{f', going on from {folder.name}' if folder else ''}")
    print(f"model     {c.size}: {model.config.parameters['total']:,} parameters, {model.config.layers} layers, D {model.config.d_model}, "
          f"vocabulary {model.config.vocab:,}; {device}, {torch.get_num_threads()} threads")
    print(f"data      {data.hash}: {sum(s['tokens'] for s in data.sidecars):,} tokens in {len(data.files)} files, {len(data):,} instances; "
          f"the run sees them {steps * c.batch / len(data):.2f} times")
    print(f"batch     {c.batch} instances x {c.seq_len} tokens = {tokens_per_step:,} tokens per step "
          f"({c.batch // micro_batch} x {micro_batch}); {steps:,} steps = {steps * tokens_per_step:,} tokens")
    if not val_files:
        print("          no held-out text (val/ or --val): the run is not evaluated on the way")
    if step > steps:
        print(f"          the run is already {step:,} steps long; --tokens asks for {steps:,}")
    if wandb := start_wandb(c, run):
        print(f"wandb     {c.wandb}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if c.compile:
        for layer in model.model.layers:
            layer.compile()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def record(event: str, **values) -> None:
        row = {"event": event, "step": step, "tokens": step * tokens_per_step, **values}
        metrics.write(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}) + "\n")
        if wandb:
            wandb.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=step)

    def save() -> None:
        metrics.flush()
        os.fsync(metrics.fileno())
        state = {"step": step, "tokens": step * tokens_per_step, "skip_history": list(skip_step.history)}
        save_state(run, state, model, optimizer, tokenizer)
        try:
            model.save(run / "hf")
            tokenizer.save(run / "hf")
        except Exception as error:
            raise UserError(f"could not write {run / 'hf'}: {error}. The training state of step {step} is safe") from None
        for old in list_states(run)[c.keep :] if c.keep else ():
            shutil.rmtree(old)

    def evaluate() -> None:
        with autocast:
            bpb = bits_per_byte_by_source(model, val_files, c.seq_len, tokenizer, c.val_tokens)
        record("eval", bpb=bpb)
        text = write_sample(model, tokenizer, c.sample)
        record("sample", text=text)
        print("          held-out bits per byte: " + ", ".join(f"{source} {value:.3f}" for source, value in bpb.items()))
        print(f"          sample: {text!r}")

    stopped_by: list[int] = []  # a signal asks the loop to stop after its step; a second one is not caught
    handlers = {s: signal.signal(s, lambda number, _: (stopped_by.append(number), signal.signal(number, signal.SIG_DFL)))
                for s in (signal.SIGINT, signal.SIGTERM)}
    skipped_in_a_row = 0
    first_step, start = step, time.perf_counter()
    then = start
    try:
        while step < steps and not stopped_by:
            # ---- 1. the learning rate
            lr = lr_at((step + 1) * tokens_per_step, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # ---- 2. gradients: sums over micro-batches, divided by the targets of the whole step
            tokens, targets = (torch.from_numpy(a) for a in data.batch(step, c.batch, c.seed, c.first_epoch, mask_repeats=c.mask_repeats))
            n = max(1, int((targets != -100).sum()))
            ce, z = torch.zeros(2, device=device)
            for i in range(0, c.batch, micro_batch):
                x, y = (a[i : i + micro_batch].to(device, non_blocking=True) for a in (tokens, targets))
                with autocast:
                    ce_sum, z_sum, _ = model.loss(x, y, c.z_loss)
                ((ce_sum + z_sum) / n).backward()
                ce, z = ce + ce_sum.detach(), z + z_sum.detach()
            # ---- 3. clip and step, unless the gradient is not to be trusted
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip).item()
            loss, z = ce.item() / n, z.item() / n
            take = skip_step(loss, grad_norm)
            if take:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # ---- 4. log
            step += 1
            now = time.perf_counter()
            speed = tokens_per_step / (now - then)
            mfu = speed * flops / peak if peak else None
            record("step", loss=loss, z_loss=z, lr=lr, grad_norm=grad_norm, skipped=not take, tokens_per_s=round(speed, 1),
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
                                f"the data; the newest state is {next((s.name for s in list_states(run)), 'none')}")
            # ---- 5. evaluate, save
            if val_files and (step % c.eval_every == 0 or step == steps):
                evaluate()
                then = time.perf_counter()
            if step % c.save_every == 0 or step == steps or stopped_by:
                save()
                then = time.perf_counter()
    finally:
        metrics.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    plot(run)
    if stopped_by:
        print(f"stopped by {signal.Signals(stopped_by[0]).name} at step {step}, saved; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + stopped_by[0])
    if not list((run / "hf").glob("*.safetensors")):  # someone removed them, and the run was finished
        model.save(run / "hf")
        tokenizer.save(run / "hf")
    finish(c, run, model, tokenizer, first_step >= steps)
    return run


def finish(c: Config, run: Path, model: OLMo2, tokenizer: Tokenizer, was_done: bool) -> None:
    """Print what the run has come to, and where everything lies."""
    rows = read_metrics(run)
    evals = [row for row in rows if row["event"] == "eval"]
    print(f"\n{run}: {'was finished already' if was_done else 'finished'}, {rows[-1]['tokens']:,} tokens")
    for source, value in (evals[-1]["bpb"] if evals else {}).items():
        print(f"  held-out bits per byte  {source:8} {value:.3f}")
    if not c.data:
        for task in ("math", "qa"):
            print(f"  held-out questions      {task:8} {100 * accuracy(model, tokenizer, task):.1f} % right of 500")
    print(f"  weights {run / 'hf'}   curves {run / 'curves.png'}   next: python sample.py {run} \"{c.sample}\"")


def write_sample(model: OLMo2, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 60) -> str:
    tokens, _ = model.generate([tokenizer.encode(prompt) or [tokenizer.eos]], max_new_tokens, temperature=0.7, top_p=0.95, eos=tokenizer.eos)
    return prompt + tokenizer.decode(t for t in tokens[0] if t != tokenizer.eos)


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


def main(arguments: list[str] | None = None) -> None:
    c, origin = read_flags(arguments)
    train(dataclasses.replace(c, out=c.out or f"runs/{c.size}/pretrain"), origin)


if __name__ == "__main__":
    run_cli(main)
