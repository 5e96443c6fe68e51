"""Post-training: SFT, preference pairs, reward model, DPO, and RLVR with PPO or with GRPO.

    python posttrain.py                                 # laptop: SFT, prefs, DPO, GRPO after runs/tiny/soup, and what each brought; 4 minutes
    python posttrain.py --rl ppo                        # as 7B and 13B were made: SFT, prefs, RM, DPO, PPO
    python posttrain.py sft                             # one stage: sft, prefs, rm, dpo, ppo, grpo
    python posttrain.py dpo --size 7B --help            # the published values of a stage and a size
    torchrun --nproc-per-node 8 posttrain.py sft --size 1B --init some/OLMo-2-1B --data allenai/tulu-3-sft-olmo-2-mixture-0225
    python posttrain.py grpo --data rlvr.jsonl --init some/folder --out runs/mine       # your own prompts, each with its verifier

What these stages teach: a base model continues text; SFT makes it answer in a conversation, in the manner of the answers it
is shown, good or bad. DPO raises the better of two answers above the other. RLVR lets the model try and rewards what a program
finds right. The objectives come first, as functions of tensors; then the data; then the loops, written out one by one.

Each stage that trains is a run as in stage 1, runs/<size>/sft and so on, with run.json, metrics.jsonl, curves.png, training states and hf/.
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
import re
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

from infra.files import UserError, json_lines, read_json, write_json, write_text
from anneal import LAPTOP_MIX
from data import TokenData, Tokenizer, embedded_corpus, get_tokenizer, instruct_rows, mix_files, mix_sources, rlvr_rows, token_files
from eval import bits_per_byte_by_source, by_source, is_right, print_table, rlvr_constraint, verify_gsm8k, verify_ifeval, verify_math
from model import OLMo2, best_device, checksum, find_weights, from_all, load_tensors, rank_and_world, read_config, run_cli, together
from pretrain import Count, Run, all_sum, clip_gradients, enter_run, export, format_seconds, leave_ranks, load_state, lost_rank, make_mesh, make_optimizer, newest_state, one_voice, parse, prepare, read_metrics, self_check, shard_size, size_of, sole_writer, start_machine, tensors_of

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
    data: tuple[str, ...] = ()  # .jsonl, .jsonl.gz, .parquet files, names of data sets on the Hub, or embedded/{instruct,sums,constraints}
    val: tuple[str, ...] = ()  # held-out rows, likewise
    quiz: tuple[str, ...] = ()  # held-out prompts to answer on the way, each with its verifier: rows as for grpo
    out: str = ""  # the run's folder; none: runs/<size>/<stage>
    seed: Count = 1  # of the order of the rows and of sampling
    lr: float = 1e-6  # peak learning rate
    schedule: str = "linear"  # linear (to 0 at the end), constant
    warmup: float = 0.0  # share of the steps in which the rate rises from 0
    steps: Count = 0  # length of the run; 0: once through the data, or --epochs times
    share: float = 1.0  # of these steps: 0.05 for a quick look
    micro_batch: Count = 2  # at most so many rows per forward and backward of a process; fewer take less memory
    clip: float = 1.0  # largest global L2 norm of the gradient
    beta1: float = 0.9  # AdamW (finetune.py: torch's values)
    beta2: float = 0.999  # AdamW, likewise
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.0  # AdamW
    response_length: Count = 2048  # tokens of an answer at most, where the model writes
    # ---- on the way
    save_every: Count = 500  # steps between training states; the last step is always saved
    keep: Count = 1  # newest states to keep; 0: all
    eval_every: Count = 100  # steps between measurements on held-out rows
    questions: Count = 200  # held-out rows of each file that take part
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
    """Supervised fine-tuning: rows {messages: [{role, content}, ...]}."""
    batch: Count = 128  # conversations per optimizer step, over all processes
    epochs: Count = 2  # times that each row is seen
    max_length: Count = 4096  # tokens of a conversation; what is longer loses its end
    drop: bool = False  # leave out rows in which that leaves no answer (finetune.py does), instead of naming them
    bos: bool = True  # conversations begin with <|endoftext|>; the released 32B's do not
    replay: float = 0.0  # ours: share of the rows that are text of the laptop's stage 2, all of it trained on; a tiny model forgets fast


@dataclass(frozen=True)
class RM(Common):
    """Reward model: rows {chosen: messages, rejected: messages}."""
    batch: Count = 256  # pairs per optimizer step
    epochs: Count = 1  # times that each row is seen
    max_length: Count = 2048  # tokens of a conversation; what is longer loses its end
    drop: bool = False  # leave out rows in which nothing is left to compare


@dataclass(frozen=True)
class DPO(RM):
    """Direct preference optimization: rows as for the reward model."""
    batch: Count = 128  # pairs per optimizer step
    beta: float = 5.0  # with normalize; 0.1 is usual without
    normalize: bool = True  # scores are means over tokens (dpo_norm), not sums


@dataclass(frozen=True)
class Sampling(Common):
    """Rows {messages, ground_truth, dataset}: `dataset` names the verifier (gsm8k, math, ifeval; ours: qa, instruct)."""
    prompts: Count = 48  # prompts per step, over all processes
    samples: Count = 16  # answers per prompt
    temperature: float = 1.0  # of sampling; log-probabilities are taken at the same
    prompt_length: Count = 2048  # longer prompts are left out
    reward: float = 10.0  # of a right answer
    shots: Count = 8  # rows {question, answer}, GSM8K's own layout, get the first so many of their file as examples


@dataclass(frozen=True)
class Prefs(Sampling):
    """Preference pairs from the model's own answers: the best one against a random other that is worse."""
    samples: Count = 4  # answers per prompt (synth_pref/README.md)
    judge: str = ""  # a reward model that scores the answers; none: each row's verifier


@dataclass(frozen=True)
class PPO(Sampling):
    """RLVR with a value model (ppo_vllm_thread_ray_gtrl.py; paper Table 18)."""
    samples: Count = 1  # answers per prompt
    value: str = ""  # the model whose weights the value model starts from; none: runs/<size>/rm
    round: Count = 1  # the 13B ran three: a mix, then GSM8K, then MATH
    minibatches: Count = 1  # optimizer steps per pass over the rollouts
    passes: Count = 4  # over the rollouts of a step (K)
    beta: float = 0.05  # of the KL penalty, k1 in the reward of each token
    gamma: float = 1.0  # discount of later rewards
    lam: float = 0.95  # lambda of the advantage estimation
    clip_range: float = 0.2  # ratios of new to old probability count between 1 - this and 1 + this
    value_clip: float = 0.2  # a value may move so far from its old one
    value_weight: float = 0.1  # of the value loss
    value_lr: float = 0.0  # learning rate of the value model; 0: lr
    no_eos: float = -10.0  # reward, instead of any other, of an answer that does not end


@dataclass(frozen=True)
class GRPO(Sampling):
    """RLVR without one (grpo_vllm_thread_ray_gtrl.py; docs/olmo2.md)."""
    round: Count = 1  # the 1B ran two: a mix, then MATH
    minibatches: Count = 2  # optimizer steps per pass over the rollouts
    passes: Count = 1  # over the rollouts of a step
    beta: float = 0.01  # of the KL penalty, k3 in the loss
    clip_range: float = 0.2  # ratios of new to old probability count between 1 - this and 1 + this
    normalize: bool = True  # advantages in standard deviations of their group
    denominator: str = "token"  # token, constant, sequence: see token_weights
    no_eos: float = 0.0  # reward, instead of any other, of an answer that does not end


STAGES: dict[str, type[Common]] = {"sft": SFT, "prefs": Prefs, "rm": RM, "dpo": DPO, "ppo": PPO, "grpo": GRPO}

# Published values: open-instruct docs/olmo2.md (1B) and scripts/train/olmo2/*.sh (7B, 13B), paper Tables 17, 18 and 26, the 32B's card.
# Where they disagree: the 13B's SFT batch is 64 in its script and 128 in the paper; the 7B's PPO beta 0.05 in Table 18 and 0.07 in
# the text; the 32B's GRPO beta 0.01 on its card and 0.1 in the text. SFT warm-up: 0.03 in every script (a caption says 0.3).
# Micro-batches, recomputation and how often to save are ours.
MIX, GSM, MATH = "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints", "allenai/RLVR-GSM", "allenai/RLVR-MATH"
TULU, TULU_0225 = "allenai/tulu-3-sft-olmo-2-mixture", "allenai/tulu-3-sft-olmo-2-mixture-0225"
PAIRS = {"1B": "0425-1b", "7B": "1124-7b", "13B": "1124-13b", "32B": "0325-32b"}  # from some 20 models, judged by GPT-4o (paper Table 27)
THRIFTY = dict(micro_batch=1, recompute=1.0)
RECIPES: dict[str, dict[str, dict]] = {
    "sft": {"1B": dict(lr=3e-5, batch=128, data=(TULU_0225,)), "7B": dict(THRIFTY, lr=2e-5, batch=128, data=(TULU,)),
            "13B": dict(THRIFTY, lr=5e-6, batch=128, data=(TULU,)), "32B": dict(THRIFTY, lr=4e-6, batch=256, data=(TULU_0225,), bos=False)},
    "prefs": {size: dict(data=(MIX,)) for size in PAIRS},
    "rm": {size: dict(THRIFTY, lr=3e-6, eps=1e-5) for size in ("7B", "13B")},
    "dpo": {"1B": dict(lr=2.5e-6, seed=111), "7B": dict(THRIFTY, lr=1e-6), "13B": dict(THRIFTY, lr=8e-7, seed=8), "32B": dict(THRIFTY, lr=2e-6)},
    "ppo": {"7B": dict(THRIFTY, lr=4e-7, prompts=224, steps=100_000 // 224, data=(MIX,)),
            "13B": dict(THRIFTY, lr=3e-7, prompts=248, steps=200_000 // 248, beta=0.1, data=(MIX,))},
    "grpo": {"1B": dict(lr=5e-7, prompts=48, steps=2_000_000 // 768, data=(MIX,)),
             "32B": dict(THRIFTY, lr=5e-7, prompts=112, steps=320, data=(MIX,))},  # of 10M episodes planned, step 320 was released
}
for size in PAIRS:
    RECIPES["sft"][size] |= dict(warmup=0.03, drop=True)
    RECIPES["dpo"][size] |= dict(warmup=0.1, drop=True, data=(f"allenai/olmo-2-{PAIRS[size]}-preference-mix",))
    for stage, more in {"rm": dict(drop=True, data=RECIPES["dpo"][size]["data"]), "ppo": dict(save_every=20, keep=0), "grpo": dict(save_every=20, keep=0, schedule="constant")}.items():
        if size in RECIPES[stage]:
            RECIPES[stage][size] |= more
# Rounds after the first. The 13B's began at step 480 of the first and, as it seems, at step 180 of the second, each with a new value model.
ROUNDS = {("grpo", "1B"): [dict(data=(MATH,))], ("ppo", "13B"): [dict(data=(GSM,), beta=0.03), dict(data=(MATH,), beta=0.1)]}
# Ours, for a laptop: see the README.
LAPTOP = dict(quiz=("embedded/sums", "embedded/constraints"), response_length=48)
RECIPES["sft"]["tiny"] = dict(LAPTOP, lr=2e-3, warmup=0.03, batch=16, micro_batch=16, epochs=1, max_length=128, replay=0.1, eval_every=400, log_every=100,
                              data=("embedded/instruct",), val=("embedded/instruct",))
RECIPES["prefs"]["tiny"] = dict(LAPTOP, prompts=256, prompt_length=80, steps=4, questions=400, data=("embedded/constraints",), val=("embedded/constraints",))
RECIPES["rm"]["tiny"] = dict(LAPTOP, lr=5e-4, batch=32, micro_batch=16, max_length=128, questions=400, quiz=())
RECIPES["dpo"]["tiny"] = dict(LAPTOP, lr=2e-4, warmup=0.1, batch=32, micro_batch=16, max_length=128, questions=400)
RL = dict(LAPTOP, lr=3e-4, micro_batch=16, prompt_length=80, eval_every=20, data=("embedded/sums", "embedded/constraints"))
RECIPES["grpo"]["tiny"] = dict(RL, prompts=16, samples=8, steps=40)
RECIPES["ppo"]["tiny"] = dict(RL, prompts=128, steps=30, value_lr=2e-3)

# ----------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Example:
    """A conversation: tokens [T], and which of them the assistant has written [T]."""
    tokens: np.ndarray
    spoken: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """[T]: the next token where the assistant wrote it, else -100."""
        return np.append(np.where(self.spoken[1:], self.tokens[1:], -100), -100)

    @property
    def prompt(self) -> list[int]:
        """What stands before the assistant's first word."""
        return self.tokens[: int(self.spoken.argmax())].tolist()


@dataclass(frozen=True)
class Prompt:
    """What to answer, and how to check the answer."""
    messages: list[dict]
    tokens: list[int]  # rendered, up to and with the assistant's header
    verifier: str
    label: str
    source: str  # by which it is counted
    exact: str = ""  # the answer word for word, where there is one


# The laptop's data, from seeded generators: name -> (split, rows, seed) -> rows; no held-out operands are ever trained on (data.py).
EMBEDDED: dict[str, tuple[int, Callable[[str, int, int], Iterator[dict]]]] = {
    "embedded/instruct": (16_000, instruct_rows), "embedded/sums": (4000, functools.partial(rlvr_rows, "gsm8k")),
    "embedded/constraints": (4000, functools.partial(rlvr_rows, "ifeval"))}


def read_rows(sources: tuple[str, ...], c: Common, held_out: bool = False) -> list[tuple[str, dict]]:
    """(where it stands, row) of every row of files, of data sets on the Hub, or embedded; of held-out ones, --questions each. Raises UserError."""
    rows: list[tuple[str, dict]] = []
    for source in sources:
        if source in EMBEDDED:
            n, make = EMBEDDED[source]
            part = [(f"{source}, row {i}", row) for i, row in enumerate(make("val", c.questions, 0) if held_out else make("train", n, c.seed), 1)]
        elif source.endswith((".jsonl", ".jsonl.gz")):
            if not Path(source).exists():
                raise UserError(f"{source} does not exist")
            part = [(f"{source}, line {number}", row) for number, row in json_lines(Path(source))]
        else:
            part = [(f"{source}, row {number}", row) for number, row in enumerate(read_table(source), 1)]
        rows += part[: c.questions] if held_out else part
    return rows


def read_table(source: str):
    """A .parquet file, or the training split of a data set on the Hub. Raises UserError."""
    if not source.endswith(".parquet") and (Path(source).exists() or source.count("/") != 1 or source.startswith("embedded/")):
        near = difflib.get_close_matches(source, EMBEDDED, 1)
        raise UserError(f"{source}: {f'did you mean {near[0]}? ' if near else ''}expected a file .jsonl, .jsonl.gz or .parquet, one of {', '.join(EMBEDDED)}, or the "
                        "name of a data set on the Hub, as in allenai/RLVR-GSM")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: reading .parquet and the Hub needs the datasets library: pip install datasets") from None
    try:
        return datasets.Dataset.from_parquet(source) if source.endswith(".parquet") else datasets.load_dataset(source, split="train")
    except Exception as error:  # of the many libraries below
        raise UserError(f"{source} cannot be read: {(str(error).strip() or repr(error)).splitlines()[0][:200]}") from None


def fit(rows: list[tuple[str, dict]], make: Callable[[dict], object]) -> list:
    """`make` of each row. Raises UserError naming the rows of which it does (their first five)."""
    made, problems = [], []
    for where, row in rows:
        try:
            made.append(make(row))
        except UserError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise UserError(first_five(problems))
    return made


def first_five(problems: list[str]) -> str:
    return "; ".join(problems[:5]) + (f" (and {len(problems) - 5:,} rows more)" if len(problems) > 5 else "")


def conversation(row: dict, key: str) -> list[dict]:
    """The messages under a key of a row. Raises UserError."""
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        raise UserError(f'expected a list of messages under "{key}", got {str(row)[:60]}')
    for i, message in enumerate(messages):
        if not (isinstance(message, dict) and message.get("role") in ("system", "user", "assistant") and isinstance(message.get("content"), str)):
            raise UserError(f'"{key}", message {i}: expected a role (system, user or assistant) and a text as content, got {str(message)[:60]}')
    return messages


def encode_conversations(tokenizer: Tokenizer, conversations: list[list[dict]], max_length: int) -> list[Example]:
    """Conversations as they are trained on: spoken are exactly the assistant's words and the EOS after them, in every turn.

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
            examples.append(Example(np.array([token for part in encoded for token in part][:max_length], np.int32),
                                    np.array([bool(n % 2) for n, part in enumerate(encoded) for _ in part][:max_length], bool)))
    return examples


def read_examples(sources: tuple[str, ...], c: SFT | RM, keys: tuple[str, ...], tokenizer: Tokenizer, held_out: bool = False) -> list[tuple[Example, ...]]:
    """Per row the conversations under `keys`, encoded: ("messages",), or ("chosen", "rejected").

    Raises UserError naming the rows that do not fit, and, without --drop, those in which nothing that the assistant says is left.
    """
    rows = read_rows(sources, c, held_out)
    conversations = fit(rows, lambda row: [conversation(row, key) for key in keys])
    flat = encode_conversations(tokenizer, [messages for row in conversations for messages in row], c.max_length)
    examples = [tuple(flat[i : i + len(keys)]) for i in range(0, len(flat), len(keys))]
    if len(keys) == 2 and not (c.drop or held_out):
        if alike := [f"{where}: {'the two answers are the same' if better == worse else 'the two answer different prompts'}"
                     for (where, _), (better, worse) in zip(rows, conversations) if better == worse or better[:-1] != worse[:-1]]:
            raise UserError(f"{first_five(alike)}: expected two conversations that differ in their last message; --drop leaves such rows out")
    silent = lambda row: not all(any(message["role"] == "assistant" for message in messages) for messages in row)
    empty = [f"{where}: {'no assistant speaks in it' if silent(row) else f'no word of the assistant is left in the first {c.max_length} tokens'}"
             for (where, _), row, each in zip(rows, conversations, examples) if not all(example.spoken[1:].any() for example in each)]
    if empty and not (c.drop or held_out):
        raise UserError(f"{first_five(empty)}: remove such rows, lengthen --max-length, or leave them out with --drop")
    if empty:
        print(f"          {len(empty):,} of {len(rows):,} rows have nothing to learn from in {c.max_length} tokens and are left out")
    return [each for each, row in zip(examples, conversations) if all(example.spoken[1:].any() for example in each)
            and (len(row) == 1 or row[0] != row[1] and row[0][:-1] == row[1][:-1])]


# The verifiers of eval.py by the names in the rows' `dataset`: (answer, label) -> is it right?
VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "gsm8k": verify_gsm8k, "math": verify_math, "ifeval": lambda answer, label: verify_ifeval(answer, *rlvr_constraint(json.loads(label))),
    "qa": functools.partial(is_right, "qa"), "instruct": functools.partial(is_right, "instruct")}


def read_prompts(sources: tuple[str, ...], c: Common, tokenizer: Tokenizer, held_out: bool = False) -> list[Prompt]:
    """The prompts of rows {messages, ground_truth, dataset}; a last message of the assistant is not shown to the model.

    Rows of GSM8K's own layout {question, answer} become such rows: see `with_examples`. Raises UserError.
    """
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
        if verifier == "gsm8k" and not verify_gsm8k(label, label):
            raise UserError(f'"ground_truth" holds no number, which gsm8k compares: {label[:40]!r}')
        try:  # now, not in the middle of a run: a constraint that is none, a library that is not there
            VERIFIERS[verifier]("x" if verifier == "ifeval" else "", label)
        except (ValueError, TypeError, AttributeError) as error:
            expected = ', expected as in {"func_name": "validate_end", "end_phrase": "Bye."}' if verifier == "ifeval" and not isinstance(error, UserError) else ""
            raise UserError(f'"ground_truth" cannot be checked{expected}: {error}') from None
        return Prompt(messages, tokenizer.apply_chat_template(messages, add_generation_prompt=True), verifier, label, str(row.get("source") or verifier),
                      row.get("careful", "") if verifier == "ifeval" else "")

    prompts = fit(with_examples(read_rows(sources, c, held_out), getattr(c, "shots", 0)), make)
    longest = getattr(c, "prompt_length", 10**9)
    short = [prompt for prompt in prompts if len(prompt.tokens) <= longest]
    if sources and not short:
        raise UserError(f"none of {len(prompts):,} prompts has at most the {longest} tokens of --prompt-length: the shortest has {min(len(p.tokens) for p in prompts)} (GSM8K's own rows get {getattr(c, 'shots', 0)} worked examples: see --shots)"
                        if prompts else f"{', '.join(sources)}: no row")
    if len(short) < len(prompts):
        print(f"          {len(prompts) - len(short):,} of {len(prompts):,} prompts exceed {longest} tokens and are left out")
    return short


def with_examples(rows: list[tuple[str, dict]], shots: int) -> list[tuple[str, dict]]:
    """Rows of GSM8K's own layout as RLVR rows: one user turn with the first `shots` of their file as worked examples, as the release's
    prompts have eight (create_ground_truth_data.py). These are not asked; all other rows stay what they are."""
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
    return f"{' '.join(re.sub(r'<<[^<>]*>>', '', steps).split())} So the answer is {result.strip()}."


def fingerprint(rows: list) -> str:
    """12 hex digits of what is trained on."""
    digest = hashlib.sha256()
    for row in rows:
        if isinstance(row, Prompt):
            digest.update(json.dumps([row.tokens, row.verifier, row.label]).encode())
        for example in row if isinstance(row, tuple) else ():
            digest.update(example.tokens.tobytes() + example.spoken.tobytes())
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
            targets[row, : len(example.tokens)] = torch.from_numpy(example.targets)
        yield which, tokens, targets


# ----------------------------------------------------------------------------------------------------------------------
# What a model says and thinks, without gradients


@dataclass(frozen=True)
class Answer:
    example: Example  # the prompt with its answer, which is what is spoken
    log_probs: Tensor  # of the targets, as they were sampled [T], 0 elsewhere
    text: str  # without EOS
    ended: bool  # by EOS, in time
    right: bool


@contextlib.contextmanager
def inference(model: OLMo2, gather: bool = False):
    """Forwards without gradients; with `gather`, every rank has all of a sharded model's weights meanwhile, in the computing dtype, and
    goes at its own pace. All ranks come. No backward pass follows that would free what FSDP has gathered, so it is done here."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if gather:
        for module in shards:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling for every other shape would take longer than it saves
        yield
    for module in shards:
        module.set_reshard_after_forward(module is not model and model.reshards, recurse=False)  # as FSDP and --reshard have it
        module.reshard()


CACHE_BYTES = {"cuda": 2**33, "mps": 2**30, "cpu": 2**27}  # of keys and values at a time; twice as many while rows that have ended are dropped


def answers(model: OLMo2, tokenizer: Tokenizer, prompts: list[Prompt], seeds: list[int], temperature: float, max_new_tokens: int, name: str = "") -> list[Answer]:
    """An answer to each prompt, verified. Prompts of a length together, in large batches; row i draws from seeds[i] alone.

    Sharded weights are gathered once for all of it: they must fit beside everything else.
    """
    made: list[Answer | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    device, m = model.lm_head.weight.device.type, model.config
    longest = max((len(prompt.tokens) for prompt in prompts), default=0) + max_new_tokens
    rows = max(1, CACHE_BYTES[device] // (longest * 2 * m.layers * m.kv_heads * m.head_dim * (2 if device == "cuda" else 4)))
    with inference(model, gather=True):
        for i in tqdm(range(0, len(prompts), rows), desc=name, leave=False, disable=not name or rank_and_world()[0] > 0 or None):
            which = by_length[i : i + rows]
            new, sampled = model.generate([prompts[n].tokens for n in which], max_new_tokens, temperature, eos=tokenizer.eos, seed=[seeds[n] for n in which])
            for n, ids, values in zip(which, new, sampled):
                ended, prompt = ids[-1] == tokenizer.eos, prompts[n]
                text = tokenizer.decode(ids[: len(ids) - ended])
                example = Example(np.array(prompt.tokens + ids, np.int32), np.arange(len(prompt.tokens) + len(ids)) >= len(prompt.tokens))
                log_probs = torch.cat((torch.zeros(len(prompt.tokens) - 1), torch.tensor(values), torch.zeros(1)))
                made[n] = Answer(example, log_probs, text, ended, VERIFIERS[prompt.verifier](text.strip(), prompt.label))
    return made


def each_row(model: OLMo2, rows: list[tuple[Example, ...]], c: Common, values: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Per row of k conversations what `values(tokens, targets)` [k b, ...], which the model computes, gives for them: [k, ...], on the CPU."""
    found: list = [None] * len(rows)
    device = next(model.parameters()).device
    with inference(model):
        batches = micro_batches(rows, 4 * c.micro_batch)
        for which, tokens, targets in tqdm(batches, "scoring", -(-len(rows) // (4 * c.micro_batch)), leave=False, disable=len(rows) < 5000 or rank_and_world()[0] > 0 or None):
            out = values(tokens.to(device), targets.to(device)).cpu()
            for i, n in enumerate(which):
                found[n] = out[i :: len(which)]
    return found


def spread(rows: list, work: Callable[[list], list]) -> list:
    """`work` of all rows, shared out over the ranks; all get all results. The ranks have equally many, as FSDP needs it."""
    rank, world = rank_and_world()
    parts = from_all(work((rows + rows[:1] * (-len(rows) % world))[rank::world]))
    return [parts[i % world][i // world] for i in range(len(rows))]


def each_pair(model: OLMo2, pairs: list[tuple[Example, ...]], c: Common, scores: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[2, pairs]: the scores of all chosen and of all rejected conversations. All ranks share the work."""
    return torch.tensor(spread(pairs, lambda part: [row.tolist() for row in each_row(model, part, c, scores)])).view(-1, 2).T


def pad(rows: list[Tensor], like: Tensor) -> Tensor:
    """Rows [T] of several lengths as one [b, T], of the width and on the device of `like`, with zeros on the right."""
    return torch.stack([F.pad(row.flatten(), (0, like.shape[1] - row.numel())) for row in rows]).to(like.device)


def quiz(model: OLMo2, tokenizer: Tokenizer, prompts: list[Prompt], max_new_tokens: int) -> dict[str, float]:
    """Greedy answers to held-out prompts: % right by source; `exact`: % right word for word, where that is known; `format`: % that end
    and look like an answer in a conversation; mean length in tokens. {} without prompts."""
    if not prompts:
        return {}
    made = spread(prompts, lambda part: answers(model, tokenizer, part, [0] * len(part), 0.0, max_new_tokens, "held-out prompts"))
    share = lambda hits: 100 * float(np.mean(list(hits)))
    columns = {f"{name} %": share(a.right for a, p in zip(made, prompts) if p.source == name) for name in dict.fromkeys(p.source for p in prompts)}
    if any(p.exact for p in prompts):
        columns["exact %"] = share(a.text.strip() == p.exact for a, p in zip(made, prompts) if p.exact)
    return columns | {"format %": share(a.ended and "<|" not in a.text for a in made), "length": float(np.mean([a.example.spoken.sum() for a in made]))}


# ----------------------------------------------------------------------------------------------------------------------
# What the loops share


def start(c: Common, chat_bos: bool | None = None) -> tuple[torch.device, Tokenizer]:
    """This process' device, and the tokenizer of --init, as the instruct model's that is being made. Raises UserError."""
    device = start_machine(c)
    tokenizer = copy.copy(together(lambda: get_tokenizer(find_weights(c.init)[0])))
    tokenizer.instruct = True
    if chat_bos is not None:
        tokenizer.chat_bos = chat_bos
    return device, tokenizer


def load_model(c: Common, path: str, device: torch.device, head: str = "lm") -> OLMo2:
    """The model at `path`, sharded as the run's. Given head "score", a language model gets a new one, of one column."""
    folder, weights = together(lambda: find_weights(path))
    config = together(lambda: read_config(folder))
    if config.head == "score" and head == "lm":
        raise UserError(f"{path} holds a reward model: it gives a text a number and cannot write", everywhere=True)
    longest = c.max_length if hasattr(c, "max_length") else c.prompt_length + c.response_length
    if longest > config.context:
        raise UserError(f"{path} takes {config.context:,} tokens at most: lower {'--max-length' if hasattr(c, 'max_length') else '--prompt-length and --response-length'}, "
                        f"which {'is' if hasattr(c, 'max_length') else 'add up to'} {longest:,}", everywhere=True)
    with torch.device("meta"):
        model = OLMo2(dataclasses.replace(config, head=head))
    prepare(model, c, make_mesh(c, device), bf16=device.type == "cuda")
    model.reshards = c.reshard  # for `inference`, which has to restore it
    model.to_empty(device=device)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if config.head != head:
        model.init_weights(c.seed, names=("score.weight",))
        del tensors["score.weight"]
    load_tensors(weights, tensors, leave_out=("lm_head.weight",) if config.head != head else ())
    return model


def open_stage(c: Common, origin: dict[str, str], rows: list, per_step: int, steps: int, tensors: dict[str, dict[str, Tensor]], config, tokenizer: Tokenizer) -> Run:
    """Make the run's folder, or go on with its newest state, which replaces `tensors`; prints what is about to happen."""
    data_hash, device = fingerprint(rows), next(iter(tensors["model"].values())).device
    together(lambda: check_stage(c))
    enter_run(c, origin, {"stage": type(c).__name__.lower(), "hash": data_hash, "files": list(c.data), "rows": len(rows)}, checksum(tensors["model"]))
    state_folder = newest_state(Path(c.out))
    state = load_state(state_folder, config, tensors) if state_folder else {}
    checked = self_check(c, data_hash, tensors["model"], device)
    print(f"run       {c.out}{f', going on from {state_folder.name}' if state_folder else ''}\n"
          f"model     {c.init}: {config.parameters['total']:,} parameters; {device}, {torch.get_num_threads()} threads\n"
          f"check     {checked}\n"
          f"data      {' '.join(c.data)}, {data_hash}: {len(rows):,} rows; {steps:,} steps of {per_step}, which is {100 * steps * per_step / len(rows):.0f} % of the rows", flush=True)
    if not (c.val or c.quiz):
        print("          no held-out rows (--val, --quiz): nothing is measured on the way")
    return Run(c, config, tokenizer, state)


def check_stage(c: Common) -> None:
    """Is the run in --out, if there is one, of this stage? Raises UserError."""
    stage, path = type(c).__name__.lower(), Path(c.out) / "run.json"
    if path.exists() and (there := read_json(path)["data"].get("stage", "pretrain or anneal")) != stage:
        raise UserError(f"{c.out} is a run of {there}, not of {stage}: choose another folder with --out")


def number_of_steps(c: Common, rows: int, per_step: int) -> int:
    """Raises UserError where there is less than a step's."""
    if rows < per_step:
        raise UserError(f"{rows:,} rows are fewer than the {per_step:,} of a step: give more data, or a smaller {'--batch' if hasattr(c, 'batch') else '--prompts'}", everywhere=True)
    return max(1, round(c.share * (c.steps or getattr(c, "epochs", 1) * (rows // per_step))))


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


def count(rows: list[tuple[Example, ...]]) -> tuple[float, float]:
    """(targets, tokens) in the rows of all ranks."""
    mine = [(float(example.spoken[1:].sum()), float(len(example.tokens))) for row in rows for example in row]
    return tuple(all_sum(torch.tensor(mine, dtype=torch.float64).sum(0)).tolist())


class Progress:
    """What follows each step: count it, record and show its metrics, measure on held-out rows, save."""

    def __init__(self, run: Run, c: Common, steps: int, tensors: dict | None = None, evaluate: Callable[[], None] = lambda: None):
        self.run, self.c, self.steps, self.tensors, self.evaluate = run, c, steps, tensors, evaluate
        self.first, self.seconds, self.skipped = run.step, 0.0, 0
        if run.step == 0:
            evaluate()
        self.then = time.perf_counter()

    def end_step(self, tokens: float, **values: float) -> None:
        run, c = self.run, self.c
        seconds = time.perf_counter() - self.then
        self.seconds += seconds
        run.step, run.tokens = run.step + 1, run.tokens + int(tokens)
        skipped = not math.isfinite(values.get("grad_norm", 0.0))
        run.record("step", **values, skipped=skipped, tokens_per_s=round(tokens / seconds, 1), seconds=round(self.seconds, 3))
        last = run.step == self.steps
        if run.step % c.log_every == 0 or last or skipped:
            left = (self.steps - run.step) * self.seconds / (run.step - self.first)
            shown = "  ".join(f"{name} {value:{'.1e' if name == 'lr' else '#.3g'}}" for name, value in values.items())
            print(f"step {run.step:>{len(str(self.steps))}}/{self.steps}  {shown}  {format_seconds(left)} left{'  SKIPPED' if skipped else ''}", flush=True)
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped == 20:
            raise UserError(f"the gradients of 20 steps in a row, up to step {run.step}, were not finite: lower --lr, or look at the data", everywhere=True)
        if (run.step % c.eval_every == 0 or last) and not run.stop:
            self.evaluate()
        if self.tensors and (run.step % c.save_every == 0 or last or run.stop):
            run.save(self.tensors, wait=last or run.stop)
        self.then = time.perf_counter()


def record_eval(run: Run, model: OLMo2, tokenizer: Tokenizer, c: Common, columns: dict[str, float], prompts: list[list[int]]) -> None:
    """Record and show what was measured, and an answer, at temperature 1, to one of the prompts: always the same one."""
    if columns:
        run.record("eval", held_out=columns)
        print("          held-out: " + ", ".join(f"{name} {value:.{1 if '%' in name else 3}f}" for name, value in columns.items()), flush=True)
    if prompts:
        prompt = random.Random(c.seed).choice(prompts)
        with inference(model, gather=True):
            (new,), _ = model.generate([prompt], min(c.response_length, model.config.context - len(prompt)), eos=tokenizer.eos, seed=c.seed)
        asked, said = tokenizer.decode(prompt), tokenizer.decode(new)
        run.record("sample", prompt=asked, text=said)
        print(f"          sample: {asked[-200:]!r} -> {said!r}", flush=True)


def close_stage(run: Run, c: Common, tensors: dict[str, dict[str, Tensor]], tokenizer: Tokenizer, config) -> None:
    if run.rank == 0:
        plot(run.folder)
    run.leave_if_stopped()
    if not list((run.folder / "hf").glob("*.safetensors")):  # someone removed them, and the run was finished
        export(run.folder, newest_state(run.folder), tensors["model"], config, tokenizer)
    print(f"{run.folder}: finished; weights {run.folder / 'hf'}   curves {run.folder / 'curves.png'}\n", flush=True)


def plot(folder: Path) -> None:
    """Draw curves.png from metrics.jsonl: each metric of the steps against the step, with what was measured on held-out rows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_metrics(folder)
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        values = {f"held-out {name}": value for name, value in row.get("held_out", {}).items()} if row["event"] == "eval" else row if row["event"] == "step" else {}
        for name in values.keys() - {"event", "step", "tokens", "skipped", "tokens_per_s", "seconds"}:
            curves.setdefault(name, []).append((row["step"], math.nan if values[name] is None else values[name]))
    if not curves:
        return
    height = -(-len(curves) // 4)
    figure, axes = plt.subplots(height, 4, figsize=(13, 2.5 * height), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, sorted(curves, key=lambda name: (name.startswith("held-out"), name))):
        axis.plot(*zip(*curves[name]), marker="." if name.startswith("held-out") else "", color="C1" if name.startswith("held-out") else "C0", linewidth=0.9)
        axis.set(title=name)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    figure.suptitle(str(folder))
    figure.savefig(folder / "curves.png.tmp", format="png", dpi=110)
    os.replace(folder / "curves.png.tmp", folder / "curves.png")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The loops


def sft(c: SFT, origin: dict[str, str]) -> None:
    """Supervised fine-tuning: cross-entropy on what the assistant says, each token of a batch counting the same (Tulu 3; finetune.py)."""
    device, tokenizer = start(c, c.bos)
    rank, world = rank_and_world()
    rows = together(lambda: read_examples(c.data, c, ("messages",), tokenizer))
    val = together(lambda: read_examples(c.val, c, ("messages",), tokenizer, held_out=True))
    questions = together(lambda: read_prompts(c.quiz, c, tokenizer, held_out=True))
    if rows and c.replay:
        replayed = lambda: replayed_rows(c, tokenizer, round(len(rows) * c.replay / (1 - c.replay)))
        together(lambda: rank or replayed())  # the embedded corpus is made by one, found by the others
        rows += together(replayed)
    steps = number_of_steps(c, len(rows), c.batch)
    model = load_model(c, c.init, device)
    optimizer = make_optimizer(model, c)
    tensors = tensors_of(model, optimizer)
    run = open_stage(c, origin, rows, c.batch, steps, tensors, model.config, tokenizer)

    def evaluate() -> None:
        nats = spread(val, lambda part: [-row.sum().item() for row in each_row(model, part, c, model.log_probs)])
        columns = {"loss": sum(nats) / sum(int(example.spoken[1:].sum()) for (example,) in val)} if val else {}
        prompts = [prompt.tokens for prompt in questions] or [example.prompt for (example,) in val]
        record_eval(run, model, tokenizer, c, columns | quiz(model, tokenizer, questions, c.response_length), prompts)

    with run:
        progress = Progress(run, c, steps, tensors, evaluate)
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
            progress.end_step(n_tokens, loss=loss, lr=lr, grad_norm=take_step(model, optimizer, lr, c.clip))
    close_stage(run, c, tensors, tokenizer, model.config)


def replayed_rows(c: SFT, tokenizer: Tokenizer, rows: int) -> list[tuple[Example, ...]]:
    """So many instances of the laptop's stage-2 mix."""
    if not rows:
        return []
    files, counts = mix_files(mix_sources(LAPTOP_MIX, "train", tokenizer), rows, c.max_length)
    data = TokenData(files, c.max_length, tokenizer, counts)
    return [(Example(data.instance(i).astype(np.int32), np.ones(c.max_length, bool)),) for i in range(len(data))]


def prefs(c: Prefs, origin: dict[str, str]) -> None:
    """Preference pairs from the model's own answers: of each prompt's samples the best, against a random one of those that are worse.

    Writes train.jsonl and, where there are held-out prompts, val.jsonl, in the layout of the released mixes (parse_preferences.py). A
    step is the answers to --prompts prompts; what is written is not made again.
    """
    device, tokenizer = start(c)
    rank, world = rank_and_world()
    splits = {"train": together(lambda: read_prompts(c.data, c, tokenizer))}
    parts = max(1, round(c.share * (c.steps or -(-len(splits["train"]) // c.prompts))))
    splits["train"] = splits["train"][: parts * c.prompts]
    if c.val:
        splits["val"] = together(lambda: read_prompts(c.val, c, tokenizer, held_out=True))
    model = load_model(c, c.init, device)
    judge = load_model(c, c.judge, device, "score") if c.judge else None
    if judge and together(lambda: read_config(find_weights(c.judge)[0])).head != "score":
        raise UserError(f"--judge {c.judge} is no reward model: train one with python posttrain.py rm", everywhere=True)
    weights = "-".join(checksum({name: p.detach() for name, p in m.named_parameters()}) for m in (model, judge) if m)
    together(lambda: check_stage(c))
    enter_run(c, origin, {"stage": "prefs", "hash": fingerprint(sum(splits.values(), [])), "files": list(c.data), "rows": len(splits["train"])}, weights)

    def judged(asked: list[Prompt], step: int) -> list[dict]:
        """The rows of the pairs from these prompts, those of all ranks."""
        mine = [n % len(asked) for n in range(rank, -(-len(asked) // world) * world, world)]  # equally many on each rank, as FSDP needs it
        made = answers(model, tokenizer, [asked[n] for n in mine for _ in range(c.samples)], [row_seed(c, step, n * c.samples + k) for n in mine for k in range(c.samples)],
                       c.temperature, c.response_length)
        scores = [c.reward * (answer.right and answer.ended) for answer in made]
        if judge:
            values = each_row(judge, [(answer.example,) for answer in made], c, lambda tokens, _: judge.scores(tokens))
            scores = [row[0, len(answer.example.tokens) - 1].item() for row, answer in zip(values, made)]
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
    done = from_all(len(parts) if finished else next((k for k, part in enumerate(parts) if not place(*part).exists()), len(parts)))[0]
    print(f"run       {c.out}{', going on' if done else ''}\nmodel     {c.init}: {c.samples} answers at temperature {c.temperature:g} to each of "
          f"{' and '.join(f'{len(prompts):,} prompts ({split})' for split, prompts in splits.items())}; judged by {c.judge or 'the verifiers'}", flush=True)
    with Run(c, model.config, tokenizer, {"step": done}) as run:
        progress = Progress(run, c, len(parts))
        while run.step < len(parts) and not run.stop:
            split, i = parts[run.step]
            rows = judged(splits[split][i : i + c.prompts], run.step)
            if rank == 0:
                write_text(place(split, i), "".join(json.dumps({"id": f"{split}-{i + k}", **row}, ensure_ascii=False) + "\n" for k, row in enumerate(rows)))
            run.share(torch.zeros((), device=device))
            progress.end_step(0, pairs=len(rows) / len(splits[split][i : i + c.prompts]))
    run.leave_if_stopped()

    def merge() -> None:
        for split in () if finished else splits:
            write_text(Path(c.out) / f"{split}.jsonl", "".join(place(*part).read_text(encoding="utf-8") for part in parts if part[0] == split))
        for part in () if finished else parts:
            place(*part).unlink()
        for split, prompts in splits.items():
            print(f"          {sum(1 for _ in json_lines(Path(c.out) / f'{split}.jsonl')):,} pairs from {len(prompts):,} prompts: {c.out}/{split}.jsonl")

    together(lambda: rank or merge())
    if not (Path(c.out) / "train.jsonl").stat().st_size:
        raise UserError(f"{c.out}/train.jsonl has no pair: the answers to each prompt were all right or all wrong. Ask for more --samples, or other prompts", everywhere=True)
    print(flush=True)


def read_pairs(c: RM, tokenizer: Tokenizer) -> tuple[list, list]:
    """(pairs to train on, held-out pairs) of chosen and rejected conversations."""
    return tuple(together(lambda: read_examples(sources, c, ("chosen", "rejected"), tokenizer, held_out=sources is c.val)) for sources in (c.data, c.val))


def pair_columns(loss: Tensor, better: Tensor, worse: Tensor) -> dict[str, float]:
    """What held-out pairs say: means of loss and margin, and how often the chosen one is ahead."""
    return {"loss": loss.mean().item(), "margin": (better - worse).mean().item(), "accuracy %": 100 * (better > worse).float().mean().item()}


def dpo(c: DPO, origin: dict[str, str]) -> None:
    """Direct preference optimization, with the reference's scores computed once, before the first step (dpo_tune_cache.py)."""
    device, tokenizer = start(c)
    rank, world = rank_and_world()
    rows, val = read_pairs(c, tokenizer)
    questions = together(lambda: read_prompts(c.quiz, c, tokenizer, held_out=True))
    steps = number_of_steps(c, len(rows), c.batch)
    model = load_model(c, c.init, device)
    optimizer = make_optimizer(model, c)
    tensors = tensors_of(model, optimizer)

    def scores(tokens: Tensor, targets: Tensor) -> Tensor:
        """S(y) of b chosen, then of b rejected conversations [2 b]: one forward for both."""
        return sequence_scores(model.log_probs(tokens, targets), (targets != -100).float(), c.normalize)

    reference, reference_val = (each_pair(model, pairs, c, scores) for pairs in (rows, val))  # now: a state may replace the weights
    run = open_stage(c, origin, rows, c.batch, steps, tensors, model.config, tokenizer)

    def evaluate() -> None:
        columns = pair_columns(*dpo_loss(*each_pair(model, val, c, scores), *reference_val, c.beta)) if val else {}
        prompts = [prompt.tokens for prompt in questions] or [chosen.prompt for chosen, _ in val]
        record_eval(run, model, tokenizer, c, columns | quiz(model, tokenizer, questions, c.response_length), prompts)

    with run:
        progress = Progress(run, c, steps, tensors, evaluate)
        while run.step < steps and not run.stop:
            numbers = order(len(rows), c.batch, run.step, c.seed)[rank::world]
            batch = [rows[n] for n in numbers]
            _, n_tokens = count(batch)
            sums = torch.zeros(4, device=device)
            for which, tokens, targets in micro_batches(batch, c.micro_batch):
                loss, better, worse = dpo_loss(*scores(tokens.to(device), targets.to(device)).chunk(2), *reference[:, numbers[which]].to(device), c.beta)
                (loss.sum() / c.batch).backward()
                sums += torch.stack((loss.detach().sum(), better.sum(), worse.sum(), (better > worse).sum())) / c.batch
            loss, better, worse, accuracy = run.share(*sums)
            lr = lr_at(run.step, steps, c)
            progress.end_step(n_tokens, loss=loss, chosen_reward=better, rejected_reward=worse, margin=better - worse, accuracy=accuracy,
                              lr=lr, grad_norm=take_step(model, optimizer, lr, c.clip))
    close_stage(run, c, tensors, tokenizer, model.config)


def rm(c: RM, origin: dict[str, str]) -> None:
    """A reward model: the SFT model with a head of one column, read at the last token of a conversation (reward_modeling.py)."""
    device, tokenizer = start(c)
    rank, world = rank_and_world()
    rows, val = read_pairs(c, tokenizer)
    steps = number_of_steps(c, len(rows), c.batch)
    model = load_model(c, c.init, device, "score")
    optimizer = make_optimizer(model, c)
    tensors = tensors_of(model, optimizer)
    run = open_stage(c, origin, rows, c.batch, steps, tensors, model.config, tokenizer)

    def scores(tokens: Tensor, targets: Tensor) -> Tensor:
        """[2 b], at the assistant's last token: the final EOS, or where the row was cut."""
        last = (targets != -100).long().cumsum(1).argmax(1) + 1
        return model.scores(tokens).gather(1, last[:, None])[:, 0]

    def evaluate() -> None:
        if val:
            better, worse = each_pair(model, val, c, scores)
            record_eval(run, model, tokenizer, c, pair_columns(reward_loss(better, worse), better, worse), [])

    with run:
        progress = Progress(run, c, steps, tensors, evaluate)
        while run.step < steps and not run.stop:
            batch = [rows[n] for n in order(len(rows), c.batch, run.step, c.seed)[rank::world]]
            _, n_tokens = count(batch)
            sums = torch.zeros(4, device=device)
            for _, tokens, targets in micro_batches(batch, c.micro_batch):
                better, worse = scores(tokens.to(device), targets.to(device)).chunk(2)
                loss = reward_loss(better, worse).sum() / c.batch
                loss.backward()
                sums += torch.stack((loss.detach(), *(torch.stack((better.sum(), worse.sum(), (better > worse).sum())).detach() / c.batch)))
            loss, better, worse, accuracy = run.share(*sums)
            lr = lr_at(run.step, steps, c)
            progress.end_step(n_tokens, loss=loss, chosen_reward=better, rejected_reward=worse, margin=better - worse, accuracy=accuracy,
                              lr=lr, grad_norm=take_step(model, optimizer, lr, c.clip))
    close_stage(run, c, tensors, tokenizer, model.config)


def row_seed(c: Common, step: int, row: int) -> int:
    """The seed of an answer: of the run, the step and the answer's place in it, whichever rank makes it."""
    return (c.seed * 2**32 + step) * 2**32 + row


@dataclass(frozen=True)
class Rollouts:
    """What a rank has sampled in a step."""
    parts: list[list[int]]  # its rows by mini-batch; those of all ranks together are the same at any world size
    examples: list[tuple[Example]]
    rewards: Tensor  # [rows], of which `samples` neighbours answer the same prompt
    old: list[Tensor]  # log-probabilities of the targets [T] under the weights that have sampled
    n_tokens: float  # targets, of all ranks
    stats: dict[str, float]  # of all ranks


def roll_out(model: OLMo2, tokenizer: Tokenizer, prompts: list[Prompt], c: GRPO | PPO, step: int) -> Rollouts:
    """Sample this step's answers and let the verifiers score them.

    The old log-probabilities are, in fp32, those of sampling itself. In bf16 (CUDA) a forward with a cache rounds otherwise than one
    without, by more than the clip may bear, so the trainer's own forward computes them.
    """
    rank, world = rank_and_world()
    numbers = order(len(prompts), c.prompts, step, c.seed)
    per_part = c.prompts // c.minibatches
    places = [place for part in range(c.minibatches) for place in range(part * per_part, (part + 1) * per_part)[rank::world]]
    rows = [(place, k) for place in places for k in range(c.samples)]
    made = answers(model, tokenizer, [prompts[numbers[place]] for place, _ in rows], [row_seed(c, step, place * c.samples + k) for place, k in rows], c.temperature, c.response_length)
    examples, old = [(answer.example,) for answer in made], [answer.log_probs for answer in made]
    if torch.cuda.is_available() and model.lm_head.weight.is_cuda:
        old = [row[0] for row in each_row(model, examples, c, lambda tokens, targets: model.log_probs(tokens, targets, c.temperature))]
    rewards = torch.tensor([c.reward * answer.right if answer.ended else c.no_eos for answer in made])
    groups = rewards.view(-1, c.samples)
    sums = np.sum([[answer.example.spoken.sum(), answer.right, answer.ended] for answer in made], axis=0)
    n_tokens, right, ended, reward, signal = all_sum(torch.tensor([*sums, rewards.sum(), (groups != groups[:, :1]).any(1).sum()], dtype=torch.float64)).tolist()
    n, here = c.prompts * c.samples, len(rows) // c.minibatches
    stats = dict(reward=reward / n, right=right / n, length=n_tokens / n, ended=ended / n) | ({"signal": signal / c.prompts} if c.samples > 1 else {})
    return Rollouts([list(range(i, i + here)) for i in range(0, len(rows), here)], examples, rewards, old, n_tokens, stats)


def grpo(c: GRPO, origin: dict[str, str]) -> None:
    """RLVR with GRPO: sample groups of answers, reward what is right, raise the better ones of each group (grpo_vllm_thread_ray_gtrl.py)."""
    device, tokenizer = start(c)
    prompts = together(lambda: read_prompts(c.data, c, tokenizer))
    questions = together(lambda: read_prompts(c.quiz, c, tokenizer, held_out=True))
    steps = number_of_steps(c, len(prompts), c.prompts)
    model, reference = load_model(c, c.init, device), load_model(c, c.init, device)
    optimizer = make_optimizer(model, c)
    tensors = tensors_of(model, optimizer)
    run = open_stage(c, origin, prompts, c.prompts, steps, tensors, model.config, tokenizer)
    evaluate = lambda: record_eval(run, model, tokenizer, c, quiz(model, tokenizer, questions, c.response_length), [prompt.tokens for prompt in questions])
    with run:
        progress = Progress(run, c, steps, tensors, evaluate)
        while run.step < steps and not run.stop:
            # ---- 1. sample, verify; what is better than its group? and what did the reference think of it?
            rollouts = roll_out(model, tokenizer, prompts, c, run.step)
            advantages = grpo_advantages(rollouts.rewards.view(-1, c.samples), c.normalize).flatten()
            fixed = each_row(reference, rollouts.examples, c, lambda tokens, targets: reference.log_probs(tokens, targets, c.temperature))
            # ---- 2. optimizer steps
            lr = lr_at(run.step, steps, c)
            sums, norms = torch.zeros(3, device=device), []
            for part in rollouts.parts * c.passes:
                batch = [rollouts.examples[n] for n in part]
                n_tokens, _ = count(batch)
                for which, tokens, targets in micro_batches(batch, c.micro_batch):
                    rows, mask = [part[n] for n in which], (targets != -100).float().to(device)
                    weights = token_weights(mask, c.denominator, n_tokens, c.prompts * c.samples // c.minibatches, c.response_length)
                    new = model.log_probs(tokens.to(device), targets.to(device), c.temperature)
                    loss, clipped, kl = grpo_loss(new, pad([rollouts.old[n] for n in rows], mask), pad([fixed[n] for n in rows], mask), advantages[rows].to(device), weights,
                                                  c.clip_range, c.beta)
                    loss.backward()
                    sums += torch.stack((loss.detach(), clipped, kl))
                norms.append(take_step(model, optimizer, lr, c.clip))
            # ---- 3. of what was sampled, the mean of -log p estimates the entropy
            loss, clipped, kl, entropy = run.share(*sums, -sum(row.sum() for row in rollouts.old).to(device))
            seen = rollouts.n_tokens * c.passes
            progress.end_step(rollouts.n_tokens, loss=loss / len(norms), **rollouts.stats, kl=kl / seen, clip_fraction=clipped / seen, entropy=entropy / rollouts.n_tokens,
                              lr=lr, grad_norm=float(np.max(norms)))
    close_stage(run, c, tensors, tokenizer, model.config)


def ppo(c: PPO, origin: dict[str, str]) -> None:
    """RLVR with PPO: a value model learns what an answer so far is worth; tokens that bring more than that are raised (ppo_vllm_thread_ray_gtrl.py)."""
    device, tokenizer = start(c)
    prompts = together(lambda: read_prompts(c.data, c, tokenizer))
    questions = together(lambda: read_prompts(c.quiz, c, tokenizer, held_out=True))
    steps = number_of_steps(c, len(prompts), c.prompts)
    model, reference, value = load_model(c, c.init, device), load_model(c, c.init, device), load_model(c, c.value, device, "score")
    optimizer, value_optimizer = make_optimizer(model, c), make_optimizer(value, c)
    tensors = tensors_of(model, optimizer) | {f"value_{part}": values for part, values in tensors_of(value, value_optimizer).items()}
    run = open_stage(c, origin, prompts, c.prompts, steps, tensors, model.config, tokenizer)
    evaluate = lambda: record_eval(run, model, tokenizer, c, quiz(model, tokenizer, questions, c.response_length), [prompt.tokens for prompt in questions])
    with run:
        progress = Progress(run, c, steps, tensors, evaluate)
        while run.step < steps and not run.stop:
            # ---- 1. sample, verify
            rollouts = roll_out(model, tokenizer, prompts, c, run.step)
            examples, old = rollouts.examples, rollouts.old
            fixed = each_row(reference, examples, c, lambda tokens, targets: reference.log_probs(tokens, targets, c.temperature))
            old_values = each_row(value, examples, c, lambda tokens, _: value.scores(tokens))
            # ---- 2. rewards per token: minus beta k1 everywhere, the verdict on the last; then advantages
            wide = torch.zeros(len(examples), max(len(example.tokens) for (example,) in examples))
            mask = pad([torch.from_numpy(example.targets != -100).float() for (example,) in examples], wide)
            k1 = (pad(old, wide) - pad(fixed, wide)) * mask
            rewards = -c.beta * k1
            rewards[torch.arange(len(rewards)), mask.cumsum(1).argmax(1)] += rollouts.rewards
            advantages, returns = gae(rewards, pad(old_values, wide), mask, c.gamma, c.lam)
            advantages = whiten(advantages, mask)
            # ---- 3. optimizer steps, of both models
            lr = lr_at(run.step, steps, c)
            sums, norms = torch.zeros(3, device=device), []
            for part in rollouts.parts * c.passes:
                batch = [examples[n] for n in part]
                n_tokens, _ = count(batch)
                for which, tokens, targets in micro_batches(batch, c.micro_batch):
                    rows, real, tokens = [part[n] for n in which], (targets != -100).float().to(device), tokens.to(device)
                    new, values = model.log_probs(tokens, targets.to(device), c.temperature), value.scores(tokens)
                    policy, squares, clipped = ppo_losses(new, pad([old[n] for n in rows], real), values, pad([old_values[n] for n in rows], real),
                                                          pad(advantages[rows], real), pad(returns[rows], real), real, c.clip_range, c.value_clip)
                    ((policy + c.value_weight * squares) / n_tokens).backward()
                    sums += torch.stack((policy.detach() / n_tokens, squares.detach() / n_tokens, clipped))
                norms += [take_step(model, optimizer, lr, c.clip), take_step(value, value_optimizer, lr * (c.value_lr or c.lr) / c.lr, c.clip)]
            updates, seen = len(rollouts.parts) * c.passes, rollouts.n_tokens * c.passes
            loss, squares, clipped, kl, entropy = run.share(*sums, k1.sum().to(device), -sum(row.sum() for row in old).to(device))
            progress.end_step(rollouts.n_tokens, loss=loss / updates, value_loss=squares / updates, **rollouts.stats, kl=kl / rollouts.n_tokens, clip_fraction=clipped / seen,
                              entropy=entropy / rollouts.n_tokens, lr=lr, grad_norm=float(np.max(norms)))
    close_stage(run, c, tensors, tokenizer, model.config)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

LOOPS = {"sft": sft, "prefs": prefs, "rm": rm, "dpo": dpo, "ppo": ppo, "grpo": grpo}
# What a stage starts from, in runs/<size>: the first that is there. The released 1B was made of its third ingredient alone.
BEFORE = {"sft": ("soup", "anneal-3", "anneal-1", "pretrain"), "prefs": ("sft",), "rm": ("sft",), "dpo": ("sft",), "ppo": ("dpo",), "grpo": ("dpo",)}


def settings(stage: str, arguments: list[str], folder: Path | None = None, **more) -> tuple[Common, dict[str, str]]:
    """(a stage's settings, where each came from): class defaults < recipe of --size < the runs before, in `folder` < `more` < flags.

    A size without a recipe of its own has another one's rates, and no data. Raises UserError.
    """
    size, config = size_of(arguments), STAGES[stage]
    folder = folder or Path(f"runs/{size}")
    like = size if size in RECIPES[stage] else "1B" if "1B" in RECIPES[stage] else "7B"
    recipe = RECIPES[stage][like] | ({"data": ()} if like != size else {})
    words = [word for argument in arguments for word in argument.split("=", 1)]
    k = more.get("round") or next((int(after) for word, after in zip(words, words[1:]) if word == "--round" and after.isdigit()), 1)  # known before the rest, as --size
    rounds = [{}, *ROUNDS.get((stage, size), [])] if hasattr(config, "round") else [{}]
    if not 1 <= k <= len(rounds):
        raise UserError(f"--round {k}: {size} has {len(rounds)} of {stage}")
    before = (f"{stage}-{k - 1}",) if k > 1 else BEFORE[stage]
    chain = {"out": str(folder / (f"{stage}-{k}" if hasattr(config, "round") else stage)), "init": str(folder / next((b for b in before if (folder / b).exists()), before[0]))}
    if stage == "ppo":
        chain["value"] = str(folder / "rm")
    pairs = folder / "prefs"
    if stage in ("rm", "dpo") and (size == "tiny" or (pairs / "train.jsonl").exists()):  # one's own pairs, beside the released ones
        chain["data"] = (*recipe.get("data", ()), str(pairs / "train.jsonl"))
        chain["val"] = (str(pairs / "val.jsonl"),) if size == "tiny" or (pairs / "val.jsonl").exists() else ()
    default = config(**{**recipe, **rounds[k - 1], **chain, **more, "size": size})
    c = parse(default, arguments, __doc__, prog=f"posttrain.py {stage}")
    if c.data != default.data:  # of other data, what was held out of these says nothing; nor does the laptop's text belong to them
        alone = {"val": (), "quiz": (), "replay": 0.0}
        c = dataclasses.replace(c, **{name: alone[name] for name in alone if hasattr(c, name) and getattr(c, name) == getattr(default, name)})
    return c, {f.name: "flag" if getattr(c, f.name) != getattr(default, f.name) else "runs before" if f.name in chain else
               f"recipe {like}" if f.name in recipe | rounds[k - 1] else "default" for f in dataclasses.fields(c)}


def check(c: Common) -> None:
    """Raise UserError with every value that is out of range, before anything is made."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rules = [(f"--{name.replace('_', '-')} {getattr(c, name)} must be {words}", holds(getattr(c, name)))
             for names, words, holds in [
                 ("micro_batch save_every eval_every log_every questions timeout batch epochs prompts samples response_length prompt_length minibatches passes", "at least 1", lambda v: v >= 1),
                 ("max_length", "at least 2", lambda v: v >= 2),
                 ("seed steps keep threads weight_decay shots value_lr beta reward value_weight shard", "at least 0", lambda v: 0 <= v < math.inf),
                 ("lr clip eps temperature share clip_range value_clip", "above 0", lambda v: 0 < v < math.inf), ("no_eos", "a number", math.isfinite),
                 ("warmup recompute gamma lam", "from 0 to 1", lambda v: 0 <= v <= 1), ("beta1 beta2 replay", "from 0 to below 1", lambda v: 0 <= v < 1)]
             for name in names.split() if hasattr(c, name)]
    rules += [(f"--{name.replace('_', '-')} {getattr(c, name)} must be {' or '.join(values)}", getattr(c, name) in values)
              for name, values in {"schedule": ("linear", "constant"), "recompute_part": ("block", "mlp"), "denominator": ("token", "constant", "sequence")}.items() if hasattr(c, name)]
    if isinstance(c, GRPO):
        rules.append((f"--samples {c.samples} must be at least 2: an answer is compared with its group", c.samples >= 2))
    if not isinstance(c, Recipe):
        rules.append((f"--data: {c.size} has no data of its own for this stage, name some: files, or data sets on the Hub", bool(c.data)))
    if problems := [text for text, holds in rules if not holds]:
        raise UserError("; ".join(problems))
    if isinstance(c, Recipe):
        return
    shard_size(c, world)
    name, unit = ("batch", world) if hasattr(c, "batch") else ("prompts", 1 if isinstance(c, Prefs) else world * c.minibatches)
    if (n := getattr(c, name)) % unit:
        parts = " x ".join([f"{world} processes"] * (world > 1) + [f"--minibatches {c.minibatches}"] * hasattr(c, "minibatches"))
        raise UserError(f"--{name} {n} = {n / unit:.2f} x {parts} does not divide: use --{name} {' or '.join(str(m) for m in (n // unit * unit, (n // unit + 1) * unit) if m)}")
    folder, size = Path(f"runs/{c.size}"), "" if c.size == "tiny" else f" --size {c.size}"
    for flag, path in {"init": c.init, "value": getattr(c, "value", ""), "judge": getattr(c, "judge", "")}.items():
        if path and not Path(path).exists():
            stage = Path(path).name.split("-")[0]
            script = f"posttrain.py {stage}" if stage in STAGES else f"{stage}.py" if stage in ("pretrain", "anneal", "soup") else ""
            first = f"make it first (python {script}{size}), or " if script and Path(path).parent == folder else ""
            raise UserError(f"{path} does not exist: {first}name a run, a checkpoint or a Hugging Face directory with --{flag}")
    for source in (*c.data, *c.val):
        if Path(source).parent.name == "prefs" and not Path(source).exists():
            raise UserError(f"{source} does not exist: make preference pairs first (python posttrain.py prefs{size}), or name your own with --data")


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
    out: str = ""  # the folder of the runs; none: runs/<size>
    seed: Count = 1  # of every stage
    share: float = 1.0  # of each stage's steps: 0.05 for a quick look, in runs/<size>-quick
    questions: Count = 500  # held-out questions of each kind in the table at the end, which tiny alone has
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
    check(c)
    folder, bases = Path(c.out or f"runs/{size}{'' if c.share == 1 else '-quick'}"), Path(f"runs/{size}")
    made = [c.init or str(bases / next((name for name in BEFORE["sft"] if (bases / name).exists()), BEFORE["sft"][0]))]
    with one_voice():
        for stage, k in stages_of(size, c.rl):
            more = dict(seed=c.seed, device=c.device, threads=c.threads) | ({"round": k} if hasattr(STAGES[stage], "round") else {})
            more |= ({} if stage == "prefs" else {"share": c.share}) | ({"questions": c.questions} if c.questions < 200 and stage != "prefs" else {})
            settled, origin = settings(stage, ["--size", size], folder, **more | ({"init": made[0]} if stage == "sft" else {}))
            check(settled)
            print(f"---- {stage}{f' {k}' if k > 1 else ''}", flush=True)
            run_stage(stage, settled, origin)
            made += [settled.out] if stage not in ("prefs", "rm") else []
        if size == "tiny":
            report(folder, made, c)
        else:
            print(f"next: python eval.py {' '.join(made)} --tasks gsm8k ifeval (see the README's Benchmarks)")


def report(folder: Path, made: list[str], c: Recipe) -> None:
    """Print what each stage has brought, on text and questions that no stage trains on, and draw it: pipeline.json, pipeline.png."""
    device = best_device(c.device)
    pretrained = Path(made[0]).parent / "pretrain"
    before = [str(pretrained)] if (pretrained / "hf").exists() and Path(made[0]) != pretrained else []
    made += [str(path) for path in (*folder.glob("grpo-*"), *folder.glob("ppo-*")) if (path / "hf").exists() and str(path) not in made]  # of the other --rl
    table = {}
    for path in [*before, *made]:
        model, tokenizer = OLMo2.load(path, device=device), get_tokenizer(find_weights(path)[0])
        sources = by_source(token_files([embedded_corpus(tokenizer)], "val"))
        bpb = bits_per_byte_by_source(model, {name: sources[name] for name in ("docs", "code")}, min(256, model.config.context), tokenizer)
        table[path] = {f"{name} bpb": value for name, value in bpb.items()} | quiz(model, tokenizer, read_prompts(LAPTOP["quiz"], c, tokenizer, held_out=True), 48)
    if rank_and_world()[0]:
        return
    print_table(table)
    write_json(folder / "pipeline.json", table)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained", width_ratios=(3, 4, 4))
    for axis, columns, title in ((axes[0], ("docs bpb", "code bpb"), "Held-out bits per byte"), (axes[1], ("format %", "constraints %", "sums %"), "Held-out answers, %")):
        width = 0.8 / len(columns)
        for i, column in enumerate(columns):
            axis.bar([x + (i + 0.5) * width - 0.4 for x in range(len(table))], [row[column] for row in table.values()], width, label=column)
        axis.set(title=title, xticks=range(len(table)), xticklabels=[Path(path).name for path in table])
        axis.legend(fontsize=8)
    for path in made[3:]:  # after the base, SFT and DPO: RLVR
        steps, evals = ([row for row in read_metrics(Path(path)) if row["event"] == event] for event in ("step", "eval"))
        axes[2].plot([row["step"] for row in steps], [100 * row["right"] for row in steps], linewidth=0.9, label=f"{Path(path).name}: sampled answers that are right, %")
        axes[2].plot([row["step"] for row in evals], [row["held_out"]["sums %"] for row in evals], marker="o", label=f"{Path(path).name}: held-out sums, %")
    axes[2].set(title="RLVR", xlabel="step", ylim=(0, 101))
    axes[2].legend(fontsize=8)
    figure.savefig(folder / "pipeline.png", dpi=110)
    plt.close(figure)
    print(f"drawn in {folder / 'pipeline.png'}; talk to it: python sample.py {made[-1]}")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    stage = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if stage and stage not in STAGES:
        near = difflib.get_close_matches(stage.lower(), STAGES, 1)
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
