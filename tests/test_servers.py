"""Sampling by servers: the client against a stand-in that answers from OLMo2.generate, and against real vLLM where
VLLM_PYTHON names an interpreter that has it (docs/posttrain.md says how to make one)."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import fails
from ranks import launch
from safetensors.torch import load_file
from vllm_server import serve

import eval as eval_script
import posttrain
import rollouts
import sample
from data import get_tokenizer
from infra.checkpoint import list_states
from infra.files import UserError
from infra.metrics import read_metrics
from model import SIZES, OLMo2
from servers import Servers, serve_model

LENGTHS = """
def score(messages, answer, label):
    return len(answer) % 7 / 7
"""
TIMES = ("seconds", "tokens_per_s", "logprob_gap", "event")


@pytest.fixture(scope="module")
def policy(workplace):
    """A model that is sure of some tokens; with heads 32 wide, which vLLM's kernels for CPUs can take."""
    model = OLMo2(replace(SIZES["tiny"], layers=2, heads=3, kv_heads=3))
    with torch.no_grad():
        model.lm_head.weight *= 20
        mean = model.model(torch.arange(900).view(30, 30)).mean((0, 1))
        model.lm_head.weight[SIZES["tiny"].eos] = 9 * mean / mean.norm() ** 2  # some answers end
    folder = workplace / "policy"
    model.save(folder)
    get_tokenizer("laptop").save(folder)
    (workplace / "lengths.py").write_text(LENGTHS)
    return folder


@pytest.fixture
def server(policy):
    server = serve(policy)
    yield server
    server.stop()


@pytest.fixture
def row_by_row(monkeypatch):
    """In process, too, a batch is one answer, so that not even last bits differ."""
    monkeypatch.setattr(rollouts, "rows_that_fit", lambda *_: 1)


def grpo(policy, out, *more):
    flags = "--threads 1 --log-every 1 --steps 3 --prompts 4 --samples 4 --response-length 8 --lr 1e-4".split()
    flags += [
        "--data",
        "embedded/sums",
        "--quiz",
        "--verifier",
        "lengths.py:score",
        "--init",
        policy,
    ]
    return [str(flag) for flag in ["grpo", *flags, "--out", out, *more]]


def steps_of(folder):
    rows = [row for row in read_metrics(Path(folder)) if row["event"] == "step"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def asked(server, path):
    return [body for called, body in server.calls if called == path]


def client(server, tmp_path, **more):
    servers = Servers((server.url,), **{"patience": 5, **more})
    servers.folder = tmp_path / "weights"
    servers.check()
    return servers


# ---- the same answers


def test_a_run_with_servers_is_the_run_without(here, policy, server, row_by_row):
    posttrain.main(grpo(policy, "runs/alone"))
    posttrain.main(grpo(policy, "runs/served", "--rollouts", server.url))
    assert steps_of("runs/served") == steps_of("runs/alone")
    one, two = (load_file(f"runs/{name}/hf/model.safetensors") for name in ("alone", "served"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(
        row["logprob_gap"] < 1e-5
        for row in read_metrics(Path("runs/served"))
        if row["event"] == "step"
    )
    # Weights went before the first answers, and after each step but the last; not one of them is left.
    versions = [body["new_version"] for body in asked(server, "/update_weight_version")]
    assert len(versions) == len(set(versions)) == 3
    assert len(asked(server, "/inference/v1/generate")) == 3 * 16
    assert not list(Path("runs/served").glob("policy-*"))


@pytest.mark.parametrize("stage", ["prefs", "sft"])
def test_other_stages_ask_servers(here, policy, server, row_by_row, stage):
    flags = {
        "prefs": "--prompts 4 --samples 4 --steps 1 --questions 2 --val --data embedded/sums".split(),
        "sft": "--steps 2 --batch 4 --questions 4 --data embedded/instruct".split(),
    }[stage] + ["--threads", "1", "--response-length", "8", "--init", str(policy)]
    if stage == "prefs":
        flags += ["--verifier", "lengths.py:score"]
    for name, more in (("alone", []), ("served", ["--rollouts", server.url])):
        posttrain.main([stage, *flags, "--out", f"runs/{stage}-{name}", *more])
    assert asked(server, "/inference/v1/generate")
    if stage == "prefs":
        alone, served = (
            Path(f"runs/prefs-{name}/train.jsonl").read_text() for name in ("alone", "served")
        )
        assert alone == served and alone
        return
    evals = {}
    for name in ("alone", "served"):
        rows = read_metrics(Path(f"runs/sft-{name}"))
        evals[name] = [
            row.get("held_out", row.get("text"))
            for row in rows
            if row["event"] in ("eval", "sample")
        ]
    assert evals["alone"] == evals["served"]
    assert len({body["new_version"] for body in asked(server, "/update_weight_version")}) == 2


def test_rows_go_to_all_servers_which_have_one_version(policy, server, tmp_path):
    other = serve(policy)
    servers = Servers((server.url, other.url), patience=5)
    servers.folder = tmp_path / "weights"
    servers.check(100)
    model = OLMo2.load(policy)
    servers.update(model)
    assert server.version == other.version == servers.policy.version
    made = servers.generate([[1, 2, 3]] * 6, 5, seed=list(range(6)))
    assert made[0] == [model.generate([[1, 2, 3]], 5, seed=[i])[0][0] for i in range(6)]
    assert [len(asked(one, "/inference/v1/generate")) for one in (server, other)] == [3, 3]
    servers.update(model)  # the same weights: nothing is sent
    assert len(asked(server, "/collective_rpc")) == 1
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    servers.update(model)
    assert server.version == other.version != made
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [server.version]
    other.stop()


def test_seeds_fit_63_bits_and_depend_on_all_they_come_from():
    seeds = {
        rollouts.sampling_seed(s, t, r) for s in (0, 1, 2**62) for t in range(30) for r in range(30)
    }
    assert len(seeds) == 2700 and max(seeds) < 2**63 and max(seeds) > 2**62


def test_two_ranks_ask_servers_and_compute_what_one_does(here, policy, server):
    flags = [*grpo(policy, "runs/ranks-1"), "--rollouts", server.url, "--lr", "1e-5"]
    for world in (1, 2):
        statuses, log = launch(world, [*flags, "--out", f"runs/ranks-{world}"], script="posttrain")
        assert statuses == [0] * world, log
    for one, two in zip(steps_of("runs/ranks-1"), steps_of("runs/ranks-2"), strict=True):
        for name, value in one.items():
            assert abs(value - two[name]) <= 1e-5 * max(1, abs(value)), (name, one, two)
    server.fault = lambda path, reply: 400 if path == "/inference/v1/generate" else None
    statuses, log = launch(2, [*flags, "--out", "runs/ranks-fail"], script="posttrain")
    assert statuses == [2, 2] and log.count("error: ") == 1, log  # no rank waits for another


def test_answers_over_the_shards_are_those_of_all_weights(here, policy):
    flags = [*grpo(policy, ""), "--response-length", "24", "--lr", "1e-5", "--steps", "2"]
    for fault in ("", "no_room"):
        out = f"runs/shards-{fault}"
        statuses, log = launch(2, [*flags, "--out", out], fault, script="posttrain")
        assert statuses == [0, 0], log
        assert ("sampling over the shards" in log) == bool(fault)
    for one, two in zip(steps_of("runs/shards-"), steps_of("runs/shards-no_room"), strict=True):
        for name, value in one.items():
            assert abs(value - two[name]) <= 1e-5 * max(1, abs(value)), (name, one, two)


@pytest.mark.parametrize("world", [1, 3])
def test_the_folder_holds_the_weights_whoever_writes_it(here, policy, world):
    statuses, log = launch(
        world,
        grpo(policy, f"runs/folder-{world}", "--steps", "1"),
        "keep_policy",
        script="posttrain",
    )
    assert statuses == [0] * world, log
    (folder,) = Path(f"runs/folder-{world}").glob("kept")
    assert len(list(folder.glob("model*.safetensors"))) >= world
    written, model = OLMo2.load(folder).state_dict(), OLMo2.load(policy).state_dict()
    assert all(torch.equal(written[name], model[name]) for name in model)


# ---- faults


def test_a_server_that_starts_anew_gets_the_weights_again(here, policy, server, row_by_row):
    posttrain.main(grpo(policy, "runs/calm"))
    old = OLMo2.load(policy)
    calls = []

    def fault(path, reply):
        if path == "/inference/v1/generate":
            calls.append(path)
            if len(calls) in (20, 40):
                server.model, server.version = old, "default"

    server.fault = fault
    posttrain.main(grpo(policy, "runs/restarted", "--rollouts", server.url))
    assert steps_of("runs/restarted") == steps_of("runs/calm")
    assert len(asked(server, "/collective_rpc")) > 3 + 1


def test_a_run_whose_server_is_gone_saves_and_goes_on_later(
    here, policy, server, row_by_row, capsys
):
    posttrain.main(grpo(policy, "runs/quiet"))
    count = []

    def gone(path, reply):
        count.append(path)
        return 503 if count.count("/inference/v1/generate") > 20 else None

    server.fault = gone
    flags = grpo(policy, "runs/gone", "--rollouts", server.url, "--rollouts-timeout", "4")
    error = fails(posttrain.main, flags, capsys)
    assert "no answer from the vLLM server" in error and "VLLM_SERVER_DEV_MODE" not in error
    assert [state.name.split("-")[0] for state in list_states(Path("runs/gone"))] == ["step1"]
    assert not list(Path("runs/gone").glob("policy-*"))
    server.fault = None
    posttrain.main(flags)
    assert steps_of("runs/gone") == steps_of("runs/quiet")


def test_a_server_that_is_away_for_a_while_is_waited_for(policy, server, tmp_path):
    servers = client(server, tmp_path, patience=20)
    servers.update(OLMo2.load(policy))
    expected = servers.generate([[1, 2]], 4)
    statuses = [503, 429, 502]
    server.fault = lambda path, reply: statuses.pop() if statuses else None
    assert servers.generate([[1, 2]], 4) == expected and not statuses
    server.stop()
    back = []
    timer = threading.Timer(1, lambda: back.append(serve(policy, server.port)))
    timer.start()
    assert servers.generate([[1, 2]], 4) == expected
    back[0].stop()


WRONG = {
    "a token less": (lambda choice: choice["token_ids"].pop(), "gave 3 tokens with 4 log-prob"),
    "a log-probability less": (
        lambda choice: choice["logprobs"]["content"].pop(),
        "gave 4 tokens with 3 log-prob",
    ),
    "an end in between": (
        lambda choice: [choice["token_ids"].pop(), choice["logprobs"]["content"].pop()],
        r"gave 3 tokens .* of 4 \(length\)",
    ),
    "no versions": (
        lambda choice: choice.pop("weight_versions"),
        "another way than vLLM 0.32|other weights",
    ),
    "other versions": (
        lambda choice: choice["weight_versions"].append({"version": "old", "start": 0, "end": 1}),
        "answers with other weights",
    ),
    "no log-probabilities": (
        lambda choice: choice.update(logprobs=None),
        "another way than vLLM 0.32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_refused(policy, server, tmp_path, name):
    change, words = WRONG[name]
    servers = client(server, tmp_path)
    servers.update(OLMo2.load(policy))
    server.fault = lambda path, reply: (
        change(reply["choices"][0]) and None if "choices" in reply else None
    )
    with pytest.raises(UserError, match=words) as error:
        servers.generate([[1, 2]], 4)
    assert server.url in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit_is_named_before_all_work(here, policy, server, capsys):
    def error(url=server.url, *more):
        return fails(
            posttrain.main,
            grpo(policy, "runs/refused", "--rollouts-timeout", "1", "--rollouts", url, *more),
            capsys,
        )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert f"no answer from the vLLM server at {nobody}" in error(nobody)
    assert "ftp://x" in error("ftp://x")
    assert "serves policy: name one of them with --rollouts-model" in error(
        server.url, "--rollouts-model", "other"
    )
    short = serve(policy, context=20)
    assert "takes 20 tokens at most, and 88 are asked for" in error(short.url)
    two = serve(policy, names=("a", "b"))
    assert "serves a, b: name one" in error(two.url)
    locked = serve(policy, key="secret")
    assert "set VLLM_API_KEY" in error(locked.url)
    assert not asked(server, "/collective_rpc")
    server.fault = lambda path, reply: 404 if path == "/collective_rpc" else None
    assert "must run with VLLM_SERVER_DEV_MODE=1" in error()
    server.fault = lambda path, reply: (
        reply.update(success=False) if path == "/reset_prefix_cache" else None
    )
    assert "keeps keys and values of old weights" in error()
    assert "name them with --rollouts" in fails(
        posttrain.main, grpo(policy, "x", "--rollouts-folder", "y"), capsys
    )
    for other in (short, two, locked):
        other.stop()


def test_a_key_and_a_name_go_with_the_requests(policy, tmp_path, monkeypatch):
    server = serve(policy, key="secret", names=("a", "b"))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    servers = client(server, tmp_path, name="b")
    servers.update(OLMo2.load(policy))
    servers.generate([[1, 2]], 4)
    assert [body["model"] for body in asked(server, "/inference/v1/generate")] == ["b"]
    server.stop()


def test_log_probabilities_of_another_model_are_refused(here, policy, server, capsys):
    def fault(path, reply):
        for choice in reply.get("choices", ()):
            for token in choice["logprobs"]["content"]:
                token["logprob"] *= 1.5

    server.fault = fault
    error = fails(posttrain.main, grpo(policy, "runs/gap", "--rollouts", server.url), capsys)
    assert re.search(r"the sampler's log-probabilities are [\d.]+ nats a token from the tr", error)


# ---- sample.py and eval.py


def test_sample_and_eval_ask_servers_that_load_the_model(here, policy, server, capsys):
    sample.main(
        [str(policy), "Return the", "--temperature", "0", "--max-new-tokens", "8", "--threads", "1"]
    )
    alone = capsys.readouterr().out
    server.model = OLMo2(SIZES["tiny"])  # of other weights, until it is told
    flags = ["--rollouts", server.url]
    sample.main(
        [
            str(policy),
            "Return the",
            "--temperature",
            "0",
            "--max-new-tokens",
            "8",
            "--threads",
            "1",
            *flags,
        ]
    )
    assert capsys.readouterr().out == alone
    assert (policy / "model.safetensors").exists()

    table = {}
    for name, more in (("alone", []), ("served", flags)):
        path = here / f"{name}.json"
        eval_script.main(
            [
                str(policy),
                "--tasks",
                "math",
                "qa",
                "bpb",
                "--questions",
                "4",
                "--json",
                str(path),
                *more,
            ]
        )
        table[name] = json.loads(path.read_text())
    assert table["alone"] == table["served"]
    assert len(asked(server, "/inference/v1/generate")) == 1 + 8


def test_stop_strings_end_answers_of_servers(policy, server):
    from answers import complete

    tokenizer, model = get_tokenizer(str(policy)), OLMo2.load(policy)
    prompts = [tokenizer.encode("Return the"), tokenizer.encode("What is")]
    whole = complete(model, tokenizer, prompts, 12)
    stop = whole[0][3:5]
    alone = complete(model, tokenizer, prompts, 12, (stop,))
    assert alone[0] == whole[0].split(stop)[0] != whole[0]
    model.servers = serve_model((server.url,), str(policy))
    assert complete(model, tokenizer, prompts, 12, (stop,)) == alone
    assert asked(server, "/inference/v1/generate")[-1]["sampling_params"]["stop"] == [stop]


def test_a_training_state_cannot_be_served(made, server):
    state = next(Path(made).glob("step*"))
    with pytest.raises(
        UserError, match="is a training state, which vLLM cannot read: name its run"
    ):
        serve_model((server.url,), str(state))


# ---- real vLLM

VLLM = os.environ.get("VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(not VLLM, reason="no vLLM: VLLM_PYTHON names no interpreter")


@contextlib.contextmanager
def vllm(model, port, *more, cores="0"):
    """A real server on loopback."""
    env = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
    }
    flags = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --block-size 32 --max-model-len 128"
    flags += " --enable-scale-out --logprobs-mode processed_logprobs --served-model-name policy"
    command = [
        VLLM,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        *flags.split(),
        *more,
    ]
    log = open(f"vllm-{port}.log", "a")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def check_answers(servers, model):
    """Greedy tokens are ours; log-probabilities of sampled ones, too, at any temperature."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 900, (n,), generator=generator).tolist() for n in (3, 9, 40, 70)]
    assert servers.generate(prompts, 20, 0.0)[0] == model.generate(prompts, 20, 0.0)[0]
    for temperature in (1.0, 0.7):
        tokens, log_probs = servers.generate(prompts, 20, temperature, seed=[5, 6, 7, 2**63 - 1])
        for prompt, ids, values in zip(prompts, tokens, log_probs):
            row = torch.tensor([prompt + ids])
            targets = torch.full_like(row, -100)
            targets[0, len(prompt) - 1 : -1] = torch.tensor(ids)
            with torch.no_grad():
                expected = model.log_probs(row, targets, temperature)[targets != -100]
            assert (expected - torch.tensor(values)).abs().max() < 1e-4


@needs_vllm
def test_vllm_answers_as_we_do_and_follows_new_weights(here, policy, tmp_path):
    with vllm(policy, free_port()) as (process, url):
        servers = Servers((url,), patience=180)
        servers.folder = tmp_path / "weights"
        servers.check(128)
        model = OLMo2.load(policy)
        for scale in (1.0, 0.5):
            with torch.no_grad():
                model.lm_head.weight *= scale
                model.model.layers[0].mlp.down_proj.weight *= 3 * scale
            servers.update(model)
            check_answers(servers, model)

        # Three steps, in the middle of which it is killed and started anew.
        port = int(url.rsplit(":")[-1])
        done = []

        def restart():
            while not any(row["event"] == "step" for row in read_metrics(here / "runs/vllm")):
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGKILL)
            with vllm(policy, port) as (_, _):
                while not done:
                    time.sleep(0.1)

        (here / "runs/vllm").mkdir(parents=True)
        (here / "runs/vllm/metrics.jsonl").write_text("")
        thread = threading.Thread(target=restart)
        thread.start()
        try:
            posttrain.main(grpo(policy, "runs/vllm", "--rollouts", url))
        finally:
            done.append(True)
            thread.join()
        rows = [row for row in read_metrics(here / "runs/vllm") if row["event"] == "step"]
        assert len(rows) == 3 and all(row["logprob_gap"] < 1e-4 for row in rows)
        assert any(row["grad_norm"] > 0 for row in rows)


@needs_vllm
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="no vLLM on one core in two parts")
def test_two_ranks_and_a_server_in_two_parts(here, policy, tmp_path):
    grouped = OLMo2(replace(OLMo2.load(policy).config, heads=4, kv_heads=2, d_model=128))
    grouped.save(here / "grouped")
    get_tokenizer("laptop").save(here / "grouped")
    with vllm(here / "grouped", free_port(), "--tensor-parallel-size", "2", cores="0|1") as (
        _,
        url,
    ):
        servers = Servers((url,), patience=180)
        servers.folder = tmp_path / "weights"
        servers.check(128)
        servers.update(grouped)
        check_answers(servers, grouped)
        flags = grpo(here / "grouped", "runs/vllm-2", "--rollouts", url)
        statuses, log = launch(2, flags, script="posttrain")
        assert statuses == [0, 0], log
    rows = [row for row in read_metrics(here / "runs/vllm-2") if row["event"] == "step"]
    assert len(rows) == 3 and all(row["logprob_gap"] < 1e-4 for row in rows)
