"""Post-training: SFT, preference pairs, reward model, DPO, and RLVR with PPO or with GRPO.

    python posttrain.py                                 # laptop: SFT, prefs, DPO, GRPO after runs/tiny/soup, and what each brought; 5 minutes
    python posttrain.py --rl ppo                        # as 7B and 13B were made: SFT, prefs, RM, DPO, PPO
    python posttrain.py sft                             # one stage: sft, prefs, rm, dpo, ppo, grpo
    python posttrain.py dpo --size 7B --help            # the published values of a stage and a size
    torchrun --nproc-per-node 8 posttrain.py sft --size 1B --init some/OLMo-2-1B --data allenai/tulu-3-sft-olmo-2-mixture-0225
    python posttrain.py grpo --data rlvr.jsonl --init some/folder --out runs/mine       # your own prompts, each with its verifier

What these stages teach: a base model continues text; SFT makes it answer in a conversation, in the manner of the answers it
is shown, good or bad. DPO raises the better of two answers above the other. RLVR lets the model try and rewards what a program
finds right. The objectives come first, as functions of tensors; then the data; then the loops, written out one by one.

Each stage is a run as in stage 1, runs/<size>/sft and so on, with run.json, metrics.jsonl, curves.png, training states and hf/.
Sources: paper section 5; facts of open-instruct are given as file names of it.
Shapes: B rows (conversations), T tokens; position t of a row of targets holds token t + 1, as in `OLMo2.loss`.
"""
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from anneal import LAPTOP_MIX
from data import TokenData, Tokenizer, embedded_corpus, get_tokenizer, instruct_rows, make_targets, mix_files, mix_sources, rlvr_rows, token_files
from eval import (bits_per_byte_by_source, by_source, ifeval_check, is_right, json_lines, print_table, rlvr_constraint, verify_gsm8k, verify_ifeval,
                  verify_math)
from model import (OLMo2, UserError, best_device, checksum, find_weights, from_all, keep_freed_memory, load_tensors, rank_and_world, read_config, run_cli, together,
                   write_json)
from pretrain import (Count, Run, all_sum, clip_gradients, export, format_seconds, leave_ranks, lost_rank, load_state, make_mesh, make_optimizer, newest_state,
                      one_voice, open_run, parse, prepare, read_metrics, self_check, size_of, sole_writer, start_ranks, tensors_of)

# ----------------------------------------------------------------------------------------------------------------------
# Objectives. A mask is 1.0 where a token counts. The loss of a step is a sum over all rows of the step, on all ranks, divided by what
# all of them count together: never a mean of means.


def sequence_scores(log_probs: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """S(y) [B] of log-probabilities [B, T]: their sum over the mask, or (`normalize`) their mean, as `dpo_norm` of OLMo 2 has it.

    >>> sequence_scores(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1.0, 1.0, 0.0]]), True)
    tensor([-1.5000])
    """
    total = (log_probs * mask).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if normalize else total


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, reward of the chosen, reward of the rejected), each [B], from scores S(y) [B] of the policy and of the reference.

        loss = -log sigmoid(beta ((S(c) - S(r)) - (S_ref(c) - S_ref(r)))),   reward(y) = beta (S(y) - S_ref(y))

    Source: DPO (arXiv 2305.18290) equations 5 and 7; dpo_utils.py. With S the mean over tokens it is `dpo_norm` (TRL: sigmoid_norm),
    and beta 5 there is what some 0.05 to 0.1 is with sums. The same S for both models, always.

    >>> loss, better, worse = dpo_loss(*(torch.tensor([x]) for x in (-1.0, -2.0, -1.5, -1.5)), beta=5.0)
    >>> better, worse, loss            # -log sigmoid(5 * 1)
    (tensor([2.5000]), tensor([-2.5000]), tensor([0.0067]))
    """
    better, worse = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
    return -F.logsigmoid(better - worse), better.detach(), worse.detach()


def reward_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry, [B]: -log sigmoid(r(chosen) - r(rejected)), without margin or centring (reward_modeling.py; Tulu 3, equation 2).

    >>> reward_loss(torch.tensor([1.0]), torch.tensor([1.0]))         # a coin's
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen - rejected)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T] of rewards and values [B, T]: generalized advantage estimation (arXiv 1506.02438, equation 16).

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   return_t = A_t + V_t

    V_t is read before token t, and V is 0 after the last. The reward of an answer belongs to its last token; upstream, as TRL, puts
    it on the position behind that, where a value is still read.

    >>> advantages, returns = gae(torch.tensor([[0.0, 10.0, 0.0]]), torch.tensor([[4.0, 6.0, 7.0]]), torch.tensor([[1.0, 1.0, 0.0]]), 1.0, 0.5)
    >>> advantages, returns            # A_1 = 10 - 6;  A_0 = (6 - 4) + 0.5 * 4
    (tensor([[4., 4., 0.]]), tensor([[ 8., 10.,  0.]]))
    """
    values, advantage, advantages = values * mask, torch.zeros_like(values[:, 0]), []
    following = F.pad(values[:, 1:], (0, 1))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], dim=1)
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """values [B, T] with mean 0 and (unbiased) variance 1 over the mask, of all ranks together; 0 outside. Upstream: over each rank's own.

    >>> whiten(torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    n, total = all_sum(torch.stack((mask.sum(), (values * mask).sum())))
    mean = total / n
    variance = all_sum((((values - mean) * mask) ** 2).sum()) / (n - 1).clamp(min=1)
    return (values - mean) * (variance + 1e-8).rsqrt() * mask


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(loss, whether the clipped branch holds the gradient back) per token [B, T] (PPO, arXiv 1707.06347, equation 7).

        ratio = exp(new - old),   loss = max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))

    `old` are the log-probabilities under the weights that sampled. At the first mini-batch of a step the ratio is 1 whatever one
    does. Upstream's GRPO runs set old = new at every mini-batch of their one epoch: there the clip never acts.

    >>> policy_loss(torch.tensor([0.5, 0.5, -0.5]), torch.zeros(3), torch.tensor([1.0, -1.0, -1.0]), 0.2)       # ratios 1.65, 1.65, 0.61
    (tensor([-1.2000,  1.6487,  0.8000]), tensor([ True, False,  True]))
    """
    ratio = (new - old).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.max(free, held), held > free


def ppo_losses(new: Tensor, old: Tensor, values: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor, mask: Tensor,
               clip: float = 0.2, value_clip: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """(policy loss, value loss, clipped tokens), sums over the mask, of [B, T] each; divide by the tokens of the whole mini-batch.

        value loss = max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2          (ppo_vllm_thread_ray_gtrl.py)

    >>> one, row = torch.ones(1, 2), lambda *x: torch.tensor([x])
    >>> ppo_losses(row(0.0, 0.0), row(0.0, 0.0), row(1.0, 5.0), row(1.0, 1.0), row(2.0, -1.0), row(3.0, 5.0), one)     # (2^2 + (1.2 - 5)^2) / 2
    (tensor(-1.), tensor(9.2200), tensor(0.))
    """
    policy, clipped = policy_loss(new, old, advantages, clip)
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)
    return (policy * mask).sum(), (value * mask).sum(), (clipped * mask).sum()


def grpo_advantages(rewards: Tensor, normalize: bool = True) -> Tensor:
    """rewards [prompts, samples] -> what each answer is better than its group's mean, in the group's (unbiased) standard deviations.

    Source: GRPO (arXiv 2402.03300, section 4.1.2); grpo_vllm_thread_ray_gtrl.py. Without `normalize`, the difference alone (Dr. GRPO,
    arXiv 2503.20783). A group of equal rewards has advantages of 0.

    >>> grpo_advantages(torch.tensor([[10.0, 0.0, 0.0, 10.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-8) if normalize else centred


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) per token, estimated as exp(-d) - 1 + d with d = log_probs - reference: never negative, and 0 where they agree.

    As a loss its gradient is, in expectation, that of KL(reference || policy). (model_utils.py; d is cut at 40.)

    >>> k3(torch.tensor([0.0, -1.0]), torch.tensor([0.0, -2.0]))
    tensor([0.0000, 0.3679])
    """
    d = (log_probs - reference).clamp(-40, 40)
    return torch.expm1(-d) + d


def token_weights(mask: Tensor, denominator: str, tokens: float, rows: int, longest: int) -> Tensor:
    """What each token of [B, T] weighs in a loss over `tokens` tokens in `rows` rows, of all ranks: multiply, and add up.

    token: 1 / tokens, the mean over tokens (ours; TRL's dapo; grpo_fast.py). constant: 1 / (rows x longest), Dr. GRPO's, so that long
    answers are not made light. sequence: 1 / (rows x its row's tokens), the mean of means of the GRPO paper.

    >>> mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> token_weights(mask, "sequence", 3, 2, 8).tolist(), token_weights(mask, "constant", 3, 2, 8)[1].tolist()
    ([[0.5, 0.0], [0.25, 0.25]], [0.0625, 0.0625])
    """
    if denominator == "sequence":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / rows
    return mask / (tokens if denominator == "token" else rows * longest)


def grpo_loss(new: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, weights: Tensor, clip: float = 0.2,
              beta: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, clipped tokens, KL), sums over tokens, from log-probabilities [B, T] and advantages [B]; `weights`: see `token_weights`.

        loss = sum of weight (policy_loss + beta k3(new, reference))          (GRPO, equation 3)

    >>> lp = torch.tensor([[-1.0, -1.0]])
    >>> grpo_loss(lp, lp, lp - 1, torch.tensor([2.0]), torch.tensor([[0.5, 0.5]]), beta=0.1)          # -2 + 0.1 * (e^-1 - 1 + 1)
    (tensor(-1.9632), tensor(0.), tensor(0.7358))
    """
    policy, clipped = policy_loss(new, old, advantages[:, None], clip)
    kl = k3(new, reference)
    counts = (weights > 0).float()
    return (weights * (policy + beta * kl)).sum(), (clipped * counts).sum(), (kl * counts).sum().detach()


# ----------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Common:
    """What all stages have."""
    size: str = "tiny"  # tiny, 14M, 30M, 60M, 190M, 370M, 760M, 1B, 7B, 13B, 32B
    init: str = ""  # the model to start from: a run, checkpoint or Hugging Face directory; none: what the stage before left in runs/<size>
    data: tuple[str, ...] = ()  # .jsonl, .jsonl.gz, .parquet files or names of data sets on the Hub; none: the recipe's, the laptop's are embedded
    val: tuple[str, ...] = ()  # held-out rows, likewise
    out: str = ""  # the run's folder; none: runs/<size>/<stage>
    seed: Count = 1  # of the order of the rows and of sampling
    lr: float = 0.0  # peak learning rate
    schedule: str = "linear"  # linear (to 0 at the end), constant
    warmup: float = 0.0  # share of the steps in which the rate rises from 0
    steps: Count = 0  # length of the run; 0: all epochs
    share: float = 1.0  # of these steps: 0.05 for a quick look
    micro_batch: Count = 2  # at most so many rows per forward and backward of a process; fewer take less memory
    clip: float = 1.0  # largest global L2 norm of the gradient
    beta1: float = 0.9  # AdamW (finetune.py: torch's values)
    beta2: float = 0.999  # AdamW
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.0  # AdamW
    # ---- on the way
    save_every: Count = 500  # steps between training states; the last step is always saved
    keep: Count = 1  # newest states to keep; 0: all
    eval_every: Count = 100  # steps between measurements on held-out rows
    questions: Count = 200  # held-out rows of each
    log_every: Count = 10  # steps between lines on the terminal
    wandb: str = ""  # Weights & Biases project; none: nothing is sent
    # ---- machines: see pretrain.py
    device: str = "auto"  # auto, cpu, mps, cuda
    threads: Count = 0  # CPU threads; 0: torch's choice
    compile: bool = False  # torch.compile each block
    shard: Count = 0  # at most so many processes share one copy of the weights (FSDP); 0: all
    reshard: bool = True  # free a block's gathered weights between its forward and its backward
    recompute: float = 0.0  # share of the blocks that run their forward again in the backward pass
    recompute_part: str = "block"  # block, mlp
    async_save: bool = False  # write states while training goes on
    timeout: Count = 600  # seconds that a process waits for another one


@dataclass(frozen=True)
class SFT(Common):
    # ---- supervised fine-tuning: rows {messages: [{role, content}, ...]}
    batch: Count = 128  # conversations per optimizer step, over all processes
    epochs: Count = 2  # times that each row is seen
    max_length: Count = 4096  # tokens of a conversation; what is longer loses its end
    drop: bool = False  # leave out rows in which that leaves no answer (finetune.py does), instead of naming them
    bos: bool = True  # conversations begin with <|endoftext|>; the released 32B's do not
    replay: float = 0.0  # ours, of the embedded data: share of the rows that are stage-2 text, all of it trained on: a tiny model forgets fast


@dataclass(frozen=True)
class RM(Common):
    # ---- reward model: rows {chosen: messages, rejected: messages}
    batch: Count = 256  # pairs per optimizer step
    epochs: Count = 1
    max_length: Count = 2048
    drop: bool = False  # leave out rows in which nothing is left to compare


@dataclass(frozen=True)
class DPO(RM):
    # ---- direct preference optimization: rows as for the reward model
    batch: Count = 128  # pairs per optimizer step
    beta: float = 5.0  # with normalize; 0.1 is usual without
    normalize: bool = True  # scores are means over tokens (dpo_norm), not sums


@dataclass(frozen=True)
class Sampling(Common):
    # ---- rows {messages, ground_truth, dataset}: `dataset` names the verifier (gsm8k, math, ifeval; ours: qa, instruct)
    prompts: Count = 48  # prompts per step, over all processes
    samples: Count = 16  # answers per prompt
    temperature: float = 1.0
    response_length: Count = 2048  # tokens of an answer at most
    prompt_length: Count = 2048  # longer prompts are left out
    reward: float = 10.0  # of a right answer
    shots: Count = 8  # rows {question, answer}, GSM8K's own layout, get the first so many of their file as examples

    @property
    def batch(self) -> int:
        """Rows per optimizer step."""
        return self.prompts * self.samples // getattr(self, "minibatches", 1)


@dataclass(frozen=True)
class Prefs(Sampling):
    # ---- preference pairs from the model's own answers: the best one against a random other that is worse
    samples: Count = 4  # synth_pref/README.md
    judge: str = ""  # a reward model that scores the answers; none: each row's verifier


@dataclass(frozen=True)
class PPO(Sampling):
    # ---- RLVR with a value model (ppo_vllm_thread_ray_gtrl.py; paper Table 18)
    samples: Count = 1
    value: str = ""  # the model whose weights the value model starts from; none: runs/<size>/rm
    round: Count = 1  # the 13B ran three: a mix, then GSM8K, then MATH
    minibatches: Count = 1  # optimizer steps per pass over the rollouts
    passes: Count = 4  # over the rollouts of a step (K)
    beta: float = 0.05  # of the KL penalty, k1 in the reward of each token
    gamma: float = 1.0
    lam: float = 0.95  # lambda of the advantage estimation
    clip_range: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1  # of the value loss
    value_lr: float = 0.0  # learning rate of the value model; 0: lr
    no_eos: float = -10.0  # reward, instead of any other, of an answer that does not end


@dataclass(frozen=True)
class GRPO(Sampling):
    # ---- RLVR without (grpo_vllm_thread_ray_gtrl.py; docs/olmo2.md)
    round: Count = 1  # the 1B ran two: a mix, then MATH
    minibatches: Count = 2  # optimizer steps per pass over the rollouts
    passes: Count = 1
    beta: float = 0.01  # of the KL penalty, k3 in the loss
    clip_range: float = 0.2
    normalize: bool = True  # advantages in standard deviations of their group
    denominator: str = "token"  # token, constant, sequence: see token_weights
    no_eos: float = 0.0


STAGES: dict[str, type[Common]] = {"sft": SFT, "prefs": Prefs, "rm": RM, "dpo": DPO, "ppo": PPO, "grpo": GRPO}

# Published values: open-instruct docs/olmo2.md (1B) and scripts/train/olmo2/*.sh (7B, 13B), paper Tables 17, 18 and 26, the 32B's card.
# Where they disagree: the 13B's SFT batch is 64 in its script and 128 in the paper; the 7B's PPO beta 0.05 in Table 18 and 0.07 in the
# text; the 32B's GRPO beta 0.01 on its card and 0.1 in the text. SFT warm-up: 0.03 in every script (a caption says 0.3).
MIX, GSM, MATH = "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints", "allenai/RLVR-GSM", "allenai/RLVR-MATH"
SFT_MIX = ("allenai/tulu-3-sft-olmo-2-mixture-0225",)
RECIPES: dict[str, dict[str, dict]] = {
    "sft": {"1B": dict(lr=3e-5, batch=128, warmup=0.03, data=SFT_MIX), "7B": dict(lr=2e-5, batch=128, warmup=0.03, data=("allenai/tulu-3-sft-olmo-2-mixture",)),
            "13B": dict(lr=5e-6, batch=128, warmup=0.03, data=("allenai/tulu-3-sft-olmo-2-mixture",)),
            "32B": dict(lr=4e-6, batch=256, warmup=0.03, data=SFT_MIX, bos=False)},
    # The released preference mixes come from some 20 models and a judge of GPT-4o (paper Table 27); prefs makes pairs of one's own.
    "prefs": {size: dict(data=(MIX,)) for size in ("1B", "7B", "13B", "32B")},
    "rm": {size: dict(lr=3e-6, eps=1e-5, data=(f"allenai/olmo-2-1124-{size.lower()}-preference-mix",)) for size in ("7B", "13B")},
    "dpo": {"1B": dict(lr=2.5e-6, warmup=0.1, seed=111, data=("allenai/olmo-2-0425-1b-preference-mix",)),
            "7B": dict(lr=1e-6, warmup=0.1, data=("allenai/olmo-2-1124-7b-preference-mix",)),
            "13B": dict(lr=8e-7, warmup=0.1, seed=8, data=("allenai/olmo-2-1124-13b-preference-mix",)),
            "32B": dict(lr=2e-6, warmup=0.1, data=("allenai/olmo-2-0325-32b-preference-mix",))},
    "ppo": {"7B": dict(lr=4e-7, prompts=224, steps=100_000 // 224, beta=0.05, data=(MIX,)),
            "13B": dict(lr=3e-7, prompts=248, steps=200_000 // 248, beta=0.1, data=(MIX,))},
    "grpo": {"1B": dict(lr=5e-7, schedule="constant", prompts=48, samples=16, steps=2_000_000 // 768, data=(MIX,)),
             "32B": dict(lr=5e-7, schedule="constant", prompts=112, samples=16, steps=320, data=(MIX,))},  # of 10M episodes planned, step 320 was released
}
# Rounds after the first. The 13B's began at step 480 of the first and, as it seems, at step 180 of the second; the value model is new in each.
ROUNDS = {("grpo", "1B"): [dict(data=(MATH,))], ("ppo", "13B"): [dict(data=(GSM,), beta=0.03), dict(data=(MATH,), beta=0.1)]}
# Ours, for a laptop: see the README.
EMBEDDED_ROWS = {"sft": 16_000, "prefs": 1024, "rl": 4000}
LAPTOP = dict(micro_batch=16, log_every=10)
RECIPES["sft"]["tiny"] = dict(LAPTOP, lr=2e-3, warmup=0.03, batch=16, epochs=1, max_length=128, replay=0.1, eval_every=400, log_every=100)
RECIPES["prefs"]["tiny"] = dict(LAPTOP, prompts=256, response_length=48, prompt_length=80, steps=4)
RECIPES["rm"]["tiny"] = dict(LAPTOP, lr=5e-4, batch=32, max_length=128, eval_every=20)
RECIPES["dpo"]["tiny"] = dict(LAPTOP, lr=2e-4, warmup=0.1, batch=32, max_length=128, eval_every=20)
RECIPES["grpo"]["tiny"] = dict(LAPTOP, lr=3e-4, prompts=16, samples=8, steps=40, response_length=48, prompt_length=80, eval_every=20)
RECIPES["ppo"]["tiny"] = dict(LAPTOP, lr=3e-4, value_lr=2e-3, prompts=128, steps=30, response_length=48, prompt_length=80, eval_every=30)

# ----------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Example:
    """A conversation in tokens, and `targets`: the next token where the assistant wrote it, else -100. Both [T]."""
    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """What to answer, and how to check the answer."""
    messages: list[dict]
    tokens: list[int]  # rendered, up to and with the assistant's header
    verifier: str
    label: str
    source: str  # by which it is counted
    exact: str = ""  # the answer word for word, where there is one


def encode_conversations(tokenizer: Tokenizer, conversations: list[list[dict]], max_length: int) -> list[Example]:
    """Conversations as they are trained on: targets are exactly the assistant's words and the EOS after them, in every turn.

    What the assistant says is encoded apart from what stands before, as it is when a model writes it: so an answer that begins with
    a line break does not change the header's last token, as it does when all is encoded at once (sft_tulu_tokenize_and_truncate_v1;
    all other conversations get the same ids either way). What exceeds max_length is cut on the right.
    """
    examples = []
    for i in tqdm(range(0, len(conversations), 1000), desc="encoding", leave=False, disable=rank_and_world()[0] > 0 or None):
        pieces = [tokenizer.chat_pieces(messages) for messages in conversations[i : i + 1000]]
        ids = iter(tokenizer.encode_batch([text for row in pieces for text in row]))
        for row in pieces:
            encoded = [next(ids) for _ in row]
            tokens = np.array([token for part in encoded for token in part][:max_length], np.int64)
            by_assistant = np.array([bool(n % 2) for n, part in enumerate(encoded) for _ in part][:max_length], bool)
            targets = np.where(by_assistant, tokens, -100)
            examples.append(Example(tokens, np.append(targets[1:], -100)))
    return examples


def read_rows(sources: tuple[str, ...]) -> list[tuple[str, dict]]:
    """(where it stands, row) of every row of files or of data sets on the Hub. Raises UserError."""
    rows: list[tuple[str, dict]] = []
    for source in sources:
        if source.endswith((".jsonl", ".jsonl.gz")):
            if not Path(source).exists():
                raise UserError(f"{source} does not exist")
            rows += [(f"{source}, line {number}", row) for number, row in json_lines(Path(source))]
            continue
        if Path(source).exists() and not source.endswith(".parquet") or source.count("/") != 1 and not source.endswith(".parquet"):
            raise UserError(f"{source}: expected a file .jsonl, .jsonl.gz or .parquet, or the name of a data set on the Hub, as in allenai/RLVR-GSM")
        try:
            import datasets
        except ImportError:
            raise UserError(f"{source}: reading .parquet and the Hub needs the datasets library: pip install datasets") from None
        try:
            if source.endswith(".parquet"):
                table = datasets.Dataset.from_parquet(source)
            else:
                table = datasets.load_dataset(source, split="train")
        except Exception as error:  # of the many libraries below
            raise UserError(f"{source} cannot be read: {str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)}") from None
        rows += [(f"{source}, row {number}", row) for number, row in enumerate(table, 1)]
    return rows


def fit(rows: list[tuple[str, dict]], make: Callable[[dict], object]) -> list:
    """`make` of each row. Raises UserError naming the rows of which it does (their first five)."""
    made, problems = [], []
    for where, row in rows:
        try:
            made.append(make(row))
        except UserError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise UserError("; ".join(problems[:5]) + (f" (and {len(problems) - 5} rows more)" if len(problems) > 5 else ""))
    return made


def conversation(row: dict, key: str) -> list[dict]:
    """The messages under a key of a row, whose last is the assistant's. Raises UserError."""
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        raise UserError(f'expected a list of messages under "{key}", got {json.dumps(row)[:60]}')
    for i, message in enumerate(messages):
        if not (isinstance(message, dict) and message.get("role") in ("system", "user", "assistant") and isinstance(message.get("content"), str)):
            raise UserError(f'"{key}", message {i}: expected a role (system, user or assistant) and a text as content, got {str(message)[:60]}')
    return messages


def read_examples(sources: tuple[str, ...], rows: list[tuple[str, dict]], keys: tuple[str, ...], tokenizer: Tokenizer, max_length: int,
                  drop: bool) -> list[tuple[Example, ...]]:
    """Per row the conversations under `keys`, encoded: ("messages",), or ("chosen", "rejected").

    Raises UserError naming the rows that do not fit, and, without `drop`, those in which nothing that the assistant says is left.
    """
    rows = rows or read_rows(sources)
    conversations = fit(rows, lambda row: [conversation(row, key) for key in keys])
    flat = encode_conversations(tokenizer, [messages for row in conversations for messages in row], max_length)
    examples = [tuple(flat[i : i + len(keys)]) for i in range(0, len(flat), len(keys))]
    empty = [(where, not any(m["role"] == "assistant" for messages in row for m in messages)) for (where, _), row, each in zip(rows, conversations, examples)
             if any((example.targets == -100).all() for example in each)]
    if empty and not drop:
        raise UserError("; ".join(f"{where}: {'no assistant speaks in it' if silent else f'no word of the assistant is left in the first {max_length} tokens'}"
                                  for where, silent in empty[:5]) + (f" (and {len(empty) - 5} rows more)" if len(empty) > 5 else "")
                        + ": remove such rows, lengthen --max-length, or leave them out with --drop")
    if empty:
        print(f"          {len(empty):,} of {len(rows):,} rows have nothing to learn from in {max_length} tokens and are left out")
    return [each for each in examples if all((example.targets != -100).any() for example in each)]


# The verifiers of eval.py by the names in the rows' `dataset`: (answer, label) -> is it right?
VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "gsm8k": verify_gsm8k, "math": verify_math, "ifeval": lambda answer, label: verify_ifeval(answer, *rlvr_constraint(json.loads(label))),
    "qa": functools.partial(is_right, "qa"), "instruct": functools.partial(is_right, "instruct")}


def read_prompts(sources: tuple[str, ...], rows: list[tuple[str, dict]], tokenizer: Tokenizer, max_length: int, shots: int) -> list[Prompt]:
    """The prompts of RLVR rows {messages, ground_truth, dataset}; a last message of the assistant is not shown to the model.

    Rows of GSM8K's own layout {question, answer} become such rows: one user turn with the first `shots` rows of their file as worked
    examples, as the release's prompts have eight (create_ground_truth_data.py); these are not asked. Raises UserError.
    """
    rows = with_examples(rows or read_rows(sources), shots)

    def make(row: dict) -> Prompt:
        messages, label, verifier = conversation(row, "messages"), row.get("ground_truth"), str(row.get("dataset", "")).lower()
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError("there is no prompt before the assistant's message")
        if verifier not in VERIFIERS:
            near = difflib.get_close_matches(verifier, VERIFIERS, 1)
            raise UserError(f'"dataset" names the verifier {verifier!r}{f", did you mean {near[0]}?" if near else ""}: there are {", ".join(VERIFIERS)}')
        if not isinstance(label, str) or not label:
            raise UserError(f'expected the right answer, a text, under "ground_truth", got {label!r}')
        if verifier == "ifeval":
            try:
                ifeval_check(*rlvr_constraint(json.loads(label)))
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f'"ground_truth" is no constraint: {error}') from None
        return Prompt(messages, tokenizer.apply_chat_template(messages, add_generation_prompt=True), verifier, label, str(row.get("source") or verifier),
                      row.get("careful", "") if verifier == "ifeval" else "")

    prompts = fit(rows, make)
    short = [prompt for prompt in prompts if len(prompt.tokens) <= max_length]
    if not short:
        raise UserError(f"none of {len(prompts):,} prompts has at most the {max_length} tokens of --prompt-length: the shortest has {min(len(p.tokens) for p in prompts)}"
                        if prompts else f"{', '.join(sources)}: no row")
    if len(short) < len(prompts):
        print(f"          {len(prompts) - len(short):,} of {len(prompts):,} prompts exceed {max_length} tokens and are left out")
    return short


def with_examples(rows: list[tuple[str, dict]], shots: int) -> list[tuple[str, dict]]:
    files: dict[str, list[tuple[str, dict]]] = {}
    for where, row in rows:
        files.setdefault(where.rpartition(",")[0], []).append((where, row))
    made = []
    for part in files.values():
        if not all(isinstance(row.get(key), str) for _, row in part for key in ("question", "answer")):
            made += part
            continue
        text = "".join(f"Question: {row['question']}\nAnswer: {worked_answer(row['answer'])}\n\n" for _, row in part[:shots])
        made += [(where, {"messages": [{"role": "user", "content": f"{text}Question: {row['question']}\nAnswer:"}], "dataset": "gsm8k",
                          "ground_truth": row["answer"].rpartition("####")[2].strip()}) for where, row in part[shots:]]
    return made


def worked_answer(solution: str) -> str:
    """
    >>> worked_answer("She sold 48/2 = <<48/2=24>>24 clips.\\n#### 24")
    'She sold 48/2 = 24 clips. So the answer is 24.'
    """
    steps, _, result = solution.partition("####")
    while "<<" in steps and ">>" in steps:
        steps = steps[: steps.index("<<")] + steps[steps.index(">>") + 2 :]
    return f"{' '.join(steps.split())} So the answer is {result.strip()}."


def fingerprint(rows: list) -> str:
    """12 hex digits of what is trained on."""
    digest = hashlib.sha256()
    for row in rows:
        if isinstance(row, Prompt):
            digest.update(json.dumps([row.tokens, row.verifier, row.label]).encode())
        for example in row if isinstance(row, tuple) else ():
            digest.update(example.tokens.tobytes() + example.targets.tobytes())
    return digest.hexdigest()[:12]


def order(rows: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Which rows are in the batch of a step: each epoch is a new permutation, and what fills no batch at its end is left out."""
    epoch, i = divmod(step, rows // batch)
    return np.random.Generator(np.random.PCG64(seed + epoch)).permutation(rows)[i * batch : (i + 1) * batch]


def micro_batches(rows: list[tuple[Example, ...]], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(which rows, tokens, targets [k b, T]) of rows of k conversations each: neighbours in length together, padded on the right.

    The first conversations of all b rows come first, then all second ones.
    """
    longest = [max(len(example.tokens) for example in row) for row in rows]
    by_length = sorted(range(len(rows)), key=lambda n: longest[n])
    for i in range(0, len(rows), size):
        which = by_length[i : i + size]
        examples = [example for column in zip(*(rows[n] for n in which)) for example in column]
        tokens = torch.zeros(len(examples), longest[which[-1]], dtype=torch.long)
        targets = torch.full_like(tokens, -100)
        for row, example in enumerate(examples):
            tokens[row, : len(example.tokens)] = torch.from_numpy(example.tokens)
            targets[row, : len(example.targets)] = torch.from_numpy(example.targets)
        yield which, tokens, targets


def spread(rows: list, work: Callable[[list], list]) -> list:
    """`work` of all rows, shared out over the ranks; all get all results. The ranks have equally many, as FSDP needs it."""
    rank, world = rank_and_world()
    parts = from_all(work((rows + rows[:1] * (-len(rows) % world))[rank::world]))
    return [parts[i % world][i // world] for i in range(len(rows))]


# ----------------------------------------------------------------------------------------------------------------------
# Answers: the model writes, a program reads


@dataclass(frozen=True)
class Answer:
    example: Example  # the prompt with its answer; targets: the answer's tokens
    log_probs: Tensor  # of the targets, as they were sampled [T], 0 elsewhere
    text: str  # without EOS
    ended: bool  # by EOS, in time
    right: bool


@contextlib.contextmanager
def gathered(model: OLMo2):
    """Inside, every rank has all of a sharded model's weights, in the computing dtype, and may generate at its own pace. All ranks come."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    with torch.compiler.set_stance("force_eager"):  # compiling for each length of the cache would take longer than it saves
        yield
    for module in shards:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


CACHE_TOKENS = 2**15  # whose keys and values are kept at a time: 16 GiB of a 7B in bfloat16


def answers(model: OLMo2, tokenizer: Tokenizer, prompts: list[Prompt], seeds: list[int], temperature: float, max_new_tokens: int, name: str = "") -> list[Answer]:
    """An answer to each prompt, verified. Prompts of a length together, in large batches; row i draws from seeds[i] alone.

    Sharded weights are gathered once for all of it: they must fit beside everything else.
    """
    made: list[Answer | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    rows = max(1, CACHE_TOKENS // (max((len(prompt.tokens) for prompt in prompts), default=0) + max_new_tokens))
    with gathered(model):
        for i in tqdm(range(0, len(prompts), rows), desc=name, leave=False, disable=not name or rank_and_world()[0] > 0 or None):
            which = by_length[i : i + rows]
            new, sampled = model.generate([prompts[n].tokens for n in which], max_new_tokens, temperature, eos=tokenizer.eos, seed=[seeds[n] for n in which])
            for n, ids, values in zip(which, new, sampled):
                ended, prompt = ids[-1] == tokenizer.eos, prompts[n]
                text = tokenizer.decode(ids[: len(ids) - ended])
                tokens = np.array(prompt.tokens + ids, np.int64)
                targets = np.full_like(tokens, -100)
                targets[len(prompt.tokens) - 1 : -1] = ids
                log_probs = torch.zeros(len(tokens)).index_copy(0, torch.arange(len(prompt.tokens) - 1, len(tokens) - 1), torch.tensor(values))
                made[n] = Answer(Example(tokens, targets), log_probs, text, ended, VERIFIERS[prompt.verifier](text.strip(), prompt.label))
    return made


@contextlib.contextmanager
def inference(model: OLMo2):
    """Forwards without gradients. No backward pass follows that would free what FSDP has gathered of the root, so it is done here."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    if isinstance(model, FSDPModule):
        model.reshard()


def each_row(model: OLMo2, examples: list[Example], c: Common, values: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Per example its row [T] of `values(tokens, targets)` [b, T], which the model computes; without gradients, on the CPU."""
    found: list = [None] * len(examples)
    device = next(model.parameters()).device
    with inference(model):
        for which, tokens, targets in micro_batches([(example,) for example in examples], 4 * c.micro_batch):
            for n, row in zip(which, values(tokens.to(device), targets.to(device)).cpu()):
                found[n] = row[: len(examples[n].tokens)]
    return found


def pad(rows: list[Tensor], like: Tensor) -> Tensor:
    """Rows of several lengths as one [b, T], of the width and on the device of `like`, with zeros on the right."""
    return torch.stack([F.pad(row, (0, like.shape[1] - len(row))) for row in rows]).to(like.device)


def quiz(model: OLMo2, tokenizer: Tokenizer, prompts: list[Prompt], max_new_tokens: int) -> dict[str, float]:
    """Greedy answers to held-out prompts: % right by source; `exact`: % right word for word, of those where that is known; `format`: % that end
    and look like an answer in a conversation; mean length in tokens."""
    rank, world = rank_and_world()
    made = sum(from_all(answers(model, tokenizer, prompts[rank::world], [0] * len(prompts), 0.0, max_new_tokens, "held-out prompts")), [])
    asked = sum(from_all(prompts[rank::world]), [])
    share = lambda hits: 100 * float(np.mean(list(hits)))
    columns = {f"{name} %": share(a.right for a, p in zip(made, asked) if p.source == name) for name in dict.fromkeys(p.source for p in asked)}
    if any(p.exact for p in asked):
        columns["exact %"] = share(a.text.strip() == p.exact for a, p in zip(made, asked) if p.exact)
    return columns | {"format %": share(a.ended and "<|" not in a.text for a in made), "length": float(np.mean([(a.example.targets != -100).sum() for a in made]))}


# ----------------------------------------------------------------------------------------------------------------------
# What the loops share


def start(c: Common, chat_bos: bool | None = None) -> tuple[torch.device, Tokenizer]:
    """This process' device, and the tokenizer of --init, as the instruct model's that is being made. Raises UserError."""
    keep_freed_memory(True)
    device = start_ranks(c)
    if c.threads:
        torch.set_num_threads(c.threads)
    tokenizer = copy.copy(together(lambda: get_tokenizer(find_weights(c.init)[0])))
    tokenizer.instruct = True
    if chat_bos is not None:
        tokenizer.chat_bos = chat_bos
    return device, tokenizer


def load_model(c: Common, path: str, device: torch.device, head: str = "lm") -> OLMo2:
    """The model at `path`, sharded as the run's. Given head "score", that of a language model becomes a new one, of one column."""
    folder, weights = together(lambda: find_weights(path))
    config = together(lambda: read_config(folder))
    if config.head == "score" and head == "lm":
        raise UserError(f"{path} holds a reward model: it gives a text a number and cannot write", everywhere=True)
    with torch.device("meta"):
        model = OLMo2(dataclasses.replace(config, head=head))
    prepare(model, c, make_mesh(c, device), bf16=device.type == "cuda")
    model.to_empty(device=device)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if config.head != head:
        model.init_weights(c.seed)
        del tensors["score.weight"]
    load_tensors(weights, tensors, leave_out=("lm_head.weight",) if config.head != head else ())
    return model


def open_stage(c: Common, origin: dict[str, str], rows: list, tensors: dict[str, dict[str, Tensor]], config, tokenizer: Tokenizer, steps: int, unit: str) -> Run:
    """Make the run's folder, or go on with its newest state, which replaces `tensors`; prints what is about to happen."""
    rank, world = rank_and_world()
    folder, data_hash, weights = Path(c.out), fingerprint(rows), checksum(tensors["model"])
    together(lambda: rank or open_run(c, origin, {"hash": data_hash, "files": list(c.data), "rows": len(rows)}, weights))
    state_folder = newest_state(folder)
    state = load_state(state_folder, config, tensors) if state_folder else {}
    checked = self_check(c, data_hash, tensors["model"], next(iter(tensors["model"].values())).device)
    print(f"run       {folder}{f', going on from {state_folder.name}' if state_folder else ''}")
    print(f"model     {c.init}: {config.parameters['total']:,} parameters; {next(iter(tensors['model'].values())).device}, {torch.get_num_threads()} threads")
    print(f"check     {checked}")
    print(f"data      {data_hash}: {len(rows):,} rows; {steps:,} steps of {unit}, {steps * c.batch / len(rows):.2f} times each", flush=True)
    return Run(c, config, tokenizer, state)


def lr_at(step: int, steps: int, c: Common) -> float:
    """The rate of a step (from 0): linear warm-up, then constant, or in a straight line to 0 just after the last step.

    >>> [round(lr_at(step, 10, SFT(lr=1.0, warmup=0.2)), 3) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    warmup = round(steps * c.warmup)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    return c.lr * (1.0 if c.schedule == "constant" else (steps - step) / (steps - warmup))


def take_step(model: OLMo2, optimizer: torch.optim.AdamW, lr: float, clip: float) -> float:
    """Clip, step, and forget the gradients; returns their norm. One that is not finite changes nothing."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = clip_gradients(model, clip)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def number_of_steps(c: Common, rows: int, batch: int) -> int:
    """--steps, or all epochs. Raises UserError where there is less than a batch."""
    if rows < batch:
        raise UserError(f"{rows:,} rows are fewer than the {batch:,} of a step: give more data, or a smaller {'--batch' if hasattr(c, 'epochs') else '--prompts'}", everywhere=True)
    return max(1, round(c.share * (c.steps or getattr(c, "epochs", 1) * (rows // batch))))


def check_length(c: Common, model: OLMo2) -> None:
    longest = c.max_length if hasattr(c, "max_length") else c.prompt_length + c.response_length
    if longest > model.config.context:
        raise UserError(f"{c.init} takes {model.config.context:,} tokens at most: lower {'--max-length' if hasattr(c, 'max_length') else '--prompt-length and --response-length'}, "
                        f"which {'is' if hasattr(c, 'max_length') else 'add up to'} {longest:,}", everywhere=True)


def count(rows: list[tuple[Example, ...]]) -> tuple[float, float]:
    """(targets, tokens) in the rows of all ranks."""
    mine = [(float((example.targets != -100).sum()), float(len(example.tokens))) for row in rows for example in row]
    return tuple(all_sum(torch.tensor(mine, dtype=torch.float64).sum(0)).tolist())


class Clock:
    """Prints a line of a run now and then, with the time left."""

    def __init__(self, run: Run, c: Common, steps: int):
        self.run, self.c, self.steps, self.first, self.start, self.then = run, c, steps, run.step, time.perf_counter(), time.perf_counter()

    def end_step(self, tokens: float, **values: float) -> None:
        """Count, record and show a step; `values` are its metrics."""
        run, now = self.run, time.perf_counter()
        run.step, run.tokens = run.step + 1, run.tokens + int(tokens)
        skipped = not math.isfinite(values.get("grad_norm", 0.0))
        run.record("step", **values, skipped=skipped, tokens_per_s=round(tokens / (now - self.then), 1), seconds=round(now - self.start, 3))
        self.then = now
        if run.step % self.c.log_every == 0 or run.step == self.steps or skipped:
            left = (self.steps - run.step) * (now - self.start) / (run.step - self.first)
            print(f"step {run.step:>{len(str(self.steps))}}/{self.steps}  " + "  ".join(f"{name} {value:{'.1e' if name == 'lr' else '#.3g'}}" for name, value in values.items()) +
                  f"  {format_seconds(left)} left{'  SKIPPED' if skipped else ''}", flush=True)

    def due(self, every: int) -> bool:
        return self.run.step % every == 0 or self.run.step == self.steps or self.run.stop


def record_eval(run: Run, columns: dict[str, float], sample: tuple[str, str] | None = None) -> None:
    run.record("eval", held_out=columns)
    print("          held-out: " + ", ".join(f"{name} {value:.{1 if '%' in name else 3}f}" for name, value in columns.items()))
    if sample:
        run.record("sample", prompt=sample[0], text=sample[1])
        print(f"          sample: {sample[0]!r} -> {sample[1]!r}", flush=True)


def show_answer(model: OLMo2, tokenizer: Tokenizer, prompts: list[list[int]], c: Common, max_new_tokens: int) -> tuple[str, str] | None:
    """One of the held-out prompts, always the same one, and an answer at temperature 1."""
    if not prompts:
        return None
    prompt = random.Random(c.seed).choice(prompts)
    with gathered(model):
        (new,), _ = model.generate([prompt], min(max_new_tokens, model.config.context - len(prompt)), eos=tokenizer.eos, seed=c.seed)
    return tokenizer.decode(prompt)[-200:], tokenizer.decode(new)


def prompt_of(example: Example) -> list[int]:
    """What stands before the first word of the assistant."""
    return example.tokens[: int((example.targets != -100).argmax()) + 1].tolist()


def close_stage(run: Run, c: Common, tensors: dict[str, dict[str, Tensor]], tokenizer: Tokenizer, config) -> Path:
    if run.rank == 0:
        plot(run.folder)
    run.leave_if_stopped()
    if not list((run.folder / "hf").glob("*.safetensors")):  # someone removed them, and the run was finished
        export(run.folder, newest_state(run.folder), tensors["model"], config, tokenizer)
    print(f"{run.folder}: finished; weights {run.folder / 'hf'}   curves {run.folder / 'curves.png'}\n", flush=True)
    return run.folder


def plot(folder: Path) -> None:
    """Draw curves.png from metrics.jsonl: each metric of the steps against the step, with what was measured on held-out rows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_metrics(folder)
    steps, evals = ([row for row in rows if row["event"] == event] for event in ("step", "eval"))
    left_out = {"event", "step", "tokens", "skipped", "tokens_per_s", "seconds"}
    panels = [("step", name) for name in (steps[0] if steps else ()) if name not in left_out] + [("held-out", name) for name in (evals[0]["held_out"] if evals else ())]
    if not steps:
        return
    figure, axes = plt.subplots(-(-len(panels) // 4), 4, figsize=(13, 2.5 * -(-len(panels) // 4)), squeeze=False, layout="constrained")
    for axis, (kind, name) in zip(axes.flat, panels):
        if kind == "step":
            axis.plot([row["step"] for row in steps], [math.nan if row.get(name) is None else row[name] for row in steps], color="C0", linewidth=0.9)
        else:
            axis.plot([row["step"] for row in evals], [row["held_out"].get(name, math.nan) for row in evals], color="C1", marker=".")
        axis.set(title=name if kind == "step" else f"held-out {name}")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.suptitle(str(folder))
    figure.savefig(folder / "curves.png.tmp", format="png", dpi=110)
    os.replace(folder / "curves.png.tmp", folder / "curves.png")
    plt.close(figure)


def held_out_prompts(c: Common, tokenizer: Tokenizer) -> list[Prompt]:
    """The laptop's held-out questions, which no stage trains on: half sums, half constraints."""
    rows = [(f"held-out {task}", row) for task in ("gsm8k", "ifeval") for row in rlvr_rows(task, "val", c.questions)]
    return read_prompts((), rows, tokenizer, 10**9, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The loops


def sft(c: SFT, origin: dict[str, str]) -> Path:
    """Supervised fine-tuning: cross-entropy on what the assistant says, each token of a batch counting the same (Tulu 3; finetune.py)."""
    device, tokenizer = start(c, c.bos)
    rank, world = rank_and_world()
    embedded = [] if c.data else [(f"embedded instructions, row {i}", row) for i, row in enumerate(instruct_rows("train", EMBEDDED_ROWS["sft"], c.seed), 1)]
    embedded_val = [] if c.data else [("held-out instructions", row) for row in instruct_rows("val", c.questions)]
    rows = together(lambda: read_examples(c.data, embedded, ("messages",), tokenizer, c.max_length, c.drop))
    val = together(lambda: read_examples(c.val, embedded_val, ("messages",), tokenizer, c.max_length, True)) if c.val or embedded_val else []
    prompts = [] if c.data else held_out_prompts(c, tokenizer)
    if embedded and c.replay:
        rows += replayed_rows(c, tokenizer, round(len(rows) * c.replay / (1 - c.replay)))
    steps = number_of_steps(c, len(rows), c.batch)
    model = load_model(c, c.init, device)
    check_length(c, model)
    optimizer = make_optimizer(model, c)
    tensors = tensors_of(model, optimizer)
    run = open_stage(c, origin, rows, tensors, model.config, tokenizer, steps, f"{c.batch} conversations")

    def evaluate() -> None:
        columns = {}
        if val:
            nats = spread([example for (example,) in val], lambda part: [-row.sum().item() for row in each_row(model, part, c, model.log_probs)])
            columns = {"loss": sum(nats) / sum(int((example.targets != -100).sum()) for (example,) in val)}
        if columns or prompts:
            shown = [prompt.tokens for prompt in prompts] or [prompt_of(example) for (example,) in val]
            record_eval(run, columns | (quiz(model, tokenizer, prompts, 48) if prompts else {}), show_answer(model, tokenizer, shown, c, 48))

    with run:
        clock = Clock(run, c, steps)
        if run.step == 0:
            evaluate()
        while run.step < steps and not run.stop:
            batch = [rows[n] for n in order(len(rows), c.batch, run.step, c.seed)[rank::world]]
            n_targets, n_tokens = count(batch)
            loss = torch.zeros((), device=device)
            for _, tokens, targets in micro_batches(batch, c.micro_batch):
                ce_sum, _, _ = model.loss(tokens.to(device), targets.to(device), z_loss=0.0)
                (ce_sum / n_targets).backward()
                loss += ce_sum.detach() / n_targets
            (loss,) = run.share(loss)
            lr = lr_at(run.step, steps, c)
            clock.end_step(n_tokens, loss=loss, lr=lr, grad_norm=take_step(model, optimizer, lr, c.clip))
            if clock.due(c.eval_every):
                evaluate()
            if clock.due(c.save_every):
                run.save(tensors, wait=run.step == steps or run.stop)
    return close_stage(run, c, tensors, tokenizer, model.config)


def replayed_rows(c: SFT, tokenizer: Tokenizer, rows: int) -> list[tuple[Example, ...]]:
    """So many instances of stage 2's mix."""
    sources = mix_sources(LAPTOP_MIX, "train", tokenizer)
    files, counts = mix_files(sources, rows, c.max_length)
    data = TokenData(files, c.max_length, tokenizer, counts)
    instances = (data.instance(i) for i in range(len(data)))
    return [(Example(tokens, make_targets(tokens[None])[0]),) for tokens in instances]


def prefs(c: Prefs, origin: dict[str, str]) -> Path:
    """Preference pairs from the model's own answers: of each prompt's samples the best, against a random one of those that are worse.

    Writes train.jsonl and, where there are held-out prompts, val.jsonl, in the layout of the released mixes (parse_preferences.py). A
    step is the answers to --prompts prompts; what is written is not made again.
    """
    device, tokenizer = start(c)
    rank, world = rank_and_world()
    embedded = [] if c.data else [("embedded prompts", row) for row in rlvr_rows("ifeval", "train", EMBEDDED_ROWS["prefs"], c.seed)]
    embedded_val = [] if c.data else [("held-out prompts", row) for row in rlvr_rows("ifeval", "val", 2 * c.questions)]
    splits = {"train": together(lambda: read_prompts(c.data, embedded, tokenizer, c.prompt_length, c.shots))}
    steps = max(1, round(c.share * (c.steps or -(-len(splits["train"]) // c.prompts))))
    splits["train"] = splits["train"][: steps * c.prompts]
    if c.val or embedded_val:
        splits["val"] = together(lambda: read_prompts(c.val, embedded_val, tokenizer, c.prompt_length, c.shots))
    model = load_model(c, c.init, device)
    check_length(c, model)
    judge = load_model(c, c.judge, device, "score") if c.judge else None
    weights = checksum({name: p.detach() for name, p in model.named_parameters()})
    together(lambda: rank or open_run(c, origin, {"hash": fingerprint(sum(splits.values(), [])), "files": list(c.data), "rows": len(splits["train"])}, weights))

    def judged(asked: list[Prompt], step: int) -> list[dict]:
        """The rows of the pairs from these prompts, those of all ranks."""
        mine = [n % len(asked) for n in range(rank, -(-len(asked) // world) * world, world)]  # equally many on each rank, as FSDP needs it
        made = answers(model, tokenizer, [asked[n] for n in mine for _ in range(c.samples)], [row_seed(c, step, n * c.samples + k) for n in mine for k in range(c.samples)],
                       c.temperature, c.response_length)
        scores = [c.reward * answer.right for answer in made]
        if judge:
            scores = [row[-1].item() for row in each_row(judge, [answer.example for answer in made], c, lambda tokens, _: judge.scores(tokens))]
        rows = []
        for i, n in enumerate(mine):
            chance, group = random.Random(row_seed(c, step, n)), range(i * c.samples, (i + 1) * c.samples)
            best = max(scores[g] for g in group)
            worse = [g for g in group if scores[g] < best]
            if worse and rank + i * world < len(asked):
                chosen, rejected = chance.choice([g for g in group if scores[g] == best]), chance.choice(worse)
                said = lambda g: [*asked[n].messages, {"role": "assistant", "content": made[g].text}]
                rows.append((n, {"prompt": asked[n].messages[-1]["content"], "chosen": said(chosen), "rejected": said(rejected), "chosen_rating": scores[chosen],
                                 "rejected_rating": scores[rejected], "chosen_model": c.init, "rejected_model": c.init, "source": asked[n].source}))
        return [row for _, row in sorted(sum(from_all(rows), []), key=lambda pair: pair[0])]

    parts = [(split, i) for split, prompts in splits.items() for i in range(0, len(prompts), c.prompts)]
    place = lambda split, i: Path(c.out) / f".{split}-{i:08d}.jsonl"
    finished = all((Path(c.out) / f"{split}.jsonl").exists() for split in splits)
    done = len(parts) if finished else next((k for k, part in enumerate(parts) if not place(*part).exists()), len(parts))
    print(f"run       {c.out}{', going on' if done else ''}\nmodel     {c.init}: {c.samples} answers at temperature {c.temperature:g} to each of {len(splits['train']):,} prompts"
          + (f", and to {len(splits['val']):,} held-out ones" if "val" in splits else "") + f"; judged by {c.judge or 'the verifiers'}", flush=True)
    with Run(c, model.config, tokenizer, {"step": from_all(done)[0]}) as run:
        clock = Clock(run, c, len(parts))
        while run.step < len(parts) and not run.stop:
            split, i = parts[run.step]
            rows = judged(splits[split][i : i + c.prompts], run.step)
            if rank == 0:
                write_text(place(split, i), "".join(json.dumps({"id": f"{split}-{i + k}", **row}, ensure_ascii=False) + "\n" for k, row in enumerate(rows)))
            run.share(torch.zeros((), device=device))
            clock.end_step(0, pairs=len(rows) / len(splits[split][i : i + c.prompts]))
    run.leave_if_stopped()
    if rank == 0 and not finished:
        for split, prompts in splits.items():
            files = [place(split, i) for i in range(0, len(prompts), c.prompts)]
            write_text(Path(c.out) / f"{split}.jsonl", "".join(file.read_text(encoding="utf-8") for file in files))
        for part in parts:
            place(*part).unlink()
    for split, prompts in splits.items() if rank == 0 else ():
        print(f"          {sum(1 for _ in json_lines(Path(c.out) / f'{split}.jsonl')):,} pairs from {len(prompts):,} prompts: {c.out}/{split}.jsonl")
    print(flush=True)
    return Path(c.out)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def pair_scores(model: OLMo2, c: DPO, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """S(y) of the chosen and of the rejected of b pairs, from [2 b, T]: one forward for both."""
    scores = sequence_scores(model.log_probs(tokens, targets), (targets != -100).float(), c.normalize)
    return scores.chunk(2)


def each_pair(model: OLMo2, pairs: list[tuple[Example, ...]], c: Common, scores: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Per pair the two `scores(tokens, targets)` of its conversations, which the model computes; without gradients. All ranks share the work."""
    device = next(model.parameters()).device

    def work(part: list) -> list:
        found: list = [None] * len(part)
        with inference(model):
            for which, tokens, targets in micro_batches(part, 4 * c.micro_batch):
                for n, *row in zip(which, *(side.tolist() for side in scores(tokens.to(device), targets.to(device)))):
                    found[n] = tuple(row)
        return found

    return spread(pairs, work)


def read_pairs(c: RM, tokenizer: Tokenizer) -> tuple[list, list]:
    """(pairs to train on, held-out pairs) of chosen and rejected conversations."""
    rows = together(lambda: read_examples(c.data, [], ("chosen", "rejected"), tokenizer, c.max_length, c.drop))
    return rows, together(lambda: read_examples(c.val, [], ("chosen", "rejected"), tokenizer, c.max_length, True)) if c.val else []


def dpo(c: DPO, origin: dict[str, str]) -> Path:
    """Direct preference optimization, with the reference's scores computed once, before the first step (dpo_tune_cache.py)."""
    device, tokenizer = start(c)
    rank, world = rank_and_world()
    rows, val = read_pairs(c, tokenizer)
    prompts = held_out_prompts(c, tokenizer) if is_laptop(c) else []
    steps = number_of_steps(c, len(rows), c.batch)
    model = load_model(c, c.init, device)
    check_length(c, model)
    scores = functools.partial(pair_scores, model, c)
    reference, reference_val = (each_pair(model, pairs, c, scores) for pairs in (rows, val))  # before a state replaces the weights
    optimizer = make_optimizer(model, c)
    tensors = tensors_of(model, optimizer)
    run = open_stage(c, origin, rows, tensors, model.config, tokenizer, steps, f"{c.batch} pairs")

    def evaluate() -> None:
        columns = {}
        if val:
            now = each_pair(model, val, c, scores)
            loss, better, worse = dpo_loss(*torch.tensor(now).T, *torch.tensor(reference_val).T, c.beta)
            columns = {"loss": loss.mean().item(), "margin": (better - worse).mean().item(), "accuracy %": 100 * (better > worse).float().mean().item()}
        if columns or prompts:
            shown = [prompt.tokens for prompt in prompts] or [prompt_of(chosen) for chosen, _ in val]
            record_eval(run, columns | (quiz(model, tokenizer, prompts, 48) if prompts else {}), show_answer(model, tokenizer, shown, c, 48))

    with run:
        clock = Clock(run, c, steps)
        if run.step == 0:
            evaluate()
        while run.step < steps and not run.stop:
            numbers = order(len(rows), c.batch, run.step, c.seed)[rank::world]
            batch = [rows[n] for n in numbers]
            _, n_tokens = count(batch)
            sums = torch.zeros(4, device=device)  # loss, chosen reward, rejected reward, accuracy
            for which, tokens, targets in micro_batches(batch, c.micro_batch):
                old = torch.tensor([reference[numbers[n]] for n in which], device=device).T
                loss, better, worse = dpo_loss(*scores(tokens.to(device), targets.to(device)), *old, c.beta)
                (loss.sum() / c.batch).backward()
                sums += torch.stack((loss.detach().sum(), better.sum(), worse.sum(), (better > worse).sum())) / c.batch
            loss, better, worse, accuracy = run.share(*sums)
            lr = lr_at(run.step, steps, c)
            clock.end_step(n_tokens, loss=loss, chosen_reward=better, rejected_reward=worse, margin=better - worse, accuracy=accuracy,
                           lr=lr, grad_norm=take_step(model, optimizer, lr, c.clip))
            if clock.due(c.eval_every):
                evaluate()
            if clock.due(c.save_every):
                run.save(tensors, wait=run.step == steps or run.stop)
    return close_stage(run, c, tensors, tokenizer, model.config)


def rm(c: RM, origin: dict[str, str]) -> Path:
    """A reward model: the SFT model with a head of one column, read at the last token of a conversation (reward_modeling.py)."""
    device, tokenizer = start(c)
    rank, world = rank_and_world()
    rows, val = read_pairs(c, tokenizer)
    steps = number_of_steps(c, len(rows), c.batch)
    model = load_model(c, c.init, device, "score")
    check_length(c, model)
    optimizer = make_optimizer(model, c)
    tensors = tensors_of(model, optimizer)
    run = open_stage(c, origin, rows, tensors, model.config, tokenizer, steps, f"{c.batch} pairs")

    def scores(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        last = (targets != -100).long().cumsum(1).argmax(1) + 1  # where the last target stands: the final EOS, or where a row was cut
        return model.scores(tokens).gather(1, last[:, None])[:, 0].chunk(2)

    def evaluate() -> None:
        if val:
            better, worse = torch.tensor(each_pair(model, val, c, scores)).T
            record_eval(run, {"loss": reward_loss(better, worse).mean().item(), "margin": (better - worse).mean().item(), "accuracy %": 100 * (better > worse).float().mean().item()})

    with run:
        clock = Clock(run, c, steps)
        if run.step == 0:
            evaluate()
        while run.step < steps and not run.stop:
            batch = [rows[n] for n in order(len(rows), c.batch, run.step, c.seed)[rank::world]]
            _, n_tokens = count(batch)
            sums = torch.zeros(4, device=device)
            for _, tokens, targets in micro_batches(batch, c.micro_batch):
                better, worse = scores(tokens.to(device), targets.to(device))
                loss = reward_loss(better, worse).sum() / c.batch
                loss.backward()
                sums += torch.stack((loss.detach(), better.detach().sum() / c.batch, worse.detach().sum() / c.batch, (better > worse).sum() / c.batch))
            loss, better, worse, accuracy = run.share(*sums)
            lr = lr_at(run.step, steps, c)
            clock.end_step(n_tokens, loss=loss, chosen_reward=better, rejected_reward=worse, margin=better - worse, accuracy=accuracy,
                           lr=lr, grad_norm=take_step(model, optimizer, lr, c.clip))
            if clock.due(c.eval_every):
                evaluate()
            if clock.due(c.save_every):
                run.save(tensors, wait=run.step == steps or run.stop)
    return close_stage(run, c, tensors, tokenizer, model.config)


def row_seed(c: Common, step: int, row: int) -> int:
    """The seed of an answer: of the run, the step and the answer's place in it, whichever rank makes it."""
    return (c.seed * 2**32 + step) * 2**32 + row


@dataclass(frozen=True)
class Rollouts:
    """What a rank has sampled in a step. `parts`: its rows, as one list per mini-batch; these are the same ones at any world size."""
    parts: list[list[int]]
    made: list[Answer]
    rewards: Tensor  # [rows], of which `samples` neighbours answer the same prompt
    n_tokens: float  # targets, of all ranks
    stats: dict[str, float]  # of all ranks


def roll_out(model: OLMo2, tokenizer: Tokenizer, prompts: list[Prompt], c: GRPO | PPO, run: Run, device: torch.device) -> Rollouts:
    """Sample this step's answers and let the verifiers score them."""
    rank, world = rank_and_world()
    numbers = order(len(prompts), c.prompts, run.step, c.seed)
    per_part = c.prompts // c.minibatches
    places = [place for part in range(c.minibatches) for place in range(part * per_part, (part + 1) * per_part)[rank::world]]
    rows = [(place, k) for place in places for k in range(c.samples)]
    made = answers(model, tokenizer, [prompts[numbers[place]] for place, _ in rows], [row_seed(c, run.step, place * c.samples + k) for place, k in rows], c.temperature, c.response_length)
    rewards = torch.tensor([c.reward * answer.right if answer.ended else c.no_eos for answer in made])
    here = len(rows) // c.minibatches
    groups = rewards.view(-1, c.samples)
    sums = all_sum(torch.stack((torch.tensor(float(sum((a.example.targets != -100).sum() for a in made))), rewards.sum(), torch.tensor(float(sum(a.right for a in made))),
                                torch.tensor(float(sum(a.ended for a in made))), (groups != groups[:, :1]).any(1).sum().float()))).tolist()
    n = c.prompts * c.samples
    stats = dict(reward=sums[1] / n, right=sums[2] / n, length=sums[0] / n, ended=sums[3] / n) | ({"signal": sums[4] / c.prompts} if c.samples > 1 else {})
    return Rollouts([list(range(i, i + here)) for i in range(0, len(rows), here)], made, rewards, sums[0], stats)


def old_log_probs(model: OLMo2, rollouts: Rollouts, c: GRPO | PPO) -> list[Tensor]:
    """Per answer [T]: under the weights that have sampled it, which are still the model's.

    In fp32 those of sampling itself. In bf16 (CUDA) a forward with a cache rounds otherwise than one without, by more than
    the clip may bear, so the trainer computes its own.
    """
    if next(model.parameters()).device.type != "cuda":
        return [answer.log_probs for answer in rollouts.made]
    return each_row(model, [answer.example for answer in rollouts.made], c, lambda tokens, targets: model.log_probs(tokens, targets, c.temperature))


def grpo(c: GRPO, origin: dict[str, str]) -> Path:
    """RLVR with GRPO: sample groups of answers, reward what is right, raise the better ones of each group (grpo_vllm_thread_ray_gtrl.py)."""
    device, tokenizer = start(c)
    prompts, quizzed = rl_prompts(c, tokenizer)
    steps = number_of_steps(c, len(prompts), c.prompts)
    model, reference = load_model(c, c.init, device), load_model(c, c.init, device)
    check_length(c, model)
    optimizer = make_optimizer(model, c)
    tensors = tensors_of(model, optimizer)
    run = open_stage(c, origin, prompts, tensors, model.config, tokenizer, steps, f"{c.prompts} prompts x {c.samples} answers")

    def evaluate() -> None:
        if quizzed:
            record_eval(run, quiz(model, tokenizer, quizzed, c.response_length), show_answer(model, tokenizer, [prompt.tokens for prompt in quizzed], c, c.response_length))

    with run:
        clock = Clock(run, c, steps)
        if run.step == 0:
            evaluate()
        while run.step < steps and not run.stop:
            # ---- 1. sample, verify; what is better than its group?
            rollouts = roll_out(model, tokenizer, prompts, c, run, device)
            examples = [answer.example for answer in rollouts.made]
            advantages = grpo_advantages(rollouts.rewards.view(-1, c.samples), c.normalize).flatten()
            # ---- 2. log-probabilities under the weights that have sampled, and under the reference
            old = old_log_probs(model, rollouts, c)
            fixed = each_row(reference, examples, c, lambda x, y: reference.log_probs(x, y, c.temperature))
            # ---- 3. optimizer steps
            lr = lr_at(run.step, steps, c)
            sums, norms = torch.zeros(3, device=device), []
            for part in rollouts.parts * c.passes:
                n_tokens, _ = count([(examples[n],) for n in part])
                for which, tokens, targets in micro_batches([(examples[n],) for n in part], c.micro_batch):
                    rows, mask = [part[n] for n in which], (targets != -100).float().to(device)
                    weights = token_weights(mask, c.denominator, n_tokens, c.batch, c.response_length)
                    new = model.log_probs(tokens.to(device), targets.to(device), c.temperature)
                    loss, clipped, kl = grpo_loss(new, pad([old[n] for n in rows], mask), pad([fixed[n] for n in rows], mask), advantages[rows].to(device), weights, c.clip_range, c.beta)
                    loss.backward()
                    sums += torch.stack((loss.detach(), clipped, kl))
                norms.append(take_step(model, optimizer, lr, c.clip))
            updates = c.passes * len(rollouts.parts)
            entropy = -sum(row.sum() for row in old)  # of what was sampled, the mean of -log p estimates it
            loss, clipped, kl, entropy = run.share(*sums, entropy.to(device))
            tokens = rollouts.n_tokens
            clock.end_step(tokens, loss=loss / updates, **rollouts.stats, kl=kl / tokens / c.passes, clip_fraction=clipped / tokens / c.passes, entropy=entropy / tokens,
                           lr=lr, grad_norm=max(norms))
            if clock.due(c.eval_every):
                evaluate()
            if clock.due(c.save_every):
                run.save(tensors, wait=run.step == steps or run.stop)
    return close_stage(run, c, tensors, tokenizer, model.config)


def ppo(c: PPO, origin: dict[str, str]) -> Path:
    """RLVR with PPO: a value model learns what an answer so far is worth; tokens that bring more than that are raised (ppo_vllm_thread_ray_gtrl.py)."""
    device, tokenizer = start(c)
    prompts, quizzed = rl_prompts(c, tokenizer)
    steps = number_of_steps(c, len(prompts), c.prompts)
    model, reference, value = load_model(c, c.init, device), load_model(c, c.init, device), load_model(c, c.value, device, "score")
    check_length(c, model)
    optimizer, value_optimizer = make_optimizer(model, c), make_optimizer(value, c)
    tensors = tensors_of(model, optimizer) | {f"value_{part}": values for part, values in tensors_of(value, value_optimizer).items()}
    run = open_stage(c, origin, prompts, tensors, model.config, tokenizer, steps, f"{c.prompts} prompts x {c.samples} answers")

    def evaluate() -> None:
        if quizzed:
            record_eval(run, quiz(model, tokenizer, quizzed, c.response_length), show_answer(model, tokenizer, [prompt.tokens for prompt in quizzed], c, c.response_length))

    with run:
        clock = Clock(run, c, steps)
        if run.step == 0:
            evaluate()
        while run.step < steps and not run.stop:
            # ---- 1. sample, verify
            rollouts = roll_out(model, tokenizer, prompts, c, run, device)
            examples = [answer.example for answer in rollouts.made]
            old = old_log_probs(model, rollouts, c)
            fixed = each_row(reference, examples, c, lambda x, y: reference.log_probs(x, y, c.temperature))
            old_values = each_row(value, examples, c, lambda x, _: value.scores(x))
            # ---- 2. rewards per token: minus beta k1 everywhere, the verdict on the last; then advantages
            T = max(len(example.tokens) for example in examples)
            wide = torch.zeros(len(examples), T)
            mask = pad([torch.from_numpy(example.targets != -100).float() for example in examples], wide)
            k1 = (pad(old, wide) - pad(fixed, wide)) * mask
            rewards = -c.beta * k1
            rewards[torch.arange(len(rewards)), mask.cumsum(1).argmax(1)] += rollouts.rewards
            advantages, returns = gae(rewards, pad(old_values, wide), mask, c.gamma, c.lam)
            advantages = whiten(advantages, mask)
            # ---- 3. optimizer steps, of both models
            lr = lr_at(run.step, steps, c)
            sums, norms = torch.zeros(3, device=device), []
            for part in rollouts.parts * c.passes:
                n_tokens, _ = count([(examples[n],) for n in part])
                for which, tokens, targets in micro_batches([(examples[n],) for n in part], c.micro_batch):
                    rows, real = [part[n] for n in which], (targets != -100).float().to(device)
                    tokens, targets = tokens.to(device), targets.to(device)
                    cut = lambda x: x[rows, : tokens.shape[1]].to(device)
                    policy, squares, clipped = ppo_losses(model.log_probs(tokens, targets, c.temperature), pad([old[n] for n in rows], real), value.scores(tokens),
                                                          pad([old_values[n] for n in rows], real), cut(advantages), cut(returns), real, c.clip_range, c.value_clip)
                    ((policy + c.value_weight * squares) / n_tokens).backward()
                    sums += torch.stack((policy.detach() / n_tokens, squares.detach() / n_tokens, clipped))
                norms.append(take_step(model, optimizer, lr, c.clip))
                take_step(value, value_optimizer, lr * (c.value_lr or c.lr) / c.lr, c.clip)
            updates = c.passes * len(rollouts.parts)
            loss, squares, clipped, kl, entropy = run.share(*sums, k1.sum().to(device), -sum(row.sum() for row in old).to(device))
            tokens = rollouts.n_tokens
            clock.end_step(tokens, loss=loss / updates, value_loss=squares / updates, **rollouts.stats, kl=kl / tokens, clip_fraction=clipped / tokens / c.passes,
                           entropy=entropy / tokens, lr=lr, grad_norm=max(norms))
            if clock.due(c.eval_every):
                evaluate()
            if clock.due(c.save_every):
                run.save(tensors, wait=run.step == steps or run.stop)
    return close_stage(run, c, tensors, tokenizer, model.config)


def rl_prompts(c: GRPO | PPO, tokenizer: Tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, held-out prompts)."""
    embedded = [] if c.data else [(f"embedded {task}", row) for task in ("gsm8k", "ifeval") for row in rlvr_rows(task, "train", EMBEDDED_ROWS["rl"], c.seed)]
    prompts = together(lambda: read_prompts(c.data, embedded, tokenizer, c.prompt_length, c.shots))
    if not c.data:
        return prompts, held_out_prompts(c, tokenizer)
    return prompts, together(lambda: read_prompts(c.val, [], tokenizer, c.prompt_length, c.shots))[: c.questions] if c.val else []


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def is_laptop(c: RM) -> bool:
    """Are the pairs those of the laptop's recipe?"""
    return c.size == "tiny" and [Path(path).parent.name for path in c.data] == ["prefs"]


LOOPS = {"sft": sft, "prefs": prefs, "rm": rm, "dpo": dpo, "ppo": ppo, "grpo": grpo}
# What a stage starts from, in runs/<size>: the first that is there. The released 1B was made of its third ingredient alone.
BEFORE = {"sft": ("soup", "anneal-3", "anneal-1", "pretrain"), "prefs": ("sft",), "rm": ("sft",), "dpo": ("sft",), "ppo": ("dpo",), "grpo": ("dpo",)}


def settings(stage: str, arguments: list[str], folder: Path | None = None, **more) -> tuple[Common, dict[str, str]]:
    """(a stage's settings, where each came from): class defaults < recipe of --size < the runs before, in `folder` < `more` < flags.

    Raises UserError.
    """
    size, config = size_of(arguments), STAGES[stage]
    folder = folder or Path(f"runs/{size}")
    recipe = RECIPES[stage].get(size) or {**RECIPES[stage].get("1B", RECIPES[stage].get("7B")), "data": ()}
    k = getattr(parse(config(**{**recipe, **more, "size": size}), arguments, __doc__), "round", 1)
    rounds = [{}, *ROUNDS.get((stage, size), [])]
    if not 1 <= k <= len(rounds):
        raise UserError(f"--round {k}: {size} has {len(rounds)} of {stage}")
    before = (f"{stage}-{k - 1}",) if k > 1 else BEFORE[stage]
    chain = {"out": str(folder / (f"{stage}-{k}" if hasattr(config, "round") else stage)), "init": str(folder / next((b for b in before if (folder / b).exists()), before[0]))}
    if stage == "ppo":
        chain["value"] = str(folder / "rm")
    if stage in ("rm", "dpo") and (size == "tiny" or (folder / "prefs" / "train.jsonl").exists()):  # one's own pairs, beside the released ones
        chain |= {"data": (*recipe.get("data", ()), str(folder / "prefs" / "train.jsonl")), "val": (str(folder / "prefs" / "val.jsonl"),)}
    default = config(**{**recipe, **rounds[k - 1], **chain, **more, "size": size})
    c = parse(default, arguments, __doc__)
    if c.data != default.data and c.val == default.val:
        c = dataclasses.replace(c, val=())
    return c, {f.name: "flag" if getattr(c, f.name) != getattr(default, f.name) else "runs before" if f.name in chain else
               f"recipe {size}" if f.name in recipe | rounds[k - 1] else "default" for f in dataclasses.fields(c)}


def check(c: Common) -> None:
    """Raise UserError with every value that is out of range, before anything is made."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rules = [(f"--{name.replace('_', '-')} {getattr(c, name)} must be {words}", holds(getattr(c, name)))
             for names, words, holds in [
                 ("micro_batch save_every eval_every log_every questions timeout batch epochs prompts samples response_length prompt_length minibatches passes round", "at least 1", lambda v: v >= 1),
                 ("max_length", "at least 2", lambda v: v >= 2),
                 ("seed steps keep threads shard weight_decay shots value_lr", "at least 0", lambda v: 0 <= v < math.inf),
                 ("lr clip eps temperature", "above 0", lambda v: 0 < v < math.inf), ("beta reward value_weight", "at least 0", lambda v: 0 <= v < math.inf),
                 ("clip_range value_clip", "above 0", lambda v: 0 < v < math.inf), ("warmup recompute gamma lam", "from 0 to 1", lambda v: 0 <= v <= 1),
                 ("beta1 beta2", "from 0 to below 1", lambda v: 0 <= v < 1)]
             for name in names.split() if hasattr(c, name) and not (name == "lr" and isinstance(c, Prefs))]
    rules += [(f"--schedule {c.schedule} must be linear or constant", c.schedule in ("linear", "constant")),
              (f"--recompute-part {c.recompute_part} must be block or mlp", c.recompute_part in ("block", "mlp"))]
    if isinstance(c, GRPO):
        rules += [(f"--denominator {c.denominator} must be token, constant or sequence", c.denominator in ("token", "constant", "sequence")),
                  (f"--samples {c.samples} must be at least 2: an answer is compared with its group", c.samples >= 2)]
    if problems := [text for text, holds in rules if not holds]:
        raise UserError("; ".join(problems))
    if hasattr(c, "prompts"):
        unit = world * getattr(c, "minibatches", 1)
        if c.prompts % unit and not isinstance(c, Prefs):
            below = c.prompts // unit * unit
            raise UserError(f"--prompts {c.prompts} = {c.prompts / unit:.2f} x {f'{world} processes x ' if world > 1 else ''}--minibatches {c.minibatches} does not divide: "
                            f"use --prompts {' or '.join(str(n) for n in (below, below + unit) if n)}")
    else:
        if c.batch % world:
            raise UserError(f"--batch {c.batch} = {c.batch / world:.2f} x {world} processes does not divide: use --batch {c.batch // world * world or ''} or {(c.batch // world + 1) * world}")
    if not Path(c.init).exists():
        made_by = {"soup": "python soup.py", "anneal": "python anneal.py", "pretrain": "python pretrain.py"}
        stage = Path(c.init).name.split("-")[0]
        raise UserError(f"{c.init} does not exist: make it first ({made_by.get(stage, f'python posttrain.py {stage}')}), or name a run, a checkpoint or a Hugging Face directory with --init")
    for source in (*c.data, *c.val):
        if source.startswith("runs/") and not Path(source).exists():
            raise UserError(f"{source} does not exist: make preference pairs first (python posttrain.py prefs), or name your own with --data")
    if isinstance(c, PPO) and not Path(c.value).exists():
        raise UserError(f"{c.value} does not exist: train a reward model first (python posttrain.py rm), or name another start with --value")


def run_stage(stage: str, c: Common, origin: dict[str, str]) -> None:
    with sole_writer(Path(c.out)):
        try:
            LOOPS[stage](c, origin)
        except RuntimeError as error:
            lost_rank(error)
            raise


@dataclass(frozen=True)
class Recipe:
    """All stages, one after the other; for other settings, run them one by one."""
    size: str = "tiny"  # tiny, 14M, 30M, 60M, 190M, 370M, 760M, 1B, 7B, 13B, 32B
    rl: str = ""  # grpo, ppo; none: as the size was released
    init: str = ""  # the base model; none: the soup in runs/<size>, or what comes nearest
    out: str = ""  # the runs' folder; none: runs/<size>
    seed: Count = 1  # of every stage
    share: float = 1.0  # of each stage's steps: 0.05 for a quick look
    questions: Count = 500  # held-out questions of each kind in the table at the end, tiny alone
    device: str = "auto"  # auto, cpu, mps, cuda
    threads: Count = 0  # CPU threads; 0: torch's choice


def stages_of(size: str, rl: str) -> list[tuple[str, int]]:
    """(stage, round) of a size, in order: 1B and 32B were released with GRPO, 7B and 13B with PPO.

    >>> stages_of("13B", "")
    [('sft', 1), ('prefs', 1), ('rm', 1), ('dpo', 1), ('ppo', 1), ('ppo', 2), ('ppo', 3)]
    """
    rl = rl or ("ppo" if size in ("7B", "13B") else "grpo")
    rounds = 1 + len(ROUNDS.get((rl, size), []))
    return [("sft", 1), ("prefs", 1), *([("rm", 1)] if rl == "ppo" else []), ("dpo", 1), *((rl, k) for k in range(1, rounds + 1))]


def run_recipe(arguments: list[str]) -> None:
    """SFT, preference pairs, (a reward model,) DPO and RLVR; for tiny, the table of what each stage has brought."""
    size = size_of(arguments)
    c = parse(Recipe(size=size), arguments, __doc__)
    if c.rl not in ("", "ppo", "grpo"):
        raise UserError(f"--rl {c.rl} must be grpo or ppo")
    folder = Path(c.out or f"runs/{size}")
    base = c.init or str(folder / next((name for name in BEFORE["sft"] if (folder / name).exists()), BEFORE["sft"][0]))
    made = [base]
    with one_voice():
        for stage, k in stages_of(size, c.rl):
            more = dict(seed=c.seed, share=c.share, device=c.device, threads=c.threads) | ({"round": k} if hasattr(STAGES[stage], "round") else {}) | ({"init": base} if stage == "sft" else {})
            settled, origin = settings(stage, ["--size", size], folder, **more)
            check(settled)
            print(f"---- {stage}{f' {k}' if k > 1 else ''}", flush=True)
            run_stage(stage, settled, origin)
            made += [settled.out] if stage not in ("prefs", "rm") else []
        if size == "tiny" and rank_and_world()[0] == 0:
            report(folder, made, c)
        elif size != "tiny":
            print(f"next: python eval.py {' '.join(made)} --tasks gsm8k ifeval (see the README's Benchmarks)")


def report(folder: Path, made: list[str], c: Recipe) -> None:
    """Print what each stage has brought, on text and questions that no stage trains on, and draw it: pipeline.json, pipeline.png."""
    device = best_device(c.device)
    before = [str(folder / "pretrain")] if (folder / "pretrain" / "hf").exists() and Path(made[0]).name != "pretrain" else []
    table = {}
    for path in [*before, *made]:
        model, tokenizer = OLMo2.load(path, device=device), get_tokenizer(find_weights(path)[0])
        sources = by_source(token_files([embedded_corpus(tokenizer)], "val"))
        bpb = bits_per_byte_by_source(model, {name: sources[name] for name in ("docs", "code")}, min(256, model.config.context), tokenizer)
        table[path] = {f"{name} bpb": value for name, value in bpb.items()} | quiz(model, tokenizer, held_out_prompts(c, tokenizer), 48)
    print_table(table)
    write_json(folder / "pipeline.json", table)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained", width_ratios=(3, 4, 4))
    names = [Path(path).name for path in table]
    for axis, columns, title in ((axes[0], ("docs bpb", "code bpb"), "Held-out bits per byte"), (axes[1], ("format %", "constraints %", "sums %"), "Held-out answers, %")):
        for i, column in enumerate(columns):
            width = 0.8 / len(columns)
            axis.bar([x + (i + 0.5) * width - 0.4 for x in range(len(names))], [row[column] for row in table.values()], width, label=column)
        axis.set(title=title, xticks=range(len(names)), xticklabels=names)
        axis.legend(fontsize=8)
    for path in made:
        rows = [row for row in read_metrics(Path(path)) if row["event"] == "step" and "right" in row]
        if rows:
            axes[2].plot([row["step"] for row in rows], [100 * row["right"] for row in rows], linewidth=0.9, label=f"{Path(path).name}: sampled answers that are right, %")
            evals = [row for row in read_metrics(Path(path)) if row["event"] == "eval"]
            axes[2].plot([row["step"] for row in evals], [row["held_out"]["sums %"] for row in evals], marker="o", label="held-out sums, %")
    axes[2].set(title="RLVR", xlabel="step", ylim=(0, 101))
    axes[2].legend(fontsize=8)
    figure.savefig(folder / "pipeline.png", dpi=110)
    plt.close(figure)
    print(f"drawn in {folder / 'pipeline.png'}; talk to it: python sample.py {made[-1]}")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    stage = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if stage and stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, 1)
        raise UserError(f"no stage {stage!r}{f': did you mean {near[0]}?' if near else ''}; the stages are {', '.join(STAGES)}; without one, the recipe runs from end to end")
    if not stage:
        run_recipe(arguments)
    else:
        c, origin = settings(stage, arguments[1:])
        check(c)
        with one_voice():
            run_stage(stage, c, origin)
    leave_ranks()


if __name__ == "__main__":
    run_cli(main)
