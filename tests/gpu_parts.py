"""What tests/gpu.py measures: its parts, each run in a process of its own.

A part is a generator. It yields {name: figure} as soon as it knows some, so that an error, or the
end of its time, takes only what is still to come. It raises AssertionError for a figure out of its
bounds. `real` is false in the dry run: the same lines, on the CPU, with a tiny model.
"""

import argparse
import contextlib
import functools
import gc
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, distributed, nn  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import decode  # noqa: E402
import posttrain  # noqa: E402
import pretrain  # noqa: E402
import rlvr  # noqa: E402
from counting import compiled_bytes, is_compiled  # noqa: E402
from data import embedded_corpus, get_tokenizer, token_files  # noqa: E402
from infra.checkpoint import list_states  # noqa: E402
from infra.distributed import (  # noqa: E402
    free_memory,
    init_process,
    local_part,
    peak_flops,
    shutdown_distributed,
)
from infra.files import first_line, sha256, write_json  # noqa: E402
from infra.metrics import rows_of  # noqa: E402
from infra.run import Run  # noqa: E402
from infra.settings import RunSettings  # noqa: E402
from infra.sharding import inference, make_mesh, shard_model  # noqa: E402
from model import SIZES, ModelConfig, OLMo2  # noqa: E402
from plan import Plan, PlanSettings  # noqa: E402
from recipes import pretrain_recipe  # noqa: E402

GIB = 2**30
Figures = Iterator[dict[str, float | int | str | bool | None]]

# Bounds of bf16 against fp32. bf16 keeps 8 bits, a relative error of 2^-9 a rounding. The loss is a
# mean over tokens, in which roundings cancel; a gradient has passed through all blocks twice. They
# are some ten times what the dry run shows, which also computes in bf16.
LOSS_OFF = 1e-3  # relative
NORM_OFF = 2e-2  # relative, of the whole gradient
LEAST_COSINE = 0.99  # of the gradient of any one parameter

# ------------------------------------------------------------------------------------------
# A device, models, clocks


def start(real: bool) -> tuple[torch.device, DeviceMesh]:
    """Begin a world of one, so that bf16 goes the way of a run; on the CPU, too."""
    if not real:
        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        # inductor needs a compiler of C++, which the dry run must not
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    device = init_process("cuda" if real else "cpu", 0, 600)
    return device, make_mesh(0, device)


def shape_of(real: bool, size: str, **changes) -> ModelConfig:
    """A size, with changes; in the dry run the laptop's, with two layers, grouped as the size."""
    if real:
        return replace(SIZES[size], **changes)
    grouped = SIZES[size].kv_heads < SIZES[size].heads
    return replace(SIZES["tiny"], layers=2, kv_heads=2 if grouped else 4)


def settings_of(real: bool, size: str, **changes) -> PlanSettings:
    """Stage 1 of a size on one GPU, with four micro-batches to a step; the dry run's is small."""
    recipe = pretrain_recipe(size) | {"shard": 1} | changes
    if not real:
        recipe |= {"seq_len": 64, "micro_batch": 2}
    return PlanSettings(size=size, **recipe | {"batch": 4 * recipe["micro_batch"]})


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give random weights fast, on the device: here nobody needs the same ones everywhere."""
    for parameter in model.parameters():
        part, _ = local_part(parameter)
        if parameter.ndim == 1:
            part.fill_(1.0)
        else:
            part.normal_(0, 0.02)


def sharded_model(
    shape: ModelConfig, c: RunSettings, device: torch.device, mesh: DeviceMesh
) -> OLMo2:
    """A model that computes in bf16, as pretraining makes it, without values."""
    with torch.device("meta"):
        model = OLMo2(shape)
    shard_model(model, model.model.layers, c, mesh, bf16=True)
    return model.to_empty(device=device)


def plain_model(real: bool, shape: ModelConfig) -> OLMo2:
    """A model in bf16 with random weights, as one that is only asked."""
    with torch.device("meta"):
        model = OLMo2(shape)
    model = model.to(torch.bfloat16).to_empty(device="cuda" if real else "cpu")
    fill(model)
    return model


def random_tokens(shape: ModelConfig, rows: int, length: int, device: torch.device) -> Tensor:
    """Token ids [rows, length], the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, shape.vocab, (rows, length), generator=generator).to(device)


def synchronize() -> None:
    """Wait until the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable, *arguments) -> float:
    synchronize()
    began = time.perf_counter()
    work(*arguments)
    synchronize()
    return time.perf_counter() - began


def clock(owner, name: str) -> list[float]:
    """Seconds of each call of owner.name from now on; the list grows."""
    seconds = []
    work = getattr(owner, name)

    @functools.wraps(work)
    def timed(*arguments, **named):
        synchronize()
        began = time.perf_counter()
        result = work(*arguments, **named)
        synchronize()
        seconds.append(time.perf_counter() - began)
        return result

    setattr(owner, name, timed)
    return seconds


@contextlib.contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    """owner.name is `value` meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


# ------------------------------------------------------------------------------------------
# Are the numbers right?


def loss_and_gradients(model: OLMo2, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The mean loss, and each parameter's gradient, in fp64 on the CPU."""
    ce_sum, z_sum, n_targets = model.loss(tokens, tokens.roll(-1, 1))
    ((ce_sum + z_sum) / n_targets).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        part, _ = local_part(parameter.grad)
        gradients[name] = part.double().cpu().flatten()
    return (ce_sum / n_targets).item(), gradients


def parity(real: bool) -> Figures:
    """Loss and gradients in bf16 against fp32 on the CPU: 1B, and 32B (grouped queries)."""
    device, mesh = start(real)
    torch.set_float32_matmul_precision("highest")  # a CPU, too, may round products of fp32
    grouped = shape_of(real, "32B", layers=1, vocab=8192)
    shapes = {"1B": shape_of(real, "1B", layers=4), "32B": grouped}
    problems = []
    for size, shape in shapes.items():
        tokens = random_tokens(shape, 2, 512 if real else 64, torch.device("cpu"))
        with torch.device("meta"):
            exact_model = OLMo2(shape)
        fill(exact_model.to_empty(device="cpu"))
        exact = loss_and_gradients(exact_model, tokens)
        for kind, answer in {"eager": "no", "compiled": "yes"}.items():
            model = sharded_model(shape, RunSettings(compile=answer), device, mesh)
            copy_weights(exact_model, model)
            found = compare(exact, loss_and_gradients(model, tokens.to(device)))
            yield {f"{size} {kind}, {name}": value for name, value in found.items()}
            problems += [f"{size} {kind}: {problem}" for problem in out_of_bounds(found)]
    assert not problems, "; ".join(problems)


@torch.no_grad()
def copy_weights(source: OLMo2, model: OLMo2) -> None:
    """Give a model, which is whole in a world of one, the weights of another."""
    for parameter, value in zip(model.parameters(), source.parameters()):
        part, _ = local_part(parameter)
        part.copy_(value)


def compare(exact: tuple, rounded: tuple) -> dict[str, float]:
    """How far a loss and its gradients are from others."""
    norms, cosines = [], []
    for gradients in (exact[1], rounded[1]):
        norms.append(math.hypot(*(gradient.norm().item() for gradient in gradients.values())))
    for name, gradient in exact[1].items():
        cosines.append(torch.cosine_similarity(gradient, rounded[1][name], dim=0).item())
    return {
        "loss": rounded[0],
        "loss off": abs(rounded[0] / exact[0] - 1),
        "norm off": abs(norms[1] / norms[0] - 1),
        "least cosine": min(cosines),
    }


def out_of_bounds(found: dict[str, float]) -> list[str]:
    """What is worse than the bounds at the top; NaN is."""
    problems = []
    for name, most in (("loss off", LOSS_OFF), ("norm off", NORM_OFF)):
        if not found[name] <= most:
            problems.append(f"{name} {found[name]:.2g}, at most {most}")
    if not found["least cosine"] >= LEAST_COSINE:
        problems.append(f"least cosine {found['least cosine']:.4f}, at least {LEAST_COSINE}")
    return problems


def tests(real: bool) -> Figures:
    """The tests that need CUDA: tests/test_cuda.py."""
    path = ROOT / "tests/test_cuda.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    yield {"pytest": last.strip("= ")}
    assert done.returncode == 0 and (not real or "skipped" not in last), last or done.stderr


# (share of blocks, what of them runs again) -> kinds of blocks, so many graphs
KINDS = {(0, "block"): 1, (1, "block"): 1, (1, "mlp"): 1, (0.25, "block"): 2, (0.25, "mlp"): 2}


def graphs(real: bool) -> Figures:
    """How many graphs inductor makes for each kind of block, and how many in later steps."""
    device, mesh = start(real)
    shape = replace(shape_of(real, "30M"), layers=12 if real else 4)
    tokens = random_tokens(shape, 2, 128, device)
    wrong = []
    for (share, part), kinds in KINDS.items():
        torch._dynamo.reset()
        counters.clear()
        c = RunSettings(recompute=share, recompute_part=part, compile="yes")
        model = sharded_model(shape, c, device, mesh)
        fill(model)
        seconds = seconds_of(loss_and_gradients, model, tokens)
        first = counters["stats"]["unique_graphs"]
        with inference(model):  # an evaluation, of another shape
            model.loss(tokens[:, :17], tokens[:, :17])
        loss_and_gradients(model, tokens)
        found = {
            "graphs": first,
            "later": counters["stats"]["unique_graphs"] - first,
            "breaks": sum(counters["graph_break"].values()),
        }
        name = f"recompute {share} {part}"
        yield {f"{name}, {key}": value for key, value in found.items()} | {f"{name}, s": seconds}
        if list(found.values()) != [kinds + 1, 0, 0]:
            wrong.append(f"{name}: {found}, not {kinds} graphs of blocks and one of the loss")
    assert not wrong, "; ".join(wrong)


def bits(real: bool) -> Figures:
    """Are two runs the same, bit for bit, with --deterministic, and without it?"""
    c = ["--size", "190M", "--batch", "16", "--micro-batch", "8", "--tokens", str(20 * 16 * 1024)]
    if not real:
        c = ["--device", "cpu", "--seq-len", "64", "--batch", "4", "--tokens", "512"]
    c += ["--tokenizer", "laptop", "--sample", "", "--questions", "0", "--data", *corpus()]
    c += ["--compile", "no"]
    for name in ("deterministic", "no-deterministic"):
        weights, losses = [], []
        for number in (1, 2):
            out = f"{name}-{number}"
            command = [sys.executable, ROOT / "pretrain.py", *c, "--out", out, f"--{name}"]
            subprocess.run(command, check=True)
            weights.append([sha256(path) for path in sorted(Path(out, "hf").glob("*.safetensors"))])
            losses.append([row["loss"] for row in rows_of(Path(out), "step")])
        same = {"weights": weights[0] == weights[1], "losses": losses[0] == losses[1]}
        yield {f"--{name}, equal {key}": value for key, value in same.items()}
        if name == "deterministic":
            differs = not all(same.values())
    assert not differs, "two runs with --deterministic differ"


def corpus() -> list[str]:
    """The training files of the embedded corpus, which the parts of a call share."""
    folder = embedded_corpus(get_tokenizer("laptop"), Path("../tokens"))
    return [str(path) for path in token_files([str(folder)], "train")]


# ------------------------------------------------------------------------------------------
# How fast is training, and what does it take?

STEPS = 6  # the first one compiles


def training_speed(
    shape: ModelConfig, c: PlanSettings, device: torch.device, mesh: DeviceMesh
) -> dict[str, float | None]:
    """Tokens/s, MFU and memory of steps of four micro-batches: the median without the first."""
    torch._dynamo.reset()
    model = sharded_model(shape, c, device, mesh)
    fill(model)
    optimizer = pretrain.make_optimizer(model, c)
    tokens = random_tokens(shape, c.batch, c.seq_len, device)
    targets = tokens.roll(-1, 1)

    def step() -> None:
        for x, y, _ in pretrain.micro_batches(tokens, targets, c.micro_batch, device):
            ce_sum, z_sum, _ = model.loss(x, y, c.z_loss)
            ((ce_sum + z_sum) / targets.numel()).backward()
        pretrain.clip_gradients(model, c.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [seconds_of(step) for _ in range(STEPS)]
    speed = tokens.numel() / statistics.median(seconds[1:])
    full = shape.flops_per_token(c.seq_len)  # attention in full, as most count it
    causal = full - 6 * shape.layers * shape.d_model * c.seq_len  # half of it, as kernels do
    peak = peak_flops(device)
    return {
        "tokens/s": speed,
        "MFU, full": speed * full / peak if peak else None,
        "MFU, causal": speed * causal / peak if peak else None,
        "peak GiB": torch.cuda.max_memory_allocated() / GIB,
        "first step s": seconds[0],
    }


def planned_gib(shape: ModelConfig, c: PlanSettings) -> float:
    """What plan.py says of the same; it needs a process group of its own."""
    shutdown_distributed()
    return Plan(shape, c).memory(c.micro_batch, is_compiled(c)).total() / GIB


def train_1b(real: bool) -> Figures:
    """1B at T 4,096, compiled, as its recipe: tokens/s, MFU, peak memory against plan.py's."""
    device, mesh = start(real)
    shape = shape_of(real, "1B")
    c = settings_of(real, "1B")
    yield training_speed(shape, c, device, mesh)
    yield {"planned GiB": planned_gib(shape, c)}


def recompute(real: bool) -> Figures:
    """The same, recomputing the MLPs, then whole blocks."""
    device, mesh = start(real)
    shape = shape_of(real, "1B")
    choices = {}
    for part in ("mlp", "block"):
        choices[part] = settings_of(real, "1B", recompute=1.0, recompute_part=part)
        found = training_speed(shape, choices[part], device, mesh)
        yield {f"{part}, {name}": value for name, value in found.items()}
        release_memory()
    for part, c in choices.items():
        yield {f"{part}, planned GiB": planned_gib(shape, c)}


def train_7b(real: bool) -> Figures:
    """A 7B of as many layers as fit."""
    device, mesh = start(real)
    c = settings_of(real, "7B")
    layers = layers_that_fit(c, free_memory(device)) if real else 2
    while True:
        shape = shape_of(real, "7B", layers=layers)
        try:
            found = training_speed(shape, c, device, mesh)
            break
        except torch.OutOfMemoryError:
            yield {f"{layers} layers": "out of memory"}
            layers -= 2
        release_memory()
    yield {"layers": shape.layers, **found}
    yield {"planned GiB": planned_gib(shape, c)}


def layers_that_fit(c: PlanSettings, free: int) -> int:
    """16 bytes per parameter, the bf16 copies of two blocks aside, and what a compiled block keeps.

    A tenth stays free: for temporaries, and for what is fragmented.
    """
    one = replace(SIZES["7B"], layers=1)
    outside = one.vocab * one.d_model * 2  # embedding and head
    block = one.parameters["total"] - outside
    # One of the two is gathered at a time, in bf16, and so is its gradient, in fp32.
    room = 0.9 * free - (16 + (2 + 4) / 2) * outside
    return int(room / (16 * block + c.micro_batch * compiled_bytes(one, c, c.seq_len)))


def release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------
# Which kernels attend?

ATTENTION = re.compile("flash|fmha|cudnn|attention", re.IGNORECASE)


def kernels(real: bool) -> Figures:
    """The kernels of attention, by their names: in training, reading prompts, decoding."""
    for size, layers in (("1B", 4), ("32B", 2)):
        shape = shape_of(real, size, layers=layers)
        model = plain_model(real, shape)
        tokens = random_tokens(shape, 2, 1024 if real else 64, model.lm_head.weight.device)
        training = functools.partial(train_once, model, tokens)
        yield {f"{size} training": attention_names(real, training)}
        with inference(model):
            prompts = tokens[:, :40].tolist()
            read = functools.partial(decode.read_prompts, model, prompts, 60)
            yield {f"{size} prompts": attention_names(real, read)}
            _, cache = read()
            slots = torch.tensor([40, 40])
            step = functools.partial(decode.read_tokens, model, tokens[:, 40].cpu(), slots, cache)
            yield {f"{size} decoding": attention_names(real, step)}


def train_once(model: OLMo2, tokens: Tensor) -> None:
    ce_sum, z_sum, _ = model.loss(tokens, tokens.roll(-1, 1))
    (ce_sum + z_sum).backward()


def attention_names(real: bool, work: Callable) -> str:
    """Names of the kernels that attend, each with its calls; on the CPU, of the operations."""
    work()  # the first call may try several
    kind = ProfilerActivity.CUDA if real else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        work()
        synchronize()
    events = profiler.key_averages()
    assert events, "the profiler has seen nothing"
    names = []
    for event in events:
        if ATTENTION.search(event.key):
            names.append(f"{event.count} x {event.key[:90]}")
    return "; ".join(names) or "none has such a name: all may be done by plain matrix products"


# ------------------------------------------------------------------------------------------
# How fast is generation, and a step of GRPO?


def exact_width(last: int, capacity: int, device: torch.device) -> int:
    """In the place of decode.slots_seen: no slot more than there are tokens."""
    return last + 1


def any_kernel(cache: Tensor | None) -> contextlib.AbstractContextManager:
    """In the place of decode.attention_kernels: cuDNN's are allowed."""
    return contextlib.nullcontext()


def decoding(real: bool) -> Figures:
    """Decoding with the 1B: ms per token of a step, batch 1 and 26, width rounded and exact."""
    shape = shape_of(real, "1B")
    model = plain_model(real, shape)
    length = 200 if real else 4
    yield from step_times(model, "", length)
    with replaced(decode, "slots_seen", exact_width):
        yield from step_times(model, "exact width, ", length)
    with replaced(decode, "attention_kernels", any_kernel):
        yield from step_times(model, "cuDNN allowed, ", length)
        with replaced(decode, "slots_seen", exact_width):  # a new plan for each token: few of them
            yield from step_times(model, "cuDNN allowed, exact width, ", length // 4)


def step_times(model: OLMo2, name: str, length: int) -> Figures:
    """Milliseconds per step of each batch, after prompts of 64 tokens; a first time does not count.

    What a kernel has planned for a width in the first time is no help in the second: there all
    widths are new.
    """
    for rows in (1, 26):
        for n_prompt in (64, 64 + length):
            prompts = random_tokens(model.config, rows, n_prompt, torch.device("cpu")).tolist()
            with inference(model):
                seconds = seconds_of(model.generate, prompts, length)
        yield {f"{name}batch {rows}, ms": 1000 * seconds / length}


def nothing(*_) -> None:
    """In the place of saving: other parts measure that."""


def grpo(real: bool) -> Figures:
    """Steps of GRPO with the 1B: 8 prompts x 16 answers of 256 tokens; seconds of the last."""
    model = plain_model(real, shape_of(real, "1B"))
    model.save("base")
    get_tokenizer("laptop").save("base")
    del model
    release_memory()
    c = "--size 1B --prompts 8 --response-length 256 --micro-tokens 8192 --prompt-length 512".split()
    if not real:
        c = "--device cpu --prompts 2 --samples 2 --response-length 8".split()
    c += "--init base --out run --data embedded/sums --steps 3 --save-every 1000".split()
    sampling = clock(rlvr, "sample_rollouts")
    scoring = clock(rlvr, "score_log_probs")
    with replaced(Run, "save", nothing), replaced(rlvr, "finish_stage", nothing):
        posttrain.main(["grpo", *c])
    rows = rows_of(Path("run"), "step")
    step = rows[-1]["seconds"] - rows[-2]["seconds"]  # they add up
    yield {
        "step s": step,
        "sampling s, with old log-probabilities": sampling[-1],
        "reference s": scoring[-1],
        "training s": step - sampling[-1] - scoring[-1],
        "tokens of answers per s": rows[-1]["tokens_per_s"],
        "mean length": rows[-1]["length"],
        "peak GiB": torch.cuda.max_memory_allocated() / GIB,
    }


# ------------------------------------------------------------------------------------------
# How long does it take to save and to resume?


def saving(real: bool) -> Figures:
    """Save, resume, save while training goes on: 8 layers of the 1B, the laptop's vocabulary."""
    c = "--size 1B --layers 8 --seq-len 1024 --batch 16 --micro-batch 4 --compile no".split()
    if not real:
        c = "--device cpu --seq-len 64 --batch 16 --layers 2".split()
    tokens_per_step = 16 * (1024 if real else 64)
    c += ["--tokenizer", "laptop", "--sample", "", "--questions", "0", "--data", *corpus()]
    saves = clock(Run, "save")
    resumes = clock(Run, "resume")
    c += ["--tokens", str(8 * tokens_per_step)]

    yield {"save, host GiB": host_memory(pretrain.main, [*c, "--out", "run"])}
    (state,) = list_states(Path("run"))
    size = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    yield {"state GB": size / 1e9, "save s": saves.pop()}

    resumes.clear()
    yield {"resume, host GiB": host_memory(pretrain.main, [*c, "--out", "run"])}
    yield {"resume s": resumes.pop()}

    c += ["--out", "async", "--async-save", "--save-every", "4"]
    yield {"async save, host GiB": host_memory(pretrain.main, c)}
    yield {"async save s, of which training waits": saves[0], "last save s": saves[1]}
    seconds = [row["seconds"] for row in rows_of(Path("async"), "step")]
    step_times = [b - a for a, b in zip(seconds, seconds[1:])]
    yield {"step s, before": step_times[2], "step s, after": max(step_times[4:])}


def host_memory(work: Callable, *arguments) -> float | None:
    """The most memory that this process has had meanwhile, GiB; None where Linux does not say."""
    process = Path("/proc/self")
    with contextlib.suppress(OSError):
        (process / "clear_refs").write_text("5")  # forget the peak
    work(*arguments)
    if not (process / "status").exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    return int(found[1]) * 1024 / GIB


# ------------------------------------------------------------------------------------------
# The parts, in this order: name, minutes at most, what to do. A part beyond its time is killed.

PARTS: dict[str, tuple[float, Callable[[bool], Figures]]] = {
    "tests": (2, tests),
    "parity": (3, parity),
    "1B": (3, train_1b),
    "graphs": (3, graphs),
    "kernels": (2, kernels),
    "decoding": (3, decoding),
    "grpo": (3, grpo),
    "bits": (3, bits),
    "7B": (3, train_7b),
    "recompute": (3, recompute),
    "saving": (3, saving),
}


def main(parts: dict[str, tuple[float, Callable[[bool], Figures]]]) -> None:
    """Run one part, and keep what it yields in a JSON file, with its error if it raises one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("file")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    figures, report = {}, {}
    try:
        for found in parts[options.part][1](not options.dry):
            figures |= found
            write_json(Path(options.file), {"figures": figures})
    except BaseException as error:  # SystemExit, too: a script's way to end
        traceback.print_exc()
        report["error"] = f"{type(error).__name__}: {first_line(error)}"
    write_json(Path(options.file), {"figures": figures, **report})
    os._exit(bool(report))  # a process group that is left in an error must not wait for anyone


if __name__ == "__main__":
    main(PARTS)
