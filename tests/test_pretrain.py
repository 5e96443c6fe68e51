"""pretrain.py: its schedule against the published rates, its states against damage, its runs against interruption."""

import contextlib
import doctest
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kill
import numpy as np
import pytest
import torch
from conftest import ROOT, fails
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import pretrain as module
import sample
from data import get_tokenizer
from infra.checkpoint import list_states, newest_state, verify_state
from infra.metrics import read_metrics
from model import SIZES, OLMo2
from pretrain import Config, SkipStep, check, lr_at, read_settings
from recipes import PRETRAIN

SHORT = "--seq-len 32 --batch 4 --threads 1 --save-every 8 --eval-every 8 --val-tokens 512 --log-every 4 --warmup 512 --data tokens/embedded-laptop".split()


def run(out, steps=16, *flags):
    """A short run through the command's own main; its folder."""
    module.main(
        [
            *SHORT,
            "--tokens",
            str(steps * 128),
            "--horizon",
            "4096",
            "--out",
            str(out),
            *map(str, flags),
        ]
    )
    return out


def rows_of(folder):
    return [
        {k: v for k, v in row.items() if k not in kill.TIME_FIELDS} for row in read_metrics(folder)
    ]


def tensors_of(folder):
    state = list_states(folder)[0]
    return {
        f"{part}/{name}": tensor
        for part in ("model", "optim")
        for path in (state / part).glob("*")
        for name, tensor in load_file(path).items()
    }


def same_run(one, two):
    a, b = tensors_of(one), tensors_of(two)
    assert rows_of(one) == rows_of(two)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- recipes and rules


@pytest.mark.parametrize(
    "size, steps, last_lr",
    [
        ("1B", 1_907_359, 7.4487e-5),
        ("7B", 928_646, 6.1351e-5),
        ("13B", 596_057, 9.0e-5),
        ("32B", 721_901, 6.6232e-5),
    ],
)
def test_recipes_end_at_the_published_step_and_rate(size, steps, last_lr):
    c, origin = read_settings(["--size", size, "--data", "x.npy"])
    check(c)
    assert c.tokens == steps * c.batch * c.seq_len and c.batch * c.seq_len == {
        "1B": 2_097_152,
        "7B": 4_194_304,
    }.get(size, 8_388_608)
    assert lr_at(c.tokens, c) == pytest.approx(last_lr, rel=1e-4)
    assert lr_at(c.warmup, c) == pytest.approx(c.lr) and lr_at(
        c.batch * c.seq_len, c
    ) == pytest.approx(c.lr * c.batch * c.seq_len / c.warmup)
    assert lr_at(2 * c.horizon, c) == pytest.approx(0.1 * c.lr)
    assert (
        origin["lr"] == ("default" if "lr" not in PRETRAIN[size] else f"recipe {size}")
        and origin["data"] == "flag"
        and origin["clip"] == "default"
    )
    # What ran: the code of 1B to 13B never read the 1e-5 of the yamls; the 32B's order is of pairs.
    assert (c.z_loss, c.chunk) == ((1e-5, 2) if size == "32B" else (1e-4, 1))
    if (
        size == "7B"
    ):  # the published start of its anneal is the rate at the last multiple of 1,000 steps
        assert lr_at(928_000 * 4_194_304, c) == pytest.approx(6.1499e-5, rel=1e-4)


def test_every_size_has_a_recipe_and_a_model():
    assert PRETRAIN.keys() == SIZES.keys()
    for size in SIZES:
        check(read_settings(["--size", size, "--data", "x.npy"])[0])


def test_weights_decay_but_for_the_input_embedding():
    network = OLMo2(SIZES["tiny"])
    groups = module.make_optimizer(network, Config()).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [
        (0.0, 1),
        (0.1, 3 + 4 * 11 - 1),
    ]
    assert groups[0]["params"][0] is network.model.embed_tokens.weight


def test_skip_step_decides_as_olmo_core_and_survives_nan():
    from olmo_core.optim import SkipStepAdamW

    rng = np.random.default_rng(0)
    theirs = SkipStepAdamW([torch.nn.Parameter(torch.zeros(2))])
    ours, skipped = SkipStep(6.0), 0
    for step in range(600):
        loss, norm = 3 + 0.1 * rng.standard_normal(), 1 + 0.05 * rng.standard_normal()
        if step % 37 == 5:
            loss += rng.choice([0.3, 0.8, 5])
        if step % 41 == 7:
            norm += rng.choice([0.2, 0.5, 50])
        theirs.latest_loss, theirs.latest_grad_norm = torch.tensor(loss), torch.tensor(norm)
        verdict = ours(loss, norm)
        assert verdict == bool(theirs.get_step_factor()), step
        skipped += not verdict
    assert 5 < skipped < 60
    before = list(ours.history)
    for bad in (math.nan, math.inf, -math.inf):
        assert not ours(bad, 1.0) and not ours(3.0, bad)
    assert list(ours.history) == before and ours(3.0, 1.0)  # upstream would skip the next 128 steps


# ---- a run, as a user sees it


@pytest.fixture(scope="module")
def finished(workplace):
    """One short run, killed by nothing."""
    with contextlib.chdir(workplace):
        return run(workplace / "runs/finished", 16)


def test_a_run_leaves_what_it_promises(finished, here):
    settings = json.loads((finished / "run.json").read_text())
    assert (
        settings["config"]["seq_len"] == {"value": 32, "from": "flag"}
        and settings["config"]["lr"]["from"] == "recipe tiny"
    )
    assert (
        settings["versions"]["torch"] == torch.__version__
        and settings["hardware"]["threads"] == 1
        and len(settings["data"]["hash"]) == 12
    )
    rows = read_metrics(finished)
    steps = [row for row in rows if row["event"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 17)) and steps[-1]["tokens"] == 16 * 128
    assert {
        "loss",
        "z_loss",
        "lr",
        "grad_norm",
        "skipped",
        "tokens_per_s",
        "mfu",
        "seconds",
    } < steps[0].keys()
    assert (
        steps[0]["loss"] == pytest.approx(math.log(1024), rel=0.05)
        and steps[-1]["loss"] < steps[0]["loss"] - 0.5
    )
    assert steps[3]["lr"] == pytest.approx(1e-2) and steps[0]["lr"] == pytest.approx(2.5e-3)
    evals = [row for row in rows if row["event"] == "eval"]
    assert [row["step"] for row in evals] == [8, 16] and set(evals[0]["bpb"]) == {
        "docs",
        "code",
        "math",
        "qa",
    }
    assert (finished / "curves.png").stat().st_size > 10_000
    assert [p.name for p in list_states(finished)] == ["step16-tokens3K", "step8-tokens2K"]
    for folder in list_states(finished):
        assert verify_state(folder) is None
        for path in folder.glob("*/*"):  # a header of JSON behind its length, not a pickle in a zip
            assert path.suffix == ".safetensors" and path.read_bytes()[8:9] == b"{"
        assert {k.split(".")[0] for k in load_file(next((folder / "optim").glob("*")))} == {
            "step",
            "exp_avg",
            "exp_avg_sq",
        }


def test_what_it_wrote_opens_everywhere(finished, here, capsys):
    ours = OLMo2.load(finished)
    tokens = torch.randint(0, 1000, (1, 20))
    theirs = AutoModelForCausalLM.from_pretrained(finished / "hf", dtype=torch.float32)
    assert type(theirs).__name__ == "Olmo2ForCausalLM"
    assert ((ours(tokens) - theirs(tokens).logits).norm() / ours(tokens).norm()).item() < 1e-5
    assert AutoTokenizer.from_pretrained(finished / "hf")("def f():")["input_ids"] == get_tokenizer(
        finished
    ).encode("def f():")
    checkpoint = OLMo2.load(list_states(finished)[0])
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), checkpoint.parameters()))
    assert not torch.equal(OLMo2.load(list_states(finished)[1]).lm_head.weight, ours.lm_head.weight)
    for path in (finished, finished / "hf", list_states(finished)[0]):
        sample.main([str(path), "def ", "--max-new-tokens", "12", "--temperature", "0"])
    texts = capsys.readouterr().out.splitlines()
    assert texts[0].startswith("def ") and len(set(texts[: len(texts) // 3])) == len(set(texts)) > 0


def test_the_same_command_again_finds_it_finished(finished, here, tmp_path, capsys):
    finished = shutil.copytree(finished, tmp_path / "run")
    before = rows_of(finished)
    run(finished, 16)
    assert "was finished already" in capsys.readouterr().out and rows_of(finished) == before
    shutil.rmtree(finished / "hf")
    from_state = OLMo2.load(finished)  # without hf/, a run's newest state serves
    run(finished, 16)  # and hf/ is made again
    assert torch.equal(OLMo2.load(finished / "hf").lm_head.weight, from_state.lm_head.weight)
    line = fails(
        module.main,
        [
            *SHORT,
            "--tokens",
            "2048",
            "--horizon",
            "4096",
            "--out",
            str(finished),
            "--lr",
            "0.1",
            "--seed",
            "7",
        ],
        capsys,
    )
    assert "lr 0.01 -> 0.1" in line and "seed 6198 -> 7" in line and "--out" in line
    assert rows_of(finished) == before


def test_same_seed_same_bits_and_resumed_as_if_never_stopped(finished, here):
    again = run(here / "runs/again", 8)  # stops half-way
    longer = run(again, 16)  # and goes on
    same_run(finished, longer)


def test_accumulation_changes_nothing_but_the_last_bits(here, monkeypatch):
    filtered = (
        module.TokenData.batch
    )  # two rows of four without targets: a mean of means would show

    def batch(self, step, rows, *args, **kwargs):
        tokens, targets = filtered(self, step, rows, *args, **kwargs)
        targets[step % 4] = -100
        targets[(step + 1) % 4, 5:] = -100
        return tokens, targets

    monkeypatch.setattr(module.TokenData, "batch", batch)
    whole, parts = run(here / "runs/whole", 6), run(here / "runs/parts", 6, "--micro-batch", 1)
    losses = [
        [row["loss"] for row in read_metrics(folder) if row["event"] == "step"]
        for folder in (whole, parts)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6) and losses[0] != losses[1]


def test_a_batch_goes_to_the_device_in_one_piece():
    class Copies(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.made += function is torch.ops.aten._to_copy.default
            return function(*args, **(kwargs or {}))

    tokens, targets = torch.arange(40).view(10, 4), torch.arange(40, 80).view(10, 4)
    with Copies() as copies:
        there = list(module.micro_batches(tokens, targets, 4, torch.device("meta")))
    assert copies.made == 1
    assert [(x.shape[0], y.device.type, last) for x, y, last in there] == [
        (4, "meta", False),
        (4, "meta", False),
        (2, "meta", True),
    ]
    here = list(module.micro_batches(tokens, targets, 4, torch.device("cpu")))
    assert torch.equal(torch.cat([x for x, _, _ in here]), tokens)
    assert torch.equal(torch.cat([y for _, y, _ in here]), targets)


def test_filtered_instances_count_in_the_denominator(here, monkeypatch):
    """As upstream: a token with a zero loss is a token. So the losses of two halves add up."""
    whole = module.TokenData.batch
    losses = []
    for filtered in ([], [0], [1, 2, 3]):

        def batch(self, step, rows, *args, **kwargs):
            tokens, targets = whole(self, step, rows, *args, **kwargs)
            targets[filtered] = -100
            return tokens, targets

        monkeypatch.setattr(module.TokenData, "batch", batch)
        folder = run(here / f"runs/filtered-{len(filtered)}", 1)
        losses.append(next(r["loss"] for r in read_metrics(folder) if r["event"] == "step"))
    assert losses[1] + losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_a_setting_that_is_younger_than_the_run_had_its_default(finished, here, capsys):
    again = here / "runs/older"
    shutil.copytree(finished, again)
    record = json.loads((again / "run.json").read_text())
    del record["config"]["chunk"]
    (again / "run.json").write_text(json.dumps(record))
    arguments = [*SHORT, "--tokens", "2176", "--horizon", "4096", "--out", str(again)]
    refused = fails(module.main, [*arguments, "--chunk", "2"], capsys)
    assert "was started with other settings (chunk 1 -> 2)" in refused
    run(again, 17)


def test_starts_from_the_weights_of_another_run(finished, here, tmp_path, capsys):
    again = run(tmp_path / "more", 2, "--init", finished)
    before, first = (
        next(row for row in read_metrics(again) if row["event"] == event)
        for event in ("eval", "step")
    )
    assert (
        before["step"] == 0
        and before["bpb"]
        == [row for row in read_metrics(finished) if row["event"] == "eval"][-1]["bpb"]
    )
    assert first["loss"] < read_metrics(finished)[0]["loss"] - 0.2
    network = OLMo2.load(finished)
    network.save(tmp_path / "other")
    other = get_tokenizer("laptop")
    type(other)("other", other.ranks, other.pattern, {"<|endoftext|>": 1001, "<|pad|>": 1000}).save(
        tmp_path / "other"
    )
    flags = [*SHORT, "--init", str(tmp_path / "other"), "--out", str(tmp_path / "x")]
    refused = fails(module.main, [*flags, "--tokenizer", "laptop"], capsys)
    assert "another tokenizer than laptop: leave out --tokenizer, and make data with its" in refused
    # Without the flag the tokenizer is that of the weights, and the data are what does not fit.
    refused = fails(module.main, flags, capsys)
    assert "made with the tokenizer 'laptop', the model has 'other': tokenise the text" in refused


# ---- interruption and damage


@pytest.mark.parametrize("flags", [["--kills", "6"], ["--kills", "3", "--ranks", "2"]])
def test_kills_do_not_show(flags, tmp_path):
    """In a process of its own, whose children are forked before any thread is started."""
    out = subprocess.run(
        [sys.executable, ROOT / "tests/kill.py", *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert out.returncode == 0 and "as if it had never been killed" in out.stdout, out.stderr[
        -3000:
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, finished, here, sigint, tmp_path):
    command = [
        sys.executable,
        ROOT / "pretrain.py",
        *SHORT,
        "--tokens",
        str(16 * 128),
        "--horizon",
        "4096",
        "--out",
        tmp_path / "run",
    ]
    child = subprocess.Popen(
        [*command, "--save-every", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "step  4/16" not in child.stdout.readline():
        assert child.poll() is None, child.stderr.read()
    child.send_signal(number)
    _, errors = child.communicate()
    if "stopped by" in errors:  # else it was faster than the signal
        assert child.returncode == 128 + number and f"stopped by {number.name}" in errors
        assert (
            int(json.loads((list_states(tmp_path / "run")[0] / "state.json").read_text())["step"])
            < 16
        )
    run(tmp_path / "run", 16)
    a, b = tensors_of(finished), tensors_of(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_has_one_writer(finished, here, tmp_path, capsys):
    finished = shutil.copytree(finished, tmp_path / "run")
    command = [
        sys.executable,
        "-c",
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from infra.run import run_lock\n"
        f"with run_lock(Path({str(finished)!r})): print('writing', flush=True); time.sleep(60)",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "writing\n"
        assert "another process is writing to" in fails(
            module.main,
            [*SHORT, "--tokens", "2048", "--horizon", "4096", "--out", str(finished)],
            capsys,
        )
        child.kill()  # and dead it does not stand in the way
        child.wait()
        run(finished, 16)


@pytest.mark.parametrize(
    "damage",
    [
        "bit flipped",
        "file truncated",
        "file missing",
        "file too many",
        "manifest cut",
        "manifest missing",
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_is_used(
    damage, finished, here, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "run")
    newest = list_states(tmp_path / "run")[0]
    weights = next((newest / "model").glob("*"))
    if damage == "bit flipped":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "file truncated":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "file missing":
        (newest / "state.json").unlink()
    elif damage == "file too many":
        shutil.copy(weights, newest / "model" / "shard-00002-model-00001-of-00001.safetensors")
    elif damage == "manifest cut":
        os.truncate(newest / "manifest.json", 100)
    else:
        (newest / "manifest.json").unlink()
    assert newest_state(tmp_path / "run").name == "step8-tokens2K"
    assert "step16-tokens3K is damaged" in capsys.readouterr().err
    same_run(finished, run(tmp_path / "run", 16))  # trained again from step 8, to the same bits


def test_a_full_disk_loses_nothing(finished, here, tmp_path):
    """The disk is full for real: the kernel refuses to let a file grow beyond a limit."""
    folder = tmp_path / "run"
    run(folder, 8)
    command = [
        sys.executable,
        "-c",
        f"import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import sys; sys.path.insert(0, {str(ROOT)!r}); import pretrain; pretrain.run_cli(pretrain.main)",
        *SHORT,
        "--tokens",
        str(16 * 128),
        "--horizon",
        "4096",
        "--out",
        str(folder),
    ]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 2, out.stderr
    line = out.stderr.strip().splitlines()[-1]
    assert line.startswith("error: could not save") and "File too large" in line
    assert [p.name for p in list_states(folder)] == ["step8-tokens2K"] and not list(
        folder.glob(".saving*")
    )
    same_run(finished, run(folder, 16))


def test_leftovers_of_a_death_while_saving_are_cleared(finished, here, tmp_path):
    run(tmp_path / "run", 8)
    shutil.copytree(list_states(tmp_path / "run")[0], tmp_path / "run/.saving-step16-tokens3K")
    with open(tmp_path / "run/metrics.jsonl", "a") as metrics:
        metrics.write('{"event": "step", "step": 9, "lo')  # cut in the middle of a row
    same_run(finished, run(tmp_path / "run", 16))
    assert not list((tmp_path / "run").glob(".saving*"))


def test_non_finite_steps_are_skipped_and_an_endless_row_of_them_ends_the_run(
    here, tmp_path, monkeypatch, capsys
):
    real = OLMo2.loss
    calls = []

    def loss(self, *args):
        """The real loss, with one weight broken while it is computed."""
        calls.append(1)
        weight = self.lm_head.weight.data
        before = weight[5, 5].clone()
        weight[5, 5] = (
            {3: math.nan, 5: 3e38}.get(len(calls), before) if len(calls) < 9 else math.nan
        )
        result = real(self, *args)
        weight[5, 5] = before
        return result

    monkeypatch.setattr(OLMo2, "loss", loss)
    monkeypatch.setattr(module, "bits_per_byte_by_source", lambda *args: {})
    folder = run(tmp_path / "run", 8)
    steps = [row for row in read_metrics(folder) if row["event"] == "step"]
    assert [row["step"] for row in steps if row["skipped"]] == [3, 5] and steps[2]["loss"] is None
    assert all(torch.isfinite(t).all() for t in tensors_of(folder).values())
    assert (
        next(v for k, v in tensors_of(folder).items() if "optim/step" in k).item() == 6
    )  # Adam did not advance
    line = fails(
        module.main, [*SHORT, "--tokens", "128000", "--out", str(tmp_path / "nan")], capsys
    )
    assert "20 steps in a row were skipped, up to step 20" in line and "lower --lr" in line


# ---- bad input: one clear line, exit status 2


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--size 7b", "unknown size '7b', did you mean 7B?"),
        ("--size=2B", "sizes are tiny, 14M"),
        ("--lr nan", "--lr nan must be above 0"),
        (
            "--lr -1 --clip 0 --beta1 1",
            "--clip 0.0 must be above 0; --lr -1.0 must be above 0, and at most 100; --beta1 1.0 must be",
        ),
        ("--tokens 0", "--tokens 0 must be at least 1"),
        (
            "--batch 10 --micro-batch 4",
            "--batch 10 = 2.50 x --micro-batch 4 does not divide: use --batch 8 or 12",
        ),
        ("--size 7B", "--size 7B needs --data: the token files of OLMo-mix-1124"),
        ("--data nothing.npy", "nothing.npy does not exist"),
        (
            "--data tokens/embedded-laptop --batch 1e6 --micro-batch 1e6",
            "fewer than one batch of 1000000",
        ),
        ("--data tokens/embedded-laptop --tokenizer tokens", "tokens holds no model"),
        ("--out /proc/nothing/run", "cannot write to /proc/nothing/run"),
        ("--init tokens", "tokens"),
        ("--device tpu", "no device 'tpu'"),
        ("--data tokens/embedded-laptop/corpus.json", "tokenise it first, with python data.py"),
        ("--data tokens/embedded-laptop --seq-len 1e7", "a smaller --seq-len"),
        ("--val nothing", "nothing does not exist"),
        ("--seed -1", "--seed -1 must be at least 0"),
    ],
)
def test_bad_input(flags, words, here, capsys):
    assert words in fails(module.main, flags.split(), capsys)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--warmups 1", "--warmup"),
        ("--batch 1.5", "batch"),
        ("--micro-batc 2", "--micro-batch"),
        ("--norm-position post", "reordered"),
    ],
)
def test_bad_flags_are_explained_by_tyro(flags, words, here, capsys):
    with pytest.raises(SystemExit) as exit:
        module.main(flags.split())
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_a_state_of_another_model_is_refused(finished, here, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    record["config"]["qk_norm"]["value"] = False
    path.write_text(json.dumps(record))
    line = fails(
        module.main,
        [
            *SHORT,
            "--tokens",
            "2048",
            "--horizon",
            "4096",
            "--out",
            str(tmp_path / "run"),
            "--no-qk-norm",
        ],
        capsys,
    )
    assert "holds another model (" in line and "qk_norm None, not False)" in line


def test_numbers_may_be_written_as_people_write_them(capsys):
    c, _ = read_settings("--tokens 1e6 --batch 2_048 --micro-batch 16".split())
    assert (c.tokens, c.batch, c.micro_batch) == (1_000_000, 2048, 16)


def test_help_shows_the_values_of_the_size(capsys):
    for size, words in (
        (
            "7B",
            [
                "3e-4|0.0003",
                "1024",
                "3895",
                "laptop CPU|torchrun|One training loop|one training loop",
            ],
        ),
        ("32B", ["774861|6500005", "34521"]),
    ):
        with pytest.raises(SystemExit) as exit:
            module.main(["--size", size, "--help"])
        shown = capsys.readouterr().out
        assert exit.value.code == 0 and all(
            any(word in shown for word in choice.split("|")) for choice in words
        ), shown


def test_docstrings():
    assert doctest.testmod(module).failed == 0


def test_what_the_states_will_take_is_said_at_the_start(here, capsys, monkeypatch):
    flags = [*SHORT, "--tokens", "1024", "--out", "runs/many", "--save-every", "1", "--keep"]
    module.main([*flags, "3"])
    assert "\nstates " not in capsys.readouterr().out  # there is room for a thousand
    shutil.rmtree("runs/many")
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000_000))
    module.main([*flags, "0"])
    assert "\nstates    8 of 0.0 GB each will be kept in runs/many" in capsys.readouterr().out
    shutil.rmtree("runs/many")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    module.main([*flags, "0"])
    assert "free; warning: they do not fit, see --keep" in capsys.readouterr().out


def test_the_flag_for_determinism_changes_no_bit_of_a_cpu(here, monkeypatch):
    seen = []
    whole = module.clip_gradients

    def clip_gradients(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return whole(*arguments)

    monkeypatch.setattr(module, "clip_gradients", clip_gradients)
    flags = [*SHORT, "--tokens", "512", "--sample", "The", "--eval-every", "2"]
    try:
        module.main([*flags, "--deterministic", "--out", "runs/strict"])
    finally:
        torch.use_deterministic_algorithms(False)
    module.main([*flags, "--out", "runs/free"])
    assert seen == [True] * 4 + [False] * 4
    same_run(Path("runs/strict"), Path("runs/free"))


def test_the_order_is_shuffled_once(here, monkeypatch):
    shuffled = []
    whole = data.TokenData.order

    def order(self, seed, epoch):
        shuffled.append(epoch)
        return whole(self, seed, epoch)

    monkeypatch.setattr(data.TokenData, "order", order)
    module.main([*SHORT, "--tokens", "256", "--sample", "", "--out", "runs/once"])
    assert shuffled == [0]
