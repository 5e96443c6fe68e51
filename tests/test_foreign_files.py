"""Files that nobody vouches for, and command lines at their edges: one line, and nothing wrong in silence."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, fails
from safetensors.torch import load_file, save_file

import anneal
import data
import eval as eval_module
import posttrain
import pretrain
import sample
import soup
from data import TokenData, get_tokenizer, token_files
from infra.checkpoint import list_states
from infra.files import UserError, read_json
from infra.metrics import read_metrics
from model import OLMo2, read_config

SHAPES = ["[]", "null", '"text"', "3", "", "{", "[" * 100_000, "{}", '{"a": [1, {"b": null}]}']


def go_on(run, tokens=1280):
    pretrain.main([*SHORT, "--tokens", str(tokens), "--out", str(run)])


# ---- JSON of other shapes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name", ["hf/config.json", "hf/tokenizer.json", "hf/tokenizer_config.json", "run.json"]
)
def test_json_of_another_shape_is_one_line(run, name, shape, capsys):
    """Either it is refused by name, or it is as good as an empty object."""
    (run / name).write_text(shape)
    if name == "run.json":
        error = fails(pretrain.main, [*SHORT, "--tokens", "1280", "--out", str(run)], capsys)
    else:
        if shape in ("{}", SHAPES[-1]) and name == "hf/tokenizer_config.json":
            return
        error = fails(sample.main, [str(run / "hf"), "The", "--max-new-tokens", "2"], capsys)
    assert name.split("/")[-1] in error and "\n" not in error.strip()


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "4"),
        ("num_hidden_layers", True),
        ("hidden_size", 10**12),
        ("hidden_size", 96.0),
        ("rope_theta", -1.0),
        ("rope_theta", "x"),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0),
        ("vocab_size", None),
        ("quantization_config", {"bits": 4}),
        ("sliding_window", 4096),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("norm", "batchnorm"),
        ("qk_norm", "yes"),
    ],
)
def test_shapes_that_no_model_has_are_named(run, key, value):
    path = run / "hf/config.json"
    path.write_text(json.dumps(read_json(path) | {key: value}))
    with pytest.raises(UserError, match=r"config.json (has|lacks) .*|d_model .* multiple"):
        OLMo2.load(run / "hf")


def test_config_as_transformers_accepts_it(run):
    path = run / "hf/config.json"
    whole = read_json(path)
    changes = {
        "rope_scaling": {"rope_type": "default"},
        "num_key_value_heads": None,
        "eos_token_id": [whole["eos_token_id"], 7],
        "pad_token_id": None,
    }
    path.write_text(json.dumps(whole | changes))
    config = read_config(run / "hf")
    assert (config.kv_heads, config.eos) == (config.heads, whole["eos_token_id"])
    OLMo2.load(run / "hf")


def test_a_pipe_does_not_block(run):
    (run / "hf/config.json").unlink()
    os.mkfifo(run / "hf/config.json")
    with pytest.raises(UserError, match="no regular file"):
        read_config(run / "hf")


# ---- chat templates

CHATML = "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, [{"name": "default", "template": CHATML}]])
def test_another_chat_template_is_refused_for_training(run, template, capsys):
    path = run / "hf/tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"chat_template": template}))
    get_tokenizer.cache_clear()
    flags = ["sft", "--init", str(run / "hf"), "--data", "embedded/instruct", "--steps", "1"]
    flags += ["--out", "runs/foreign-sft", "--batch", "2", "--threads", "1", "--val", "--quiz"]
    assert "another chat template than Tulu's" in fails(posttrain.main, flags, capsys)
    posttrain.main([*flags, "--template", "tulu"])
    assert not get_tokenizer(Path("runs/foreign-sft/hf")).foreign_template
    shutil.rmtree("runs/foreign-sft")


# ---- weights


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_nan_in_weights_is_reported(run, bad, capsys):
    path = run / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float(bad)
    save_file(tensors, path)
    words = "weights that are NaN or infinite: model.norm.weight"
    assert words in fails(sample.main, [str(run / "hf"), "The"], capsys)
    paths = [str(run / "hf"), str(run), "--out", "runs/bad-soup", "--no-score"]
    shutil.copytree(run / "hf", run.parent / "other")
    error = fails(soup.main, [str(run / "hf"), str(run.parent / "other"), *paths[2:]], capsys)
    assert "model.norm.weight is NaN or infinite" in error
    assert not Path("runs/bad-soup").exists()
    shutil.rmtree(run.parent / "other")


def test_integers_are_no_weights(run):
    path = run / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(96, dtype=torch.int32)
    save_file(tensors, path)
    with pytest.raises(UserError, match="model.norm.weight holds torch.int32, no weights"):
        OLMo2.load(run / "hf")


# ---- records of a run


@pytest.mark.parametrize("damage", ["nuls", "cut", "latin1", "gone"])
def test_damaged_metrics_do_not_stop_a_run(run, damage, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    bad = {"nuls": b"\0" * 50 + b"\n", "cut": lines[3][:20] + b"\n", "latin1": b'{"\xe4": 1}\n'}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"".join([*lines[:3], bad[damage], *lines[4:]]))
    go_on(run)
    error = capsys.readouterr().err
    assert "metrics.jsonl has lost" in error
    assert damage == "gone" or "1 lines of" in error
    assert [row["step"] for row in read_metrics(run) if row["event"] == "step"][-1] == 10


def test_settings_are_never_guessed(run, capsys):
    (run / "run.json").unlink()
    error = fails(pretrain.main, [*SHORT, "--tokens", "1280", "--out", str(run)], capsys)
    assert "its run.json is gone" in error and len(list_states(run)) == 2
    shutil.rmtree(run)


# ---- token files


def test_changed_token_files_are_found_before_training(here, capsys):
    laptop = get_tokenizer("laptop")
    data.write_tokens(["some words"] * 200, here / "mine/train", "mine", laptop)
    (path,) = token_files([here / "mine"], "train")
    data.main(["--verify", str(here / "mine")])
    assert "1 of 1 token files have a sha256" in capsys.readouterr().out
    tokens = np.fromfile(path, "<u4")
    tokens[50] += 1
    tokens.tofile(path)
    with pytest.raises(UserError, match="mine-00000.npy has changed since it was made"):
        TokenData([path], 8, laptop)
    assert "has changed" in fails(data.main, ["--verify", str(here / "mine")], capsys)


# ---- terminals


def test_a_closed_pipe_and_a_terminal_without_utf8_end_nothing(run):
    script = f"{sys.executable} {ROOT}/pretrain.py {' '.join(SHORT)} --tokens 1280 --out {run}"
    command = f"PYTHONUNBUFFERED=1 {script} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_metrics(run)[-1]["step"] == 10
    command = [
        sys.executable,
        f"{ROOT}/sample.py",
        str(run),
        "M\u00e4dchen",
        "--max-new-tokens",
        "2",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "M\\xe4dchen" in done.stdout, done.stderr


# ---- the command line


LONG = "x" * 300


@pytest.mark.parametrize(
    "main, flags, words",
    [
        (pretrain.main, ["--device", "cpu:x"], "no device 'cpu:x' here"),
        (pretrain.main, ["--device", "cpu:7"], "no device 'cpu:7' here"),
        (pretrain.main, ["--threads", "100000"], "--threads 100000 must be from 0 to 1024"),
        (pretrain.main, ["--lr", "1e30"], "--lr 1e+30 must be above 0, and at most 100"),
        (pretrain.main, ["--out", LONG], "File name too long"),
        (pretrain.main, ["--data", LONG], "File name too long"),
        (pretrain.main, ["--mix", "math=1e308", "qa=1e308"], "--mix math=1e308: expected"),
        (anneal.main, ["--mix", "math=1e-12", "qa=1", "--init", "RUN"], "as good as none"),
        (posttrain.main, ["sft", "--share", "1e300"], "--share 1e+300 must be"),
        (sample.main, ["RUN", "The", "--temperature", "1e-300"], "must be 0, or from 0.001"),
        (sample.main, ["RUN", "The", "--max-new-tokens", "-1"], "--max-new-tokens -1 must be"),
        (sample.main, [LONG], "File name too long"),
        (eval_module.main, ["RUN", "--seq-len", "1"], "--seq-len 1 has nothing to predict"),
        (soup.main, ["RUN", "RUN", "--weights", "1e308", "1e308"], "numbers from 1e-6 to 1e6"),
        (data.main, [LONG], "File name too long"),
    ],
)
def test_edges_of_the_command_line(main, flags, words, made, here, capsys):
    error = fails(main, [str(made) if flag == "RUN" else flag for flag in flags], capsys)
    assert words in error and "Errno" not in error


def test_what_cannot_fit_into_memory_is_one_line(capsys):
    def main(_):
        return list(range(2**60))

    assert "not enough memory" in fails(main, [], capsys)


def test_an_answer_is_never_longer_than_the_context(made):
    model = OLMo2.load(made)
    (ids,), _ = model.generate([[5, 6]], 10**15, eos=None)
    assert len(ids) == model.config.context - 2 + 1


@pytest.mark.parametrize("where", ["argument", "stdin"])
def test_bytes_that_are_no_utf8(made, where):
    command = [sys.executable, f"{ROOT}/sample.py", str(made), "--max-new-tokens", "2"]
    typed = b"\xe4\xff\n\n"
    if where == "argument":
        command.append(b"\xe4\xff")
        typed = b""
    done = subprocess.run(command, capture_output=True, input=typed)
    assert done.returncode == (2 if where == "argument" else 0), done.stderr
    assert b"Traceback" not in done.stderr
    assert where == "stdin" or b"on the command line is no UTF-8" in done.stderr


def test_a_port_in_use_is_one_line(here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        world = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        environment = os.environ | world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, f"{ROOT}/pretrain.py", "--out", "runs/port", "--timeout", "20"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and f"another process listens at 127.0.0.1:{port}" in done.stderr
