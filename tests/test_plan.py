"""plan.py: exact where it counts, honest where it guesses."""

import dataclasses
import doctest
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fails

import anneal
import counting
import plan as module
import pretrain
from counting import COLLECTIVES, KINDS
from infra import checkpoint, gpus as gpu_table
from infra.checkpoint import state_bytes, state_tensors
from infra.distributed import peak_flops
from model import SIZES, OLMo2
from plan import EFFICIENCY, PUBLISHED, Plan, make_cluster, read_settings

GIB = 2**30


def planned(flags: str) -> Plan:
    c = read_settings(flags.split())
    return Plan(module.shape_of(c), c)


def printed(flags: str, capsys) -> str:
    module.main(flags.split())
    return capsys.readouterr().out


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
    always = "parameters", "optimizer moments", "gradients", "gathered weights", "activations"
    assert all(kind in out.stdout for kind in always)


def test_the_constants_come_from_the_1B_and_the_7B():
    """And no published speed needs a faster link than the plan has."""
    efficiency = {}
    for size in ("1B", "7B"):
        gpus, speed = PUBLISHED[size]
        plan = planned(f"--size {size} --gpus {gpus}")
        step, seconds = plan.step(), plan.c.batch * plan.c.seq_len / gpus / speed
        assert step["parameters"] == SIZES[size].parameters["total"]
        efficiency[size] = step["FLOPs"] / seconds / 989e12
        sent = sum(step[kind] for kind in COLLECTIVES)
        assert sent / seconds < plan.cluster.bus(plan.layout.shard)
    assert round((efficiency["1B"] + efficiency["7B"]) / 2, 2) == EFFICIENCY


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
    with counting.fake_cluster(c.gpus):
        counts = counting.count_micro_step(plan.micro_step.work)
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
        return OLMo2(shape)


def test_it_suggests_the_largest_micro_batch(capsys):
    def at(micro_batch, gib):
        plan = planned(
            f"--size 190M --gpus 4 --batch 64 --seq-len 4096 --micro-batch {micro_batch} --gpu-memory {gib} --compile no"
        )
        return plan.largest_micro_batch(), plan.memory(micro_batch, compiled=False).total()

    best, _ = at(1, 30)
    assert best in (2, 4, 8)  # of 16 rows
    assert at(best, 30)[1] <= 0.9 * 30 * GIB < at(2 * best, 30)[1]
    out = printed("--size 190M --gpus 4 --batch 64 --seq-len 4096 --gpu-memory 1", capsys)
    assert "fits      largest --micro-batch within 90% of 1 GiB: 0\n" in out
    assert "--micro-batch 1 --recompute 1 --recompute-part block --reshard --shard 0 takes" in out
    assert "GiB: take more GPUs" in out


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
        ("--gpu h1000", "--gpu h1000 is not known, did you mean H100?"),
        ("--gpu abacus", "--gpu abacus is not known: name one of H100, "),
        ("--stage grop", "--stage grop is not known, did you mean grpo?"),
        ("--stage anneal", "stage 2 (anneal.py) takes what pretrain takes"),
        ("--stage sft --gpus 3", "--batch 16 = 5.33 x 3 processes does not divide"),
        ("--stage grpo --prompts 7", "--prompts 7 = 3.50 x --minibatches 2 does not divide"),
        (
            "--stage sft --size 1B --max-length 5000",
            "--size 1B takes 4,096 tokens at most, and 5,000 are asked for",
        ),
        ("--stage grpo --size 1B --round 3", "--round 3: 1B has 2 of grpo"),
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
        "1,280 H100 in 160 nodes: 5 x the weights, each sharded over 256" in out
        and "per GPU 1 x 2 instances" in out
        and not os.path.exists("runs/32B")
    )


# ---- GPUs and their links


def test_a_gpu_is_one_line_for_mfu_and_plan(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda")) == gpu_table.GPUS["H100 PCIe"].peak < 989e12
    for gpu in gpu_table.GPUS.values():  # in the units of their fields
        assert 5e13 < gpu.peak < 3e15 and 20 < gpu.memory < 200 and 3e10 < gpu.link < 1e12
    a100, b200 = (planned(f"--size tiny --gpus 8 --gpu {name}") for name in ("A100", "B200"))
    ratio = a100.seconds(a100.step())[0] / b200.seconds(b200.step())[0]
    assert ratio == pytest.approx(2250 / 312)  # compute
    assert b200.cluster.memory > 2 * a100.cluster.memory
    assert planned("--gpu A100 --gpu-memory 40").cluster.memory == pytest.approx(0.9 * 40 * GIB)


def test_a_node_pays_no_price_for_what_lies_across():
    """Shards in a node: a slow network between the nodes slows the sums over replicas alone."""
    small = "--size tiny --batch 64 --micro-batch 1"

    def seconds(plan, step, flags):
        plan.cluster = make_cluster(read_settings(flags.split()))
        return plan.seconds(step)[1]

    plan = planned(f"{small} --gpus 16 --shard 8")
    step = plan.step()
    fast = seconds(plan, step, "--gpus 16")
    slow = seconds(plan, step, "--gpus 16 --bus-across 10")
    sums = 8 * step["all-reduce"]  # each GPU of the node has its own group, and its own card
    assert step["all-reduce"] > 0
    assert slow - fast == pytest.approx(sums / 10e9 - sums / 320e9)
    in_fours = seconds(plan, step, "--gpus 16 --gpus-per-node 4 --bus-across 10")
    assert in_fours > 2 * slow  # now the shards lie on two nodes

    plan = planned(f"{small} --gpus 8")
    step = plan.step()
    node = seconds(plan, step, "--gpus 8")
    assert seconds(plan, step, "--gpus 8 --bus-across 10") == node
    assert seconds(plan, step, "--gpus 8 --bus-inside 180") == pytest.approx(2 * node)
    assert seconds(plan, step, "--gpus 8 --gpus-per-node 4 --bus-across 10") > 10 * node


@pytest.mark.parametrize(
    "ranks, stride, speed",
    [
        (8, 1, 360),  # a node
        (2, 4, 360),
        (16, 1, 320),  # two nodes, with all their cards
        (2, 8, 40),  # one GPU of each node: its own card
        (4, 4, 80),  # two GPUs of each node
        (6, 1, 320),  # the second such group lies on two nodes
    ],
)
def test_links(ranks, stride, speed):
    cluster = make_cluster(read_settings(["--gpus", "48"]))
    assert cluster.bus(ranks, stride) == pytest.approx(speed * 1e9)


def test_a_node_of_h100s_is_not_held_up_by_its_links(capsys):
    out = printed("--size 7B --gpus 8 --micro-batch 1 --shard 8 --recompute 0", capsys)
    speed = int(out.split("speed     ")[1].split(" tokens")[0].replace(",", ""))
    assert 9_000 < speed < 11_000 and "if the network is faster" not in out


def test_one_gpu_keeps_a_copy_of_the_weights_in_bf16():
    memory = planned("--size 190M --gpus 1 --batch 8 --no-reshard").memory(8, compiled=True)
    assert memory["gathered weights"] == pytest.approx(2 * SIZES["190M"].parameters["total"])


# ---- What a run leaves and takes


def test_disk_host_and_days(capsys):
    plan = planned("--size 190M --gpus 16 --shard 8 --save-every 700 --keep 0")
    network = meta(SIZES["190M"])
    groups = torch.optim.AdamW(network.parameters())
    for p in network.parameters():
        moments = {"exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
        groups.state[p] = {"step": torch.zeros(()), **moments}
    state = state_bytes(state_tensors(network, groups))  # as run.announce_states counts it
    assert plan.step()["state"] == pytest.approx(state, rel=1e-9)
    steps = pretrain.number_of_steps(plan.c)
    seconds = max(plan.seconds(plan.step()))
    kept = -(-steps // 700)
    weights = 4 * SIZES["190M"].parameters["total"]
    module.report_run(plan, state, seconds)
    out = capsys.readouterr().out
    assert f"{steps:,} steps: {steps * seconds / 86_400:,.1f} days" in out
    assert f"{steps * seconds * 16 / 3600:,.0f} GPU hours" in out
    assert (
        f"{(kept * state + weights) / 1e9:,.1f} GB: {kept} states of {state / 1e9:,.1f} GB" in out
    )
    plan.c = dataclasses.replace(plan.c, keep=2)
    module.report_run(plan, state, seconds)
    assert (
        f": 2 states of {state / 1e9:,.1f} GB (--save-every 700 --keep 2)"
        in capsys.readouterr().out
    )
    saved = module.host_bytes(plan, state)
    assert saved == pytest.approx(4 * weights)  # moments, twice, of a node that is a replica
    plan.layout = dataclasses.replace(plan.layout, shard=4)
    assert module.host_bytes(plan, state) == pytest.approx(saved)  # the other half has no more
    plan.layout = dataclasses.replace(plan.layout, shard=16)
    assert module.host_bytes(plan, state) == pytest.approx(saved / 2)
    plan.c = dataclasses.replace(plan.c, async_save=True)
    assert module.host_bytes(plan, state) == pytest.approx((saved + state) / 2)


# ---- Post-training


@pytest.mark.parametrize(
    "stage, models", [("sft", 1), ("dpo", 1), ("rm", 1), ("grpo", 1), ("ppo", 2)]
)
def test_what_each_stage_trains(stage, models):
    """Weights, moments, gradients of each model; a frozen reference for GRPO and PPO, in bf16."""
    plan = planned(f"--stage {stage} --size 190M --gpus 8 --micro-tokens 1")
    memory = plan.memory(1, compiled=False)
    shape = SIZES["190M"]
    heads = counting.HEADS.get(stage, ("lm",))
    n = sum(dataclasses.replace(shape, head=head).parameters["total"] for head in heads)
    assert len(heads) == models
    assert plan.step()["state"] == pytest.approx(12 * n, rel=1e-5)
    assert memory["parameters"] == pytest.approx(4 * n / 8, rel=0.01)
    assert memory["optimizer moments"] == pytest.approx(8 * n / 8, rel=0.01)
    frozen = 2 * shape.parameters["total"] / 8 if stage in ("grpo", "ppo") else 0
    assert memory["reference"] == pytest.approx(frozen, rel=0.01)
    twice = plan.memory(2, compiled=False)
    assert twice["activations"] > 1.5 * memory["activations"] > 0


@pytest.mark.parametrize("stage, words", [("grpo", "answers per prompt"), ("dpo", "pairs per")])
def test_help_of_a_stage_explains_its_flags_and_the_cluster(stage, words, capsys):
    with pytest.raises(SystemExit) as exit:
        module.main(f"--stage {stage} --size 1B --help".split())
    shown = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and words in shown and "GPUs that share a node" in shown


def test_pairs_are_two_sequences():
    pairs = planned("--stage dpo --size 190M --gpus 8 --micro-tokens 1 --recompute 0")
    grpo = planned(
        "--stage grpo --size 190M --gpus 8 --micro-tokens 4096 --recompute 0"
        " --prompt-length 1024 --response-length 1024"
    )
    assert pairs.length == grpo.length == 2048
    of_pair, of_two = pairs.memory(1, compiled=False), grpo.memory(2, compiled=False)
    assert of_pair["activations"] == pytest.approx(of_two["activations"])


def test_the_published_RLVR_on_GPUs_of_80_GB(capsys):
    """Whole weights fit where what is trained leaves room for them and for one answer."""
    for size, stage, gpus, whole in [
        ("13B", "ppo", 8, False),
        ("32B", "grpo", 32, False),
        ("32B", "grpo", 64, True),
    ]:
        plan = planned(f"--stage {stage} --size {size} --gpus {gpus}")
        sampling = plan.sampling()
        assert bool(sampling.copy) == whole, (size, gpus)
        needed = sampling.resident.total() + SIZES[size].sampling_bytes(4096)
        assert (needed <= plan.cluster.memory) == whole
        assert sampling.memory.total() <= plan.cluster.memory
        module.report_sampling(plan)
        out = capsys.readouterr().out
        assert ("over the shards, which is slow" in out) != whole
        answers = -(-plan.c.prompts * plan.c.samples // gpus)
        assert f"of a GPU's {answers} answers at a time" in out and "(--rollouts)" in out


def test_servers_take_nothing_here():
    c = read_settings("--stage grpo --size 1B --gpus 8".split())
    object.__setattr__(c, "rollouts", "http://localhost:8000")
    assert Plan(SIZES["1B"], c).sampling() is None


def test_pairs_of_preferences_are_only_sampled(capsys):
    out = printed("--stage prefs --size 7B --gpus 8", capsys)
    frozen = 2 * SIZES["7B"].parameters["total"] / 8 / GIB
    assert f"parameters          {frozen:8.2f} GiB" in out and "gradients" not in out
    assert "whole weights on each GPU" in out and "speed" not in out


def test_docstrings():
    for tested in (module, counting, gpu_table, checkpoint):
        assert doctest.testmod(tested).failed == 0
