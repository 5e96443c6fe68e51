"""Several ranks on this machine, real processes with real connections, and faults to plant in them.

    python tests/ranks.py FAULT flags of pretrain.py …     # also under torchrun

`launch` forks the ranks from a server that has torch imported, which saves seconds per rank. A fault is a function of this
file that changes what a rank does before its main begins.
"""

import functools
import importlib
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch._dynamo  # torch imports it at the first use of an optimizer: a second per rank
import torch.distributed.tensor.parallel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import infra.run
import pretrain
from infra import checkpoint, distributed
from model import Head, OLMo2


def launch(
    world: int,
    arguments,
    fault: str = "",
    log: Path = Path("ranks.log"),
    timeout: float = 120,
    script: str = "pretrain",
) -> tuple[list[int], str]:
    """Run `python <script>.py arguments` as `world` ranks; (exit statuses, all that they printed). Negative: killed by that signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(
        Path(__file__).parent
    )  # Python 3.11's server does not look where its parent does
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(log).resolve()
    log.write_text("")
    ranks = [
        context.Process(
            target=worker,
            args=(rank, world, port, [str(a) for a in arguments], fault, log, os.getcwd(), script),
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks], log.read_text()


def worker(
    rank: int,
    world: int,
    port: int,
    arguments: list[str],
    fault: str,
    log: Path,
    folder: str,
    script: str,
) -> None:
    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (
        open(1, "w", buffering=1, closefd=False),
        open(2, "w", buffering=1, closefd=False),
    )
    torch.set_num_threads(1)
    pretrain.plot_run = lambda run: None  # another second; the curves are no matter of ranks
    if script == "posttrain":
        importlib.import_module("sft").plot_run = pretrain.plot_run
    if fault:
        globals()[fault](rank)
    distributed.run_cli(lambda: importlib.import_module(script).main(arguments))


# ---- faults


def count_graphs(rank: int) -> None:
    """No fault: at its end the rank prints how many graphs torch.compile has made."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    counter = CompileCounterWithBackend("eager")
    main = pretrain.main

    def counted(arguments):
        main(arguments)
        os.write(
            1, f"graphs {counter.frame_count}, breaks {len(counters['graph_break'])}\n".encode()
        )

    torch.compile = functools.partial(torch.compile, backend=counter)
    pretrain.main = counted


def show_collectives(rank: int) -> None:
    """No fault: rank 0 prints what it gathers and reduces in a forward and backward, in order, as [kind, numbers]."""
    seen = []

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if DTensor in types:
                return NotImplemented
            kind = {"c10d::_allgather_base_": "gather", "c10d::_reduce_scatter_base_": "reduce"}
            name = kind.get(function._schema.name)
            if name:
                seen.append([name, max(tensor.numel() for tensor in args[:2])])
            return function(*args, **(kwargs or {}))

    mode, before, after = Collectives(), pretrain.all_reduce_when, pretrain.clip_gradients

    def begin(*arguments):
        before(*arguments)
        mode.__enter__()

    def end(*arguments):
        mode.__exit__(None, None, None)
        if rank == 0:
            os.write(1, f"collectives {json.dumps(seen)}\n".encode())
        seen.clear()
        return after(*arguments)

    pretrain.all_reduce_when, pretrain.clip_gradients = begin, end


def count_all_reduces(rank: int) -> None:
    """No fault: at its end the rank prints how often replicas have added up a group's gradients."""
    real, sizes = torch.distributed.all_reduce, []

    def all_reduce(tensor, *arguments, **named):
        sizes.append(tensor.numel())
        return real(tensor, *arguments, **named)

    torch.distributed.all_reduce = all_reduce
    module = importlib.import_module("posttrain")
    main = module.main

    def counted(arguments):
        main(arguments)
        os.write(1, f"all-reduces {sum(size > 1000 for size in sizes)}\n".encode())

    module.main = counted


def uneven_rows(rank: int) -> None:
    """Rows of the global batch have very different numbers of targets; the same ones at any world size."""
    whole = pretrain.TokenData.batch

    def batch(self, step, rows, seed, first_epoch=0, rank=0, world=1, mask_repeats=False):
        tokens, targets = whole(self, step, rows, seed, first_epoch, 0, 1, mask_repeats)
        for row in range(rows):
            targets[row, 1 + (7 * row + step) ** 2 % targets.shape[1] :] = -100
        return tokens[rank::world], targets[rank::world]

    pretrain.TokenData.batch = batch


def mean_of_means(rank: int) -> None:
    """The classic bug: each rank divides by its own number of targets, and the gradients are averaged."""
    uneven_rows(rank)
    whole = OLMo2.loss

    def loss(self, tokens, targets, z_loss=1e-5):
        ce_sum, z_sum, n_targets = whole(self, tokens, targets, z_loss)
        share = targets[:, 1:].numel() / n_targets  # of what all targets count
        return ce_sum * share, z_sum * share, n_targets

    OLMo2.loss = loss


def no_stages(rank: int) -> None:
    """posttrain.py's recipe finds its runs made."""
    import posttrain

    posttrain.run_stage = lambda stage, c, origin: distributed.init_process(
        c.device, c.threads, c.timeout
    )


def recorded_rollouts(rank: int) -> None:
    """posttrain.py gets the same answers at any world size, whatever a last bit does to sampling."""
    import numpy as np

    import rollouts
    import sft
    from tasks.conversations import Example

    def answers(model, tokenizer, prompts, seeds, temperature, max_new_tokens, name=""):
        made = []
        for prompt, seed in zip(prompts, seeds):
            draw = np.random.default_rng(seed)
            ids = [*draw.integers(0, 900, draw.integers(1, max_new_tokens)).tolist(), tokenizer.eos]
            n, T = len(prompt.tokens), len(prompt.tokens) + len(ids)
            log_probs = torch.cat(
                (
                    torch.zeros(n - 1),
                    torch.tensor(-2.0 * draw.random(len(ids))).float(),
                    torch.zeros(1),
                )
            )
            made.append(
                rollouts.Completion(
                    Example(np.array(prompt.tokens + ids), np.arange(T) >= n),
                    log_probs,
                    tokenizer.decode(ids[:-1]),
                    True,
                    bool(draw.random() < 0.5),
                )
            )
        return made

    sft.generate_completions = rollouts.generate_completions = answers


def kept_rollouts(rank: int) -> None:
    """posttrain.py writes kept-<rank>.jsonl: the seeds of the rows that this rank samples, the rollouts that it knows, and the
    mean advantage of each row that it trains on."""
    import rlvr
    import rollouts

    def keep(**values) -> None:
        with open(f"kept-{rank}.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    def keep_calls(module, name: str, kept) -> None:
        real = getattr(module, name)

        def work(*arguments, **named):
            result = real(*arguments, **named)
            keep(**kept(arguments, named, result))
            return result

        setattr(module, name, work)

    def kept(arguments, named, result) -> dict:
        return {
            "tokens": [example.tokens.tolist() for (example,) in result.examples],
            "rewards": result.rewards.tolist(),
            "old": [row.flatten().tolist() for row in result.old_logprobs],
        }

    def advantages(arguments, named, result) -> dict:
        mask = named["mask"] if "mask" in named else (named["weights"] > 0).float()
        values = named["advantages"].view(len(mask), -1) * mask
        means = values.sum(1) / mask.sum(1)
        return {"advantages": means[mask.sum(1) > 0].tolist()}

    keep_calls(rollouts, "complete_rows", lambda a, *_: {"seeds": [seed for _, seed in a[-1]]})
    keep_calls(rlvr, "sample_rollouts", kept)
    keep_calls(rlvr, "grpo_loss", advantages)
    keep_calls(rlvr, "ppo_losses", advantages)


def bf16(rank: int) -> None:
    """Compute as on CUDA."""
    real = pretrain.shard_model
    pretrain.shard_model = lambda *args, bf16: real(*args, bf16=True)


def show_moments(rank: int) -> None:
    """Print the checksum of the optimizer's moments as loaded."""
    real = infra.run.load_state

    def load_state(folder, trained):
        state = real(folder, trained)
        print("moments", distributed.checksum(trained.tensors["optim"]))
        return state

    infra.run.load_state = load_state


def other_data(rank: int) -> None:
    if rank == 1:
        pretrain.TokenData.hash = property(lambda self: "0" * 12)


def other_weights(rank: int) -> None:
    """One bit of one weight differs in the second replica."""
    real = OLMo2.init_weights

    def init_weights(self, seed):
        real(self, seed)
        if rank == 1:
            distributed.local_part(self.lm_head.weight)[0].view(-1).view(torch.int32)[5] ^= 1

    OLMo2.init_weights = init_weights


def killed_in_training(rank: int) -> None:
    at_batch(rank, {1: lambda step: step == 11 and os.kill(os.getpid(), signal.SIGKILL)})


def killed_twice(rank: int) -> None:
    """Under torchrun --max-restarts: rank 1 dies at step 11, and after the first restart at step 13."""
    deadly = {"0": 11, "1": 13}.get(os.environ["TORCHELASTIC_RESTART_COUNT"])
    at_batch(rank, {1: lambda step: step == deadly and os.kill(os.getpid(), signal.SIGKILL)})


def killed_hashing(rank: int) -> None:
    """Rank 1 dies in the second save, after the tensors are written and before they count."""
    real = checkpoint.sha256
    checkpoint.sha256 = lambda path: (
        os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and "saving-step16" in str(path)
        else real(path)
    )


def killed_before_commit(rank: int) -> None:
    """Rank 0 dies in the second save between two files: the manifest is there, the name is not."""
    real = checkpoint.sync
    checkpoint.sync = lambda path: (
        os.kill(os.getpid(), signal.SIGKILL)
        if "saving-step16" in str(path) and path.name == "optim"
        else real(path)
    )


def terminated(rank: int) -> None:
    """Rank 1 gets SIGTERM at step 11."""
    at_batch(rank, {1: lambda step: step == 11 and os.kill(os.getpid(), signal.SIGTERM)})


def nan_on_one_rank(rank: int) -> None:
    """At steps 4 and 6 the loss of rank 1 is computed with a weight that is NaN, or so large that the loss is infinite."""
    broken = {4: math.nan, 6: 3e38}
    real, steps = Head.loss, []  # FSDP has gathered the head's weight here
    at_batch(rank, {1: lambda step: steps.append(step + 1)})

    def loss(self, *args):
        weight, bad = (
            self.weight.data,
            broken.get(steps[-1]) if steps and torch.is_grad_enabled() else None,
        )
        before = weight[5, 5].clone()
        weight[5, 5] = before if bad is None else bad
        values = real(self, *args)
        weight[5, 5] = before
        return values

    Head.loss = loss


def spike(rank: int) -> None:
    """At step 70 the loss is 1,000 times what it should be, on all ranks."""
    real, steps = OLMo2.loss, []
    at_batch(rank, {r: lambda step: steps.append(step + 1) for r in range(4)})
    OLMo2.loss = lambda self, *args: (
        tuple(v * (1000 if steps and steps[-1] == 70 else 1) for v in real(self, *args)[:2])
        + (None,)
    )


def slow_disk(rank: int) -> None:
    """The others wait for this rank's part of a state longer than --timeout."""
    whole = checkpoint.hash_files

    def hash_files(folder):
        if rank == 1:
            time.sleep(8)
        return whole(folder)

    checkpoint.hash_files = hash_files


def slow_answers(rank: int) -> None:
    """The first answers of this rank take longer than --timeout."""
    whole = OLMo2.generate
    waited = []

    def generate(self, *arguments, **named):
        if rank == 1 and not waited:
            waited.append(time.sleep(8))
        return whole(self, *arguments, **named)

    OLMo2.generate = generate


def no_room(rank: int) -> None:
    """No GPU holds all weights, and an answer at a time is all that fits beside the shards."""
    rollouts = importlib.import_module("rollouts")
    rollouts.whole_copy_fits = lambda *_: False
    rollouts.rows_that_fit = lambda *_: 1


def keep_policy(rank: int) -> None:
    """All ranks write the policy as servers get it, to kept/ in the run, before the first step."""
    rlvr, servers = importlib.import_module("rlvr"), importlib.import_module("servers")
    load_model = rlvr.load_model

    def load(c, path, run, longest, **more):
        model = load_model(c, path, run, longest, **more)
        if not more:
            servers.write_policy(Path(c.out) / "kept", model)
        return model

    rlvr.load_model = load


def full_disk(rank: int) -> None:
    """On rank 1 the kernel refuses to let a file grow beyond 1 MiB, in the second save."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    at_batch(
        rank,
        {
            1: lambda step: (
                step == 12
                and resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
            )
        },
    )


def stuck(rank: int, who: int = 1) -> None:
    """Rank 1 never comes."""
    if rank == who:
        signal.alarm(8)
        signal.pause()


def headless(rank: int) -> None:
    """Rank 0 never comes."""
    stuck(rank, 0)


def at_batch(rank: int, actions: dict) -> None:
    """Call actions[rank](step) whenever this rank fetches the batch of a step (from 0)."""
    real = pretrain.TokenData.batch

    def batch(self, step, *args, **kwargs):
        actions.get(rank, lambda step: None)(step)
        return real(self, step, *args, **kwargs)

    pretrain.TokenData.batch = batch


if __name__ == "__main__":
    globals()[sys.argv[1]](int(os.environ["RANK"]))
    del sys.argv[1]
    distributed.run_cli(pretrain.main)
