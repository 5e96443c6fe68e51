"""Kill a training run again and again with SIGKILL, at random moments; in the end it must not show.

    python tests/kill.py --kills 20                    # one process
    python tests/kill.py --kills 100 --ranks 2         # two: one of them is killed, and the other a moment later
    python tests/kill.py --kills 20 --ranks 2 --async-save

Two runs with the same settings: one undisturbed, one killed whenever it has lived for a random time. Their metrics rows
(without the time fields), final weights and final moments must be equal bit for bit. Children are forked from a parent that
has imported everything and built an optimizer, or the kills would land in imports; and steps must have been trained
twice, or nothing was tested.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# Imported here, once: else every child would import it.
import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo
from safetensors.torch import load_file

import pretrain
from data import embedded_corpus, get_tokenizer
from infra.checkpoint import list_states, newest_state
from infra.metrics import read_metrics
from model import SIZES, OLMo2

TIME_FIELDS = ("seconds", "tokens_per_s", "mfu")


def run_once(folder: Path, steps: int, flags: list[str], environment: dict[str, str]) -> None:
    """The whole of `python pretrain.py …` in this process."""
    os.environ |= environment
    with (
        open(folder.with_suffix(".log"), "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        pretrain.main(
            [
                *f"--out {folder} --seq-len 32 --batch 4 --micro-batch 2 --tokens {steps * 128} --save-every 4 --keep 2 --eval-every 16 "
                f"--val-tokens 512 --threads 1 --data {folder.parent / 'tokens/embedded-laptop'} --sample".split(),
                "",
                *flags,
            ]
        )


def start(ranks: int, *arguments) -> list[int]:
    """Fork the run's processes; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    return [
        fork(
            run_once,
            *arguments,
            world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {},
        )
        for rank in range(ranks)
    ]


def fork(function, *arguments) -> int:
    """Run a function in a forked child; its process id."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    return pid


def fingerprint(run: Path) -> tuple[str, str]:
    """Hashes of the metrics rows without time, and of every tensor of the last state."""
    rows = [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_metrics(run)]
    state = hashlib.sha256()
    for part in ("model", "optim"):
        for path in sorted((list_states(run)[0] / part).glob("*.safetensors")):
            for name, tensor in sorted(load_file(path).items()):
                state.update(name.encode() + tensor.numpy().tobytes())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest(), state.hexdigest()


def main(
    kills: int, steps: int, folder: Path, ranks: int = 1, flags: list[str] = [], seed: int = 0
) -> dict:
    """Run both; returns the counts. AssertionError if the kills show."""
    torch.set_num_threads(
        1
    )  # a forked child of a process with OpenMP threads would wait for them for ever
    torch.optim.AdamW(OLMo2(SIZES["tiny"]).parameters(), fused=True)
    embedded_corpus(get_tokenizer("laptop"), folder / "tokens")
    calm, stormy = folder / "calm", folder / "stormy"
    seconds = []
    for _ in range(2):  # the second finds the run finished: what it takes is starting up
        began = time.time()
        assert [os.waitpid(pid, 0)[1] for pid in start(ranks, calm, steps, flags)] == [0] * ranks, (
            calm.with_suffix(".log").read_text()
        )
        seconds.append(time.time() - began)
    whole, startup = seconds
    rng, killed, replayed = random.Random(seed), 0, 0
    while True:
        living = start(ranks, stormy, steps, flags)
        if killed >= kills:
            assert [os.waitpid(pid, 0)[1] for pid in living] == [0] * ranks, stormy.with_suffix(
                ".log"
            ).read_text()[-3000:]
            break
        time.sleep(rng.uniform(0.2 * startup, 0.6 * startup + 8 * (whole - startup) / steps))
        ended = [os.waitpid(pid, os.WNOHANG) for pid in living]
        if all(pid for pid, _ in ended):
            assert [status for _, status in ended] == [0] * ranks, stormy.with_suffix(
                ".log"
            ).read_text()[-3000:]
            break
        rng.shuffle(living)
        for pid in living:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            time.sleep(rng.uniform(0, 0.1) if ranks > 1 else 0)  # what do the others do meanwhile?
        killed += 1
        reached = max([row["step"] for row in read_metrics(stormy)], default=0)
        state = newest_state(stormy)
        replayed += reached - (
            json.loads((state / "state.json").read_text())["step"] if state else 0
        )
    assert replayed > 0, "no step was replayed: nothing was tested"
    assert fingerprint(calm) == fingerprint(stormy), (
        f"{killed} kills show: {fingerprint(calm)} {fingerprint(stormy)}"
    )
    return {
        "kills": killed,
        "replayed steps": replayed,
        "rows and state": fingerprint(stormy)[1][:12],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, default=0, help="of the run; default: 24 per kill, 12 of two ranks"
    )
    parser.add_argument("--async-save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        steps = options.steps or (24 if options.ranks == 1 else 12) * options.kills
        result = main(
            options.kills, steps, Path(path), options.ranks, ["--async-save"] * options.async_save
        )
    assert result["kills"] >= options.kills, (
        f"the run ended after {result['kills']} kills: give it more --steps"
    )
    print(f"{result}: as if it had never been killed")
