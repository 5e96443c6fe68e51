"""Kill a training run again and again with SIGKILL, at random moments; in the end it must not show.

    python tests/kill.py --kills 20

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
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from safetensors.torch import load_file

import pretrain
from model import SIZES, OLMo2

TIME_FIELDS = ("seconds", "tokens_per_s", "mfu")


def run_once(folder: Path, steps: int) -> None:
    """The whole of `python pretrain.py …` in this process."""
    with open(folder.with_suffix(".log"), "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        pretrain.main(f"--out {folder} --seq-len 32 --batch 4 --micro-batch 2 --tokens {steps * 128} --save-every 4 --keep 2 "
                      f"--eval-every 16 --val-tokens 512 --threads 1 --data {folder.parent / 'tokens/embedded-laptop'}".split())


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
    rows = [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in pretrain.read_metrics(run)]
    state = hashlib.sha256()
    for part in ("model", "optim"):
        for path in (pretrain.list_states(run)[0] / part).glob("*.safetensors"):
            for name, tensor in sorted(load_file(path).items()):
                state.update(name.encode() + tensor.numpy().tobytes())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest(), state.hexdigest()


def main(kills: int, steps: int, folder: Path, seed: int = 0) -> dict:
    """Run both; returns the counts. AssertionError if the kills show."""
    torch.set_num_threads(1)  # a forked child of a process with OpenMP threads would wait for them for ever
    torch.optim.AdamW(OLMo2(SIZES["tiny"]).parameters(), fused=True)
    pretrain.embedded_corpus(pretrain.get_tokenizer("laptop"), folder / "tokens")
    calm, stormy = folder / "calm", folder / "stormy"
    seconds = []
    for _ in range(2):  # the second finds the run finished: what it takes is starting up
        began = time.time()
        assert os.waitpid(fork(run_once, calm, steps), 0)[1] == 0, calm.with_suffix(".log").read_text()
        seconds.append(time.time() - began)
    whole, startup = seconds
    rng, killed, replayed = random.Random(seed), 0, 0
    while True:
        pid = fork(run_once, stormy, steps)
        time.sleep(rng.uniform(0.2 * startup, 0.6 * startup + 8 * (whole - startup) / steps)) if killed < kills else None
        done, status = os.waitpid(pid, os.WNOHANG if killed < kills else 0)
        if done:
            assert status == 0, stormy.with_suffix(".log").read_text()[-3000:]
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        reached = max([row["step"] for row in pretrain.read_metrics(stormy)], default=0)
        state = pretrain.newest_state(stormy)
        replayed += reached - (json.loads((state / "state.json").read_text())["step"] if state else 0)
    assert replayed > 0, "no step was replayed: nothing was tested"
    assert fingerprint(calm) == fingerprint(stormy), f"{killed} kills show: {fingerprint(calm)} {fingerprint(stormy)}"
    return {"kills": killed, "replayed steps": replayed, "rows and state": fingerprint(stormy)[1][:12]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=0, help="of the run; default: 24 per kill")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        result = main(options.kills, options.steps or 24 * options.kills, Path(path))
    assert result["kills"] >= options.kills, f"the run ended after {result['kills']} kills: give it more --steps"
    print(f"{result}: as if it had never been killed")
