"""What only a GPU can show to be right: skipped without one. `python tests/gpu.py` runs it, too."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import SHORT
from torch.nn.attention import SDPBackend, sdpa_kernel

import decode
import posttrain
import pretrain
from data import get_tokenizer
from infra.metrics import rows_of
from model import SIZES, OLMo2

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def exact_products():
    """A run sets the rounding of fp32 products, and determinism, for the whole process."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(False)


# The laptop's width; as the 32B, five queries share a key.
GROUPED = dataclasses.replace(SIZES["tiny"], d_model=160, heads=5, kv_heads=1, layers=2)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13] * 40]


@pytest.mark.parametrize("shape", [SIZES["tiny"], GROUPED])
def test_greedy_answers_are_those_of_the_cpu(shape):
    model = OLMo2(shape)
    expected, expected_log_probs = model.generate(PROMPTS, 20, temperature=0)
    tokens, log_probs = model.to(DEVICE).generate(PROMPTS, 20, temperature=0)
    assert tokens == expected
    for row, expected_row in zip(log_probs, expected_log_probs):
        assert row == pytest.approx(expected_row, abs=1e-4)


@pytest.mark.parametrize("shape", [SIZES["tiny"], GROUPED])
def test_fast_kernels_take_every_step_of_generation(shape, monkeypatch):
    """The plain products (MATH) are forbidden: torch raises where nothing else takes a step."""
    shape = dataclasses.replace(shape, d_model=128 * shape.heads)  # heads as wide as the released
    model = OLMo2(shape).to(DEVICE, torch.bfloat16)
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    monkeypatch.setattr(decode, "attention_kernels", lambda cache: sdpa_kernel(fast))
    tokens, _ = model.generate(PROMPTS, 20)
    assert [len(row) for row in tokens] == [20, 20, 20]


def test_saved_and_loaded_on_the_gpu_no_bit_is_lost(tmp_path):
    model = OLMo2(SIZES["tiny"]).to(DEVICE, torch.bfloat16)
    model.save(tmp_path)
    loaded = OLMo2.load(tmp_path, torch.bfloat16, DEVICE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def losses(folder):
    return [row["loss"] for row in rows_of(Path(folder), "step")]


def test_a_run_goes_on_and_is_near_that_of_the_cpu(here):
    pretrain.main([*SHORT, "--tokens", "1024", "--device", "cpu", "--out", "runs/cpu"])
    whole = [*SHORT, "--device", DEVICE, "--deterministic"]
    pretrain.main([*whole, "--tokens", "1024", "--out", "runs/whole"])
    pretrain.main([*whole, "--tokens", "512", "--horizon", "4096", "--out", "runs/parts"])
    pretrain.main([*whole, "--tokens", "1024", "--out", "runs/parts"])
    assert losses("runs/parts") == losses("runs/whole")
    assert losses("runs/whole") == pytest.approx(losses("runs/cpu"), rel=1e-2)  # it is in bf16


def test_grpo_takes_a_step(here):
    OLMo2(SIZES["tiny"]).save("base")
    get_tokenizer("laptop").save("base")
    flags = "--init base --out runs/grpo --data embedded/sums --steps 1 --response-length 16"
    posttrain.main(["grpo", *flags.split(), "--device", DEVICE])
    (row,) = rows_of(Path("runs/grpo"), "step")
    assert not row["skipped"] and row["length"] > 0
    assert abs(row["kl"]) < 1e-2  # the reference is the model itself, but rounded once
