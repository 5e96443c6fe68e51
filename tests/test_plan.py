"""plan.py: exact where it counts, honest where it guesses."""

import dataclasses
import doctest
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fails
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

import anneal
import plan as module
import pretrain
from model import SIZES, ChunkedLoss
from plan import BUS, COLLECTIVES, EFFICIENCY, KINDS, PUBLISHED, Plan, read_settings


@pytest.mark.parametrize("size, parameters", [("13B", "13,716,198,400"), ("32B", "32,234,279,936")])
def test_released_sizes(size, parameters):
    """Each in a process of its own, below 2 GiB; the layout is the recipe's."""
    gpus, speed = PUBLISHED[size]
    peak = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            peak,
            sys.executable,
            ROOT / "plan.py",
            "--size",
            size,
            "--gpus",
            str(gpus),
        ],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and int(out.stderr) < 2 * 2**20, out.stderr
    assert (
        f"{size}: {parameters} parameters" in out.stdout
        and f"published {speed:,} tokens/s/GPU: the plan is" in out.stdout
    )
    assert all(kind in out.stdout for kind in KINDS)


def test_the_constants_come_from_the_1B_and_the_7B():
    implied = {}
    for size in ("1B", "7B"):
        gpus, speed = PUBLISHED[size]
        c = read_settings(["--size", size, "--gpus", str(gpus)])
        step, seconds = Plan(SIZES[size], c).step(), c.batch * c.seq_len / gpus / speed
        assert step["parameters"] == SIZES[size].parameters["total"]
        implied[size] = (
            step["FLOPs"] / seconds / 989e12,
            sum(step[kind] for kind in COLLECTIVES) / seconds,
        )
    assert round((implied["1B"][0] + implied["7B"][0]) / 2, 2) == EFFICIENCY
    assert max(bus for _, bus in implied.values()) == pytest.approx(BUS, rel=0.005)


@pytest.mark.parametrize(
    "flags",
    [
        "--gpus 16",
        "--gpus 16 --shard 4 --recompute 0.5",
        "--gpus 8 --recompute 1 --recompute-part mlp --no-reshard --batch 32",
    ],
)
def test_straight_lines_meet_the_whole_model(flags):
    """9 blocks continued from the shallow depths, and 9 blocks counted: the same bytes and FLOPs."""
    shape = dataclasses.replace(SIZES["190M"], layers=8 if "0.5" in flags else 9)
    c = read_settings(f"--size 190M --batch 64 --micro-batch 2 {flags}".split())
    plan = Plan(shape, c)
    step, memory = plan.step(), plan.memory(plan.layout.micro_batch, compiled=False)
    rows, micro_batch = plan.layout.rows, plan.layout.micro_batch
    chunk, ChunkedLoss.CHUNK["cpu"] = ChunkedLoss.CHUNK["cpu"], ChunkedLoss.CHUNK["cuda"]
    distributed.init_process_group("fake", rank=0, world_size=c.gpus, store=FakeStore())
    try:
        counts = module.count_micro_step(shape, c, plan.layout)
    finally:
        distributed.destroy_process_group()
        ChunkedLoss.CHUNK["cpu"] = chunk
    whole = max(
        ({kind: counts[phase, kind] for kind in KINDS} for phase in ("forward", "backward")),
        key=lambda kinds: sum(kinds.values()),
    )
    assert (
        step["parameters"]
        == counts["parameters"]
        == sum(p.numel() for p in meta(shape).parameters())
    )
    assert memory == pytest.approx(whole, rel=1e-3, abs=2**20)
    assert step["FLOPs"] == pytest.approx(counts["FLOPs"] * rows // micro_batch)
    if c.recompute == 0:  # what is computed is the formula of MFU, with causal attention
        full = shape.flops_per_token(c.seq_len) - 6 * shape.layers * shape.d_model * c.seq_len
        assert step["FLOPs"] == pytest.approx(rows * c.seq_len * full, rel=1e-3)
        n = sum(p.numel() for p in meta(shape).parameters())
        assert step["reduce-scatter"] == pytest.approx(
            rows // micro_batch * 4 * n * 15 / 16, rel=0.01
        )  # fp32, all but one's own
        assert memory["parameters"] == pytest.approx(4 * n / 16, rel=0.01)
        assert memory["optimizer moments"] == pytest.approx(8 * n / 16, rel=0.01)


def meta(shape):
    with torch.device("meta"):
        return module.OLMo2(shape)


def test_it_suggests_the_largest_micro_batch(capsys):
    def planned(micro_batch, gib):
        c = read_settings(
            f"--size 190M --gpus 4 --batch 64 --seq-len 4096 --micro-batch {micro_batch} --gpu-memory {gib} --compile no".split()
        )
        plan = Plan(SIZES["190M"], c)
        return plan.largest_micro_batch(), plan.memory(micro_batch, compiled=False).total()

    best, _ = planned(1, 30)
    assert best in (2, 4, 8)  # of 16 rows
    assert planned(best, 30)[1] <= 0.9 * 30 * 2**30 < planned(2 * best, 30)[1]
    module.main("--size 190M --gpus 4 --batch 64 --seq-len 4096 --gpu-memory 1".split())
    assert (
        "fits      largest micro-batch within 90% of 1 GiB: 0 instances\n          --micro-batch 1 --recompute 1 --recompute-part block --reshard --shard 0 takes"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            "--size 32B --gpus 1280",
            "--batch 2048 = 1.60 x 1280 processes does not divide: use --batch 1280 or 2560",
        ),
        (
            "--size 32B --gpus 960 --batch 1920",
            "960 processes = 3.75 x --shard 256 does not divide: use --shard 240 or 320",
        ),
        ("--gpus 0", "--gpus 0 must be at least 1"),
        ("--recompute 1.5", "--recompute 1.5 must be from 0 to 1"),
    ],
)
def test_bad_plans(flags, words, capsys):
    assert words in fails(module.main, flags.split(), capsys)


def test_training_scripts_name_the_command_to_type(capsys):
    assert "python plan.py --size 7B --gpus 64" in fails(
        pretrain.main, "--size 7B --gpus 64 --plan".split(), capsys
    )
    assert "python plan.py --size 7B --gpus 64" in fails(
        anneal.main, "--size 7B --plan --gpus 64".split(), capsys
    )
    with pytest.raises(SystemExit) as exit:  # --gpus is no flag of a training script
        pretrain.main(["--gpus", "8"])
    assert exit.value.code == 2


def test_it_works_for_2560_rows_over_1280_gpus(capsys):
    module.main("--size 32B --gpus 1280 --batch 2560".split())
    out = capsys.readouterr().out
    assert (
        "1,280 H100: 5 x the weights, each sharded over 256" in out
        and "per GPU 1 x 2 instances" in out
        and not os.path.exists("runs/32B")
    )


def test_docstrings():
    assert doctest.testmod(module).failed == 0
