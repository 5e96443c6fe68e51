"""torch.compile: a silent fall back to eager gives the right numbers, so here the graphs are counted.

Counting backends take the place of the default one, so no C++ compiler is needed: "eager" traces alone, PARTITION
also differentiates and decides what is computed again, as the default one does.
"""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import SHORT
from ranks import launch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import pretrain
from anneal import stage1_settings
from infra.distributed import is_compiled
from infra.files import read_json, write_json
from infra.settings import RunSettings
from infra.sharding import inference, shard_model
from model import SIZES, ChunkedLoss, Head, OLMo2
from sft import SFTSettings

PARTITION = "aot_eager_decomp_partition"
# (share of blocks, what of them runs again) -> kinds of blocks, so many graphs, and one of the loss
KINDS = {(0, "block"): 1, (1, "block"): 1, (1, "mlp"): 1, (0.25, "block"): 2, (0.25, "mlp"): 2}
GRAPHS = {kind: blocks + 1 for kind, blocks in KINDS.items()}


@pytest.fixture
def graphs(monkeypatch, request):
    """A counting backend, in the place of the default one."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(getattr(request, "param", "eager"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def prepared(share, part, compile, layers=12):
    model = OLMo2(dataclasses.replace(SIZES["tiny"], layers=layers))
    settings = RunSettings(recompute=share, recompute_part=part, compile=compile)
    shard_model(model, model.model.layers, settings, None, bf16=False)
    return model


def gradients(model, steps=2):
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 1000, (2, 64), generator=generator)
        model.zero_grad()
        ce_sum, z_sum, n = model.loss(tokens, tokens.roll(-1, 1))
        ((ce_sum + z_sum) / n).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("share, part", KINDS)
def test_a_graph_for_each_kind_of_block(share, part, graphs):
    model = prepared(share, part, compile="yes")
    gradients(model)
    assert graphs.frame_count == GRAPHS[share, part] and not counters["graph_break"]
    with inference(model):  # an evaluation, of another shape
        model.loss(torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long))
    gradients(model)
    assert graphs.frame_count == GRAPHS[share, part] and not counters["graph_break"]


def test_auto_compiles_on_gpus_alone(graphs):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    settings = [RunSettings(), SFTSettings(), pretrain.default_settings("7B")]
    assert all(c.compile == "auto" for c in settings)
    assert is_compiled("auto", gpu) and not is_compiled("auto", cpu)
    assert not is_compiled("auto", torch.device("mps"))
    assert all(is_compiled("yes", d) and not is_compiled("no", d) for d in (cpu, gpu))
    gradients(prepared(0, "block", compile="auto"), steps=1)
    assert graphs.frame_count == 0


@pytest.mark.parametrize("graphs", [PARTITION], indirect=True)
@pytest.mark.parametrize("share, part", [(1, "mlp"), (0.25, "block")])
def test_gradients_are_those_without_compilation(share, part, graphs):
    compiled = gradients(prepared(share, part, compile="yes"), steps=1)
    assert graphs.frame_count == GRAPHS[share, part]
    for name, gradient in gradients(prepared(share, part, compile="no"), steps=1).items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("graphs", [PARTITION], indirect=True)
def test_the_loss_has_a_graph_for_whole_chunks_and_one_for_any_rest(graphs, monkeypatch):
    head, hidden = Head(48, 1024), torch.randn(600, 48, requires_grad=True)
    targets = torch.randint(0, 1024, (600,)).masked_fill(torch.rand(600) < 0.2, -100)
    monkeypatch.setitem(ChunkedLoss.CHUNK, "cpu", 128 * 1024)

    def results(rows):
        ce, z = head.loss(hidden[:rows], targets[:rows], 1e-4)
        return ce, z, *torch.autograd.grad(ce + z, [hidden, head.weight])

    lengths = (256, 300, 511, 600)  # the second and the fourth have a rest of other lengths
    eager = [results(rows) for rows in lengths]
    assert graphs.frame_count == 0
    head.compile()
    for rows, expected in zip(lengths, eager):
        torch.testing.assert_close(results(rows), expected, rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == 2 and not counters["graph_break"]
    with inference(head):
        head.loss(hidden[:77], targets[:77], 1e-4)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("share, part", [(0, "block"), (1, "mlp")])
def test_few_graphs_for_the_many_shapes_of_post_training(share, part, graphs):
    model = prepared(share, part, compile="yes", layers=2)

    def once():
        for rows, width in ((4, 20), (3, 31), (8, 12), (1, 64), (2, 33), (1, 19)):
            tokens = torch.randint(0, 1000, (rows, width))
            model.log_probs(tokens, tokens).sum().backward()

    once()
    first = graphs.frame_count
    assert 1 <= first <= 4 and not counters["graph_break"]
    once()
    assert graphs.frame_count == first


FLAGS = [*SHORT, "--tokens", "512", "--layers", "12", "--eval-every", "2", "--val-tokens", "64"]


def losses(folder):
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]


def test_a_run_and_its_ranks_compile_as_many(graphs, here):
    flags = [*FLAGS, "--recompute", "1", "--recompute-part", "mlp"]  # as the 32B
    pretrain.main([*flags, "--out", "runs/eager"])
    assert graphs.frame_count == 0
    pretrain.main([*flags, "--compile", "yes", "--out", "runs/alone"])
    assert graphs.frame_count == 2 and not counters["graph_break"]
    statuses, text = launch(2, [*flags, "--compile", "yes", "--out", "runs/two"], "count_graphs")
    assert statuses == [0, 0], text
    assert text.count("graphs 2, breaks 0") == 2, text
    eager = losses("runs/eager")
    assert losses("runs/alone") == pytest.approx(eager, rel=1e-5)
    assert losses("runs/two") == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("before, now", [(True, "yes"), (False, "no")])
def test_a_run_from_before_auto_goes_on_and_is_annealed(before, now, run):
    record = read_json(run / "run.json")
    record["config"]["compile"]["value"] = before
    write_json(run / "run.json", record)
    assert stage1_settings(run, "tiny").compile == now
    pretrain.main([*SHORT, "--tokens", "1152", "--out", str(run)])
    assert len(losses(run)) == 9
