"""posttrain.py: rendering, objectives against trl's, data in the published layouts, each stage as users run it, many ranks, bad input."""

import contextlib
import doctest
import gzip
import json
import math
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, fails, needs_cl100k, needs_shared
from ranks import launch
from safetensors.torch import load_file
from test_verifiers import HOSTILE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_scheduler,
)

import dpo
import posttrain as module
import rlvr
import sft
from data import get_tokenizer
from dpo import DPOSettings, dpo_loss, sequence_scores
from infra.checkpoint import list_states, load_tensors
from infra.files import UserError
from infra.metrics import read_metrics
from model import ChunkedLoss, ModelConfig, OLMo2, read_config
from posttrain import resolve_settings
from recipes import LATER_ROUNDS, POSTTRAIN
from rlvr import (
    GRPOSettings,
    PPOSettings,
    Rollouts,
    gae,
    grpo_advantages,
    grpo_loss,
    pad_like,
    sample_rollouts,
    token_weights,
)
from rollouts import Completion, generate_completions
from sft import SFTSettings, micro_batches
from tasks import conversations
from tasks.conversations import (
    VERIFIERS,
    Example,
    Source,
    encode_conversations,
    read_examples,
    read_prompts,
)
from tasks.synthetic import rlvr_rows

CPU = torch.device("cpu")


def say(*texts):
    """A conversation of user and assistant in turns."""
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


def save_base(folder, seed=1, scale=2.0, **shape):
    tokenizer = get_tokenizer("laptop")
    model = OLMo2(
        ModelConfig(
            **{
                **dict(
                    layers=2,
                    d_model=32,
                    heads=2,
                    kv_heads=2,
                    ffn=64,
                    vocab=tokenizer.padded_vocab_size,
                    context=128,
                    eos=tokenizer.eos,
                    pad=tokenizer.pad,
                ),
                **shape,
            }
        ),
        seed,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.ndim > 1 else 1)
    model.save(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(workplace):
    """A base model without any skill."""
    return save_base(workplace / "post-base")


@pytest.fixture(scope="module")
def pairs(workplace):
    """A file of preference pairs, and of conversations."""
    rows = [
        {
            "chosen": say(row["messages"][0]["content"], row["worked_answer"]),
            "rejected": say(row["messages"][0]["content"], row["short_answer"]),
            "messages": say(row["messages"][0]["content"], row["worked_answer"]),
        }
        for row in rlvr_rows("ifeval", "train", 64)
    ]
    path = workplace / "post-pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def examples_of(path, c, *keys):
    """The encoded rows of a file, under the settings of a stage."""
    source = Source((str(path),), c.seed)
    return read_examples(
        source, keys or ("messages",), get_tokenizer("laptop"), c.max_length, c.drop
    )


QUICK = ["--threads", "1", "--questions", "4", "--log-every", "1"]


def run(stage, out, *flags):
    module.main([stage, *QUICK, "--out", str(out), *map(str, flags)])
    return [row for row in read_metrics(Path(out)) if row["event"] == "step"]


# ---- conversations


@pytest.mark.parametrize("name", ["laptop", pytest.param("olmo2", marks=needs_cl100k)])
@pytest.mark.parametrize(
    "texts",
    [
        ("Hi?", "Yes."),
        ("Hi", ""),
        ("", "x"),
        ("a b", " c\nd", "e\n", "f", "g", "h!"),
        ("x", "\n\n1"),
        ("你好", "<|endoftext|> is a token"),
    ],
)
def test_labels_are_exactly_what_the_assistant_says(name, texts):
    tokenizer = get_tokenizer(name)
    (example,) = encode_conversations(tokenizer, [say(*texts)], 4096)
    assert example.targets.tolist()[-1] == -100
    labels = np.where(np.append(-100, example.targets[:-1]) != -100, 1, 0)  # on the token itself
    assert all(t == example.tokens[i + 1] for i, t in enumerate(example.targets) if t != -100)
    spans, trained = [], []  # each turn's tokens
    for token, on in zip(example.tokens, labels):
        if on and not (spans and trained[-1]):
            spans.append([])
        trained.append(on)
        if on:
            spans[-1].append(int(token))
    expected = []
    for i, text in enumerate(texts):
        if i % 2:
            expected.append(tokenizer.encode(text) + [tokenizer.eos])
    assert spans == expected
    if not texts[1].startswith("\n"):  # there, all at once merges the line break into the header
        assert example.tokens.tolist() == tokenizer.apply_chat_template(say(*texts))
    prompt = tokenizer.apply_chat_template(
        say(*texts)[:1], add_generation_prompt=True
    )  # what the model is given is what it was trained on
    assert example.tokens.tolist()[: len(prompt)] == prompt


@needs_cl100k
def test_header_ids_are_the_released_ones():
    (example,) = encode_conversations(
        get_tokenizer("olmo2"), [[{"role": "system", "content": "S"}, *say("Hi", "\nYes")]], 4096
    )
    ids = example.tokens.tolist()
    assert ids[0] == 100257 and ids[-1] == 100257
    for header in ([27, 91, 9125, 91, 397], [27, 91, 882, 91, 397], [27, 91, 78191, 91, 397]):
        assert any(ids[i : i + 5] == header for i in range(len(ids)))


def test_truncation_keeps_the_beginning():
    tokenizer = get_tokenizer("laptop")
    (whole,), (cut,) = (
        encode_conversations(tokenizer, [say("Hi", "one two three", "and", "four")], n)
        for n in (999, 15)
    )
    assert len(cut.tokens) == 15 and cut.tokens.tolist() == whole.tokens[:15].tolist()
    assert cut.targets.tolist() == [*whole.targets[:14].tolist(), -100]


def test_a_row_without_a_label_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": messages}) + "\n"
            for messages in (say("Hi", "Yes"), say("Hi"), say("word " * 50, "Yes"))
        )
    )
    with pytest.raises(
        UserError,
        match=r"rows.jsonl, line 2: no assistant speaks in it; .*line 3: no word of the assistant is left in the first 20 tokens.*--drop",
    ):
        examples_of(path, SFTSettings(max_length=20))
    assert len(examples_of(path, SFTSettings(max_length=20, drop=True))) == 1


# ---- objectives


def test_log_probs_are_those_of_the_logits_with_their_gradients(monkeypatch):
    model = OLMo2(
        ModelConfig(layers=2, d_model=32, heads=2, kv_heads=1, ffn=64, vocab=256, context=64),
        seed=3,
    )
    tokens = torch.randint(0, 256, (40, 20), generator=torch.Generator().manual_seed(0))
    targets = torch.where(
        torch.rand(40, 20, generator=torch.Generator().manual_seed(1)) < 0.5,
        tokens.roll(-1, 1),
        -100,
    )
    weights = torch.rand(40, 20, generator=torch.Generator().manual_seed(2))

    def gradients(log_probs):
        model.zero_grad()
        (log_probs * weights).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    logits = model(tokens) / 0.7
    expected = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0] * (
        targets != -100
    )
    reference = gradients(expected)
    for chunk in (2**23, 2**14):  # one chunk of logits, many
        monkeypatch.setitem(ChunkedLoss.CHUNK, "cpu", chunk)
        found = model.log_probs(tokens, targets, 0.7)
        assert (found - expected).abs().max() < 1e-5 and (found[targets == -100] == 0).all()
        assert max((a - b).abs().max() for a, b in zip(gradients(found), reference)) < 1e-5


@pytest.fixture(scope="module")
def trl_pair(workplace):
    """Two random models, as ours and as transformers', and the tokenizer."""
    folders = [save_base(workplace / f"trl-{seed}", seed, scale=3.0) for seed in (1, 2)]
    ours = [OLMo2.load(folder) for folder in folders]
    theirs = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders
    ]
    return ours, theirs, AutoTokenizer.from_pretrained(folders[0])


def compare_gradients(ours, theirs):
    for (name, p), (other, q) in zip(
        sorted(ours.named_parameters()), sorted(theirs.named_parameters())
    ):
        assert name == other and (p.grad - q.grad).abs().max() < 1e-5 * max(
            1, q.grad.abs().max()
        ), name


@pytest.mark.parametrize(
    "normalize, loss_type, beta", [(False, "sigmoid", 0.1), (True, "sigmoid_norm", 5.0)]
)
def test_dpo_equals_trl(trl_pair, tmp_path, normalize, loss_type, beta):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    (model, reference), (theirs, their_reference), their_tokenizer = trl_pair
    rows = [
        dict(
            prompt=say(p),
            chosen=[{"role": "assistant", "content": c}],
            rejected=[{"role": "assistant", "content": r}],
        )
        for p, c, r in (
            ("Say two.", "Two it is.", "No"),
            ("What is 3 + 4?", "7", "3 + 4 = 7. The answer is 7."),
            ("Hi", "a longer answer than the other", ""),
        )
    ]
    trainer = DPOTrainer(
        theirs,
        their_reference,
        DPOConfig(
            str(tmp_path),
            loss_type=[loss_type],
            beta=beta,
            max_length=128,
            per_device_train_batch_size=3,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=their_tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    theirs.zero_grad()
    their_loss = trainer.compute_loss(theirs, batch)
    their_loss.backward()

    tokenizer = get_tokenizer("laptop")
    flat = encode_conversations(
        tokenizer,
        [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")],
        128,
    )
    c, values = DPOSettings(normalize=normalize, beta=beta), []
    scores = lambda model, tokens, targets: sequence_scores(
        model.log_probs(tokens, targets), (targets != -100).float(), c.normalize
    ).chunk(2)
    model.zero_grad()
    budget = 4 * max(len(example.tokens) for example in flat)
    for _, tokens, targets, _ in micro_batches(
        [tuple(flat[i : i + 2]) for i in (0, 2, 4)], budget, CPU
    ):  # two micro-batches, of two and one
        with torch.no_grad():
            before = scores(reference, tokens, targets)
        loss, _, _ = dpo_loss(*scores(model, tokens, targets), *before, c.beta)
        (loss.sum() / 3).backward()
        values.append(loss.sum().item() / 3)
    assert abs(sum(values) - their_loss.item()) < 1e-5
    compare_gradients(model, theirs)


@pytest.mark.parametrize(
    "denominator, loss_type", [("token", "dapo"), ("constant", "dr_grpo"), ("sequence", "grpo")]
)
def test_grpo_equals_trl(trl_pair, tmp_path, denominator, loss_type):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    (model, reference), (theirs, _), their_tokenizer = trl_pair
    trainer = GRPOTrainer(
        theirs,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=their_tokenizer,
        train_dataset=Dataset.from_list([{"prompt": say("x")}] * 8),
        args=GRPOConfig(
            str(tmp_path),
            loss_type=loss_type,
            beta=0.3,
            epsilon=0.2,
            num_generations=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            max_completion_length=12,
            use_bias_correction_kl=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
    )
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 900, (n,), generator=generator).tolist() for n in (4, 4, 7, 7)]
    responses = [torch.randint(0, 900, (n,), generator=generator).tolist() for n in (12, 3, 6, 9)]
    rewards = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    advantages = grpo_advantages(rewards).flatten()
    examples = [
        Example(np.array(p + r), np.arange(len(p) + len(r)) >= len(p))
        for p, r in zip(prompts, responses)
    ]
    ((by_length, tokens, targets, is_last),) = micro_batches(
        [(example,) for example in examples], 100, CPU
    )
    assert is_last
    mask = (targets != -100).float()
    with torch.no_grad():
        old = (
            model.log_probs(tokens, targets) + 0.3 * torch.randn(tokens.shape, generator=generator)
        ) * mask  # so that some ratios are clipped
        fixed = reference.log_probs(tokens, targets)
    n_tokens = float(mask.sum())
    model.zero_grad()
    loss, clipped, _ = grpo_loss(
        model.log_probs(tokens, targets),
        old,
        fixed,
        advantages[by_length],
        token_weights(mask, denominator, n_tokens, 4, 12),
        0.2,
        0.3,
    )
    loss.backward()
    assert clipped > 0

    left = lambda rows, value: torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_value=value,
        padding_side="left",
    )
    right = lambda rows, value: torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value
    )
    of_rows = lambda values: right(
        [values[by_length.index(n)][mask[by_length.index(n)] > 0] for n in range(4)], 0.0
    )
    inputs = {
        "prompt_ids": left(prompts, 1001),
        "prompt_mask": left([[1] * len(p) for p in prompts], 0),
        "completion_ids": right(responses, 1001),
        "completion_mask": right([[1] * len(r) for r in responses], 0),
        "advantages": advantages,
        "old_per_token_logps": of_rows(old),
        "ref_per_token_logps": of_rows(fixed),
        "num_items_in_batch": torch.tensor(n_tokens),
    }
    trainer.current_gradient_accumulation_steps = 1
    theirs.train()
    theirs.zero_grad()
    their_loss = trainer.compute_loss(theirs, inputs)
    their_loss.backward()
    assert abs(loss.item() - their_loss.item()) < 1e-5
    compare_gradients(model, theirs)


def test_gae_is_its_sum_and_reward_belongs_to_the_last_token():
    """Our choice: upstream puts the score behind the last token, where it reads one more value."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 7, generator=generator)
    lengths = [7, 4, 1]
    mask = torch.tensor([[float(t < n) for t in range(7)] for n in lengths])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    for row, n in enumerate(lengths):
        for t in range(n):
            delta = [
                rewards[row, k] + 0.9 * (values[row, k + 1] if k + 1 < n else 0) - values[row, k]
                for k in range(n)
            ]
            expected = sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, n))
            assert (
                abs(advantages[row, t] - expected) < 1e-5
                and abs(returns[row, t] - expected - values[row, t]) < 1e-5
            )
        assert (advantages[row, n:] == 0).all()


def test_zero_signal_groups_move_by_kl_alone():
    lp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = grpo_advantages(torch.tensor([[10.0, 10.0]])).flatten()[:1]
    loss, _, kl = grpo_loss(
        lp, lp.detach(), torch.tensor([[-1.0, -1.0]]), advantages, torch.ones(1, 2) / 2, beta=0.1
    )
    loss.backward()
    assert (
        kl > 0 and lp.grad[0, 0] == 0 and abs(lp.grad[0, 1] - 0.1 * (1 - math.e) / 2) < 1e-6
    )  # d k3 / d lp = 1 - exp(-d), d = -1


def test_docstrings():
    for each in (sft, dpo, rlvr, module, conversations):
        assert doctest.testmod(each).failed == 0


# ---- data


def test_layouts_and_compressions_give_the_same_rows(tmp_path):
    import datasets

    rows = [
        {
            "messages": say(f"Question {i}?", f"Answer {i}."),
            "ground_truth": str(i),
            "dataset": "GSM8K",
        }
        for i in range(5)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    gzip.open(tmp_path / "b.jsonl.gz", "wt").write(text)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    tokenizer = get_tokenizer("laptop")
    found = [
        read_prompts(Source((str(tmp_path / name),), 1), tokenizer)
        for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")
    ]
    assert found[0] == found[1] == found[2] and [prompt.label for prompt in found[0]] == list(
        "01234"
    )
    assert (
        found[0][0].messages == say("Question 0?") and found[0][0].verifier == "gsm8k"
    )  # the answer is not shown
    examples = [examples_of(tmp_path / name, SFTSettings()) for name in ("a.jsonl", "c.parquet")]
    assert conversations.fingerprint(examples[0]) == conversations.fingerprint(examples[1])
    assert Source((str(tmp_path / "c.parquet"),), 1).rows()[2][0].endswith("c.parquet, row 3")


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": "Hi"}, 'expected a list of messages under "messages"'),
        ({"messages": []}, "expected a list of messages"),
        ({}, "expected a list of messages"),
        ({"messages": [{"role": "human", "content": "x"}]}, "message 0: expected a role"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0: expected a role"),
        (
            {"messages": say("x"), "ground_truth": "1", "dataset": "gsm8"},
            "verifier 'gsm8', did you mean gsm8k?",
        ),
        ({"messages": say("x"), "dataset": "math"}, 'under "ground_truth", got None'),
        ({"messages": say("x"), "ground_truth": "{", "dataset": "ifeval"}, "cannot be checked"),
        (
            {"messages": say("x"), "ground_truth": '{"func_name": "f"}', "dataset": "ifeval"},
            "unknown constraint 'f'",
        ),
        ({"messages": say("x"), "ground_truth": "five", "dataset": "gsm8k"}, "holds no number"),
        (
            {"messages": say("x"), "ground_truth": "5", "dataset": "ifeval"},
            'is written as in {"func_name"',
        ),
        (
            {
                "messages": [{"role": "assistant", "content": "x"}],
                "ground_truth": "1",
                "dataset": "math",
            },
            "no prompt before",
        ),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, row, words):
    path = tmp_path / "bad.jsonl"
    good = {"messages": say("x"), "ground_truth": "1", "dataset": "math"}
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, row, good, row)))
    with pytest.raises(UserError) as error:
        read_prompts(Source((str(path),), 1), get_tokenizer("laptop"), shots=8)
    assert (
        "bad.jsonl, line 2: " in str(error.value)
        and "line 4: " in str(error.value)
        and words in str(error.value)
    )


def test_pairs_that_teach_nothing_are_named_or_left_out(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [
        (say("Hi", "a"), say("Hi", "b")),
        (say("Hi", "a"), say("Hi", "a")),
        (say("Hi", "a"), say("Ho", "b")),
    ]
    path.write_text(
        "".join(
            json.dumps({"chosen": chosen, "rejected": rejected}) + "\n"
            for chosen, rejected in pairs
        )
    )
    with pytest.raises(
        UserError,
        match="line 2: the two answers are the same; .*line 3: the two answer different prompts",
    ):
        examples_of(path, DPOSettings(), "chosen", "rejected")
    assert len(examples_of(path, DPOSettings(drop=True), "chosen", "rejected")) == 1


def test_embedded_rows_are_verified_and_no_held_out_one_is_trained_on():
    for task in ("gsm8k", "ifeval"):
        train, val = list(rlvr_rows(task, "train", 3000, 1)), list(rlvr_rows(task, "val", 1000))
        for row in val:
            assert VERIFIERS[row["dataset"]](row["worked_answer"], row["ground_truth"])
            assert (task == "gsm8k") == VERIFIERS[row["dataset"]](
                row["short_answer"], row["ground_truth"]
            )
        key = lambda row: (
            sorted(re.findall(r"\d+", row["messages"][0]["content"]))
            if task == "gsm8k"
            else row["messages"][0]["content"].split(".")[0]
        )
        assert len({row["messages"][0]["content"] for row in val}) == 1000
        assert not {str(key(row)) for row in val} & {str(key(row)) for row in train}
        assert not any(
            str(key(row)) in {str(key(v)) for v in val} for row in rlvr_rows(task, "train", 500, 7)
        )


@needs_shared
def test_gsm8k_rows_become_few_shot_prompts():
    path = SHARED / "gsm8k_train.jsonl"
    rows = [json.loads(line) for line in open(path)]
    prompts = read_prompts(Source((str(path),), 1), get_tokenizer("laptop"), shots=8)
    assert len(prompts) == len(rows) - 8
    text = prompts[0].messages[0]["content"]
    assert (
        text.count("Question: ") == 9
        and text.endswith(f"Question: {rows[8]['question']}\nAnswer:")
        and "<<" not in text
        and "####" not in text
    )
    for prompt, row in zip(prompts, rows[8:]):
        assert VERIFIERS[prompt.verifier](conversations.worked_answer(row["answer"]), prompt.label)
        assert not VERIFIERS[prompt.verifier](
            conversations.worked_answer(row["answer"]) + " 1234567.5", prompt.label
        )


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rollouts_cost_a_verifier_little(name):
    labels = {
        "gsm8k": "7",
        "math": "\\frac{x}{7}",
        "ifeval": '{"func_name": "validate_title"}',
        "qa": "7",
        "instruct": "7",
    }
    VERIFIERS["math"]("$x$", "y")
    for verifier, label in labels.items():
        before = time.process_time()
        assert VERIFIERS[verifier](HOSTILE[name], label) in (True, False)
        assert time.process_time() - before < 1


# ---- the stages


def same(one, two):
    """The same weights, bit for bit, and the same rows of metrics, but for their times."""
    a, b = (load_file(folder / "hf" / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
    timeless = lambda folder: [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")}
        for row in read_metrics(folder)
    ]
    assert timeless(one) == timeless(two)


STAGE_FLAGS = {
    "sft": ["--steps", "4", "--batch", "8"],
    "rm": ["--steps", "4", "--batch", "8"],
    "dpo": ["--steps", "4", "--batch", "8"],
    "grpo": ["--steps", "4", "--prompts", "4", "--samples", "4", "--response-length", "8"],
    "ppo": [
        "--steps",
        "4",
        "--prompts",
        "8",
        "--passes",
        "2",
        "--response-length",
        "8",
        "--beta",
        "0.1",
    ],
}


def flags_of(stage, base, pairs):
    return [
        *STAGE_FLAGS[stage],
        "--init",
        base,
        *(["--data", pairs, "--val", pairs] if stage in ("sft", "rm", "dpo") else []),
        *(["--value", base] if stage == "ppo" else []),
    ]


COLUMNS = {
    "sft": {"loss"},
    "rm": {"loss", "chosen_reward", "rejected_reward", "margin", "accuracy"},
    "dpo": {"loss", "chosen_reward", "rejected_reward", "margin", "accuracy"},
    "grpo": {
        "loss",
        "reward",
        "right",
        "length",
        "ended",
        "signal",
        "kl",
        "clip_fraction",
        "entropy",
    },
    "ppo": {
        "loss",
        "value_loss",
        "reward",
        "right",
        "length",
        "ended",
        "kl",
        "clip_fraction",
        "entropy",
    },
}


@pytest.mark.parametrize("stage", STAGE_FLAGS)
def test_a_stage_runs_records_and_resumes_bit_for_bit(here, base, pairs, stage, capsys):
    out, again = here / f"runs/{stage}-whole", here / f"runs/{stage}-again"
    flags = [*flags_of(stage, base, pairs), "--save-every", "2", "--keep", "0", "--eval-every", "2"]
    rows = run(stage, out, *flags)
    assert (
        len(rows) == 4
        and COLUMNS[stage] | {"lr", "grad_norm", "skipped", "tokens_per_s", "seconds"}
        <= rows[0].keys()
    )
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG" and json.loads(
        (out / "run.json").read_text()
    )["config"]["init"]["value"] == base
    shutil.copytree(out, again)
    shutil.rmtree(list_states(again)[0])
    shutil.rmtree(again / "hf")
    run(stage, again, *flags)
    assert "going on from step2-" in capsys.readouterr().out
    same(out, again)
    assert get_tokenizer(out / "hf").instruct
    if stage != "rm":
        assert any(row["event"] == "sample" for row in read_metrics(out))


@pytest.mark.parametrize("stage", STAGE_FLAGS)
def test_a_gradient_that_is_nan_is_skipped_and_shown(here, base, pairs, stage, monkeypatch):
    """The second optimizer step: in PPO, that of the value model."""
    real, calls = torch.nn.utils.get_total_norm, []

    def get_total_norm(*arguments):
        calls.append(1)
        return real(*arguments) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", get_total_norm)
    rows = run(stage, f"runs/{stage}-nan", *flags_of(stage, base, pairs))
    (bad,) = [row for row in rows if row["skipped"]]
    assert bad["grad_norm"] is None and bad["step"] == (1 if stage in ("grpo", "ppo") else 2)
    assert all(
        weight.isfinite().all()
        for weight in load_file(f"runs/{stage}-nan/hf/model.safetensors").values()
    )


def test_another_init_or_data_is_refused(here, base, pairs, capsys):
    flags = ["dpo", *QUICK, "--out", "runs/other-init", *STAGE_FLAGS["dpo"], "--data", pairs]
    module.main([*flags, "--init", base])
    assert "was started with other settings (init" in fails(
        module.main, [*flags, "--init", save_base(here / "post-base-2", 2)], capsys
    )
    shutil.copytree(base, here / "post-moving")
    module.main(
        [*flags[:-2], "--data", pairs, "--init", "post-moving", "--out", "runs/other-init-2"]
    )
    shutil.rmtree(here / "post-moving")
    save_base(here / "post-moving", 3)
    assert "what is in post-moving, which has been made anew" in fails(
        module.main, [*flags, "--init", "post-moving", "--out", "runs/other-init-2"], capsys
    )


def test_a_few_rows_of_ones_own_are_enough(here, base, pairs, capsys):
    path = here / "four.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": say(f"{i}?", "Yes.")}) + "\n" for i in range(4))
    )
    assert (
        len(
            run("sft", "runs/four", "--init", base, "--data", path, "--batch", "4", "--epochs", "2")
        )
        == 2
    )
    assert "4 rows; 2 steps of 4, which is 200 % of the rows" in capsys.readouterr().out
    assert "4 rows are fewer than the 16 of a step" in fails(
        module.main, ["sft", "--init", base, "--data", str(path), "--out", "runs/four-16"], capsys
    )
    import pretrain

    assert "runs/four is a run of sft, not of pretrain" in fails(
        pretrain.main, ["--tokens", "2048", "--out", "runs/four"], capsys
    )
    assert "runs/four is a run of sft, not of rm" in fails(
        module.main,
        ["rm", "--init", base, "--data", "post-pairs.jsonl", "--batch", "8", "--out", "runs/four"],
        capsys,
    )


def test_a_reward_model_opens_in_transformers(here, base, pairs, capsys):
    run("rm", "runs/rm-open", *flags_of("rm", base, pairs))
    theirs = AutoModelForSequenceClassification.from_pretrained(
        "runs/rm-open/hf", dtype=torch.float32
    )
    with torch.device("meta"):
        ours = OLMo2(read_config(here / "runs/rm-open/hf"))
    ours = ours.to_empty(device="cpu")
    load_tensors(
        here / "runs/rm-open/hf", {name: p.detach() for name, p in ours.named_parameters()}
    )
    ids = torch.tensor([get_tokenizer("laptop").apply_chat_template(say("Hi", "there"))])
    assert abs(theirs(ids).logits[0, 0] - ours.scores(ids)[0, -1]) < 1e-5
    import sample

    assert "holds a reward model" in fails(sample.main, ["runs/rm-open"], capsys)
    assert "holds a reward model" in fails(module.main, ["sft", "--init", "runs/rm-open"], capsys)


@pytest.fixture(scope="module")
def talker(workplace, base):
    """A run of a little fine-tuning on the embedded data: its answers end."""
    with contextlib.chdir(workplace):
        run(
            "sft",
            "runs/talker",
            "--init",
            base,
            "--steps",
            "60",
            "--eval-every",
            "60",
            "--lr",
            "5e-3",
        )
    return "runs/talker"


def test_sft_learns_and_replays_text(here, talker):
    evals = [row["held_out"] for row in read_metrics(here / talker) if row["event"] == "eval"]
    assert evals[-1]["loss"] < 0.5 * evals[0]["loss"] and evals[-1]["format %"] > 50
    assert read_metrics(here / talker)[-1]["tokens"] > 60 * 16 * 50  # conversations alone have 45


def test_prefs_are_the_published_layout_and_go_on_where_they_were(here, base, talker, capsys):
    """A verifier that some of the answers satisfy."""
    rows = [
        {
            "messages": row["messages"],
            "ground_truth": json.dumps(
                {"func_name": "verify_letter_frequency", "letter": "e", "N": 2}
            ),
            "dataset": "ifeval",
        }
        for row in rlvr_rows("ifeval", "train", 23)
    ]
    (here / "any.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--init",
        talker,
        "--data",
        "any.jsonl",
        "--prompts",
        "8",
        "--steps",
        "0",
        "--response-length",
        "24",
    ]
    run("prefs", "runs/prefs-whole", *flags)
    made = [json.loads(line) for line in open(here / "runs/prefs-whole/train.jsonl")]
    assert made and not list((here / "runs/prefs-whole").glob(".train*"))
    for row in made:
        assert row["chosen"][:-1] == row["rejected"][:-1] == say(row["prompt"]) and (
            row["chosen_rating"],
            row["rejected_rating"],
        ) == (10.0, 0.0)
        assert VERIFIERS["ifeval"](row["chosen"][-1]["content"].strip(), rows[0]["ground_truth"])
    real = dpo.sample_groups
    calls = []

    def answers(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dpo, "sample_groups", answers)
        run("prefs", "runs/prefs-again", *flags)
    run("prefs", "runs/prefs-again", *flags)
    assert "going on" in capsys.readouterr().out
    assert (here / "runs/prefs-again/train.jsonl").read_bytes() == (
        here / "runs/prefs-whole/train.jsonl"
    ).read_bytes()
    for world in (1, 3):  # which does not divide the answers to 8 prompts
        statuses, log = launch(
            world, ["prefs", *QUICK, *flags, "--out", f"runs/prefs-{world}"], script="posttrain"
        )
        assert statuses == [0] * world, log
        assert (here / f"runs/prefs-{world}/train.jsonl").read_bytes() == (
            here / "runs/prefs-whole/train.jsonl"
        ).read_bytes()
    assert "is no reward model" in fails(
        module.main,
        ["prefs", *QUICK, *flags, "--judge", talker, "--out", "runs/prefs-no-judge"],
        capsys,
    )
    run(
        "rm",
        "runs/prefs-judge",
        "--init",
        base,
        "--data",
        "runs/prefs-whole/train.jsonl",
        "--batch",
        "2",
        "--steps",
        "2",
    )
    run("prefs", "runs/prefs-judged", *flags, "--judge", "runs/prefs-judge")
    judged = [json.loads(line) for line in open(here / "runs/prefs-judged/train.jsonl")]
    assert len(judged) == 23 and all(
        row["chosen_rating"] > row["rejected_rating"] for row in judged
    )


@needs_shared
def test_grpo_on_real_gsm8k_text(here):
    """The data path, the few-shot prompt and the verifier; such a model is right by accident at most."""
    save_base(here / "gsm-base", context=4096)
    shutil.copy(SHARED / "gsm8k_train.jsonl", here / "gsm8k.jsonl")
    flags = [
        "--init",
        "gsm-base",
        "--data",
        "gsm8k.jsonl",
        "--shots",
        "2",
        "--prompt-length",
        "1000",
        "--response-length",
        "24",
        "--prompts",
        "4",
        "--samples",
        "4",
        "--steps",
        "2",
    ]
    rows = run("grpo", "runs/grpo-gsm8k", *flags)
    assert (
        len(rows) == 2
        and all(0 < row["length"] <= 24 and row["kl"] >= 0 for row in rows)
        and rows[0]["right"] < 0.5
    )


# ---- answers


def test_answers_do_not_depend_on_their_company_and_rewards_follow_the_rules(
    here, base, monkeypatch
):
    tokenizer, model = get_tokenizer("laptop"), OLMo2.load(base)
    prompts = read_prompts(Source(("embedded/sums",), 1), tokenizer)[:12]
    together = generate_completions(model, tokenizer, prompts, list(range(12)), 1.0, 10)
    alone = [
        generate_completions(model, tokenizer, [prompt], [i], 1.0, 10)[0]
        for i, prompt in enumerate(prompts)
    ]
    assert [a.text for a in together] == [a.text for a in alone]
    for answer, prompt in zip(together, prompts):
        spoken = answer.example.tokens[len(prompt.tokens) :]
        assert (
            answer.example.targets[len(prompt.tokens) - 1 : -1].tolist() == spoken.tolist()
            and (answer.example.targets[: len(prompt.tokens) - 1] == -100).all()
        )
        assert answer.example.prompt == prompt.tokens
        with torch.no_grad():
            expected = model.log_probs(
                torch.tensor(answer.example.tokens)[None],
                torch.tensor(answer.example.targets)[None],
            )[0]
        assert (answer.log_probs - expected).abs().max() < 1e-4
        assert answer.ended == (spoken[-1] == tokenizer.eos) and "<|endoftext|>" not in answer.text

    monkeypatch.setattr(
        rlvr,
        "sample_groups",
        lambda *_: [
            Completion(a.example, a.log_probs, a.text, i % 3 > 0, i % 2 == 0)
            for i, a in enumerate(together[:8])
        ],
    )
    for c, unended in (
        (GRPOSettings(prompts=4, samples=2, minibatches=2), 0.0),
        (PPOSettings(prompts=8), -10.0),
    ):
        rollouts = sample_rollouts(model, tokenizer, prompts, c, 3)
        assert rollouts.rewards.tolist() == [
            (10.0 if i % 2 == 0 else 0.0) if i % 3 > 0 else unended for i in range(8)
        ]  # replaced, not added
        reward = (2 * 10 + 3 * unended) / 8
        means = {"reward": reward, "right": 4 / 8, "ended": 5 / 8}
        if c.samples > 1:
            means["signal"] = 2 / 4  # of rewards 0 0, 10 0, 10 0, 0 0
        assert rollouts.stats.items() - {("length", rollouts.stats["length"])} == means.items()


@pytest.mark.parametrize("world", [1, 2, 3, 7, 9])
def test_ranks_share_the_rows_of_a_mini_batch_and_run_equally_many_forwards(world, monkeypatch):
    examples = [(Example(np.arange(n + 2), np.arange(n + 2) > n // 2),) for n in range(14)]
    part = range(7, 14)
    rollouts = Rollouts([range(7), part], examples, None, None, None)
    seen, forwards = [], set()
    for rank in range(world):
        for room in (rlvr, sft):
            monkeypatch.setattr(room, "rank_and_world", lambda: (rank, world))
        batches = list(rollouts.micro_batches(part, 32, CPU))
        forwards.add((len(batches), sum(is_last for *_, is_last in batches), batches[-1][-1]))
        for rows, tokens, targets, _ in batches:
            assert tokens.numel() <= 32
            for row, n_targets in zip(rows, (targets != -100).sum(1).tolist()):
                assert n_targets in (0, examples[row][0].n_targets)
                seen += [row] * (n_targets > 0)
    assert sorted(seen) == list(part)
    ((n_forwards, *ends),) = forwards  # the same on all ranks
    assert ends == [1, True] and n_forwards <= math.ceil(math.ceil(7 / world) / 2)


def test_a_row_that_fills_up_weighs_nothing_whatever_values_its_number_names():
    mask = torch.zeros(1, 2)
    old = pad_like(mask, [torch.full((7,), -200.0)], [0])  # e^200 is infinite, and 0 times that NaN
    new = torch.zeros(1, 2, requires_grad=True)
    loss, *counts = grpo_loss(new, old, old, torch.tensor([3.0]), mask)
    loss.backward()
    assert loss == 0 and not any(counts) and not new.grad.any()


# ---- many ranks


@pytest.mark.parametrize(
    "stage, more",
    [
        ("sft", []),
        ("dpo", []),
        ("dpo", ["--no-reshard"]),
        ("rm", []),
        ("grpo", ["--no-reshard"]),
    ],
)
def test_two_ranks_compute_what_one_does(here, base, pairs, stage, more):
    flags = [*flags_of(stage, base, pairs), *QUICK, "--lr", "1e-3", *more]
    for world in (1, 2):
        shutil.rmtree(here / f"runs/{stage}-{world}", ignore_errors=True)
        statuses, log = launch(
            world,
            [stage, *flags, "--out", f"runs/{stage}-{world}"],
            script="posttrain",
            fault="recorded_rollouts" if stage == "grpo" else "",
        )
        assert statuses == [0] * world, log
    one, two = (
        [row for row in read_metrics(here / f"runs/{stage}-{world}") if row["event"] == "step"]
        for world in (1, 2)
    )
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        for name in a.keys() - {"seconds", "tokens_per_s", "event"}:
            assert abs(a[name] - b[name]) <= 1e-5 * max(1, abs(a[name])), (stage, name, a, b)
    weights = [load_file(here / f"runs/{stage}-{world}/hf/model.safetensors") for world in (1, 2)]
    assert (
        max((weights[0][name] - weights[1][name]).abs().mean() for name in weights[0]) < 1e-6
    )  # Adam may turn a gradient of nearly 0 either way


LENGTHS = """
def score(messages, answer, label):
    return len(answer) % 7 / 7
"""


def kept_of(folder, world, name):
    """What the ranks of `kept_rollouts` have kept under a name: a list of each rank."""
    ranks = [(folder / f"kept-{rank}.jsonl").read_text().splitlines() for rank in range(world)]
    return [[row[name] for row in map(json.loads, lines) if name in row] for lines in ranks]


@pytest.mark.parametrize(
    "stage, samples, more",
    [
        ("grpo", 5, ["--micro-tokens", "128", "--denominator", "sequence"]),
        ("ppo", 1, ["--micro-tokens", "1", "--passes", "2", "--value", "BASE"]),
    ],
)
def test_rollouts_and_steps_are_the_same_on_any_number_of_ranks(
    here, base, talker, stage, samples, more
):
    """Two mini-batches of 25 rows, or of 5: neither 2 ranks nor 3 divide them, and groups lie on several ranks."""
    (here / "lengths.py").write_text(LENGTHS)
    flags = ["--init", talker, "--prompts", "10", "--samples", samples, "--minibatches", "2"]
    flags += ["--response-length", "16", "--steps", "2", "--lr", "1e-5", "--no-eos", "-1", *QUICK]
    flags += ["--quiz", "--verifier", "lengths.py:score"]
    flags += [base if flag == "BASE" else flag for flag in more]
    sampled, known, advantages, rows, weights = {}, {}, {}, {}, {}
    for world in (1, 2, 3):
        for path in here.glob("kept-*"):
            path.unlink()
        out = here / f"runs/{stage}-rows-{world}"
        statuses, log = launch(
            world, [stage, *flags, "--out", out], script="posttrain", fault="kept_rollouts"
        )
        assert statuses == [0] * world, log
        seeds = kept_of(here, world, "seeds")
        shares = {len(part) for parts in seeds for part in parts}
        assert shares == {math.ceil(10 * samples / world)}
        sampled[world] = [set().union(*parts) for parts in zip(*seeds)]  # of each step
        known[world] = {name: kept_of(here, world, name) for name in ("tokens", "rewards", "old")}
        advantages[world] = sum(sum(kept_of(here, world, "advantages"), []), [])
        rows[world] = [row for row in read_metrics(out) if row["event"] == "step"]
        weights[world] = load_file(out / "hf/model.safetensors")

    one = {name: parts[0] for name, parts in known[1].items()}
    assert [len(seeds) for seeds in sampled[1]] == [10 * samples] * 2
    if samples > 1:  # by hand, of the rewards of each group
        groups = np.array(one["rewards"]).reshape(-1, samples)
        centred = groups - groups.mean(1, keepdims=True)
        by_hand = centred / (groups.std(1, keepdims=True, ddof=1) + 1e-8)
        assert sorted(advantages[1]) == pytest.approx(sorted(by_hand.flatten()), abs=1e-5)
        assert (by_hand != 0).any(1).sum() > 15  # of 20 groups
    for world in (2, 3):
        assert sampled[world] == sampled[1]
        for name in ("tokens", "rewards"):  # on every rank
            assert known[world][name] == [one[name]] * world
        for old in known[world]["old"]:
            for a, b in zip(sum(old, []), sum(one["old"], [])):
                assert np.abs(np.subtract(a, b)).max() < 1e-4
        assert sorted(advantages[world]) == pytest.approx(sorted(advantages[1]), abs=1e-4)
        for a, b in zip(rows[1], rows[world]):
            for name in a.keys() - {"seconds", "tokens_per_s", "event"}:
                assert abs(a[name] - b[name]) <= 1e-5 * max(1, abs(a[name])), (name, a, b)
        for name, weight in weights[1].items():
            assert (weight - weights[world][name]).abs().mean() < 1e-6


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo", "ppo"])
def test_replicas_add_up_their_gradients_once_a_step(here, base, pairs, stage):
    """However many micro-batches there are: the groups of weights are the blocks, the embedding and the head."""
    flags = [*flags_of(stage, base, pairs), *QUICK, "--steps", "1", "--micro-tokens", "1"]
    flags += ["--shard", "1", "--quiz", "--init", base]
    flags += {"grpo": ["--minibatches", "1"], "ppo": ["--passes", "1"]}.get(stage, [])
    flags += ["--val"] if stage in ("sft", "dpo") else []
    arguments = [stage, *flags, "--out", f"runs/replicas-{stage}"]
    statuses, log = launch(2, arguments, "count_all_reduces", script="posttrain")
    assert statuses == [0, 0], log
    layers = OLMo2.load(base).config.layers
    groups = layers + 2 + (layers + 1 if stage == "ppo" else 0)  # a value model's head is small
    assert log.count(f"all-reduces {groups}\n") == 2, re.findall("all-reduces.*", log)
    assert "Warning" not in log


def test_answers_may_take_longer_than_a_rank_is_waited_for(here, base, pairs):
    flags = [*flags_of("grpo", base, pairs), *QUICK, "--timeout", "5", "--steps", "1"]
    arguments = ["grpo", *flags, "--out", "runs/slow-answers"]
    statuses, log = launch(2, arguments, script="posttrain", fault="slow_answers")
    assert statuses == [0, 0], log


def test_the_table_at_the_end_is_made_by_two_ranks_together(here, base):
    for name in ("sft", "dpo", "grpo-1"):
        shutil.copytree(base, here / "runs/two-ranks" / name)
    (here / "runs/two-ranks/prefs").mkdir()
    for split in ("train", "val"):
        (here / f"runs/two-ranks/prefs/{split}.jsonl").touch()
    statuses, log = launch(
        2,
        ["--init", base, "--out", "runs/two-ranks", "--questions", "3", "--threads", "1"],
        script="posttrain",
        fault="no_stages",
    )
    assert statuses == [0, 0] and log.count("docs bpb") == 1, log
    assert list(json.loads((here / "runs/two-ranks/pipeline.json").read_text())) == [
        base,
        *(f"runs/two-ranks/{name}" for name in ("sft", "dpo", "grpo-1")),
    ]


# ---- settings and errors


@pytest.mark.parametrize("world", [8, 16, 32, 64])
def test_every_published_recipe_starts_on_one_node_and_on_eight(base, monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    checked = []
    for stage, recipes in POSTTRAIN.items():
        for size in recipes.keys() - {"tiny"}:
            for number in range(1, 2 + len(LATER_ROUNDS.get((stage, size), []))):
                flags = ["--size", size, "--init", base]
                flags += ["--value", base] if stage == "ppo" else []
                flags += ["--round", str(number)] if stage in ("ppo", "grpo") else []
                module.check(resolve_settings(stage, flags)[0])
                checked.append((stage, size, number))
    assert len(checked) == 21 and ("ppo", "13B", 3) in checked and ("grpo", "1B", 2) in checked


def test_published_values_of_each_size():
    values = {
        (stage, size): resolve_settings(stage, ["--size", size])[0]
        for stage in module.STAGES
        for size in ("1B", "7B", "13B", "32B")
    }
    assert [values["sft", size].lr for size in ("1B", "7B", "13B", "32B")] == [
        3e-5,
        2e-5,
        5e-6,
        4e-6,
    ]
    assert [values["dpo", size].lr for size in ("1B", "7B", "13B", "32B")] == [
        2.5e-6,
        1e-6,
        8e-7,
        2e-6,
    ]
    assert all(
        values["dpo", size].beta == 5
        and values["dpo", size].normalize
        and values["dpo", size].warmup == 0.1
        for size in ("1B", "7B", "13B", "32B")
    )
    assert [values["grpo", size].prompts for size in ("1B", "32B")] == [48, 112] and values[
        "grpo", "1B"
    ].schedule == "constant"
    assert (
        [values["ppo", size].prompts for size in ("7B", "13B")] == [224, 248]
        and values["ppo", "7B"].passes == 4
        and values["ppo", "7B"].no_eos == -10
    )
    assert resolve_settings("ppo", ["--size", "13B", "--round", "2"])[
        0
    ].beta == 0.03 and resolve_settings("grpo", ["--size", "1B", "--round", "2"])[0].data == (
        "allenai/RLVR-MATH",
    )
    assert (
        resolve_settings("ppo", ["--size", "13B", "--round", "3"])[0].init == "runs/13B/ppo-2"
        and not values["sft", "32B"].bos
    )
    decays = {stage: values[stage, "7B"].weight_decay for stage in module.STAGES}
    assert decays == {"sft": 0, "prefs": 0, "rm": 0.01, "dpo": 0, "ppo": 0.01, "grpo": 0.01}
    assert [values["grpo", size].denominator for size in ("1B", "32B")] == ["sequence", "token"]


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("steps", [4, 30, 33, 99])
def test_rates_are_those_of_transformers_schedules(steps, warmup):
    """As open-instruct calls them: warm-up from 0, its steps cut off, not rounded."""
    for name in ("linear", "constant"):
        c = SFTSettings(lr=3e-5, schedule=name, warmup=warmup)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=c.lr)
        kind = "constant_with_warmup" if name == "constant" else name
        schedule = get_scheduler(kind, optimizer, int(warmup * steps), steps)
        for step in range(steps):
            assert sft.lr_at(step, steps, c) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
            optimizer.step()
            schedule.step()


def test_the_rate_of_ppo_falls_within_a_step(here, base, pairs, monkeypatch):
    """At each update, as open-instruct's scheduler does: 4 passes here, of 2 steps."""
    rates = []
    real = rlvr.take_step

    def take_step(model, optimizer, clip):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(model, optimizer, clip)

    monkeypatch.setattr(rlvr, "take_step", take_step)
    flags = [*flags_of("ppo", base, pairs), "--lr", "8e-3", "--value-lr", "8e-3", "--passes", "4"]
    run("ppo", "runs/ppo-rates", *flags, "--steps", "2")
    assert rates[::2] == rates[1::2] == pytest.approx([k * 1e-3 for k in range(8, 0, -1)])


def test_every_weight_of_a_stage_decays(base):
    """torch.optim.AdamW(parameters, lr), as the stages call it: the input embedding, too."""
    model = OLMo2.load(base)
    c = GRPOSettings()
    (group,) = sft.make_optimizer(model, c).param_groups
    assert group["weight_decay"] == c.weight_decay == 0.01
    assert len(group["params"]) == len(list(model.parameters()))


def test_a_reward_model_reads_whole_conversations_without_bos(here, base, capsys):
    """Pairs are dropped by the length of their prompt, and nothing is cut."""
    rows = []
    for words in (1, 40, 1, 1):
        prompt = say("word " * words)
        rows.append(
            {"chosen": prompt + say("", "a " * 30)[1:], "rejected": prompt + say("", "b")[1:]}
        )
    rows.append({"chosen": say("x", "a " * 200), "rejected": say("x", "b")})
    (here / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    real = dpo.reward_scores

    def reward_scores(model, tokens, targets):
        seen.append(tokens)
        return real(model, tokens, targets)

    flags = ["--data", "long.jsonl", "--prompt-length", "20", "--batch", "3", "--steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "reward_scores", reward_scores)
        run("rm", "runs/rm-uncut", "--init", base, *flags, "--val")
    assert "2 of 5 pairs have a prompt of more than 20 tokens" in capsys.readouterr().out
    tokenizer = get_tokenizer("laptop")
    first = np.concatenate([tokens[:, 0] for tokens in seen])
    assert not (first == tokenizer.eos).any()
    longest = len(tokenizer.encode("<|user|>\nword \n<|assistant|>\n" + "a " * 30)) + 1
    assert max(tokens.shape[1] for tokens in seen) == longest > 40
    assert not get_tokenizer("runs/rm-uncut/hf").chat_bos


def test_a_judge_without_bos_reads_none(here, base, talker, capsys):
    run(
        "prefs",
        "runs/prefs-for-bos",
        "--init",
        talker,
        "--data",
        "embedded/constraints",
        "--prompts",
        "8",
        "--steps",
        "1",
        "--response-length",
        "24",
        "--samples",
        "8",
    )
    run(
        "rm",
        "runs/judge-bos",
        "--init",
        base,
        "--data",
        "runs/prefs-for-bos/train.jsonl",
        "--batch",
        "1",
        "--steps",
        "1",
        "--val",
    )
    seen = []
    real = dpo.score_rows

    def score_rows(model, rows, *more):
        seen.extend(example.tokens[0] for (example,) in rows)
        return real(model, rows, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "score_rows", score_rows)
        run(
            "prefs",
            "runs/prefs-bos-judged",
            "--init",
            talker,
            "--data",
            "embedded/constraints",
            "--prompts",
            "4",
            "--steps",
            "1",
            "--response-length",
            "8",
            "--judge",
            "runs/judge-bos",
        )
    assert seen and get_tokenizer("laptop").eos not in seen


REWARDS = """
def score(messages, answer, label):
    assert messages[-1]["role"] == "user"
    return label["scale"] * (len(answer) % 7) / 7

def too_much(messages, answer, label):
    return 2

def broken(messages, answer, label):
    return {}["nothing"]

def other(answer):
    return 1
"""


def test_a_reward_of_ones_own_is_a_number_of_any_label(here, base, talker, capsys):
    (here / "my_rewards.py").write_text(REWARDS)
    rows = [{"messages": say(f"Say {i}."), "ground_truth": {"scale": 0.5}} for i in range(16)]
    (here / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", "own.jsonl", "--response-length", "12", "--quiz", "own.jsonl"]
    own = [*flags, "--init", talker, "--prompts", "8", "--verifier", "my_rewards.py:score"]
    steps = run("grpo", "runs/own-grpo", *own, "--samples", "4", "--steps", "2", "--no-eos", "0")
    assert all(0 < row["right"] < 0.5 for row in steps)
    run("prefs", "runs/own-prefs", *own, "--steps", "2", "--val")
    ratings = {json.loads(line)["chosen_rating"] for line in open("runs/own-prefs/train.jsonl")}
    sevenths = [rating * 7 / (10 * 0.5) for rating in ratings]
    assert sevenths == pytest.approx([round(n) for n in sevenths]) and 0 < max(sevenths) < 7
    capsys.readouterr()
    for function, words in [
        ("my_rewards.py:too_much", "returned 2: expected a number from 0 to 1"),
        ("my_rewards.py:broken", "my_rewards.py, line 10: KeyError: 'nothing'"),
        ("my_rewards.py:other", "expected other(messages, answer, label), not other(answer)"),
        ("my_rewards.py:scor", "has no function scor, did you mean score?"),
        ("my_rewards.py", "expected FILE.py:FUNCTION, as in my_rewards.py:score"),
        ("none.py:score", "none.py does not exist"),
    ]:
        arguments = ["grpo", *QUICK, "--out", "runs/own-bad", *own[:-1], function]
        assert words in fails(module.main, arguments, capsys), function
    rows[0]["dataset"] = "vibes"
    (here / "own.jsonl").write_text(json.dumps(rows[0]) + "\n")
    error = fails(module.main, ["grpo", *QUICK, "--out", "runs/own-bad", *own[:-2]], capsys)
    assert "--verifier my_rewards.py:score" in error and "own.jsonl, line 1" in error


def test_a_right_answer_may_be_a_number_and_a_constraint_an_object(tmp_path):
    rows = [
        {"messages": say("6 x 7?"), "dataset": "gsm8k", "ground_truth": 42},
        {
            "messages": say("x"),
            "dataset": "ifeval",
            "ground_truth": {"func_name": "validate_title"},
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = read_prompts(Source((str(path),), 1), get_tokenizer("laptop"))
    assert one.score("It is 42.") == 1 and one.score("41") == 0
    assert other.score("<<x>>") == 1 and other.score("x") == 0


def test_own_pairs_stand_beside_the_released_ones(tmp_path):
    (tmp_path / "prefs").mkdir()
    (tmp_path / "prefs/train.jsonl").touch()
    c, _ = resolve_settings("dpo", ["--size", "1B"], tmp_path)
    assert (
        c.data == ("allenai/olmo-2-0425-1b-preference-mix", str(tmp_path / "prefs/train.jsonl"))
        and c.val == ()
    )  # prefs had no held-out prompts
    (tmp_path / "prefs/val.jsonl").touch()
    assert resolve_settings("dpo", ["--size", "1B"], tmp_path)[0].val == (
        str(tmp_path / "prefs/val.jsonl"),
    )


@pytest.mark.parametrize(
    "size, rl, expected",
    [
        ("tiny", "auto", "sft prefs dpo grpo"),
        ("tiny", "ppo", "sft prefs rm dpo ppo"),
        ("1B", "auto", "sft prefs dpo grpo grpo"),
        ("7B", "auto", "sft prefs rm dpo ppo"),
        ("13B", "auto", "sft prefs rm dpo ppo ppo ppo"),
        ("32B", "auto", "sft prefs dpo grpo"),
        ("7B", "grpo", "sft prefs dpo grpo"),
    ],
)
def test_the_recipe_of_each_size(size, rl, expected):
    assert " ".join(stage for stage, _ in module.stages_of(size, rl)) == expected


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sfd"], "no stage 'sfd', did you mean sft?"),
        (["sft", "--size", "8B"], "unknown size '8B'"),
        (["sft", "--init", "nowhere"], "nowhere does not exist"),
        (["dpo", "--init", "BASE"], "make preference pairs first (python posttrain.py prefs)"),
        (["sft", "--init", "BASE", "--lr", "nan"], "--lr nan must be above 0"),
        (["sft", "--init", "BASE", "--batch", "0"], "--batch 0 must be at least 1"),
        (
            ["sft", "--init", "BASE", "--max-length", "999"],
            "takes 128 tokens at most, and 999 are asked for: lower --max-length",
        ),
        (
            ["grpo", "--init", "BASE", "--prompts", "15"],
            "--prompts 15 = 7.50 x --minibatches 2 does not divide: use --prompts 14 or 16",
        ),
        (["grpo", "--init", "BASE", "--samples", "1"], "--samples 1 must be at least 2"),
        (["grpo", "--init", "BASE", "--round", "2"], "--round 2: tiny has 1 of grpo"),
        (
            ["ppo", "--init", "BASE"],
            "runs/tiny/rm does not exist: make it first (python posttrain.py rm)",
        ),
        (["sft", "--init", "BASE", "--data", "none.jsonl"], "none.jsonl does not exist"),
        (["sft", "--init", "BASE", "--data", "some.txt"], "expected lines of JSON (.jsonl"),
        (
            ["sft", "--init", "BASE", "--data", "embedded/instruction"],
            "did you mean embedded/instruct?",
        ),
        (
            ["sft", "--size", "7B"],
            "runs/7B/soup does not exist: make it first (python soup.py --size 7B)",
        ),
        (["grpo", "--size", "7B", "--init", "BASE"], "--data: 7B has no data of its own"),
        (["sft", "--init", "BASE", "--replay", "1"], "--replay 1.0 must be from 0 to below 1"),
        (["--share", "nan"], "--share nan must be above 0"),
        (
            ["sft", "--init", "BASE", "--data", "allenai/none-such"],
            "allenai/none-such cannot be read",
        ),
    ],
)
def test_bad_input_is_one_line(here, base, capsys, arguments, words):
    assert words in fails(module.main, [base if a == "BASE" else a for a in arguments], capsys)


@pytest.mark.parametrize(
    "arguments, choices",
    [
        (["grpo", "--denominator", "mean"], ("token", "constant", "sequence")),
        (["sft", "--schedule", "cosine"], ("linear", "constant")),
        (["--rl", "dpo"], ("auto", "grpo", "ppo")),
    ],
)
def test_a_word_that_is_no_choice_ends_with_the_choices(here, capsys, arguments, choices):
    with pytest.raises(SystemExit) as exit:
        module.main(arguments)
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert all(choice in shown for choice in choices)


def test_a_model_that_is_only_asked_is_in_bf16_on_a_gpu(base, monkeypatch):
    """Of the weights there is then no copy in fp32: 64 GB less of the 32B's reference."""
    seen = []
    monkeypatch.setattr(sft, "weights_dtype", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(sft, "shard_model", lambda model, *_, **__: seen.append(model.dtype_now()))
    monkeypatch.setattr(OLMo2, "dtype_now", lambda self: self.lm_head.weight.dtype, raising=False)
    run = SimpleNamespace(device=CPU, mesh=None)
    for frozen in (False, True):
        model = sft.load_model(sft.SFTSettings(), str(base), run, 8, frozen=frozen)
        assert model.lm_head.weight.dtype == seen[-1]
    assert seen == [torch.float32, torch.bfloat16]
