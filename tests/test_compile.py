"""torch.compile: a silent fall back to eager gives the right numbers, so here the graphs are counted.

Counting backends take the place of the default one, so no C++ compiler is needed: "eager" traces alone, PARTITION
also differentiates and decides what is computed again, as the default one does.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import SHORT
from ranks import launch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import pretrain
from infra.settings import RunSettings
from infra.sharding import inference, shard_model
from model import SIZES, OLMo2

PARTITION = "aot_eager_decomp_partition"
# (share of blocks, what of them runs again) -> kinds of blocks, so many graphs
KINDS = {(0, "block"): 1, (1, "block"): 1, (1, "mlp"): 1, (0.25, "block"): 2, (0.25, "mlp"): 2}


@pytest.fixture
def graphs(monkeypatch, request):
    """A counting backend, in the place of the default one."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(getattr(request, "param", "eager"))
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile(block, backend=counter))
    yield counter
    torch._dynamo.reset()


def prepared(share, part, compiled, layers=12):
    model = OLMo2(dataclasses.replace(SIZES["tiny"], layers=layers))
    settings = RunSettings(recompute=share, recompute_part=part, compile=compiled)
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
    model = prepared(share, part, compiled=True)
    gradients(model)
    assert graphs.frame_count == KINDS[share, part] and not counters["graph_break"]
    with inference(model):  # an evaluation, of another shape
        model.loss(torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long))
    gradients(model)
    assert graphs.frame_count == KINDS[share, part] and not counters["graph_break"]


@pytest.mark.parametrize("graphs", [PARTITION], indirect=True)
@pytest.mark.parametrize("share, part", [(1, "mlp"), (0.25, "block")])
def test_gradients_are_those_without_compilation(share, part, graphs):
    compiled = gradients(prepared(share, part, compiled=True), steps=1)
    assert graphs.frame_count == KINDS[share, part]
    for name, gradient in gradients(prepared(share, part, compiled=False), steps=1).items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("share, part", [(0, "block"), (1, "mlp")])
def test_few_graphs_for_the_many_shapes_of_post_training(share, part, graphs):
    model = prepared(share, part, compiled=True, layers=2)

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
    pretrain.main([*flags, "--compile", "--out", "runs/alone"])
    assert graphs.frame_count == 1 and not counters["graph_break"]
    statuses, text = launch(2, [*flags, "--compile", "--out", "runs/two"], "count_graphs")
    assert statuses == [0, 0], text
    assert text.count("graphs 1, breaks 0") == 2, text
    eager = losses("runs/eager")
    assert losses("runs/alone") == pytest.approx(eager, rel=1e-5)
    assert losses("runs/two") == pytest.approx(eager, rel=1e-5)
