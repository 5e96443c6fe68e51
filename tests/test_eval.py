"""eval.py and likelihood.py: their numbers by hand, embedded tasks, the command."""

import doctest
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails

import eval as module
import likelihood
from data import TokenData, get_tokenizer, write_tokens
from eval import question_accuracy
from likelihood import length_sorted_batches, pad_rows, sum_loss_and_bytes
from model import SIZES, OLMo2
from tasks.synthetic import TASKS


def bits_per_byte(*args, **kwargs):
    nats, n_bytes, _ = sum_loss_and_bytes(*args, **kwargs)
    return nats / math.log(2) / n_bytes


def test_bits_per_byte_by_hand(tmp_path):
    laptop, network = get_tokenizer("laptop"), OLMo2(SIZES["tiny"])
    write_tokens(
        ["Some text with ünïcode.\n" * 20, "and a second document " * 30], tmp_path, "text", laptop
    )
    data = TokenData([tmp_path / "text-00000.npy"], 32, laptop)
    nats, n_bytes = 0.0, 0
    with torch.no_grad():
        for i in range(len(data)):
            tokens = torch.from_numpy(data.instance(i))
            nats += F.cross_entropy(
                network(tokens[None])[0, :-1].double(), tokens[1:], reduction="sum"
            ).item()
            n_bytes += sum(
                len(laptop.token_bytes(t)) for t in tokens[1:].tolist() if t != laptop.eos
            )
    assert bits_per_byte(network, data) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert bits_per_byte(network, data, batch_tokens=96) == pytest.approx(
        bits_per_byte(network, data), rel=1e-6
    )
    first = bits_per_byte(network, data, max_tokens=2 * 32)
    assert first != bits_per_byte(network, data) and first == bits_per_byte(
        network, data, max_tokens=2 * 32 + 31
    )


class Parrot(OLMo2):
    """Answers every question from a table: what question_accuracy counts must then be known."""

    def __init__(self, answers, tokenizer):
        super().__init__(SIZES["tiny"])
        self.answers, self.tokenizer = answers, tokenizer

    def generate(self, prompts, *args, **kwargs):
        return [
            self.tokenizer.encode(self.answers[self.tokenizer.decode(p)]) + [self.tokenizer.eos]
            for p in prompts
        ], None


@pytest.mark.parametrize("task", TASKS)
def test_accuracy_counts_right_answers(task):
    laptop = get_tokenizer("laptop")
    items = list(module.task_items(task, "val", 500))
    answers = {item["prompt"]: item["answer"] for item in items}
    assert question_accuracy(Parrot(answers, laptop), laptop, task) == 1
    for i, item in enumerate(items):
        if i % 4 == 0:
            answers[item["prompt"]] = item["answer"].replace(item["gold"], item["gold"] + "1")
    assert question_accuracy(Parrot(answers, laptop), laptop, task) == 0.75


def test_table_of_several_models(here, tmp_path, capsys):
    for name, seed in (("one", 0), ("two", 1)):
        OLMo2(SIZES["tiny"], seed).save(tmp_path / name)
        get_tokenizer("laptop").save(tmp_path / name)
    module.main(
        [
            str(tmp_path / "one"),
            str(tmp_path / "two"),
            "--questions",
            "4",
            "--json",
            str(tmp_path / "scores.json"),
        ]
    )
    header, first, second = capsys.readouterr().out.strip("\n").splitlines()[-3:]
    assert header.split() == [
        "code",
        "bpb",
        "docs",
        "bpb",
        "math",
        "bpb",
        "qa",
        "bpb",
        "math",
        "%",
        "qa",
        "%",
    ]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"{scores[str(tmp_path / 'two')]['docs bpb']:.3f}" in second and first.startswith(
        str(tmp_path / "one")
    )
    # A random model is near a uniform one: log2(1024) bits per token.
    laptop = get_tokenizer("laptop")
    data = TokenData([here / "tokens/embedded-laptop/val/docs-00000.npy"], 256, laptop)
    tokens = np.stack([data.instance(i) for i in range(len(data))])
    uniform = 10 * tokens[:, 1:].size / laptop.byte_counts[tokens[:, 1:]].sum()
    assert scores[str(tmp_path / "one")]["docs bpb"] == pytest.approx(uniform, rel=0.02)


def test_bad_input(here, tmp_path, capsys):
    assert "unknown task poetry" in fails(module.main, ["--tasks", "poetry"], capsys)
    assert "does not exist" in fails(module.main, [str(tmp_path / "none")], capsys)
    assert "holds no model" in fails(module.main, [str(tmp_path)], capsys)
    OLMo2(SIZES["tiny"]).save(tmp_path / "m")
    assert "tokenizer.json is missing" in fails(module.main, [str(tmp_path / "m")], capsys)
    (tmp_path / "old.json").write_text("scores of last week")
    fails(module.main, [str(tmp_path / "none"), "--json", str(tmp_path / "old.json")], capsys)
    assert (tmp_path / "old.json").read_text() == "scores of last week"
    assert "cannot write /proc/none/x.json" in fails(
        module.main, [str(tmp_path / "m"), "--json", "/proc/none/x.json"], capsys
    )
    folder = tmp_path / "m"
    for flag in ("--questions", "--seq-len"):
        error = fails(module.main, [str(folder), flag, "-1"], capsys)
        assert f"{flag} -1" in error and "must be at least 0" in error
    with pytest.raises(SystemExit) as exit:
        module.main([str(folder), "--dtype", "float8"])
    assert exit.value.code == 2 and "bfloat16" in capsys.readouterr().err
    assert "no device 'tpu'" in fails(module.main, [str(tmp_path / "m"), "--device", "tpu"], capsys)


def test_rows_are_padded_in_their_own_type():
    ids = pad_rows([np.array([1, 2], np.int32), np.array([3], np.int32)], value=-100)
    assert ids.dtype == torch.int32 and ids.tolist() == [[1, 2], [3, -100]]
    log_probs = pad_rows([torch.tensor([-1.5]), torch.tensor([-0.5, -2.0])], width=3)
    assert log_probs.tolist() == [[-1.5, 0, 0], [-0.5, -2, 0]]
    assert length_sorted_batches([], rows=2) == []


def test_docstrings():
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(likelihood).failed == 0
