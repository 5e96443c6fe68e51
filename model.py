"""The OLMo 2 transformer: blocks, initialisation, loss.

What OLMo 2 changes in a Llama-like decoder (paper: arXiv 2501.00656, section 3.3):
  1. RMSNorm stands on the *output* of attention and MLP, before it is added to the stream.
  2. QK-norm: queries and keys are RMS-normalised, over all heads at once, before RoPE.
  3. z-loss: the squared log of the softmax's normaliser is added to the loss.
  4. Every matrix starts from one truncated normal, std 0.02, with no scaling by depth or width.
  5. No bias anywhere, RoPE theta 500,000, SwiGLU, and an output head of its own (untied).

    python model.py                     # the table of sizes: parameters, FLOPs, memory
    OLMo2(SIZES["190M"])                # random weights, the same on every machine
    OLMo2.load("runs/tiny/pretrain")    # a run, a checkpoint, a Hugging Face directory
    OLMo2.load("allenai/OLMo-2-0425-1B")  # or a model on the Hub

The sizes are in shape.py. Modules have the names of the released checkpoints, so loading needs no
table of names.
Shapes: B batch, T time, D model width, H query heads, G key/value heads, K head width,
V vocabulary, N = B * T.
"""

import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decode
from infra.checkpoint import (
    check_tensors,
    check_unchanged,
    find_weights,
    load_tensors,
    read_steadily,
    write_weights,
)
from infra.distributed import local_part, on_rank_zero, run_cli, run_on_all_ranks
from infra.files import UserError, join_problems

# People import the names of a shape from here, too.
from shape import SIZES, ModelConfig, hf_config as hf_config, read_config, write_config

# ------------------------------------------------------------------------------------------
# The transformer


class Norm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32; no bias.

    The ablation norm=layernorm is a LayerNorm without parameters.
    """

    def __init__(self, width: int, c: ModelConfig):
        super().__init__()
        self.eps = c.norm_eps
        self.weight = nn.Parameter(torch.empty(width)) if c.norm == "rms" else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.weight is None:
            return F.layer_norm(y, y.shape[-1:], eps=self.eps).type_as(x)
        scale = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)  # [..., 1]
        return (y * scale * self.weight).type_as(x)


def rope_tables(positions: Tensor, c: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, K], fp32, of the angles position * theta^(-2i / K), i < K / 2.

    Both halves of K turn by the same angles. The sine of the first half is negated, for `rotate`.
    They are computed in each forward pass, so that there is no buffer to store or to shard.
    """
    i = torch.arange(0, c.head_dim, 2, device=positions.device).float()  # 0, 2, 4, ...: [K / 2]
    # In this order of operations, as upstream: at position 8,192 the last bit of a frequency
    # makes a difference that can be measured.
    frequency = 1.0 / c.rope_theta ** (i / c.head_dim)
    angle = positions.float()[..., None] * frequency  # [..., T, K / 2]
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K / 2]) of x [B, heads, T, K] by its angle, in fp32.

    RoPE: the dot product of two turned vectors depends on the distance of their positions alone.
    """
    a, b = x.float().chunk(2, dim=-1)  # becomes (a cos - b sin, b cos + a sin)
    return torch.addcmul(x.float() * cos, torch.cat((b, a), dim=-1), sin).type_as(x)


class Attention(nn.Module):
    """Causal attention with QK-norm and RoPE: x [B, T, D] -> [B, T, D].

    past, in generation only: (keys and values kept of this layer, positions, mask), see decode.py.
    """

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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple | None = None) -> Tensor:
        # QK-norm: attention scores are dot products of q and k. If these grow without limit, the
        # softmax saturates and gradients spike. The norm stands before the split into heads: one
        # mean square covers all heads, so that a head can still be larger than another. And it
        # stands before RoPE: RoPE keeps the size of what it turns, but weights behind it would
        # scale the two halves of a turned pair differently, and scores would then depend on
        # absolute positions.
        q = self.q_norm(self.q_proj(x))  # [B, T, H K]
        k = self.k_norm(self.k_proj(x))  # [B, T, G K]
        v = self.v_proj(x)  # [B, T, G K]

        q, k, v = (rearrange(y, "b t (h k) -> b h t k", k=self.head_dim) for y in (q, k, v))
        q = rotate(q, cos, sin)  # [B, H, T, K]
        k = rotate(k, cos, sin)  # [B, G, T, K]

        if past:  # generation: the keys and values of earlier tokens come from a cache
            y = decode.attend_to_cache(q, k, v, *past)
        else:  # each token sees itself and all before it; in GQA H / G queries share a key
            grouped = k.shape[1] != q.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(rearrange(y, "b h t k -> b t (h k)"))  # from [B, H, T, K]


class MLP(nn.Module):
    """SwiGLU: the gate decides how much of each hidden unit passes. [B, T, D] -> [B, T, D]."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.d_model, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP; each adds its output to the residual stream x [B, T, D].

    Llama normalises what a sublayer reads, OLMo 2 what it adds:

        Llama    x = x + attention(norm(x))      x = x + mlp(norm(x))
        OLMo 2   x = x + norm(attention(x))      x = x + norm(mlp(x))

    So no sublayer can add a spike to the stream, however large its output is. It takes both, this
    and QK-norm, to make training stable: neither alone was enough (paper figure 7).
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.post_attention_layernorm = Norm(c.d_model, c)
        self.post_feedforward_layernorm = Norm(c.d_model, c)
        self.pre_norm = c.norm_position == "pre"
        # What runs its forward again in the backward pass, so that its activations need not be
        # kept: "block", "mlp" or nothing. It stands in the forward, so that torch.compile sees it.
        self.recompute = ""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple | None = None) -> Tensor:
        if self.recompute == "block":
            return run_again(self.sublayers, x, cos, sin, past)
        return self.sublayers(x, cos, sin, past)

    def sublayers(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple | None) -> Tensor:
        """`forward`, with all activations kept."""
        mlp = functools.partial(run_again, self.mlp) if self.recompute == "mlp" else self.mlp
        if self.pre_norm:  # the ablation: Llama's block, with the same two norms
            x = x + self.self_attn(self.post_attention_layernorm(x), cos, sin, past)
            return x + mlp(self.post_feedforward_layernorm(x))
        x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, past))
        return x + self.post_feedforward_layernorm(mlp(x))


# Work whose forward runs again in the backward pass (activation checkpointing).
run_again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Transformer(nn.Module):
    """Everything but the head: tokens [B, T] -> normalised hidden states [B, T, D]."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab, c.d_model)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = Norm(c.d_model, c)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Tensor | None = None,
        seen: int = 0,
    ) -> Tensor:
        """For generation: `positions` [B, T] of the tokens, and the cache to read and extend.

        seen: how many of its first slots the tokens may look at; 0: their rows begin with them.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, T]
        cos, sin = rope_tables(positions[:, None], self.config)  # [B or 1, 1, T, K]
        mask = decode.cache_mask(positions, seen) if seen else None
        x = self.embed_tokens(tokens)  # [B, T, D]
        with decode.attention_kernels(cache):
            for i, layer in enumerate(self.layers):
                past = None if cache is None else (cache[i], positions, mask)
                x = layer(x, cos, sin, past)
        return self.norm(x)


# ------------------------------------------------------------------------------------------
# The language model


class OLMo2(nn.Module):
    """A transformer and its head: `model(tokens [B, T])` -> logits [B, T, V], fp32."""

    # vLLM servers that sample in the place of this process, see servers.py; None: it does.
    servers = None

    # Besides a forward, these gather sharded weights (FSDP).
    FORWARD_METHODS = ("loss", "log_probs", "scores", "generate")

    def __init__(self, config: ModelConfig, seed: int = 0):
        """Draw random weights from `seed`. Under `torch.device("meta")` there are only shapes."""
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # no memory, and none of torch's own initialisation
            self.model = Transformer(config)
            if config.head == "lm":
                self.lm_head = Head(config.d_model, config.vocab)
            else:
                self.score = Head(config.d_model, 1)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """What is in front of the blocks and what is behind them, the two largest layers."""
        return self.model.embed_tokens, self.lm_head if self.config.head == "lm" else self.score

    @torch.no_grad()
    def init_weights(self, seed: int, names: tuple[str, ...] = ()) -> None:
        """Fill norms with 1 and matrices from a truncated normal; `names`: only these of them.

        Each parameter has its own stream of random numbers, seeded by its name, and its element i
        takes the i-th: the weights are the same on any device and with any sharding, and a rank
        draws only its own part.
        """
        for name, parameter in self.named_parameters():
            if names and name not in names:
                continue
            part, start = local_part(parameter)  # of this rank, and where it begins in the whole
            if parameter.ndim == 1:
                part.fill_(1.0)
            else:
                std = initial_std(name, parameter.shape[1], self.config)
                stream = [seed, zlib.crc32(name.encode())]
                cut = 6 if name == "score.weight" else 3  # of it, one in 500 million lies beyond
                fill_truncated_normal(part.view(-1), std, stream, start, cut)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens)).float()

    def loss(
        self, tokens: Tensor, targets: Tensor, z_loss: float = 1e-5
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return three scalars: summed cross-entropy, summed z-loss and the number of targets.

        tokens, targets: [B, T]; targets[b, t] is the token that follows tokens[b, t], or -100 to
        leave it out. The z-loss is times its coefficient already.
        Train with `((ce_sum + z_sum) / n).backward()`, n counted over all micro-batches and ranks.
        No other backward is supported, as the gradients of both sums are made together: another
        raises RuntimeError. Source: paper section 3.3.3; OLMo-core
        nn/functional/cross_entropy_loss.py.
        """
        hidden = self.model(tokens).flatten(0, 1)  # [N, D]
        ce_sum, z_sum = self.lm_head.loss(hidden, targets.flatten(), z_loss)
        return ce_sum, z_sum, (targets != -100).sum()

    def log_probs(self, tokens: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(logits / temperature) of each target, fp32 [B, T]; 0 where it is -100.

        For objectives that need a value per token (DPO, PPO, GRPO). The head sees only the real
        targets.
        """
        real = targets != -100
        hidden = self.model(tokens)[real]  # [n, D], n real targets
        values = self.lm_head.log_probs(hidden, targets[real], temperature)  # [n]
        return torch.zeros_like(tokens, dtype=torch.float32).masked_scatter(real, values)

    def scores(self, tokens: Tensor) -> Tensor:
        """What the text up to each token is worth, fp32 [B, T], of a model with head=score."""
        return self.score.scores(self.model(tokens))

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos: int | None = None,
        seed: int | list[int] = 0,
        together: bool = False,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Continue each prompt (one token or more, of any lengths) with a key/value cache.

        temperature 0 is greedy; top_k keeps the k likeliest tokens (0: all), top_p the fewest
        that reach that probability. A row ends with `eos` (which is returned), after
        max_new_tokens, or at the model's context. Row i draws from a generator of its own,
        (seed, i) for one seed, seed[i] for a list, so that a row is the same in any batch.
        Returns the new tokens, and the log-probability of each under
        softmax(logits / temperature) over the whole vocabulary (temperature 1 when greedy),
        before top_k and top_p: importance ratios need it so.
        together: the weights are sharded, and all ranks call it with rows of their own. Then none
        stops before the last one, whose forwards need its shards.
        Raises UserError for an empty prompt, or one that fills the context.
        """
        sampling = (temperature, top_k, top_p, eos, seed, together)
        return decode.generate(self, prompts, max_new_tokens, *sampling)

    def save(self, path: str | Path, shard_bytes: int = 5 * 10**9) -> None:
        """Write a Hugging Face directory in this model's dtype, without a tokenizer.

        transformers opens it as Olmo2ForCausalLM. The weights are one file or, beyond
        `shard_bytes`, several with an index.
        """
        write_weights(Path(path), self.state_dict(), shard_bytes)
        write_config(Path(path), self.config, next(self.parameters()).dtype)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "OLMo2":
        """Load a run (its `hf/`), a checkpoint, a Hugging Face directory or a model on the Hub.

        Raises UserError for weights that are missing, extra, of another shape or damaged.
        """
        folder, weights = find_weights(path)

        def read() -> OLMo2:
            config = read_config(folder)
            if config.head != "lm":
                raise UserError(f"{path} holds a reward model, which cannot write text")
            with torch.device("meta"):
                model = cls(config)
            on_rank_zero(check_tensors, weights, model.state_dict())  # before memory is taken
            model = model.to(dtype).to_empty(device=device)
            load_tensors(weights, model.state_dict())
            check_finite(path, model)
            run_on_all_ranks(check_unchanged, folder, weights)
            return model

        return read_steadily(folder, read)


def check_finite(path: str | Path, model: nn.Module) -> None:
    """Raise UserError if a weight is NaN or infinite: whatever the model says is nonsense then.

    Of a sharded model, each rank looks at its part.
    """
    bad = []
    for name, parameter in model.named_parameters():
        part, _ = local_part(parameter.detach())
        if not part.sum(dtype=torch.float32).isfinite():
            bad.append(name)
    if bad:
        raise UserError(f"{path} has weights that are NaN or infinite: {join_problems(bad, 3)}")


# ------------------------------------------------------------------------------------------
# Initialisation


def initial_std(name: str, fan_in: int, c: ModelConfig) -> float:
    """Standard deviation from which a matrix [fan_out, fan_in] starts (paper section 3.2)."""
    if c.init == "olmo0424":  # the ablation
        std = 1 / math.sqrt(fan_in)
        if "o_proj" in name or "down_proj" in name:  # model.layers.<i>...: what a block adds
            std /= math.sqrt(2 * (int(name.split(".")[2]) + 1))
        return std
    if name == "score.weight":
        return 1 / math.sqrt(c.d_model + 1)  # open-instruct reward_modeling.py
    return c.embed_std if "embed_tokens" in name else 0.02


def fill_truncated_normal(
    out: Tensor, std: float, stream: list[int], start: int, cut: float = 3.0
) -> None:
    """Fill out [n] with the numbers start, start + 1, ... of a random stream, cut at `cut` std.

    A uniform number becomes a normal one by the inverse of the normal's distribution function.
    That keeps number and place together: drawing again until a number fits would not.
    """
    share = math.erf(cut / math.sqrt(2))  # of a normal: what lies within the cut
    for piece in out.split(2**24):  # 64 MiB at a time
        bits = np.random.PCG64(stream).advance(start // 2)  # one draw of 64 bits makes two numbers
        odd = start % 2
        uniform = np.random.Generator(bits).random(len(piece) + odd, np.float32)[odd:]  # in [0, 1)
        normal = torch.from_numpy(uniform).mul_(2 * share).sub_(share).erfinv_()  # std 1 / sqrt(2)
        piece.copy_(normal.mul_(std * math.sqrt(2)).clamp_(-cut * std, cut * std))
        start += len(piece)


# ------------------------------------------------------------------------------------------
# The head, and the loss


class Head(nn.Linear):
    """The output head: hidden states [..., D] -> logits [..., V], or what the losses take of them.

    What needs the weight is a method here: FSDP gathers a layer's weights for its own methods.
    """

    FORWARD_METHODS = ("loss", "log_probs", "scores", "new_zeros")

    def __init__(self, width: int, columns: int):
        super().__init__(width, columns, bias=False)
        self.chunk_loss = chunk_loss

    def compile(self) -> None:
        """Compile what `loss` does with a chunk; the rest is products, with nothing to fuse."""
        self.chunk_loss = torch.compile(chunk_loss)

    def loss(self, hidden: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        """Sums of cross-entropy and z-loss of hidden [N, D], targets [N]: see `OLMo2.loss`."""
        with_grad = torch.is_grad_enabled()
        return ChunkedLoss.apply(hidden, self.weight, targets, z_loss, self.chunk_loss, with_grad)

    def log_probs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """log softmax(logits / temperature) of each target, fp32 [N], a chunk of rows at a time.

        With several chunks, the backward pass computes the logits of each again instead of
        keeping them.
        """
        size = ChunkedLoss.rows(hidden.device, len(self.weight))
        work = functools.partial(target_log_probs, self.weight, temperature)
        if len(targets) > size and torch.is_grad_enabled():
            work = functools.partial(run_again, work)
        return torch.cat(list(map(work, hidden.split(size), targets.split(size))))

    def scores(self, hidden: Tensor) -> Tensor:
        """The logits of a head with one column, computed in fp32: [...]."""
        # A copy: FSDP warns of views, whose changes in place it would not see.
        return (hidden.float() @ self.weight.float().T)[..., 0].clone()

    def new_zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros on the device and in the dtype in which a forward computes, sharded or not."""
        return self.weight.new_zeros(shape)


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy and z-loss of the head's logits, which never exist as a whole [N, V].

    With V = 100,352 a single sequence of 4,096 tokens has 1.6 GB of logits in fp32, and as much
    again of their gradients: more than the weights and gradients of the 190M. So the rows are
    taken a chunk at a time, and the gradients of hidden states and head are computed in the
    *forward* pass, while the chunk's logits are there. No product with the head is computed
    twice: a chunk takes one for its logits and two for the gradients. `backward` only scales.
    """

    # Entries of a chunk's logits: 32, 128, 512 MiB in fp32.
    CHUNK = {"cpu": 2**23, "mps": 2**25, "cuda": 2**27}

    @staticmethod
    def rows(device: torch.device, vocab: int) -> int:
        """How many rows of V logits make a chunk: where it can be, a multiple of a GPU's tiles.

        >>> ChunkedLoss.rows(torch.device("cuda"), 100_352)
        1280
        """
        rows = ChunkedLoss.CHUNK[device.type] // vocab
        return rows // 128 * 128 or max(64, rows)

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk_loss: Callable,
        with_grad: bool,
    ):
        """hidden [N, D], head [V, D], targets [N] -> sums of cross-entropy and z-loss, fp32.

        chunk_loss: the function of this name below, compiled or not.
        """
        weight = head.to(hidden.dtype)
        ce_sum, z_sum = hidden.new_zeros(2, dtype=torch.float32)
        if with_grad:
            grad_hidden = torch.empty_like(hidden)
            grad_head = torch.zeros_like(head, dtype=torch.float32)
        size = ChunkedLoss.rows(hidden.device, len(head))
        for i in range(0, len(hidden), size):
            h = hidden[i : i + size]  # [n, D]
            ce, z, grad = chunk_loss(h, weight, targets[i : i + size], z_loss, with_grad)
            ce_sum = ce_sum + ce
            z_sum = z_sum + z
            if with_grad:
                grad_hidden[i : i + size] = grad @ weight
                add_product(grad_head, grad.T, h)
        ctx.z_loss = z_loss
        ctx.grads = (grad_hidden, grad_head.to(head.dtype)) if with_grad else None
        return ce_sum, z_sum

    @staticmethod
    def backward(ctx, grad_ce: Tensor, grad_z: Tensor):
        if ctx.grads is None:
            raise RuntimeError(
                "the loss was computed without gradients, or its backward already ran"
            )
        if ctx.z_loss and grad_ce.data_ptr() != grad_z.data_ptr():
            if not torch.equal(grad_ce, grad_z):
                raise RuntimeError(
                    "the supported backward is ((ce_sum + z_sum) / n).backward():"
                    " both terms, one scale"
                )
        grad_hidden, grad_head = ctx.grads
        ctx.grads = None  # scaled in place below, so they serve once
        return grad_hidden.mul_(grad_ce), grad_head.mul_(grad_ce), None, None, None, None


def chunk_loss(
    h: Tensor, weight: Tensor, targets: Tensor, z_loss: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of cross-entropy and z-loss of h [n, D], and the gradient [n, V] of both by the logits.

    With log Z = logsumexp(logits): cross-entropy = log Z - logits[target], of gradient
    softmax - onehot(target); z-loss = z_loss * (log Z)^2, of gradient 2 z_loss log Z softmax.
    """
    target = targets[:, None]  # [n, 1]
    valid = target != -100
    target = target.clamp(min=0)
    logits = (h @ weight.T).float()  # [n, V]
    log_z = logits.logsumexp(dim=-1, keepdim=True)  # [n, 1]
    ce_sum = ((log_z - logits.gather(1, target)) * valid).sum()
    z_sum = z_loss * (log_z.square() * valid).sum()
    if not with_grad:
        return ce_sum, z_sum, None
    grad = logits.sub_(log_z).exp_()  # softmax, in the memory of the logits
    grad *= (1 + 2 * z_loss * log_z) * valid
    grad.scatter_add_(1, target, -valid.float())
    return ce_sum, z_sum, grad.to(h.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to an fp32 total; NVIDIA's libraries do it in fp32, whatever a and b are in."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda" and torch.version.cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the product is rounded before it is added
        total.add_(a @ b)


def target_log_probs(head: Tensor, temperature: float, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden [n, D] @ head [V, D].T / temperature) of targets [n]: [n], fp32."""
    logits = (hidden @ head.to(hidden.dtype).T).float() / temperature  # [n, V]
    return -F.cross_entropy(logits, targets, reduction="none")


# ------------------------------------------------------------------------------------------


def main() -> None:
    """Print the table of sizes."""
    print(
        "  size  layers      D     H/G     FFN       parameters  GFLOP/token  KV cache MB  train GB"
    )
    row = "{:>6}{:>8}{:>7}{:>5}/{:<2}{:>8}{:>17,}{:>13.4g}{:>13,.1f}{:>10.3g}"
    for name, c in SIZES.items():
        total = c.parameters["total"]
        shape = (c.layers, c.d_model, c.heads, c.kv_heads, c.ffn)
        gflop = c.flops_per_token(c.context) / 1e9
        cache_mb = c.cache_bytes(c.context, 2) / 1e6
        print(row.format(name, *shape, total, gflop, cache_mb, 16 * total / 1e9))
    print(
        "GFLOP/token: 6 (N - embedding) + 12 layers D T, at T = the context (4,096; tiny 128). "
        "KV cache: bf16, one sequence of T.\n"
        "train: 16 bytes per parameter (fp32 weight, gradient, two moments), activations apart."
    )


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
