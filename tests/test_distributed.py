"""Many processes: the same losses and weights at any world size and mesh, states that move between them, and faults."""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT
from ranks import launch
from safetensors.torch import load_file
from test_pretrain import SHORT, rows_of, same_run, tensors_of

import infra.run
import pretrain as module
from infra.checkpoint import list_states
from infra.distributed import init_distributed
from infra.files import UserError, sha256, write_json
from infra.metrics import read_metrics
from model import OLMo2

FLAGS = [*SHORT, "--horizon", "4096", "--micro-batch", "1", "--val-tokens", "64", "--sample", ""]


def ranks(world, out, steps=16, *flags, fault="", status=0):
    """A short run on so many ranks; what they printed. `status`: of all of them, or by rank."""
    statuses, log = launch(world, [*FLAGS, "--tokens", steps * 128, "--out", out, *flags], fault)
    assert statuses == (status if isinstance(status, list) else [status] * world), log
    return log


def weights_of(log):
    return re.search(r"weights (\w{12})", log)[1]


@pytest.fixture(scope="module")
def pair(workplace):
    """An undisturbed run on two ranks."""
    with contextlib.chdir(workplace):
        ranks(2, "runs/pair")
    return workplace / "runs/pair"


# ---- the same at any world size


def test_losses_and_initial_weights_are_those_of_one_process(here):
    runs = {"one": (1,), "two": (2,), "four": (4,), "2 x 2": (4, "--shard", "2")}
    losses, weights = {}, {}
    for name, (world, *flags) in runs.items():
        log = ranks(
            world, f"runs/{name}", 40, "--batch", "8", "--lr", "3e-3", *flags, fault="uneven_rows"
        )
        rows = [row for row in read_metrics(here / f"runs/{name}") if row["event"] == "step"]
        losses[name], weights[name] = np.array([row["loss"] for row in rows]), weights_of(log)
        assert name != "2 x 2" or "4 ranks, 2 to each copy of the weights" in log
    assert len(set(weights.values())) == 1 and len(losses["one"]) == 20
    for name in runs:
        assert np.abs(losses[name] / losses["one"] - 1).max() < 1e-6, name
    ranks(2, "runs/wrong", 40, "--batch", "8", "--lr", "3e-3", fault="mean_of_means")
    wrong = np.array(
        [row["loss"] for row in read_metrics(here / "runs/wrong") if row["event"] == "step"]
    )
    assert (
        np.abs(wrong[1:] / losses["one"][1:] - 1).min() > 1e-5
    )  # the bug that the test above must find


@pytest.mark.parametrize(
    "said, used",
    [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None)],
)
def test_segments_grow_unless_the_environment_says_something_else(said, used):
    code = "import torch, infra.distributed as d; d.let_segments_grow(); print(torch._C._accelerator_getAllocatorSettings())"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | said,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == (used or said["PYTORCH_ALLOC_CONF"]), out


@pytest.mark.parametrize("reshard", [True, False])
def test_embedding_blocks_and_head_are_gathered_and_reduced_apart(here, reshard):
    """So that a group travels while another one computes. The final norm is all the rest."""
    flags = ["--layers", "2", "--micro-batch", "2", "--reshard" if reshard else "--no-reshard"]
    log = ranks(2, f"runs/groups-{reshard}", 1, *flags, fault="show_collectives")
    sizes = {name: p.numel() for name, p in OLMo2.load(f"runs/groups-{reshard}").named_parameters()}
    block = sum(n for name, n in sizes.items() if name.startswith("model.layers.0."))
    norm, embedding = sizes["model.norm.weight"], sizes["model.embed_tokens.weight"]
    head = sizes["lm_head.weight"]
    seen = json.loads(re.search("collectives (.*)", log)[1])
    gathered = [n for kind, n in seen if kind == "gather"]
    reduced = [n for kind, n in seen if kind == "reduce"]
    # The backward gathers neither the head, which its forward has just had, nor the embedding.
    assert gathered == [norm, embedding, block, block, head] + 2 * reshard * [block]
    assert reduced[:3] == [head, block, block] and sorted(reduced[3:]) == [norm, embedding]


@pytest.mark.parametrize("norm, fault", [("rms", "bf16"), ("layernorm", "")])
def test_ranks_answer_with_sharded_weights(here, norm, fault):
    """Answers need the head's dtype before its forward. Without weights of norms, the last group is empty."""
    out = here / f"runs/answers-{norm}"
    flags = [flag for flag in FLAGS if flag not in ("--data", "tokens/embedded-laptop")]
    flags += ["--tokens", "128", "--questions", "4", "--norm", norm, "--out", out]
    statuses, log = launch(2, flags, fault)
    assert statuses == [0, 0], log
    assert [row["questions"] for row in read_metrics(out) if row["event"] == "questions"] == [4]


def test_one_rank_is_one_process_bit_for_bit(finished_alone, here):
    ranks(1, "runs/alone")
    same_run(finished_alone, here / "runs/alone")


@pytest.fixture(scope="module")
def finished_alone(workplace):
    with contextlib.chdir(workplace):
        module.main([*FLAGS, "--tokens", "2048", "--out", "runs/plain"])
    return workplace / "runs/plain"


def test_recomputation_accumulation_and_zero_2_change_nothing_but_memory(pair, here):
    first = read_metrics(pair)
    for name, flags in {
        "block": ["--recompute", "1"],
        "mlp": ["--recompute", "0.5", "--recompute-part", "mlp"],
        "zero2": ["--no-reshard"],
    }.items():
        ranks(2, f"runs/{name}", 4, *flags)
        assert [
            row["loss"] for row in read_metrics(here / f"runs/{name}") if row["event"] == "step"
        ] == [row["loss"] for row in first if row["event"] == "step"][:4], name


def test_bf16_computes_in_bf16_and_keeps_fp32(here):
    """The policy that CUDA gets, on this CPU."""
    ranks(2, "runs/bf16", 4, fault="bf16")
    ranks(2, "runs/fp32", 4)
    half, whole = (
        [row["loss"] for row in read_metrics(here / f"runs/{name}") if row["event"] == "step"]
        for name in ("bf16", "fp32")
    )
    assert half != whole and half == pytest.approx(whole, rel=5e-3)
    assert all(t.dtype == torch.float32 for t in tensors_of(here / "runs/bf16").values())


# ---- states


def test_a_state_moves_between_worlds_with_equal_checksums(pair, here):
    printed = set()
    for world, *flags in [(1,), (2,), (4,), (4, "--shard", "2")]:
        shutil.rmtree(here / "runs/moved", ignore_errors=True)
        shutil.copytree(pair, here / "runs/moved")
        log = ranks(world, "runs/moved", 16, *flags, fault="show_moments")
        printed.add((weights_of(log), re.search(r"moments (\w{12})", log)[1]))
        assert ("step16-tokens3K of 2 processes (" in log) == (world != 2)
    assert len(printed) == 1
    alone = {
        name.split("/", 1)[1]: t
        for name, t in tensors_of(pair).items()
        if name.startswith("model/")
    }
    assert (
        len({p.name for p in (list_states(pair)[0] / "model").glob("*")}) == 2 and alone
    )  # each rank wrote its own
    module.main(
        [*FLAGS, "--tokens", "3072", "--out", "runs/moved"]
    )  # and one plain process goes on with it
    assert read_metrics(here / "runs/moved")[-2]["step"] == 24


def test_resumed_at_the_same_world_size_as_if_never_stopped(pair, here):
    ranks(2, "runs/halves", 8)
    ranks(2, "runs/halves", 16)
    same_ranks(pair, here / "runs/halves")


def test_states_of_zero_2_have_all_moments(pair, here):
    """An evaluation gathers weights that --no-reshard keeps; the state after it must still be that of the shards."""
    ranks(2, "runs/zero2-states", 16, "--no-reshard")
    same_ranks(
        pair, here / "runs/zero2-states", age=1
    )  # evaluated and saved in the middle of the run
    shutil.rmtree(list_states(here / "runs/zero2-states")[0])
    ranks(2, "runs/zero2-states", 16, "--no-reshard")
    same_ranks(pair, here / "runs/zero2-states")


def same_ranks(one, two, age=0):
    """Equal rows, and equal shards of every rank in the newest state, or one `age` before it."""
    assert rows_of(one) == rows_of(two)
    one, two = list_states(one)[age], list_states(two)[age]
    files = {p.relative_to(one): p for p in one.rglob("*.safetensors")}
    assert len(files) == 4
    for name, path in files.items():
        a, b = load_file(path), load_file(two / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def test_hf_is_whole_and_the_weights_of_the_state(pair, here):
    whole = OLMo2.load(pair / "hf")
    state = OLMo2.load(list_states(pair)[0])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), state.parameters()))
    assert not list(pair.glob(".*"))


def test_hf_weights_load_into_shards(pair, here):
    log = ranks(2, "runs/more", 2, "--init", pair / "hf")
    first = next(row for row in read_metrics(here / "runs/more") if row["event"] == "step")
    assert first["loss"] < read_metrics(pair)[0]["loss"] - 0.2
    assert weights_of(log) == weights_of(ranks(1, "runs/more1", 2, "--init", pair))


def test_async_states_are_the_same_states(pair, here):
    ranks(2, "runs/async", 16, "--async-save")
    same_ranks(pair, here / "runs/async")
    same_ranks(pair, here / "runs/async", 1)  # training went on while this one was written
    log = ranks(2, "runs/async-full", 16, "--async-save", fault="full_disk", status=2)
    assert (
        log.count("error: could not save runs/async-full/step16") == 1 and "File too large" in log
    )
    assert [p.name for p in list_states(here / "runs/async-full")] == ["step8-tokens2K"]


def test_a_slow_disk_may_take_longer_than_a_slow_rank(here):
    ranks(2, "runs/slow", 8, "--timeout", "5", "--save-every", "8", fault="slow_disk")
    assert [path.name for path in list_states(here / "runs/slow")] == ["step8-tokens2K"]


def test_a_file_of_another_node_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    writer = threading.Timer(1.5, path.touch)
    writer.start()
    assert infra.run.appears(path)
    monkeypatch.setattr(infra.run, "PATIENCE", 0.5)
    assert not infra.run.appears(tmp_path / "never.json")


# ---- faults: nothing is lost but the steps since the last good state


@pytest.mark.parametrize(
    "fault, statuses",
    [
        ("killed_in_training", [1, -signal.SIGKILL]),
        ("killed_hashing", [1, -signal.SIGKILL]),
        ("killed_before_commit", [-signal.SIGKILL, 1]),
        ("full_disk", [2, 2]),
        ("terminated", [128 + signal.SIGTERM] * 2),
    ],
)
def test_fault_table(fault, statuses, pair, here):
    out = here / f"runs/{fault}"
    log = ranks(2, out, fault=fault, status=statuses)
    if fault == "terminated":  # all ranks stop at the same step, and say so
        assert log.count("stopped by SIGTERM at step 12, saved") == 1
        assert "SIGTERM at step 12" in json.loads((out / "run.json").read_text())["stopped"]
        assert list_states(out)[0].name == "step12-tokens2K"
    else:
        assert [p.name for p in list_states(out)] == ["step8-tokens2K"]
        assert "Traceback" not in log
        assert ("rank 0 lost the others" in log or "rank 1 lost the others" in log) == (
            -signal.SIGKILL in statuses
        )
        assert log.count("File too large") == (fault == "full_disk")
    ranks(2, out)
    assert "stopped" not in json.loads((out / "run.json").read_text()) and not list(out.glob(".*"))
    same_ranks(pair, out)


@pytest.mark.parametrize(
    "damage",
    [
        "bit flipped",
        "truncated",
        "missing",
        "stale shards of a larger world",
        "pickle",
        "pickle with a manifest",
    ],
)
def test_damaged_states_of_many_ranks(damage, pair, here, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(pair, out)
    newest = list_states(out)[0]
    shard = sorted((newest / "optim").glob("*"))[1]
    trap = pickle.dumps(Trap(str(tmp_path / "trapped")))
    if damage == "bit flipped":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 16
        shard.write_bytes(content)
    elif damage == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "missing":
        shard.unlink()
    elif damage == "stale shards of a larger world":
        shutil.copy(shard, shard.with_name("shard-00003-model-00001-of-00001.safetensors"))
    else:
        for path in (newest / ".metadata", newest / "model/.metadata", shard):
            path.write_bytes(trap)
        if damage == "pickle with a manifest":  # someone who can write can hash, too
            write_json(
                newest / "manifest.json",
                {
                    str(p.relative_to(newest)): {"bytes": p.stat().st_size, "sha256": sha256(p)}
                    for p in newest.rglob("*")
                    if p.is_file() and p.name != "manifest.json"
                },
            )
            log = ranks(2, out, status=2)
            assert log.count("error: a weights file in") == 1 and "is damaged" in log
    if damage != "pickle with a manifest":
        log = ranks(2, out)
        assert (
            log.count("step16-tokens3K is damaged") == 1 and "going on from step8-tokens2K" in log
        )
        same_ranks(pair, out)
    assert not (tmp_path / "trapped").exists()


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(here):
    ranks(2, "runs/nan", 8, fault="nan_on_one_rank")
    steps = [row for row in read_metrics(here / "runs/nan") if row["event"] == "step"]
    assert [row["step"] for row in steps if row["skipped"]] == [4, 6]
    state = tensors_of(here / "runs/nan")
    assert all(torch.isfinite(t).all() for t in state.values())
    assert {t.item() for name, t in state.items() if "/step." in name} == {6}


def test_a_spike_is_skipped(here):
    ranks(2, "runs/spike", 80, "--save-every", "80", "--eval-every", "80", fault="spike")
    steps = [row for row in read_metrics(here / "runs/spike") if row["event"] == "step"]
    assert (
        [row["step"] for row in steps if row["skipped"]] == [70]
        and steps[69]["loss"] > 1000
        and steps[79]["loss"] < 7
    )


# ---- start-up


@pytest.mark.parametrize(
    "world, flags, fault, words",
    [
        (
            2,
            [],
            "other_data",
            "the ranks differ: rank 1 on .* has data 000000000000, rank 0 on .* has ",
        ),
        (2, ["--shard", "1"], "other_weights", "the ranks differ: rank 1 on .* has weights"),
        (2, ["--timeout", "3"], "stuck", "rank 1 of 2 did not come within 3 s"),
        (
            2,
            ["--timeout", "3"],
            "headless",
            "rank 1: error: rank 1 of 2 did not reach rank 0 at 127.0.0.1",
        ),
        (
            2,
            ["--batch", "5"],
            "",
            "--batch 5 = 2.50 x 2 processes does not divide: use --batch 4 or 6",
        ),
        (
            2,
            ["--batch", "8", "--micro-batch", "3"],
            "",
            "--batch 8 = 1.33 x 2 processes x --micro-batch 3 does not divide: use --batch 6 or 12",
        ),
        (
            3,
            ["--batch", "6", "--shard", "2"],
            "",
            "3 processes = 1.50 x --shard 2 does not divide: use --shard 1 or 3",
        ),
        (2, ["--data", "nothing"], "", "nothing does not exist"),
        (2, ["--init", "nothing"], "", "nothing does not exist"),
        (2, ["--out", "/proc/nothing/run"], "", "cannot write to /proc/nothing/run"),
        (2, ["--data", "tokens/embedded-laptop/corpus.json"], "", "tokenise it first"),
    ],
)
def test_errors_are_said_once(world, flags, fault, words, here):
    statuses, log = launch(world, [*FLAGS, "--out", "runs/never", *flags], fault)
    assert 2 in statuses and all(s in (2, -signal.SIGALRM) for s in statuses), log
    assert (
        len(re.findall("error: ", log)) == 1 and re.search(words, log) and "Traceback" not in log
    ), log


# ---- torchrun itself

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_torchrun_restarts_a_job_whose_rank_died_twice(pair, here):
    out = subprocess.run(
        [
            *TORCHRUN,
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "2",
            f"--master-port={free_port()}",
            ROOT / "tests/ranks.py",
            "killed_twice",
            *FLAGS,
            "--tokens",
            "2048",
            "--out",
            "runs/restarted",
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("going on from step8-tokens2K") == 2
    same_ranks(pair, here / "runs/restarted")


def test_two_nodes(pair, here):
    """Two launchers that find each other on loopback, each with one rank."""
    command = [
        *TORCHRUN,
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{free_port()}",
        "--rdzv-id",
        "two",
        "--max-restarts",
        "1",
        "--local-addr",
        "127.0.0.1",
        ROOT / "pretrain.py",
        *FLAGS,
        "--tokens",
        "2048",
        "--out",
        "runs/nodes",
    ]
    nodes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("2 processes agree" in text for text in said) == 1
    same_ranks(pair, here / "runs/nodes")


def test_restarts_on_several_nodes_need_a_store_per_attempt(monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
    ):
        init_distributed("cpu", timeout=600)


def test_a_signal_to_torchrun_saves_once_and_says_so(pair, here):
    child = subprocess.Popen(
        [
            *TORCHRUN,
            "--nproc-per-node",
            "2",
            f"--master-port={free_port()}",
            "--signals-to-handle",
            "SIGTERM,SIGUSR1",
            ROOT / "pretrain.py",
            *FLAGS,
            "--tokens",
            "2048",
            "--log-every",
            "1",
            "--save-every",
            "1000",
            "--out",
            "runs/signalled",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    while "step  3/16" not in (line := child.stdout.readline()):
        assert line, child.stderr.read()
    child.send_signal(signal.SIGUSR1)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 1 and errors.count("stopped by SIGUSR1 at step") == 1, errors
    state = list_states(here / "runs/signalled")[0]
    assert (
        "stopped by SIGUSR1"
        in json.loads((here / "runs/signalled/run.json").read_text())["stopped"]
    )
    assert int(state.name[4:].split("-")[0]) < 16
    ranks(2, "runs/signalled")
    assert [r for r in rows_of(here / "runs/signalled") if r["event"] == "step"] == [
        r for r in rows_of(pair) if r["event"] == "step"
    ]
