"""The OLMo 2 transformer, whole: sizes, blocks, initialisation, loss, generation, weights in and out.

What OLMo 2 changes in a Llama-like decoder (paper: arXiv 2501.00656, section 3.3):
  1. RMSNorm stands on the *output* of attention and MLP, before the residual add; the stream itself is never normalised.
  2. QK-norm: queries and keys are RMS-normalised over all heads at once, before the split into heads and before RoPE.
  3. z-loss: the squared log of the softmax's normaliser is added to the loss, so that logits do not drift.
  4. Every matrix starts from one truncated normal, std 0.02, with no scaling by depth or width.
  5. No bias anywhere, RoPE theta 500,000, SwiGLU, an untied head padded to a multiple of 128 columns.

    python model.py                     # the table of sizes: parameters, FLOPs, cache and training memory
    OLMo2(SIZES["190M"])                # random weights, the same on every machine
    OLMo2.load("runs/tiny/pretrain")    # a run, one of its checkpoints, or a Hugging Face directory

Module names are those of the released checkpoints, so loading is reading: there is no table of names.
Shapes: B batch, T time, D model width, H query heads, G key/value heads, K head width, V vocabulary, N = B*T.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from infra.files import UserError, read_json, write_json


def run_cli(main) -> None:
    """Run a script's `main()`: a UserError becomes one line on standard error, however many ranks there are, and exit status 2."""
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        alone = distributed.is_initialized() and not error.everywhere  # before they meet, all ranks read the same command line
        if rank == 0 or alone:
            print(f"{f'rank {rank}: ' if rank else ''}error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted" if int(os.environ.get("RANK", 0)) == 0 else 1)


def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes); (0, 1) without a process group."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def from_all(value, group=None) -> list:
    """The values of all ranks, by rank."""
    values = [value]
    if distributed.is_initialized():
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value, group)
    return values


def together(work, group=None):
    """Run `work()` on every rank; returns its result here. A UserError, or the system's, on one rank is raised on all."""
    result, problem = None, None
    try:
        result = work()
    except (UserError, OSError) as error:
        problem = str(error)
    problems: dict[str, list[int]] = {}
    for rank, text in enumerate(from_all(problem, group)):
        if text:
            problems.setdefault(text, []).append(rank)
    if problems:
        raise UserError("; ".join(text if 0 in ranks else f"rank {', '.join(map(str, ranks[:8]))}: {text}" for text, ranks in problems.items()),
                        everywhere=True)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The lower half are the paper's ablations: change one and train again."""

    layers: int
    d_model: int  # D
    heads: int  # H; each is D / H wide
    kv_heads: int  # G: keys and values shared by H / G queries each (GQA; only the 32B has G < H)
    ffn: int  # hidden width of the SwiGLU
    vocab: int = 100_352  # V: the tokenizer's 100,278 entries, padded to a multiple of 128
    context: int = 4096  # longest sequence that the model is trained on, tokens
    eos: int = 100_257  # id of <|endoftext|>
    pad: int = 100_277  # id of <|pad|>
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    head: Literal["lm", "score"] = "lm"  # score: one column instead of V, a reward or value model (posttrain.py)
    # The ablations of section 3. The released models have the first value of each.
    norm_position: Literal["reordered", "pre"] = "reordered"  # pre: x + f(norm(x)), as in GPT-2 and Llama
    qk_norm: bool = True
    norm: Literal["rms", "layernorm"] = "rms"  # layernorm: non-parametric, as in OLMo-0424
    init: Literal["olmo2", "olmo0424"] = "olmo2"  # olmo0424: scaled by width and depth
    embed_std: float = 0.02  # std of the input embedding under init=olmo2

    def __post_init__(self):
        rules = {
            "layers, d_model, heads, kv_heads, ffn, vocab and context must be positive": min(
                self.layers, self.d_model, self.heads, self.kv_heads, self.ffn, self.vocab, self.context) > 0,
            f"d_model {self.d_model} must be an even multiple of heads {self.heads}": self.d_model % (2 * self.heads) == 0,
            f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}": self.heads % self.kv_heads == 0,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise UserError("; ".join(broken))

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def parameters(self) -> dict[str, int]:
        """Exact counts: `total`, and of it `embed`, the input embedding, which costs no FLOPs."""
        norms = (2 * self.d_model + self.qk_norm * (self.heads + self.kv_heads) * self.head_dim) * (self.norm == "rms")
        matrices = 2 * self.d_model * (self.heads + self.kv_heads) * self.head_dim + 3 * self.d_model * self.ffn
        embed = self.vocab * self.d_model
        head = embed if self.head == "lm" else self.d_model
        return {"total": self.layers * (matrices + norms) + embed + head + self.d_model * (self.norm == "rms"),
                "embed": embed}

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs per token, forward and backward: 6 * (N - embed) + 12 * layers * D * seq_len.

        6 = 2 (multiply, add) x 3 (forward, and two products backward). The second term is attention, counted in full
        as most published MFU figures do; a causal kernel does half of it.
        """
        return 6 * (self.parameters["total"] - self.parameters["embed"]) + 12 * self.layers * self.d_model * seq_len


# Released: 1B, 7B, 13B, 32B (paper Table 3, official configs). The ladder has OLMo-core's olmo2_* shapes
# (nn/transformer/config.py); its names count the head but not the input embedding. `tiny` is ours, for the laptop.
SIZES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(layers=4, d_model=96, heads=4, kv_heads=4, ffn=256, vocab=1024, context=128, eos=1000, pad=1001),
    "14M": ModelConfig(layers=4, d_model=128, heads=8, kv_heads=8, ffn=512),
    "30M": ModelConfig(layers=4, d_model=256, heads=8, kv_heads=8, ffn=768),
    "60M": ModelConfig(layers=8, d_model=384, heads=8, kv_heads=8, ffn=1536),
    "190M": ModelConfig(layers=12, d_model=768, heads=12, kv_heads=12, ffn=3072),
    "370M": ModelConfig(layers=16, d_model=1024, heads=16, kv_heads=16, ffn=4096),
    "760M": ModelConfig(layers=16, d_model=1536, heads=16, kv_heads=16, ffn=6144),
    "1B": ModelConfig(layers=16, d_model=2048, heads=16, kv_heads=16, ffn=8192),
    "7B": ModelConfig(layers=32, d_model=4096, heads=32, kv_heads=32, ffn=11_008),
    "13B": ModelConfig(layers=40, d_model=5120, heads=40, kv_heads=40, ffn=13_824),
    "32B": ModelConfig(layers=64, d_model=5120, heads=40, kv_heads=8, ffn=27_648),
}

# Dense bf16 peak, FLOP/s, from the vendors' data sheets; the longest matching name wins, others have no MFU.
PEAK_FLOPS = {"H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
              "MI300X": 1307e12, "MI250X": 191.5e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the accelerator (for MFU), or None where it is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_FLOPS if all(word in name.replace("-", " ").split() for word in key.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def best_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, else Apple's MPS, else the CPU. Raises UserError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there.get(name.split(":")[0]):
        raise UserError(f"no device {name!r} here: use one of auto, {', '.join(kind for kind, ok in there.items() if ok)}")
    return torch.device(name)


# ----------------------------------------------------------------------------------------------------------------------
# The transformer


class Norm(nn.Module):
    """RMSNorm with a weight and no bias, or the ablation's LayerNorm without parameters. In fp32, then cast back."""

    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(width)) if config.norm == "rms" else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.weight is None:
            return F.layer_norm(y, y.shape[-1:], eps=self.eps).type_as(x)
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


def rope_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, K] of the angle position * theta^(-2i/K), in fp32. Computed anew: no buffer to shard.

    Both halves of K turn by the same K/2 angles; the sine of the first half is negated, for `rotate`.
    """
    # In this very order of operations, as upstream: an ulp of a frequency is, at position 8,192, an error one can measure.
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim)
    angle = positions.float()[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) of x [B, heads, T, K] by its angle, in fp32 (the half-split form of Llama)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.addcmul(x.float() * cos, torch.cat((b, a), dim=-1), sin).type_as(x)  # (a cos - b sin, b cos + a sin)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        kv_width = c.kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.k_proj = nn.Linear(c.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(c.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.q_norm = Norm(c.d_model, c) if c.qk_norm else nn.Identity()
        self.k_norm = Norm(kv_width, c) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache=None, positions=None, mask=None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. With a cache (see `OLMo2.stream`), keys and values are kept at `positions` [B, T].

        mask [B, 1, T, width]: which of the first `width` kept ones each token sees; without it, x is all there is.
        """
        q = self.q_norm(self.q_proj(x))  # B T D: one mean square over all heads jointly
        k = self.k_norm(self.k_proj(x))
        v = self.v_proj(x)
        q, k, v = (rearrange(y, "b t (h k) -> b h t k", k=self.head_dim) for y in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            for kept, new in zip(cache, (k, v)):  # kept: B G capacity K
                kept[rows, :, positions] = rearrange(new, "b g t k -> b t g k")
            if mask is not None:
                k, v = (kept[:, :, : mask.shape[-1]] for kept in cache)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(rearrange(y, "b h t k -> b t (h k)"))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.d_model, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.post_attention_layernorm = Norm(c.d_model, c)
        self.post_feedforward_layernorm = Norm(c.d_model, c)
        self.pre_norm = c.norm_position == "pre"

    def forward(self, x: Tensor, *context) -> Tensor:
        if self.pre_norm:  # the ablation: the same two norms, on the inputs
            x = x + self.self_attn(self.post_attention_layernorm(x), *context)
            return x + self.mlp(self.post_feedforward_layernorm(x))
        x = x + self.post_attention_layernorm(self.self_attn(x, *context))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Transformer(nn.Module):
    """Everything but the head: tokens [B, T] -> normalised hidden states [B, T, D]."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab, c.d_model)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = Norm(c.d_model, c)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: list | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # 1 T
        cos, sin = rope_tables(positions[:, None], self.config)  # B 1 T K
        mask = None
        if cache and positions.min() > 0:  # these tokens follow kept ones, in every row: each sees its own row up to its position
            mask = (torch.arange(int(positions.max()) + 1, device=tokens.device) <= positions[..., None])[:, None]  # B 1 T width
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, *((cache[i], positions, mask) if cache else ()))
        return self.norm(x)


class OLMo2(nn.Module):
    """The language model. `model(tokens [B, T]) -> logits [B, T, V]`, fp32."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        """Random weights from `seed`; under `torch.device("meta")`, shapes alone."""
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # no memory and no default initialisation, which ours would overwrite
            self.model = Transformer(config)
            if config.head == "lm":
                self.lm_head = nn.Linear(config.d_model, config.vocab, bias=False)
            else:
                self.score = nn.Linear(config.d_model, 1, bias=False)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int, names: tuple[str, ...] = ()) -> None:
        """Truncated normals, cut at three standard deviations; norms start at 1 (paper section 3.2). `names`: of these alone.

        Each parameter has a stream of random numbers of its own, seeded by its name, and element i takes the i-th: the same
        weights on any device, at any world size and sharding, and a rank draws no more than its own part.
        """
        for name, parameter in self.named_parameters():
            if names and name not in names:
                continue
            part, start = local_part(parameter)
            if parameter.ndim == 1:
                part.fill_(1.0)
                continue
            std = self.config.embed_std if "embed_tokens" in name else 0.02
            if name == "score.weight":
                std = 1 / math.sqrt(self.config.d_model + 1)  # open-instruct reward_modeling.py
            if self.config.init == "olmo0424":  # 1/sqrt(fan-in); outputs of a block also 1/sqrt(2 * layer), from 1
                std = 1 / math.sqrt(self.config.d_model if "embed_tokens" in name else parameter.shape[1])
                if "o_proj" in name or "down_proj" in name:
                    std /= math.sqrt(2 * (int(name.split(".")[2]) + 1))
            cut = math.erf(3 / math.sqrt(2))
            for i in range(0, part.numel(), 2**24):  # a piece at a time: 64 MiB
                piece = part.view(-1)[i : i + 2**24]
                stream = np.random.PCG64([seed, zlib.crc32(name.encode())]).advance((start + i) // 2)  # one draw makes two numbers
                odd = (start + i) % 2
                uniform = np.random.Generator(stream).random(piece.numel() + odd, np.float32)[odd:]
                drawn = torch.from_numpy(uniform).mul_(2 * cut).sub_(cut).erfinv_().mul_(std * math.sqrt(2))  # the inverse of the normal's CDF
                piece.copy_(drawn.clamp_(-3 * std, 3 * std))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens)).float()

    def loss(self, tokens: Tensor, targets: Tensor, z_loss: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
        """Summed cross-entropy, summed z-loss (times its coefficient) and the number of targets, each a scalar.

        tokens, targets: [B, T]; targets[b, t] is the token that follows tokens[b, t], or -100 to leave it out.
        Train with `((ce_sum + z_sum) / n).backward()`, n counted over all micro-batches and ranks. That is the one
        supported backward, since both gradients are made together; another raises RuntimeError.
        Source: paper section 3.3.3; OLMo-core nn/functional/cross_entropy_loss.py.
        """
        hidden = self.model(tokens)
        ce_sum, z_sum = ChunkedLoss.apply(
            rearrange(hidden, "b t d -> (b t) d"), self.lm_head.weight, targets.flatten(), z_loss, torch.is_grad_enabled())
        return ce_sum, z_sum, (targets != -100).sum()

    def log_probs(self, tokens: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) of each target, [B, T] in fp32; 0 where targets, as in `loss`, are -100.

        For objectives that need a value per token (DPO, PPO, GRPO). The head sees the real targets alone, a chunk of them at a
        time: where there are several chunks, the backward pass makes each one's logits again instead of keeping them.
        """
        real = targets != -100
        hidden, ids, weight = self.model(tokens)[real], targets[real], self.lm_head.weight  # n D, n
        size = max(64, ChunkedLoss.CHUNK[hidden.device.type] // self.config.vocab)

        def chunk(h: Tensor, target: Tensor) -> Tensor:
            return -F.cross_entropy((h @ weight.to(h.dtype).T).float() / temperature, target, reduction="none")

        if len(ids) > size and torch.is_grad_enabled():
            chunk = functools.partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
        parts = [chunk(h, target) for h, target in zip(hidden.split(size), ids.split(size))]
        return torch.zeros_like(tokens, dtype=torch.float32).masked_scatter(real, torch.cat(parts))

    def scores(self, tokens: Tensor) -> Tensor:
        """[B, T] in fp32, of a model with `head="score"`: what the text up to each token is worth."""
        return (self.model(tokens).float() @ self.score.weight.float().T)[..., 0]

    # ---- generation

    def empty_cache(self, rows: int, capacity: int) -> list[list[Tensor]]:
        """Keys and values [rows, G, capacity, K] of each layer, for `self.model(tokens, positions, cache)` to fill."""
        weight = self.lm_head.weight
        shape = (rows, self.config.kv_heads, capacity, self.config.head_dim)
        return [[torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in "kv"] for _ in self.model.layers]

    @torch.no_grad()
    def stream(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
               top_p: float = 1.0, eos: int | None = None, seed: int | list[int] = 0,
               ended: Callable[[int, int], bool] | None = None) -> Iterator[tuple[list[int], list[int], list[float]]]:
        """Like `generate`, a step at a time: yields (rows, their new tokens, their log-probabilities) until all end.

        A row ends, too, when `ended(row, its new token)` says so, after that token.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not prompts or min(lengths) == 0:
            raise UserError("a prompt needs at least one token (OLMo 2 has no BOS: begin with the EOS id if there is no text)")
        if max(lengths) >= self.config.context:
            raise UserError(f"a prompt of {max(lengths)} tokens leaves no room in the model's context of {self.config.context}")
        if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and max_new_tokens >= 0):
            raise UserError(f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens} must be >= 0, "
                            f"top_p {top_p} in (0, 1]")
        if min([seed] if isinstance(seed, int) else seed) < 0:
            raise UserError(f"a seed must be at least 0, got {seed}")
        device = self.lm_head.weight.device
        # Row i's draws depend on its seed and the step alone: not on its neighbours, nor on the device.
        row_seeds = [[seed, i] for i in range(len(prompts))] if isinstance(seed, int) else seed
        draws = torch.tensor(np.stack([np.random.default_rng(s).random(max_new_tokens, np.float32) for s in row_seeds]))

        # Each distinct prompt is read once. They are padded on the right: being causal, no position sees the padding, and decoding
        # overwrites it.
        B, longest = len(prompts), max(lengths)
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        which = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device)
        tokens = torch.zeros(len(index), longest, dtype=torch.long)
        for row, prompt in zip(tokens, index):
            row[: len(prompt)] = torch.tensor(prompt)
        capacity = min(longest + max_new_tokens, self.config.context)
        cache = self.empty_cache(len(index), capacity)
        hidden = self.model(tokens.to(device), torch.arange(longest, device=device).repeat(len(index), 1), cache)
        if len(index) < B:
            cache = [[kept[which] for kept in layer] for layer in cache]
        position = torch.tensor(lengths, device=device)  # where each row's next token goes
        hidden = hidden[which, position - 1]
        rows = torch.arange(B)  # which prompt each row of the batch belongs to
        running = torch.ones(B, dtype=torch.bool)
        for step in range(max_new_tokens):
            log_probs = F.log_softmax(self.lm_head(hidden).float() / (temperature or 1.0), dim=-1)  # B V
            new = pick(log_probs, draws[rows, step].to(device), temperature, top_k, top_p)
            chosen = log_probs.gather(1, new[:, None])[:, 0].cpu()
            ids = new.cpu()
            yield rows[running].tolist(), ids[running].tolist(), chosen[running].tolist()
            running &= (position.cpu() < capacity) & (ids != eos if eos is not None else True)
            if ended:
                running &= torch.tensor([not (on and ended(row, token)) for on, row, token in zip(running, rows.tolist(), ids.tolist())])
            if not running.any():
                return
            if 2 * running.sum() <= len(rows):  # half of the rows have ended: go on without them
                keep = running.nonzero()[:, 0].to(device)
                cache = [[kept[keep] for kept in layer] for layer in cache]
                new, position, rows, running = new[keep], position[keep], rows[running], running[running]
            # A row that has ended but is still here writes over its last slot, and is not read.
            position = position.clamp(max=capacity - 1)
            hidden = self.model(new[:, None], position[:, None], cache)[:, 0]
            position = position + 1

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, eos: int | None = None,
                 seed: int | list[int] = 0) -> tuple[list[list[int]], list[list[float]]]:
        """Continue each prompt (one token or more, of any lengths) with a key/value cache.

        temperature 0 is greedy; top_k keeps the k likeliest tokens (0: all), top_p the fewest that reach that mass.
        A row ends with `eos` (which is returned), after max_new_tokens, or at the model's context. Row i draws from a
        generator of its own: (seed, i) for one seed, seed[i] for a list, so that a row is the same in any batch.
        Returns the new tokens, and the log-probability of each under softmax(logits / temperature) over the whole
        vocabulary (temperature 1 when greedy), as importance ratios need it: before top_k and top_p.
        Raises UserError on an empty prompt, or one that fills the context.
        """
        tokens: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        for rows, new, chosen in self.stream(prompts, max_new_tokens, temperature, top_k, top_p, eos, seed):
            for row, token, log_prob in zip(rows, new, chosen):
                tokens[row].append(token)
                log_probs[row].append(log_prob)
        return tokens, log_probs

    # ---- weights in and out

    def save(self, path: str | Path, shard_bytes: int = 5 * 10**9) -> None:
        """Write a Hugging Face directory in this model's dtype, see `write_weights`; the tokenizer adds its own files (data.py)."""
        write_weights(Path(path), self.config, {name: p.detach() for name, p in self.named_parameters()}, shard_bytes)

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> "OLMo2":
        """The language model of a run (its `hf/`), of one of its checkpoints, or of a Hugging Face directory of any dtype.

        Raises UserError, naming what is missing, extra, of another shape or damaged.
        """
        folder, weights = find_weights(path)
        config = read_config(folder)
        if config.head != "lm":
            raise UserError(f"{path} holds a reward model: it gives a text a number and cannot write")
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=device)
        load_tensors(weights, {name: p.detach() for name, p in model.named_parameters()})
        return model


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """The part of a tensor that this rank holds, and the index of its first element in the whole, flattened.

    FSDP shards the first dimension, so that a part is one run of the whole.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0] * math.prod(tensor.shape[1:])


@torch.no_grad()
def checksum(tensors: dict[str, Tensor]) -> str:
    """12 hex digits of the bits of fp32 tensors, the same at any world size and sharding.

    Per tensor the sum over elements of (bits x (2 index + 1)) modulo 2^64, where two bits that change places show; the
    shards add up over the mesh. Each replica makes its own: compare them, see pretrain.py's self_check.
    """
    sums, mesh = [], next((t.device_mesh for t in tensors.values() if isinstance(t, DTensor)), None)
    shard = mesh.get_local_rank("shard") if mesh else 0
    for tensor in tensors.values():
        part, start = local_part(tensor)
        total = torch.zeros((), dtype=torch.int64, device=part.device)
        if isinstance(tensor, DTensor) or shard == 0:  # what is not sharded counts once
            for i in range(0, part.numel(), 2**22):
                bits = part.reshape(-1)[i : i + 2**22].view(torch.int32).long()
                index = torch.arange(start + i, start + i + len(bits), device=bits.device)
                total += (bits * (2 * index + 1)).sum()  # int64 wraps around
        sums.append(total)
    sums = torch.stack([s.to(sums[0].device) for s in sums])
    if mesh:
        distributed.all_reduce(sums, group=mesh.get_group("shard"))
    return hashlib.sha256(json.dumps(dict(zip(tensors, sums.tolist()))).encode()).hexdigest()[:12]


def pick(log_probs: Tensor, draw: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token per row of log_probs [B, V]: the likeliest, or the one where the cumulated mass passes draw [B].

    >>> log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> [pick(log_probs, torch.tensor([u]), 1.0, 0, 1.0).item() for u in (0.1, 0.6, 0.9)]
    [0, 1, 2]
    >>> [pick(log_probs, torch.tensor([u]), 1.0, 2, 1.0).item() for u in (0.1, 0.6, 0.9)]    # top 2: 5/8, 3/8
    [0, 0, 1]
    """
    if temperature == 0:
        return log_probs.argmax(dim=-1)
    if top_k == 0 and top_p == 1.0:
        mass, ids = log_probs.exp().cumsum(-1), None
    else:
        sorted_probs, ids = log_probs.exp().sort(dim=-1, descending=True, stable=True)
        before = sorted_probs.cumsum(-1) - sorted_probs  # mass of the likelier tokens: keep until it reaches top_p
        keep = before < top_p
        if top_k:
            keep[:, top_k:] = False
        mass = (sorted_probs * keep).cumsum(-1)
    index = torch.searchsorted(mass, draw[:, None] * mass[:, -1:], right=True).clamp(max=mass.shape[-1] - 1)
    return (index if ids is None else ids.gather(1, index))[:, 0]


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy and z-loss without the [N, V] logits: the head's gradients are made while a chunk's logits are there.

    With V = 100,352 the logits, not the weights, are what fills memory. Here a chunk of them lives at a time, forward and
    backward, and no product with the head is computed twice: per chunk one for the logits and two for the gradients.
    """

    CHUNK = {"cpu": 2**23, "mps": 2**25, "cuda": 2**27}  # entries of a chunk's logits: 32, 128, 512 MiB in fp32

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, z_loss: float, with_grad: bool):
        """hidden [N, D], head [V, D], targets [N] -> (sum of cross-entropy, z_loss * sum of logsumexp^2), fp32."""
        weight = head.to(hidden.dtype)
        ce_sum, z_sum = hidden.new_zeros(2, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if with_grad else None
        size = max(64, ChunkedLoss.CHUNK[hidden.device.type] // len(head))
        for i in range(0, len(hidden), size):
            h, target = hidden[i : i + size], targets[i : i + size]
            valid = target != -100
            target = target.clamp(min=0)[:, None]
            logits = (h @ weight.T).float()
            log_z = logits.logsumexp(dim=-1)
            ce_sum = ce_sum + ((log_z - logits.gather(1, target)[:, 0]) * valid).sum()
            z_sum = z_sum + z_loss * (log_z.square() * valid).sum()
            if with_grad:  # d(ce)/d(logits) = softmax - onehot;  d(log_z^2)/d(logits) = 2 log_z softmax
                grad = logits.sub_(log_z[:, None]).exp_()
                grad *= ((1 + 2 * z_loss * log_z) * valid)[:, None]
                grad.scatter_add_(1, target, -valid[:, None].float())
                grad = grad.to(h.dtype)
                grad_hidden[i : i + size] = grad @ weight
                grad_head.addmm_(grad.T, h) if h.dtype == torch.float32 else grad_head.add_(grad.T @ h)
        ctx.grads, ctx.z_loss = (grad_hidden, grad_head.to(head.dtype)) if with_grad else None, z_loss
        return ce_sum, z_sum

    @staticmethod
    def backward(ctx, grad_ce: Tensor, grad_z: Tensor):
        if ctx.grads is None:
            raise RuntimeError("the loss was computed without gradients, or its backward already ran")
        if ctx.z_loss and grad_ce.data_ptr() != grad_z.data_ptr() and not torch.equal(grad_ce, grad_z):
            raise RuntimeError("the supported backward is ((ce_sum + z_sum) / n).backward(): both terms, one scale")
        (grad_hidden, grad_head), ctx.grads = ctx.grads, None
        return grad_hidden.mul_(grad_ce), grad_head.mul_(grad_ce), None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Files

HF_KEYS = {"num_hidden_layers": "layers", "hidden_size": "d_model", "num_attention_heads": "heads",
           "num_key_value_heads": "kv_heads", "intermediate_size": "ffn", "vocab_size": "vocab",
           "max_position_embeddings": "context", "eos_token_id": "eos", "pad_token_id": "pad",
           "rope_theta": "rope_theta", "rms_norm_eps": "norm_eps"}
FIXED_KEYS = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
              "rope_scaling": None}  # what the architecture fixes: another value is another model
ABLATIONS = ("norm_position", "qk_norm", "norm")  # those that change the forward pass


def write_weights(path: Path, config: ModelConfig, tensors: dict[str, Tensor], shard_bytes: int = 5 * 10**9,
                  read: Callable[[str], Tensor] | None = None) -> None:
    """Write a Hugging Face directory: config.json, generation_config.json, and the weights, in one file or, beyond
    `shard_bytes`, in several with an index. transformers opens it as Olmo2ForCausalLM.

    With `read`, the values of a name come from there, one tensor after the other, each file is written by one rank, and
    `tensors` gives only shapes and dtypes: so no process ever holds a model that is larger than its memory.
    """
    rank, world = rank_and_world()
    path.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    for name, tensor in tensors.items():
        if shards[-1] and sum(tensors[n].nbytes for n in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = {"model.safetensors": shards[0]} if len(shards) == 1 else {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
    for file, names in list(files.items())[rank::world]:  # each file whole or not at all: written aside, then renamed
        write_safetensors(path / (file + ".tmp"), {n: tensors[n] for n in names}, read or (lambda name: tensors[name]))
        os.replace(path / (file + ".tmp"), path / file)
    if rank:
        return
    if len(files) > 1:
        write_json(path / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {name: file for file, names in files.items() for name in names}})
    else:
        (path / "model.safetensors.index.json").unlink(missing_ok=True)
    for stale in path.glob("model*.safetensors"):  # of an earlier save with another number of files
        if stale.name not in files:
            stale.unlink()
    write_config(path, config, next(iter(tensors.values())).dtype)


def write_safetensors(path: Path, tensors: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """A file as the safetensors library writes it, which would need all its tensors in memory: length, header, values."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            file.write(read(name).cpu().contiguous().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


class StoredWeights:
    """The tensors in a folder of safetensors files, whole or in pieces as many processes save them, read one at a time.

    `shapes`: name -> tensor without values (on meta). Raises UserError for damaged files; other faults: see `check_tensors`.
    """

    def __init__(self, folder: Path):
        from safetensors import safe_open
        stored = read_headers(folder)
        self.shapes = {name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                       for name, entry in stored.state_dict_metadata.items()}
        self.dtype = next((tensor.dtype for tensor in self.shapes.values()), torch.float32)
        self.places: dict[str, list[tuple[tuple[int, ...], str]]] = {name: [] for name in self.shapes}
        for index, info in stored.storage_data.items():
            self.places[index.fqn].append((tuple(index.offset), info.relative_path))
        self.open = functools.cache(lambda path: safe_open(path, "pt"))  # maps the file: what is read takes no memory of ours

    def pieces(self, name: str) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """(where it belongs in the whole, values), first rows first, some 4M values at a time."""
        for (start, *others), path in sorted(self.places[name]):
            part = self.open(path).get_tensor(name)
            for rows in part.split(max(1, 2**22 * len(part) // max(1, part.numel()))):  # a rank's piece may be empty
                yield (slice(start, start + len(rows)), *(slice(o, o + n) for o, n in zip(others, part.shape[1:]))), rows
                start += len(rows)

    def whole(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.shapes[name], device="cpu")
        for where, part in self.pieces(name):
            tensor[where] = part
        return tensor


def keep_freed_memory(yes: bool) -> None:
    """Let glibc reuse large freed buffers (a step needs the same ones again, and the kernel would clear them), or return each at once."""
    if sys.platform == "linux":
        import ctypes
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30 if yes else 2**20)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1 if yes else 2**20)  # M_TRIM_THRESHOLD


def write_config(path: Path, c: ModelConfig, dtype: torch.dtype) -> None:
    """The two config files of a Hugging Face directory. An ablated model, which Olmo2 is not, gets a type of its own."""
    ablations = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)
                 if f.name in ABLATIONS and getattr(c, f.name) != f.default}
    olmo2 = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    if c.head == "score":  # of one label
        olmo2 |= {"architectures": ["Olmo2ForSequenceClassification"], "id2label": {"0": "score"}, "label2id": {"score": 0}}
    write_json(path / "config.json", {
        **olmo2, **({"architectures": ["OLMo2Ablation"], "model_type": "olmo2-ablation"} if ablations else {}),
        **{theirs: getattr(c, ours) for theirs, ours in HF_KEYS.items()}, **FIXED_KEYS, **ablations,
        "bos_token_id": None, "initializer_range": 0.02, "use_cache": True, "torch_dtype": str(dtype).removeprefix("torch.")})
    write_json(path / "generation_config.json", {
        "_from_model_config": True, "bos_token_id": None, "eos_token_id": c.eos, "pad_token_id": c.pad})


def find_weights(path: str | Path) -> tuple[Path, Path]:
    """(folder of config.json, folder of the safetensors files) of a run, a checkpoint or a Hugging Face directory."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: train a model first (python pretrain.py), or name a run, a checkpoint of one, or a "
                        "Hugging Face directory")
    states = sorted(path.glob("step*-tokens*"), key=lambda p: (len(p.name.split("-")[0]), p.name), reverse=True)
    for folder in (path, path / "hf", *states):
        if (folder / "config.json").exists():
            return folder, folder / "model" if (folder / "model").is_dir() else folder
    raise UserError(f"{path} holds no model: expected config.json in it, or hf/ as in a run")


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig from config.json, of the release, of transformers 4 or 5, or ours."""
    hf = read_json(folder / "config.json")
    hf = {**(hf.get("rope_parameters") or {}), **hf}  # where transformers 5 keeps rope_theta
    if hf.get("model_type") not in ("olmo2", "olmo2-ablation"):
        raise UserError(f"{folder}/config.json describes a model of type {hf.get('model_type')!r}, not 'olmo2'")
    if hf.get("rope_type", "default") != "default":
        raise UserError(f"{folder}/config.json asks for RoPE of type {hf['rope_type']!r}; OLMo 2 has the default")
    for key, value in FIXED_KEYS.items():
        if hf.get(key, value) != value:
            raise UserError(f"{folder}/config.json has {key} = {hf[key]!r}; OLMo 2 has {value!r}")
    if missing := [key for key in HF_KEYS if hf.get(key) is None]:
        raise UserError(f"{folder}/config.json lacks {', '.join(missing)}")
    return ModelConfig(**{ours: hf[theirs] for theirs, ours in HF_KEYS.items()},
                       **{key: hf[key] for key in ABLATIONS if key in hf},
                       head="score" if len(hf.get("id2label", ())) == 1 else "lm")


def load_tensors(folder: Path, tensors: dict[str, Tensor], leave_out: tuple[str, ...] = ()) -> None:
    """Fill `tensors` in place from the safetensors files of `folder`, whole or sharded, converting the dtype; `leave_out` names those not wanted.

    Raises UserError where `check_tensors` does. The reader is torch's, which slices and reshards but checks little.
    """
    from torch.distributed import checkpoint as dcp
    together(lambda: check_tensors(folder, tensors, leave_out) if rank_and_world()[0] == 0 else None)
    try:
        with one_process_is_fine():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.api.CheckpointException as error:
        raise UserError(f"the weights in {folder} cannot be read: {str(error).strip().splitlines()[-1]}") from None


@contextlib.contextmanager
def one_process_is_fine():
    """Without torch's warning that a checkpoint is read or written by a single process: ours often are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def read_headers(folder: Path):
    """What the safetensors files in `folder` hold, as torch describes it (a `Metadata`). UserError for a damaged file."""
    from torch.distributed import checkpoint as dcp
    try:
        return dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
    except Exception as error:  # safetensors has one exception type for every kind of damage
        raise UserError(f"a weights file in {folder} is damaged: {error}") from None


def check_tensors(folder: Path, tensors: dict[str, Tensor], leave_out: tuple[str, ...] = ()) -> None:
    """Do the safetensors headers in `folder` hold exactly `tensors`, whole? UserError names what is missing, extra, damaged."""
    files = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    expected = set(read_json(index).get("weight_map", {}).values()) if index.exists() else files
    if not files:
        raise UserError(f"{folder} holds no .safetensors file")
    if missing := sorted(expected - files):
        raise UserError(f"{folder} lacks {', '.join(missing)}, named by its index")
    if extra := sorted(files - expected):
        raise UserError(f"{folder} holds {', '.join(extra)} beside the files of its index: which weights are meant? remove one set")
    stored = read_headers(folder).state_dict_metadata
    problems = [f"{name} is missing" for name in tensors if name not in stored]
    problems += [f"{name} is not in this model" for name in stored if name not in tensors and name not in leave_out]
    for name in (name for name in tensors if name in stored):
        if stored[name].size != tensors[name].shape:
            problems.append(f"{name} is {list(stored[name].size)}, not {list(tensors[name].shape)}")
        elif sum(math.prod(chunk.sizes) for chunk in stored[name].chunks) != tensors[name].numel():
            problems.append(f"{name} has pieces missing")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"the weights in {folder} do not fit: {'; '.join(problems[:5])}{more}")


def main() -> None:
    """Print the table of sizes. Training memory: fp32 weights, gradients and two Adam moments, without activations."""
    print(f"{'size':>6}{'layers':>8}{'D':>7}{'H/G':>8}{'FFN':>8}{'parameters':>17}{'GFLOP/token':>13}"
          f"{'KV cache MB':>13}{'train GB':>10}")
    for name, c in SIZES.items():
        total = c.parameters["total"]
        cache = 2 * c.layers * c.kv_heads * c.head_dim * c.context * 2
        print(f"{name:>6}{c.layers:>8}{c.d_model:>7}{c.heads:>5}/{c.kv_heads:<2}{c.ffn:>8}{total:>17,}"
              f"{c.flops_per_token(c.context) / 1e9:>13.4g}{cache / 1e6:>13,.1f}{16 * total / 1e9:>10.3g}")
    print("GFLOP/token: 6 (N - embedding) + 12 layers D T, at T = the context (4,096; tiny 128). "
          "KV cache: bf16, one sequence of T.\ntrain: 16 bytes per parameter (fp32 weight, gradient, two moments), activations apart.")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
