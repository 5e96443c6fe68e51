"""Generation: read the prompts, then add one token per step, with a key/value cache.

    tokens, log_probs = model.generate(prompts, max_new_tokens=50)          # all at once
    for rows, tokens, log_probs in decode_steps(model, prompts, 50): ...    # step by step

A token attends to all tokens before it. Their keys and values never change again, so a cache
keeps them, and a step computes those of one new token per row. Without a cache every step would
compute the whole text anew.

Prompts of different lengths are padded on the right. Attention is causal: no token of a prompt
sees the padding behind it, and new tokens overwrite it. So the token at position t of a row is
always in slot t of the cache.

Shapes: B rows, T time, D model width, G key/value heads, K head width, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from infra.distributed import all_gather_objects, free_memory
from infra.files import UserError


def generate(
    model: nn.Module, prompts: list[list[int]], *settings, **named
) -> tuple[list[list[int]], list[list[float]]]:
    """Return the new tokens of each prompt and their log-probabilities, see OLMo2.generate."""
    tokens = [[] for _ in prompts]
    log_probs = [[] for _ in prompts]
    for rows, new, chosen in decode_steps(model, prompts, *settings, **named):
        for row, token, log_prob in zip(rows, new, chosen):
            tokens[row].append(token)
            log_probs[row].append(log_prob)
    return tokens, log_probs


@torch.no_grad()
def decode_steps(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: int | None = None,
    seed: int | list[int] = 0,
    together: bool = False,
    ended: Callable[[int, int], bool] | None = None,
) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """Yield after each step (rows, their new tokens, their log-probabilities), until all rows end.

    The settings are those of OLMo2.generate, and so are the errors. A row also ends when
    `ended(row, its new token)` says so, after that token.
    """
    check_prompts(prompts, model.config.context)
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    draws = draws_per_row(seed, len(prompts), min(max_new_tokens, model.config.context))
    position = torch.tensor([len(prompt) for prompt in prompts])  # where a row's next token goes
    capacity = min(int(position.max()) + max_new_tokens, model.config.context)
    hidden, cache = read_prompts(model, prompts, capacity)  # hidden [B, D]
    rows = torch.arange(len(prompts))  # which prompt each row of the batch continues
    running = rows >= 0  # all of them

    for step in range(max_new_tokens):
        logits = model.lm_head(hidden).float() / (temperature or 1.0)
        log_probs = F.log_softmax(logits, dim=-1)  # [B, V]
        new = sample_token(log_probs, draws[rows, step], temperature, top_k, top_p)
        chosen = log_probs.gather(1, new[:, None])[:, 0].cpu()
        tokens = new.cpu()
        yield rows[running].tolist(), tokens[running].tolist(), chosen[running].tolist()

        running &= position < capacity
        n_running = stop_ended_rows(running, rows, tokens, eos, ended)
        if not (any(all_gather_objects(n_running)) if together else n_running):
            return
        if 0 < 2 * n_running <= len(rows):  # half of the rows have ended: go on without them
            kept = running.nonzero()[:, 0]
            cache = cache[:, :, kept]
            rows, tokens, position, running = (x[kept] for x in (rows, tokens, position, running))
        slots = position.clamp(max=capacity - 1)  # an ended row writes over its last slot, unread
        hidden = read_tokens(model, tokens, slots, cache)
        position += 1


# ------------------------------------------------------------------------------------------
# Before the first step


def check_prompts(prompts: list[list[int]], context: int) -> None:
    """Raise UserError for an empty prompt, and for one that leaves no room for a new token."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths, default=0) == 0:
        raise UserError(
            "a prompt needs at least one token"
            " (OLMo 2 has no BOS: begin with the EOS id if there is no text)"
        )
    if max(lengths) >= context:
        raise UserError(
            f"a prompt of {max(lengths)} tokens leaves no room in the model's context of {context}"
        )


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError for a value out of range, NaN included."""
    if not (temperature >= 0 and top_k >= 0 and max_new_tokens >= 0 and 0 < top_p <= 1):
        raise UserError(
            f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens}"
            f" must be >= 0, top_p {top_p} in (0, 1]"
        )
    if temperature and not 1e-3 <= temperature <= 1e3:
        raise UserError(f"temperature {temperature} must be 0, or from 0.001 to 1000")


def draws_per_row(seed: int | list[int], rows: int, steps: int) -> Tensor:
    """Uniform numbers in [0, 1), [B, steps]: of row i from seed (seed, i), or seed[i] of a list.

    They depend on the row's seed and the step alone: not on other rows, nor on the device.
    """
    seeds = [[seed, row] for row in range(rows)] if isinstance(seed, int) else seed
    if np.min(seeds) < 0:
        raise UserError(f"a seed must be at least 0, got {seed}")
    draws = [np.random.default_rng(s).random(steps, np.float32) for s in seeds]
    return torch.tensor(np.stack(draws))


def read_prompts(
    model: nn.Module, prompts: list[list[int]], capacity: int
) -> tuple[Tensor, Tensor]:
    """The hidden state after each prompt [B, D], and the cache. Equal prompts are read once."""
    index = {}  # distinct prompt -> its row in `tokens`
    which = [index.setdefault(tuple(prompt), len(index)) for prompt in prompts]
    tokens = pad_sequence([torch.tensor(prompt) for prompt in index], batch_first=True)
    cache = empty_cache(model, len(index), capacity)
    hidden = model.model(tokens.to(cache.device), cache=cache)  # [distinct prompts, T, D]
    if len(index) < len(prompts):
        cache = cache[:, :, which]
    last = [len(prompt) - 1 for prompt in prompts]
    return hidden[which, last], cache


def read_tokens(model: nn.Module, tokens: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
    """The hidden state [B, D] after one more token per row, at these slots; both on the CPU."""
    seen = slots_seen(int(slots.max()), cache.shape[-2], cache.device)
    new, positions = tokens[:, None].to(cache.device), slots[:, None].to(cache.device)
    return model.model(new, positions, cache, seen)[:, 0]


# ------------------------------------------------------------------------------------------
# A step


def sample_token(
    log_probs: Tensor, draw: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Choose a token [B] for each row of log_probs [B, V], by a number `draw` [B] from [0, 1).

    temperature 0: the likeliest token. Else the probabilities of the tokens that top_k and top_p
    leave are added up, and the token at which the sum passes the share `draw` of all is chosen.

    >>> log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> [sample_token(log_probs, torch.tensor([u]), 1.0, 0, 1.0).item() for u in (0.1, 0.6, 0.9)]
    [0, 1, 2]

    Of the top 2, the first has 5/8 and the second 3/8:

    >>> [sample_token(log_probs, torch.tensor([u]), 1.0, 2, 1.0).item() for u in (0.1, 0.6, 0.9)]
    [0, 0, 1]
    """
    if temperature == 0:
        return log_probs.argmax(dim=-1)
    draw = draw.to(log_probs.device)
    if top_k == 0 and top_p == 1.0:
        return invert_cdf(log_probs.exp(), draw)[:, 0]
    probs, ids = log_probs.exp().sort(dim=-1, descending=True, stable=True)
    likelier = probs.cumsum(-1) - probs  # the sum of all likelier tokens
    keep = likelier < top_p  # the fewest tokens that reach top_p
    keep[:, 0] = True  # also where top_p is too small for fp32
    if top_k:
        keep[:, top_k:] = False
    return ids.gather(1, invert_cdf(probs * keep, draw))[:, 0]


def invert_cdf(mass: Tensor, draw: Tensor) -> Tensor:
    """Index [B, 1] where the running sum of mass [B, V] passes the share draw [B] of its total."""
    cdf = mass.cumsum(-1)
    index = torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:], right=True)
    return index.clamp(max=cdf.shape[-1] - 1)


def stop_ended_rows(
    running: Tensor,
    rows: Tensor,
    tokens: Tensor,
    eos: int | None,
    ended: Callable[[int, int], bool] | None,
) -> int:
    """Clear running [B] where a row's new token is `eos`, or `ended(row, token)` says so.

    Returns how many rows go on.
    """
    if eos is not None:
        running &= tokens != eos
    if ended:
        for i in running.nonzero()[:, 0]:
            running[i] = not ended(rows[i].item(), tokens[i].item())
    return int(running.sum())


# ------------------------------------------------------------------------------------------
# The cache: [layers, 2, B, G, capacity, K], keys and values of each layer


# Bytes of keys and values at a time, where the free memory is not asked for.
CACHE_BYTES = {"mps": 2**30, "cpu": 2**27}


def cache_budget(device: torch.device) -> int:
    """Bytes that the keys and values of a batch may take.

    On CUDA a third of what is free: there are two of them while rows that have ended are dropped,
    or while requests copy what they share.
    """
    return free_memory(device) // 3 if device.type == "cuda" else CACHE_BYTES[device.type]


def whole_copy_fits(model: nn.Module, length: int) -> bool:
    """Is there memory for all weights of a sharded model, and rows of `length` tokens?

    Asked on GPUs alone: on a CPU what is sharded is small.
    """
    device = model.lm_head.weight.device
    return device.type != "cuda" or free_memory(device) >= model.config.sampling_bytes(length)


def rows_that_fit(model: nn.Module, length: int) -> int:
    """Rows of `length` tokens whose keys and values fit in the budget, at least 1."""
    device = model.lm_head.weight.device
    row_bytes = model.config.cache_bytes(length, 2 if device.type == "cuda" else 4)
    return max(1, cache_budget(device) // row_bytes)


def empty_cache(model: nn.Module, rows: int, capacity: int) -> Tensor:
    """Make a cache for `model.model(tokens, positions, cache)`, which fills it."""
    c = model.config
    shape = (c.layers, 2, rows, c.kv_heads, capacity, c.head_dim)
    return model.lm_head.new_zeros(shape)  # of its dtype, on its device


def cache_mask(positions: Tensor, seen: int) -> Tensor:
    """Which of the first `seen` slots the tokens at these positions [B, T] see: [B, 1, T, seen].

    >>> cache_mask(torch.tensor([[2], [1]]), 3)[:, 0, 0]
    tensor([[ True,  True,  True],
            [ True,  True, False]])
    """
    slots = torch.arange(seen, device=positions.device)
    return (slots <= positions[..., None])[:, None]


def slots_seen(last: int, capacity: int, device: torch.device) -> int:
    """How many slots a step looks at whose last token stands at position `last`.

    On CUDA in steps of 256, the mask hides the rest: a kernel may be planned for each new width,
    which takes longer than the step itself.

    >>> [slots_seen(last, 1000, torch.device("cuda")) for last in (0, 255, 256, 900)]
    [256, 256, 512, 1000]
    >>> slots_seen(300, 1000, torch.device("cpu"))
    301
    """
    step = 256 if device.type == "cuda" else 1
    return min(capacity, math.ceil((last + 1) / step) * step)


def attention_kernels(cache: Tensor | None) -> contextlib.AbstractContextManager:
    """On CUDA, keep generation off the kernels of cuDNN, which plans one for each new shape."""
    if cache is None or cache.device.type != "cuda":
        return contextlib.nullcontext()
    backends = SDPBackend
    return sdpa_kernel([backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION, backends.MATH])


def attend_to_cache(
    q: Tensor, k: Tensor, v: Tensor, layer: Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention of new tokens, whose keys and values [B, G, T, K] are kept: [B, H, T, K].

    layer [2, B, G, capacity, K] is the part of the cache of one layer, written at `positions`
    [B, T]. mask [B, 1, T, slots]; None: the rows begin here, and the tokens see each other alone.
    """
    rows = torch.arange(len(k), device=k.device)[:, None]
    for kept, new in zip(layer, (k, v)):
        kept[rows, :, positions] = new.transpose(1, 2)
    if mask is None:
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    k, v = (kept[:, :, : mask.shape[-1]] for kept in layer)
    # In GQA H / G queries of a token share a key: here they are as many tokens of one head. With a
    # mask, fast kernels refuse groups, and without them keys would be copied for each query.
    sharing = q.shape[1] // k.shape[1]
    q = rearrange(q, "b (g r) t k -> b g (r t) k", r=sharing)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, sharing, 1))
    return rearrange(y, "b g (r t) k -> b (g r) t k", r=sharing)
