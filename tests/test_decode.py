"""decode.py: the same tokens as transformers', as without a cache, and in any batch."""

import doctest
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_model import SHAPES, SMALL, make_pair

import decode as module
import infra.distributed
import likelihood
import sample
from decode import sample_token
from infra.files import UserError
from model import SIZES, OLMo2


@pytest.mark.parametrize("shape", ["MHA", "GQA", "MQA"])
def test_greedy_generation_equals_transformers(shape, tmp_path):
    ours, theirs = make_pair(SHAPES[shape], tmp_path)
    prompts = [[1, 2, 3], [5], list(range(40))]
    new, _ = ours.generate(prompts, 30, temperature=0)
    for prompt, tokens in zip(prompts, new):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def without_cache(network, prompt, steps, temperature=0.0, draws=None):
    """Generate by forwarding the whole text for every token."""
    tokens, log_probs = list(prompt), []
    for step in range(steps):
        log_p = F.log_softmax(network(torch.tensor([tokens]))[:, -1] / (temperature or 1.0), dim=-1)
        draw = None if draws is None else draws[step : step + 1]
        tokens.append(sample_token(log_p, draw, temperature, 0, 1.0).item())
        log_probs.append(log_p[0, tokens[-1]].item())
    return tokens[len(prompt) :], log_probs


@pytest.mark.parametrize("shape", ["MHA", "GQA", "MQA"])
@torch.no_grad()
def test_cache_batch_and_neighbours_do_not_matter(shape, tmp_path):
    network, _ = make_pair(SHAPES[shape], tmp_path)
    prompts = [[3], list(range(60)), [7, 8, 9], [200] * 17]
    together, together_p = network.generate(prompts, 40, temperature=0)
    sampled, sampled_p = network.generate(prompts, 40, temperature=0.7, seed=[11, 12, 13, 14])
    for i, prompt in enumerate(prompts):
        tokens, log_probs = without_cache(network, prompt, 40)
        assert tokens == together[i] and log_probs == pytest.approx(together_p[i], abs=1e-5)
        alone, alone_p = network.generate([prompt], 40, temperature=0.7, seed=[11 + i])
        assert alone[0] == sampled[i] and alone_p[0] == pytest.approx(sampled_p[i], abs=1e-5)
    again, _ = network.generate(prompts[:2], 40, temperature=0.7, seed=5)
    more, _ = network.generate(prompts, 40, temperature=0.7, seed=5)
    assert again == more[:2]
    assert again != network.generate(prompts[:2], 40, temperature=0.7, seed=6)[0]


def test_rows_end_at_eos_at_the_limit_and_at_the_context(tmp_path):
    network, _ = make_pair(SMALL, tmp_path)
    prompts = [[i] for i in range(1, 12)]
    free, free_p = network.generate(prompts, 30, temperature=1.0, seed=0)
    eos = free[0][3]
    ended, ended_p = network.generate(prompts, 30, temperature=1.0, seed=0, eos=eos)
    for i in range(len(prompts)):  # cut after its own first EOS; rows that leave change no other
        cut = free[i].index(eos) + 1 if eos in free[i] else 30
        assert ended[i] == free[i][:cut] and ended_p[i] == pytest.approx(free_p[i][:cut], abs=1e-5)
    rows, _ = network.generate([[1] * 120, [1]], 50, temperature=0)
    assert [len(row) for row in rows] == [9, 50]  # context 128: 8 slots, 1 more
    assert network.generate([[1]], 0)[0] == [[]]
    for prompts, words in (
        ([[]], "at least one token"),
        ([[1] * 128], "no room"),
        ([], "at least one"),
    ):
        with pytest.raises(UserError, match=words):
            network.generate(prompts, 5)
    with pytest.raises(UserError, match="seed must be at least 0"):
        network.generate([[1]], 5, seed=-1)
    with pytest.raises(UserError, match="top_p 0"):
        network.generate([[1]], 5, top_p=0)


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.05, 0.4, 0.25, 0.1, 0.2])
    draws = (torch.arange(10_000) + 0.5) / 10_000

    def shares(top_k=0, top_p=1.0):
        picked = sample_token(probabilities.log().expand(10_000, -1), draws, 1.0, top_k, top_p)
        return (torch.bincount(picked, minlength=5) / 10_000).tolist()

    assert shares() == pytest.approx(probabilities.tolist(), abs=2e-4)
    assert shares(top_k=2) == pytest.approx([0, 0.4 / 0.65, 0.25 / 0.65, 0, 0], abs=2e-4)
    # 0.4 is short of 0.6: one more
    assert shares(top_p=0.6) == pytest.approx([0, 0.4 / 0.65, 0.25 / 0.65, 0, 0], abs=2e-4)
    assert shares(top_p=0.3) == [0, 1, 0, 0, 0] == shares(top_k=1)


def test_docstrings():
    assert doctest.testmod(module).failed == 0


def test_on_a_gpu_what_is_free_decides_how_many_rows_there_are(monkeypatch):
    """By arithmetic: no GPU is needed to ask how many rows 80 GB would take."""
    free = 60 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 2**30)
    for size in ("1B", "7B", "13B", "32B"):
        config = SIZES[size]
        weight = SimpleNamespace(device=torch.device("cuda"))
        model = SimpleNamespace(config=config, lm_head=SimpleNamespace(weight=weight))
        rows = module.rows_that_fit(model, 4096)
        one = 2 * config.layers * config.kv_heads * config.head_dim * 2 * 4096
        assert rows * one <= (free + 3 * 2**30) // 3 < (rows + 1) * one
        assert module.whole_copy_fits(model, 4096) == (size != "32B")  # of 63 GiB
        tokens = likelihood.batch_tokens(model)
        assert tokens == min(2**16, 21 * 2**30 * 4096 // one)
    assert infra.distributed.weights_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert infra.distributed.weights_dtype("auto", torch.device("cpu")) == torch.float32
    assert infra.distributed.weights_dtype("float32", torch.device("cuda")) == torch.float32


def test_the_dtype_of_weights_is_a_flag_of_what_only_runs_them(run, capsys):
    kinds = set()
    load = OLMo2.load

    def seen(*arguments):
        model = load(*arguments)
        kinds.add(model.lm_head.weight.dtype)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OLMo2, "load", seen)
        sample.main([str(run), "The", "--dtype", "bfloat16", "--max-new-tokens", "2"])
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("shape", ["MHA", "GQA", "MQA"])
def test_wider_steps_as_on_a_gpu_change_no_answer(shape, tmp_path, monkeypatch):
    ours, _ = make_pair(SHAPES[shape], tmp_path)
    prompts = [[1, 2, 3], [5], list(range(30))]
    exact = ours.generate(prompts, 30, temperature=0)
    widths = set()
    whole = module.cache_mask

    def cache_mask(positions, seen):
        widths.add(seen)
        return whole(positions, seen)

    on_gpu = module.slots_seen
    monkeypatch.setattr(module, "cache_mask", cache_mask)
    monkeypatch.setattr(
        module, "slots_seen", lambda last, capacity, _: on_gpu(last, capacity, torch.device("cuda"))
    )
    wide = ours.generate(prompts, 30, temperature=0)
    assert widths == {60}  # all of the cache, which is below 256
    assert wide[0] == exact[0]
    for one, other in zip(wide[1], exact[1]):
        assert one == pytest.approx(other, abs=1e-5)
