"""model.py against transformers' Olmo2ForCausalLM, and against its own words."""

import dataclasses
import doctest
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Olmo2ForCausalLM

import model as module
from infra.files import UserError
from model import SIZES, ChunkedLoss, ModelConfig, OLMo2, add_product

SMALL = ModelConfig(
    layers=2, d_model=64, heads=4, kv_heads=4, ffn=96, vocab=256, context=128, eos=254, pad=255
)
SHAPES = {
    "MHA": SMALL,
    "GQA": dataclasses.replace(SMALL, kv_heads=2),
    "MQA": dataclasses.replace(SMALL, kv_heads=1),
    "odd FFN": dataclasses.replace(SMALL, ffn=97),
    "head 128": dataclasses.replace(SMALL, d_model=256, heads=2, kv_heads=2),
    "vocabulary 100,352": dataclasses.replace(
        SMALL, d_model=32, vocab=100_352, eos=100_257, pad=100_277
    ),
    "T 8,192": dataclasses.replace(SMALL, d_model=32, heads=2, kv_heads=2, context=8192),
}


def make_pair(config, path, seed=0):
    """Our model with unequal norm weights, and transformers' model opened from the directory that ours wrote."""
    ours = OLMo2(config, seed)
    generator = torch.Generator().manual_seed(1)
    for p in (
        ours.parameters()
    ):  # norms of 1 would hide a missing one; a larger std makes attention matter
        p.data = p.data + torch.rand(p.shape, generator=generator) if p.ndim == 1 else p.data * 4
    ours.save(path)
    return ours, Olmo2ForCausalLM.from_pretrained(path, dtype=torch.float32)


def tokens_for(config, rows=2, length=None, seed=0):
    length = length or (8192 if config.context == 8192 else 48)
    # Without the pad id: transformers' embedding gives it no gradient, OLMo's own trainers do.
    tokens = torch.randint(
        0,
        config.pad,
        (1 if length == 8192 else rows, length),
        generator=torch.Generator().manual_seed(seed),
    )
    targets = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], dim=1)
    targets[:, 5:9] = -100  # some masked targets
    return tokens, targets


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def reference_loss(logits, targets, z_loss):
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return (
        ce,
        z_loss * (logits.logsumexp(-1).square() * (targets != -100)).sum(),
        (targets != -100).sum(),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_equal_transformers(shape, tmp_path):
    config = SHAPES[shape]
    ours, theirs = make_pair(config, tmp_path)
    tokens, targets = tokens_for(config)
    reference = theirs(tokens).logits
    assert difference(ours(tokens), reference) < 1e-5
    z_loss = 1e-3  # large enough to matter in the gradients
    for ours_term, theirs_term in zip(
        ours.loss(tokens, targets, z_loss), reference_loss(reference, targets, z_loss)
    ):
        assert abs(ours_term.item() / theirs_term.item() - 1) < 1e-6
    for network, terms in (
        (ours, ours.loss(tokens, targets, z_loss)),
        (theirs, reference_loss(reference, targets, z_loss)),
    ):
        ((terms[0] + terms[1]) / terms[2]).backward()
    theirs_gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert difference(p.grad, theirs_gradients[name].grad) < 1e-5, name


@pytest.mark.parametrize(
    "size, total",
    [
        ("1B", 1_484_916_736),
        ("7B", 7_298_617_344),
        ("13B", 13_716_198_400),
        ("32B", 32_234_279_936),
    ],
)
def test_published_parameter_counts(size, total):
    with torch.device("meta"):
        network = OLMo2(SIZES[size])
    assert sum(p.numel() for p in network.parameters()) == SIZES[size].parameters["total"] == total


def test_released_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in OLMo2(SIZES["32B"]).named_parameters()}
    assert len(shapes) == 3 + 64 * 11
    assert shapes["model.layers.63.self_attn.k_norm.weight"] == [1024]  # over all key heads jointly
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == [1024, 5120]
    assert shapes["model.layers.0.mlp.down_proj.weight"] == [5120, 27_648]
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == [100_352, 5120]


def test_initialisation_is_truncated_and_depends_on_names_alone():
    network = OLMo2(dataclasses.replace(SMALL, vocab=4096), seed=3)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
        else:
            assert p.abs().max() <= 0.06 and abs(p.std().item() / (0.9866 * 0.02) - 1) < 0.05, name
    torch.manual_seed(99)  # nor on the global generator, nor on how many layers there are
    deeper = OLMo2(dataclasses.replace(SMALL, vocab=4096, layers=3), seed=3).state_dict()
    assert all(torch.equal(value, deeper[name]) for name, value in network.state_dict().items())
    assert not torch.equal(OLMo2(SMALL, 4).lm_head.weight, OLMo2(SMALL, 5).lm_head.weight)
    scaled = OLMo2(dataclasses.replace(SMALL, init="olmo0424", d_model=256, ffn=1024)).model.layers
    for layer in (0, 1):
        assert (
            abs(
                scaled[layer].self_attn.o_proj.weight.std().item()
                / (0.9866 / math.sqrt(2 * 256 * (layer + 1)))
                - 1
            )
            < 0.05
        )
        assert (
            abs(scaled[layer].mlp.up_proj.weight.std().item() / (0.9866 / math.sqrt(256)) - 1)
            < 0.05
        )


def test_ablations_change_the_forward_pass_and_survive_a_directory(tmp_path):
    tokens, targets = tokens_for(SMALL)
    plain = OLMo2(SMALL)(tokens)
    x = OLMo2(SMALL).model.embed_tokens(tokens)
    for field, value in (("norm_position", "pre"), ("qk_norm", False), ("norm", "layernorm")):
        network = OLMo2(dataclasses.replace(SMALL, **{field: value}))
        assert difference(network(tokens), plain) > 1e-3, field
        ce, z, n = network.loss(tokens, targets)
        ((ce + z) / n).backward()
        network.save(tmp_path / field)
        assert torch.equal(OLMo2.load(tmp_path / field)(tokens), network(tokens))
        with pytest.raises(
            Exception, match="olmo2-ablation"
        ):  # transformers must not open it as what it is not
            AutoConfig.from_pretrained(tmp_path / field)
    block = OLMo2(dataclasses.replace(SMALL, norm="layernorm")).model.layers[0]
    assert not list(block.post_attention_layernorm.parameters())
    normed = block.post_attention_layernorm(x)
    assert (
        normed.mean(-1).abs().max() < 1e-5
        and abs(normed.var(-1, unbiased=False).mean().item() - 1) < 1e-2
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation put out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
        )
        return out


def test_full_logits_never_exist_and_no_product_is_made_twice(monkeypatch):
    config = dataclasses.replace(SMALL, d_model=32, vocab=4096)
    monkeypatch.setitem(ChunkedLoss.CHUNK, "cpu", 64 * config.vocab)
    network = OLMo2(config)
    tokens, targets = tokens_for(config, rows=4, length=128)
    count = {
        torch.ops.aten.addmm_: lambda _, a, b, out_shape=None, **__: 2 * a[0] * a[1] * b[1]
    }  # torch counts addmm alone
    with LargestTensor() as largest, FlopCounterMode(display=False, custom_mapping=count) as flops:
        ce, z, n = network.loss(tokens, targets)
        ((ce + z) / n).backward()
    logits = tokens.numel() * config.vocab
    assert largest.elements < logits / 2
    assert flops.get_total_flops() == tokens.numel() * 6 * (
        config.parameters["total"] - config.parameters["embed"] - 9 * 32
    )  # 9 norms
    monkeypatch.undo()
    whole = OLMo2(config)
    ce2, z2, _ = whole.loss(tokens, targets)
    ((ce2 + z2) / n).backward()
    assert abs(ce.item() / ce2.item() - 1) < 1e-6 and abs(z.item() / z2.item() - 1) < 1e-6
    assert all(
        difference(p.grad, q.grad) < 1e-5 for p, q in zip(network.parameters(), whole.parameters())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_in_fp32(dtype):
    total = torch.full((8, 6), 256.0)  # in bf16, the next number is 258
    for _ in range(100):
        add_product(
            total, torch.full((8, 4), 0.25, dtype=dtype), torch.full((4, 6), 0.25, dtype=dtype)
        )
    assert total.dtype == torch.float32 and (total == 256 + 100 * 4 / 16).all()
    # On GPUs by a kernel that a CPU lacks; here is what can be seen of it.
    assert "dtype_out" in torch.ops.aten.addmm.overloads()


@pytest.mark.parametrize(
    "kind, vocab, rows",
    [("cpu", 1024, 8192), ("cpu", 100_352, 83), ("cuda", 100_352, 1280), ("cuda", 2**22, 64)],
)
def test_rows_of_a_chunk_are_whole_tiles_where_they_can_be(kind, vocab, rows):
    assert ChunkedLoss.rows(torch.device(kind), vocab) == rows


def test_loss_accumulates_and_refuses_other_backwards():
    network = OLMo2(SMALL)
    tokens, targets = tokens_for(SMALL, rows=4)
    n = (targets != -100).sum()
    ce, z, _ = network.loss(tokens, targets)
    ((ce + z) / n).backward()
    whole = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        ce, z, _ = network.loss(tokens[rows], targets[rows])
        ((ce + z) / n).backward()
    assert all(difference(p.grad, g) < 1e-5 for p, g in zip(network.parameters(), whole))
    ce, z, _ = network.loss(tokens, targets)
    with pytest.raises(RuntimeError, match="both terms"):
        ce.backward()
    ce, z, _ = network.loss(tokens, targets, z_loss=0.0)
    ce.backward()  # without a z-loss there is one term
    with torch.no_grad():
        assert network.loss(tokens, targets)[0].item() == pytest.approx(ce.item(), rel=1e-6)
    all_masked = torch.full_like(targets, -100)
    ce, z, count = network.loss(tokens, all_masked)
    assert (ce.item(), z.item(), count.item()) == (0, 0, 0)


# ---- files


def test_directories_round_trip_both_ways(tmp_path):
    ours, theirs = make_pair(SHAPES["GQA"], tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    ours.save(tmp_path / "sharded", shard_bytes=40_000)
    for folder in ("theirs", "sharded"):
        assert len(list((tmp_path / folder).glob("model-*-of-*.safetensors"))) > 2
        back = OLMo2.load(tmp_path / folder)
        assert back.config == ours.config
        assert all(torch.equal(p, q) for p, q in zip(back.parameters(), ours.parameters()))
    assert torch.equal(
        Olmo2ForCausalLM.from_pretrained(tmp_path / "sharded").lm_head.weight, ours.lm_head.weight
    )
    ours.save(tmp_path / "sharded")  # renewed as one file: the old shards and their index are gone
    assert [p.name for p in (tmp_path / "sharded").glob("*safetensors*")] == ["model.safetensors"]
    half = OLMo2.load(tmp_path / "theirs", dtype=torch.bfloat16)
    half.save(tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16/config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = OLMo2.load(tmp_path / "bf16")
    assert all(
        torch.equal(p, q.bfloat16().float()) for p, q in zip(wide.parameters(), ours.parameters())
    )


def test_what_does_not_fit_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    OLMo2(SMALL).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(words, tensors=None, **changes):
        save_file(tensors or weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            OLMo2.load(tmp_path)

    refused(
        "model.norm.weight is missing",
        {k: v for k, v in weights.items() if k != "model.norm.weight"},
    )
    refused("surplus is not in this model", weights | {"surplus": torch.ones(2)})
    refused(
        r"lm_head.weight is \[255, 64\], not \[256, 64\]",
        weights | {"lm_head.weight": torch.ones(255, 64)},
    )
    refused("type 'llama'", model_type="llama")
    refused("tie_word_embeddings", tie_word_embeddings=True)
    refused("lacks hidden_size", hidden_size=None)
    refused("heads 4 must be a multiple of kv_heads 3", num_key_value_heads=3)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="damaged"):
        OLMo2.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no .safetensors file"):
        OLMo2.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        OLMo2.load(tmp_path / "nothing")
    OLMo2(SMALL).save(tmp_path, shard_bytes=50_000)
    first = sorted(tmp_path.glob("model-0*"))[0]
    first.rename(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="lacks model-00001"):
        OLMo2.load(tmp_path)
    (tmp_path / "other.safetensors").rename(first)
    save_file(weights, tmp_path / "stale.safetensors")
    with pytest.raises(UserError, match="stale.safetensors beside"):
        OLMo2.load(tmp_path)


def test_table_of_sizes(capsys):
    module.main()
    table = capsys.readouterr().out
    assert all(f"{c.parameters['total']:,}" in table for c in SIZES.values())


def test_docstrings():
    assert doctest.testmod(module).failed == 0
