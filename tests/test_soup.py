"""soup.py: the average bit for bit and in little memory, what it refuses, its record, its scores and its figure."""

import contextlib
import doctest
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails
from ranks import launch
from test_pretrain import SHORT
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretrain
import soup as module
from data import get_tokenizer
from infra.checkpoint import StoredWeights, find_weights, write_weights
from infra.files import read_json
from infra.metrics import read_metrics
from model import SIZES, ModelConfig, OLMo2, write_config

QUICK = ["--points", "0", "--no-score"]


def tensors(path):
    stored = StoredWeights(find_weights(path)[1])
    return {name: stored.whole(name) for name in stored.shapes}


def make(path, seed, dtype=torch.float32, config=SIZES["tiny"], tokenizer="laptop", **kwargs):
    """A Hugging Face directory of random weights."""
    OLMo2(config, seed).to(dtype).save(path, **kwargs)
    get_tokenizer(tokenizer).save(path)
    return str(path)


def in_memory(paths, weights):
    parts = [tensors(path) for path in paths]
    total = {name: torch.zeros(t.shape) for name, t in parts[0].items()}
    for part, weight in zip(parts, weights):
        for name in total:
            total[name] += weight * part[name].float()
    return {name: (t / sum(weights)).to(parts[0][name].dtype) for name, t in total.items()}


@pytest.fixture(scope="module")
def runs(workplace):
    """Two anneals of one short stage 1, the second by two processes."""
    import anneal

    with contextlib.chdir(workplace):
        pretrain.main(
            [
                *SHORT,
                "--tokens",
                "2048",
                "--horizon",
                "4096",
                "--questions",
                "8",
                "--out",
                "runs/base",
            ]
        )
        flags = [
            "--init",
            "runs/base",
            "--out",
            "runs/soupy",
            "--tokens",
            "1024",
            "--save-every",
            "4",
        ]
        anneal.main([*flags, "--ingredient", "1"])
        statuses, log = launch(2, [*flags, "--ingredient", "2", "--sample", ""], script="anneal")
        assert statuses == [0, 0], log
    return ["runs/soupy-1", "runs/soupy-2"]


# ---- the average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 0.5)])
def test_average_is_that_of_memory_bit_for_bit(dtype, weights, tmp_path):
    paths = [
        make(
            tmp_path / f"m{i}",
            i,
            dtype,
            shard_bytes=(10**9, 300_000, 10**5)[i] * (1 + (dtype == torch.float32)),
        )
        for i in range(3)
    ]
    assert (
        len(list((tmp_path / "m2").glob("*.safetensors")))
        > len(list((tmp_path / "m1").glob("*.safetensors")))
        > 1
    )
    module.main([*paths, "--weights", *map(str, weights), "--out", str(tmp_path / "soup"), *QUICK])
    ours, theirs = tensors(tmp_path / "soup/hf"), in_memory(paths, weights)
    assert ours.keys() == theirs.keys() and all(
        ours[name].dtype == dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


def test_runs_checkpoints_and_directories_go_together(runs, here):
    """A run, a checkpoint in the pieces of two processes, and a Hugging Face directory."""
    early = next(Path(runs[1]).glob("step4-*"))
    assert len(list((early / "model").glob("*.safetensors"))) == 2
    assert max(len(StoredWeights(early / "model").places[name]) for name in tensors(early)) == 2
    for name, tensor in tensors(
        runs[1]
    ).items():  # the pieces of the last state are the weights that were exported
        assert torch.equal(tensor, tensors(sorted(Path(runs[1]).glob("step8-*"))[0])[name])
    shutil.copytree(Path(runs[1], "hf"), "theirs", dirs_exist_ok=True)
    paths = [runs[0], str(early), "theirs"]
    module.main([*paths, "--out", "runs/three", *QUICK])
    expected = in_memory(paths, [1, 1, 1])
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in tensors("runs/three").items()
    )


def test_transformers_opens_the_soup(runs, here):
    module.main([*runs, "--out", "runs/open", *QUICK])
    ours, theirs = OLMo2.load("runs/open"), AutoModelForCausalLM.from_pretrained("runs/open/hf")
    ids = get_tokenizer("runs/open").encode("What is 27 + 45?")
    assert AutoTokenizer.from_pretrained("runs/open/hf")("What is 27 + 45?")["input_ids"] == ids
    with torch.no_grad():
        torch.testing.assert_close(
            ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, rtol=1e-5, atol=1e-5
        )


def test_memory_is_that_of_two_tensors(tmp_path):
    """Two directories of 11 tensors of 36 MiB and of small ones, in bf16: about 420 MiB each."""
    config = ModelConfig(
        layers=3,
        d_model=1024,
        heads=8,
        kv_heads=8,
        ffn=18 * 1024,
        vocab=18 * 1024,
        context=128,
        eos=1000,
        pad=1001,
    )
    with torch.device("meta"):
        shapes = {name: p.detach().bfloat16() for name, p in OLMo2(config).named_parameters()}
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        write_weights(
            Path(path),
            shapes,
            80 * 2**20,
            lambda name: torch.rand(shapes[name].shape, generator=generator).bfloat16(),
        )
        write_config(Path(path), config, torch.bfloat16)
        get_tokenizer("laptop").save(path)
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import torch, soup, tqdm\n"
        "torch.zeros(10).add_(torch.ones(10))\n"
        "print(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')), flush=True)\n"
        "soup.main(sys.argv[2:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), *paths, "--out", str(tmp_path / "soup"), *QUICK],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    before, peak = int(process.stdout.readline()) / 1024, 0.0
    while process.poll() is None:
        try:
            peak = max(
                peak,
                next(
                    int(line.split()[1]) / 1024
                    for line in open(f"/proc/{process.pid}/status")
                    if line.startswith("RssAnon")
                ),
            )
        except (OSError, StopIteration):
            pass
        time.sleep(0.001)
    assert process.returncode == 0
    one = sum(file.stat().st_size for file in Path(paths[0]).glob("*.safetensors")) / 2**20
    limit = 160  # MiB: the sum of one tensor in fp32 (72), its mean in bf16 (36), a block of values (16), torch's checkpoint code (20)
    assert peak - before < limit < one / 2.5, (before, peak, one)
    soup = StoredWeights(tmp_path / "soup/hf")
    parts = [StoredWeights(Path(path)) for path in paths]
    for name in shapes:
        a, b = (part.whole(name).float() for part in parts)
        assert torch.equal(soup.whole(name), ((a + b) / 2).bfloat16())


# ---- scores, record, figure


def test_scores_record_and_figure(runs, here, capsys):
    module.main(
        [*runs, "--out", "runs/scored", "--points", "3", "--val-tokens", "1024", "--questions", "8"]
    )
    header, *lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "bpb" in line or line.startswith(("runs/soupy", "soup"))
    ]
    assert header.split("  ")[-1] == "qa %" and [line.split()[0] for line in lines] == [
        *runs,
        "soup",
    ]
    record = read_json(Path("runs/scored/soup.json"))
    assert [entry["path"] for entry in record["ingredients"]] == runs and {
        entry["weight"] for entry in record["ingredients"]
    } == {1.0}
    rows = [entry["scores"] for entry in record["ingredients"]] + [record["scores"]]
    for line, row in zip(lines, rows):
        assert (
            f"{row['mix bpb']:.4f}" == line.split()[1]
            and {"prose bpb", "math bpb", "qa bpb", "instruct bpb", "math %", "qa %"} < row.keys()
        )
    assert Path("runs/scored/soup.png").read_bytes()[:4] == b"\x89PNG"
    evals = [row for row in read_metrics(Path(runs[0])) if row["event"] == "eval"]
    assert module.Scores(module.Config(val_tokens=512, questions=0), runs[0])(
        runs[0]
    ) == pytest.approx(
        {f"{source} bpb": value for source, value in evals[-1]["bpb"].items()}, rel=1e-6
    )  # what the run itself found on its own mix
    scores = module.Scores(module.Config(points=3, val_tokens=1024), runs[0])
    ends = [row["mix bpb"] for row in rows]
    line = scores.line(*runs, (ends[0], ends[1]))
    assert line[0] == ends[0] and line[2] == ends[1]
    assert line[1] == pytest.approx(ends[2], rel=1e-5)  # halfway between two is their soup
    assert len(set(line)) == 3
    (recorded,) = record["lines"]
    assert (recorded["from"], recorded["to"]) == tuple(runs)
    assert recorded["mix bpb"] == pytest.approx(line)


def test_a_record_makes_the_same_soup_again(runs, here, capsys):
    module.main([*runs, "--weights", "2", "1", "--out", "runs/recorded", *QUICK])
    module.main(["runs/recorded/soup.json", "--out", "runs/made-again", *QUICK])
    first, again = tensors("runs/recorded"), tensors("runs/made-again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    record = read_json(Path("runs/recorded/soup.json"))
    record["ingredients"][1]["sha256"] = "0" * 64
    Path("other.json").write_text(json.dumps(record))
    assert "runs/soupy-2: other weights than those of other.json" in fails(
        module.main, ["other.json", "--out", "runs/refused", *QUICK], capsys
    )
    assert not Path("runs/refused/hf").exists()
    assert "a soup.json has its weights: leave out --weights and --greedy" in fails(
        module.main, ["other.json", "--greedy"], capsys
    )


def test_greedy_leaves_out_what_does_not_help(runs, here):
    worse = make(here / "worse", 5)
    module.main(
        [
            *runs,
            worse,
            "--greedy",
            "--out",
            "runs/greedy",
            "--points",
            "0",
            "--val-tokens",
            "1024",
            "--questions",
            "0",
        ]
    )
    record = read_json(Path("runs/greedy/soup.json"))
    chosen = [entry["path"] for entry in record["ingredients"]]
    assert worse not in chosen and chosen
    expected = in_memory(chosen, [1] * len(chosen))
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in tensors("runs/greedy").items()
    )
    assert record["scores"]["mix bpb"] <= min(
        entry["scores"]["mix bpb"] for entry in record["ingredients"]
    )


# ---- what a person can get wrong


def test_what_does_not_go_together_is_refused(runs, here, tmp_path, capsys):
    small = ModelConfig(**{**vars(SIZES["tiny"]), "ffn": 128})
    other = ModelConfig(**{**vars(SIZES["tiny"]), "heads": 2, "kv_heads": 2})
    paths = {
        name: make(tmp_path / name, 1, config=config)
        for name, config in (("plain", SIZES["tiny"]), ("small", small), ("heads", other))
    }
    flags = ["--out", "runs/never-a-soup", *QUICK]
    line = fails(module.main, [paths["plain"], paths["small"], *flags], capsys)
    assert "small does not go with" in line and "it has ffn 128, not 256" in line
    assert "it has heads 2, not 4; kv_heads 2, not 4" in fails(
        module.main, [paths["plain"], paths["heads"], *flags], capsys
    )
    tokenizer = read_json(Path(paths["heads"], "tokenizer.json"))
    shutil.copytree(runs[0] + "/hf", tmp_path / "renamed", dirs_exist_ok=True)
    tokenizer["model"]["vocab"] = {
        word: {5: 6, 6: 5}.get(i, i) for word, i in tokenizer["model"]["vocab"].items()
    }
    (tmp_path / "renamed/tokenizer.json").write_text(json.dumps(tokenizer))
    assert "it has another tokenizer" in fails(
        module.main, [runs[0], str(tmp_path / "renamed"), *flags], capsys
    )
    assert f"{runs[0]}/hf stands there twice" in fails(
        module.main, [runs[0], runs[0] + "/hf", *flags], capsys
    )
    state = str(next(Path(runs[0]).glob("step8-*")))
    assert f"{state} holds the very weights of {runs[0]}" in fails(
        module.main, [runs[0], runs[1], state, *flags], capsys
    )
    assert not list(Path("runs/never-a-soup").glob("*"))  # nothing half made


def test_a_failed_command_leaves_the_soup_that_was_there(runs, here, tmp_path, capsys):
    module.main([*runs, "--out", "runs/kept", *QUICK])
    before = {
        path: path.read_bytes() for path in sorted(Path("runs/kept").rglob("*")) if path.is_file()
    }
    other = make(tmp_path / "other", 1, config=ModelConfig(**{**vars(SIZES["tiny"]), "ffn": 128}))
    assert "runs/kept holds another soup, of runs/soupy-1 runs/soupy-2" in fails(
        module.main, [*runs, other, "--out", "runs/kept", *QUICK], capsys
    )
    assert "runs/kept lies in runs/kept" in fails(
        module.main, ["runs/kept", runs[0], "--out", "runs/kept", *QUICK], capsys
    )
    assert "something else than a soup" in fails(
        module.main, [*runs, "--out", "runs/soupy-1/run.json", *QUICK], capsys
    )
    assert {
        path: path.read_bytes() for path in sorted(Path("runs/kept").rglob("*")) if path.is_file()
    } == before
    # Killed while it was written: what it left is no obstacle, and what it had put aside comes back.
    Path("runs/kept/hf").rename("runs/kept/.old-hf")
    Path("runs/kept/.saving-hf").mkdir()
    fails(module.main, [*runs, other, "--out", "runs/kept", *QUICK], capsys)
    assert {
        path: path.read_bytes() for path in sorted(Path("runs/kept").rglob("*")) if path.is_file()
    } == before
    module.main([*runs, "--out", "runs/kept", *QUICK])


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            "",
            "a soup needs two ingredients or more, there is none: run python anneal.py --size 14M first",
        ),
        ("--size 7b", "unknown size '7b'"),
        ("soup.json.bak", "soup.json.bak does not exist"),
        ("runs/soupy-1", "there is runs/soupy-1"),
        ("runs/soupy-1 runs/nothing", "runs/nothing does not exist"),
        ("runs/soupy-1 runs/soupy-2 --weights 1", "expected 2 numbers from 1e-6"),
        ("runs/soupy-1 runs/soupy-2 --weights 1 nan", "expected 2 numbers from 1e-6"),
        ("runs/soupy-1 runs/soupy-2 --points 1", "--points 1 must be 2 or more"),
        ("runs/soupy-1 runs/soupy-2 --out runs/base", "runs/base holds something else than a soup"),
        ("runs/soupy-1 runs/soupy-2 --no-score --greedy", "--greedy judges by held-out text"),
        ("runs/soupy-1 runs/soupy-2 --data nothing", "nothing does not exist"),
        ("runs/soupy-1 runs/soupy-2 --out /proc/soup", "cannot write to /proc"),
        ("nothing.json", "nothing.json is missing"),
        ("runs/soupy-1/run.json", "is no soup.json"),
        ("runs/nothing runs/soupy-1", "runs/nothing does not exist"),
    ],
)
def test_bad_input(flags, words, runs, here, capsys):
    before = sorted(Path("runs").rglob("hf"))
    assert words in fails(
        module.main, [*flags.split(), *(["--size", "14M"] if not flags else [])], capsys
    )
    assert sorted(Path("runs").rglob("hf")) == before


def test_an_unfinished_run_is_refused(runs, here, capsys):
    shutil.copytree(runs[1], "runs/unfinished", dirs_exist_ok=True)
    shutil.rmtree(next(Path("runs/unfinished").glob("step8-*")))
    line = fails(module.main, [runs[0], "runs/unfinished", "--out", "runs/never-a-soup"], capsys)
    assert (
        "runs/unfinished is not finished, it stands at 512 of 1,024 tokens" in line
        and "step4-tokens1K" in line
    )


def test_docstrings():
    assert doctest.testmod(module).failed == 0
