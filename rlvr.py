"""Reward answers: reinforcement learning from verifiable rewards, with GRPO or with PPO.

    python posttrain.py grpo        # laptop: after DPO; 1 minute
    python posttrain.py ppo         # as the 7B and 13B were made: with a value model
    python posttrain.py grpo --data tasks.jsonl --init runs/mine/dpo --out runs/mine/grpo

What these stages teach: the model tries, a program says what is right, and what is right becomes
more likely. GRPO compares the answers to one prompt with each other; PPO compares each token with
what a value model expected.

Shapes: B rows (answers), T tokens. Position t of a row holds what belongs to token t + 1, as in
`OLMo2.loss`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo import last_target_index
from infra.checkpoint import Trained, state_tensors
from infra.distributed import rank_and_world, run_on_all_ranks
from infra.files import UserError
from infra.run import Run
from infra.settings import AboveZero, NotNegative, Number, Positive, Share, TwoOrMore
from infra.sharding import all_reduce_when
from likelihood import pad_rows
from model import OLMo2
from pretrain import set_lr, what_is_trained
from rollouts import Completion
from sft import (
    HeldOut,
    SamplingSettings,
    batch_indices,
    begin_stage,
    connect_servers,
    finish_stage,
    held_out_rows,
    instruct_tokenizer,
    load_model,
    lr_at,
    make_optimizer,
    micro_batches,
    number_of_steps,
    record_eval,
    sample_groups,
    score_rows,
    take_step,
)
from tasks.conversations import Example, Prompt, Source, read_prompts
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------
# Objectives
#
# A mask is 1.0 where a token counts. A step's loss is a sum over all rows of the step, on all
# ranks, divided by what all of them count together: never a mean of means.


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T] of rewards and values [B, T]: generalized advantage estimation.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lambda A_{t+1},   return_t = A_t + V_t

    V_t is read before token t, and V is 0 after the last. The reward of an answer belongs to its
    last token; upstream, as TRL, puts it on the position behind that, where a value is still read.
    Source: arXiv 1506.02438, equation 16.

    >>> rewards, values = torch.tensor([[0.0, 10.0, 0.0]]), torch.tensor([[4.0, 6.0, 7.0]])
    >>> mask = torch.tensor([[1.0, 1.0, 0.0]])
    >>> gae(rewards, values, mask, gamma=1.0, lam=0.5)     # A_1 = 10 - 6;  A_0 = (6 - 4) + 0.5 * 4
    (tensor([[4., 4., 0.]]), tensor([[ 8., 10.,  0.]]))
    """
    values = values * mask
    following = F.pad(values[:, 1:], (0, 1))  # V_{t+1}
    advantage = torch.zeros_like(values[:, 0])  # [B]
    advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages.append(advantage)
    stacked = torch.stack(advantages[::-1], dim=1)  # [B, T]
    return stacked, stacked + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """values [B, T] with mean 0 and (unbiased) variance 1 over the mask.

    Of all rows of a step; upstream whitens over each rank's own.

    >>> whiten(torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    tensor([[-0.7071,  0.7071,  0.0000]])
    """
    n = mask.sum()
    centred = values - (values * mask).sum() / n
    variance = ((centred * mask) ** 2).sum() / (n - 1).clamp(min=1)
    return centred * (variance + 1e-8).rsqrt() * mask


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(loss, does the clip hold the gradient back) per token [B, T], of log-probabilities.

        ratio = exp(new - old),   loss = max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))

    `old` are those under the weights that sampled. At the first mini-batch of a step the ratio is
    1. Upstream's GRPO sets old = new at every mini-batch of its one epoch: there the clip never
    acts. Source: PPO (arXiv 1707.06347), equation 7.

    >>> new, advantages = torch.tensor([0.5, 0.5, -0.5]), torch.tensor([1.0, -1.0, -1.0])
    >>> policy_loss(new, torch.zeros(3), advantages, 0.2)          # ratios 1.65, 1.65, 0.61
    (tensor([-1.2000,  1.6487,  0.8000]), tensor([ True, False,  True]))
    """
    ratio = (new - old).exp()
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.max(free, held), held > free


def ppo_losses(
    new: Tensor,
    old: Tensor,
    values: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    value_clip: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """(policy loss, value loss, clipped tokens), sums over the mask, of [B, T] each.

    Divide them by the tokens of the whole mini-batch.

        value loss = max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2

    Source: open-instruct ppo_vllm_thread_ray_gtrl.py.

    >>> zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    >>> values, advantages = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, -1.0]])
    >>> returns = torch.tensor([[3.0, 5.0]])
    >>> ppo_losses(zeros, zeros, values, ones, advantages, returns, ones)
    (tensor(-1.), tensor(9.2200), tensor(0.))

    The value loss is (2^2 + (1.2 - 5)^2) / 2.
    """
    policy, clipped = policy_loss(new, old, advantages, clip)
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)
    return (policy * mask).sum(), (value * mask).sum(), (clipped * mask).sum()


def grpo_advantages(rewards: Tensor, normalize: bool = True) -> Tensor:
    """How much better each answer is than its group, in the group's standard deviations.

    rewards: [prompts, samples]. A group of equal rewards has advantages of 0. Without `normalize`:
    the difference alone (Dr. GRPO, arXiv 2503.20783). Source: GRPO (arXiv 2402.03300) section
    4.1.2; open-instruct grpo_vllm_thread_ray_gtrl.py.

    >>> grpo_advantages(torch.tensor([[10.0, 0.0, 0.0, 10.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-8) if normalize else centred


def kl_k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) per token, estimated by exp(-d) - 1 + d, d = log_probs - reference.

    It is never negative, and 0 where they agree. As a loss its gradient is, in expectation, that of
    KL(reference || policy). d is cut at 40. Source: open-instruct model_utils.py.

    >>> kl_k3(torch.tensor([0.0, -1.0]), torch.tensor([0.0, -2.0]))
    tensor([0.0000, 0.3679])
    """
    d = (log_probs - reference).clamp(-40, 40)
    return torch.expm1(-d) + d


def token_weights(mask: Tensor, denominator: str, tokens: float, rows: int, longest: int) -> Tensor:
    """What each token of [B, T] weighs in a loss over `tokens` tokens in `rows` rows, of all ranks.

    token: 1 / tokens, the mean over tokens (ours; TRL's dapo; open-instruct grpo_fast.py).
    constant: 1 / (rows x longest), Dr. GRPO's, so that long answers are not made light.
    sequence: 1 / (rows x tokens of its row), the mean of means of the GRPO paper.

    >>> mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> token_weights(mask, "sequence", 3, 2, 8).tolist()
    [[0.5, 0.0], [0.25, 0.25]]
    >>> token_weights(mask, "constant", 3, 2, 8)[1].tolist()
    [0.0625, 0.0625]
    """
    if denominator == "sequence":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / rows
    return mask / (tokens if denominator == "token" else rows * longest)


def grpo_loss(
    new: Tensor,
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip: float = 0.2,
    beta: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, clipped tokens, KL), sums over tokens, of log-probabilities [B, T].

        loss = sum of weight (policy_loss + beta kl_k3(new, reference))

    weights: see `token_weights`. Source: GRPO (arXiv 2402.03300), equation 3.

    >>> new, advantages = torch.tensor([[-1.0, -1.0]]), torch.tensor([2.0])
    >>> weights = torch.tensor([[0.5, 0.5]])
    >>> grpo_loss(new, new, new - 1, advantages, weights, beta=0.1)     # -2 + 0.1 * (e^-1 - 1 + 1)
    (tensor(-1.9632), tensor(0.), tensor(0.7358))
    """
    policy, clipped = policy_loss(new, old, advantages[:, None], clip)
    kl = kl_k3(new, reference)
    counts = (weights > 0).float()
    loss = (weights * (policy + beta * kl)).sum()
    return loss, (clipped * counts).sum(), (kl * counts).sum().detach()


# ------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class RolloutSettings(SamplingSettings):
    """What both algorithms have."""

    # the 1B ran two (a mix, then MATH), the 13B three (a mix, then GSM8K, then MATH)
    round: Positive = 1
    # ratios of new to old probability count between 1 - this and 1 + this
    clip_range: AboveZero = 0.2
    # of AdamW: decay of all weights (torch's default, which was left as it is)
    weight_decay: NotNegative = 0.01


@dataclass(frozen=True)
class GRPOSettings(RolloutSettings):
    """RLVR without a value model (grpo_vllm_thread_ray_gtrl.py; open-instruct docs/olmo2.md)."""

    # answers per prompt: each is compared with the others
    samples: TwoOrMore = 16
    # optimizer steps per pass over the rollouts; each takes equally many --prompts
    minibatches: Positive = 2
    # over the rollouts of a step
    passes: Positive = 1
    # reward, instead of any other, of an answer that does not end
    no_eos: Number = 0.0
    # of the KL penalty, k3 in the loss
    beta: NotNegative = 0.01
    # advantages in standard deviations of their group
    normalize: bool = True
    # what a token's loss is divided by: see token_weights
    denominator: Literal["token", "constant", "sequence"] = "token"


@dataclass(frozen=True)
class PPOSettings(RolloutSettings):
    """RLVR with a value model (ppo_vllm_thread_ray_gtrl.py; paper Table 18)."""

    # answers per prompt
    samples: Positive = 1
    # the model whose weights the value model starts from; none: runs/<size>/rm
    value: str = ""
    # optimizer steps per pass over the rollouts; each takes equally many --prompts
    minibatches: Positive = 1
    # over the rollouts of a step (K)
    passes: Positive = 4
    # of the KL penalty, k1 in the reward of each token
    beta: NotNegative = 0.05
    # discount of later rewards
    gamma: Share = 1.0
    # lambda of the advantage estimation
    lam: Share = 0.95
    # a value may move so far from its old one
    value_clip: AboveZero = 0.2
    # of the value loss
    value_weight: NotNegative = 0.1
    # learning rate of the value model; 0: lr
    value_lr: NotNegative = 0.0
    # reward, instead of any other, of an answer that does not end
    no_eos: Number = -10.0


# ------------------------------------------------------------------------------------------
# GRPO


def train_grpo(c: GRPOSettings, run: Run) -> None:
    """Sample groups of answers, reward what is right, raise the better ones of each group."""
    tokenizer = instruct_tokenizer(c, c.init)
    prompts = run_on_all_ranks(read_rlvr_prompts, c, Source(c.data, c.seed), tokenizer)
    quiz = run_on_all_ranks(read_rlvr_prompts, c, held_out_rows(c, c.quiz), tokenizer)
    held_out = HeldOut(tokenizer, questions=quiz)
    steps = number_of_steps(c, len(prompts), c.prompts)
    longest = c.prompt_length + c.response_length
    model = load_model(c, c.init, run, longest)
    model.servers = connect_servers(c, run, longest)
    reference = load_model(c, c.init, run, longest, frozen=True)
    optimizer = make_optimizer(model, c)
    begin_stage(c, run, what_is_trained(model, optimizer, tokenizer), prompts, c.prompts, steps)
    if run.evaluation_owed(steps):
        record_eval(c, run, model, held_out, {})

    for step in run.steps(steps):
        # 1. sample and verify
        rollouts = sample_rollouts(model, tokenizer, prompts, c, step)

        # 2. advantages within each group; what the reference thinks of the answers
        groups = rollouts.rewards.view(-1, c.samples)  # [prompts, samples]
        advantages = grpo_advantages(groups, c.normalize).flatten()  # [B]
        ref_logprobs = score_log_probs(reference, rollouts.examples, c)

        # 3. optimizer steps, over mini-batches of the rollouts
        lr = lr_at(step, steps, c)
        set_lr(optimizer, lr)
        norms = []
        for part in rollouts.parts * c.passes:
            n_tokens = rollouts.count_tokens(part)
            for rows, *inputs, is_last in rollouts.micro_batches(part, c.micro_tokens, run.device):
                all_reduce_when(is_last, model)
                tokens, targets = inputs  # [b, T]
                mask = (targets != -100).float()  # [b, T]
                loss, clipped, kl = grpo_loss(
                    new=model.log_probs(tokens, targets, c.temperature),
                    old=pad_like(mask, rollouts.old_logprobs, rows),
                    reference=pad_like(mask, ref_logprobs, rows),
                    advantages=advantages[rows].to(run.device),
                    weights=token_weights(
                        mask, c.denominator, n_tokens, len(part), c.response_length
                    ),
                    clip=c.clip_range,
                    beta=c.beta,
                )
                loss.backward()
                run.add(loss=loss, clip_fraction=clipped, kl=kl)
            norms.append(take_step(model, optimizer, c.clip))

        # 4. log, save, evaluate
        log_rollouts(run, c, rollouts, norms, lr)
        if run.save_due():
            run.save()
        if run.evaluation_due():
            record_eval(c, run, model, held_out, {})
    finish_stage(run)


# ------------------------------------------------------------------------------------------
# PPO


def train_ppo(c: PPOSettings, run: Run) -> None:
    """Let a value model learn what an answer so far is worth; raise tokens that bring more."""
    tokenizer = instruct_tokenizer(c, c.init)
    prompts = run_on_all_ranks(read_rlvr_prompts, c, Source(c.data, c.seed), tokenizer)
    quiz = run_on_all_ranks(read_rlvr_prompts, c, held_out_rows(c, c.quiz), tokenizer)
    held_out = HeldOut(tokenizer, questions=quiz)
    steps = number_of_steps(c, len(prompts), c.prompts)
    longest = c.prompt_length + c.response_length
    model = load_model(c, c.init, run, longest)
    model.servers = connect_servers(c, run, longest)
    reference = load_model(c, c.init, run, longest, frozen=True)
    value = load_model(c, c.value, run, longest, head="score")
    optimizer = make_optimizer(model, c)
    value_optimizer = make_optimizer(value, c)
    trained = with_value_model(what_is_trained(model, optimizer, tokenizer), value, value_optimizer)
    begin_stage(c, run, trained, prompts, c.prompts, steps)
    updates = c.passes * c.minibatches  # of a step
    if run.evaluation_owed(steps):
        record_eval(c, run, model, held_out, {})

    for step in run.steps(steps):
        # 1. sample and verify; what the reference and the value model think of the answers
        rollouts = sample_rollouts(model, tokenizer, prompts, c, step)
        ref_logprobs = score_log_probs(reference, rollouts.examples, c)
        old_values = score_rows(value, rollouts.examples, c, lambda x, _: value.scores(x))

        # 2. advantages of tokens
        estimates = estimate_advantages(rollouts, ref_logprobs, old_values, c)
        kl = estimates.k1.sum().item() / rollouts.n_tokens

        # 3. optimizer steps of both models, over mini-batches of the rollouts
        norms = []
        for update, part in enumerate(rollouts.parts * c.passes, step * updates):
            lr = lr_at(update, steps * updates, c)  # it falls within a step, too
            set_lr(optimizer, lr)
            set_lr(value_optimizer, lr * (c.value_lr or c.lr) / c.lr)
            n_tokens = rollouts.count_tokens(part)
            for rows, *inputs, is_last in rollouts.micro_batches(part, c.micro_tokens, run.device):
                all_reduce_when(is_last, model)
                all_reduce_when(is_last, value)
                tokens, targets = inputs  # [b, T]
                mask = (targets != -100).float()  # [b, T]
                policy, squares, clipped = ppo_losses(
                    new=model.log_probs(tokens, targets, c.temperature),
                    old=pad_like(mask, rollouts.old_logprobs, rows),
                    values=value.scores(tokens),
                    old_values=pad_like(mask, old_values, rows),
                    advantages=pad_like(mask, estimates.advantages, rows),
                    returns=pad_like(mask, estimates.returns, rows),
                    mask=mask,
                    clip=c.clip_range,
                    value_clip=c.value_clip,
                )
                ((policy + c.value_weight * squares) / n_tokens).backward()
                run.add(
                    loss=policy / n_tokens, value_loss=squares / n_tokens, clip_fraction=clipped
                )
            norms.append(take_step(model, optimizer, c.clip))
            norms.append(take_step(value, value_optimizer, c.clip))

        # 4. log, save, evaluate
        log_rollouts(run, c, rollouts, norms, lr, kl=kl)
        if run.save_due():
            run.save()
        if run.evaluation_due():
            record_eval(c, run, model, held_out, {})
    finish_stage(run)


def with_value_model(trained: Trained, value: OLMo2, optimizer: torch.optim.Optimizer) -> Trained:
    """What PPO saves: the policy's tensors, and the value model's."""
    parts = {f"value_{part}": t for part, t in state_tensors(value, optimizer).items()}
    return Trained(trained.tensors | parts, trained.config, trained.describe)


@dataclass(frozen=True)
class Estimates:
    """Of each token of the rollouts, [B, T] with zeros after a row's end."""

    advantages: Tensor  # whitened
    returns: Tensor
    k1: Tensor  # log-probability less the reference's: the simplest estimate of the KL


def estimate_advantages(
    rollouts: "Rollouts", ref_logprobs: list[Tensor], old_values: list[Tensor], c: PPOSettings
) -> Estimates:
    """Rewards per token: -beta k1 everywhere, the verdict on the last one; then GAE, whitened."""
    targets = pad_rows([example.targets for (example,) in rollouts.examples], value=-100)
    mask = (targets != -100).float()  # [B, T]
    k1 = pad_like(mask, rollouts.old_logprobs) - pad_like(mask, ref_logprobs)
    rewards = -c.beta * k1
    rewards[torch.arange(len(rewards)), last_target_index(targets)] += rollouts.rewards
    advantages, returns = gae(rewards, pad_like(mask, old_values), mask, c.gamma, c.lam)
    return Estimates(whiten(advantages, mask), returns, k1)


# ------------------------------------------------------------------------------------------
# Rollouts: what both share


# A row that counts nowhere, for ranks that have one row less than others.
NO_TARGETS = (Example(np.zeros(2, np.int32), np.zeros(2, bool)),)


@dataclass(frozen=True)
class Rollouts:
    """All answers of a step, on every rank, though each has sampled only its share.

    The answers to one prompt may be sampled on several ranks. Every rank knows all rewards, so all
    compute the same advantages, at any world size. Each then trains on its share of a mini-batch.
    """

    parts: list[range]  # the rows of each mini-batch: whole groups
    examples: list[tuple[Example]]
    rewards: Tensor  # [B], of which `samples` neighbours answer the same prompt
    old_logprobs: list[Tensor]  # of the targets [T], under the weights that have sampled
    stats: dict[str, float]  # see `rollout_stats`

    @property
    def n_tokens(self) -> int:
        return self.count_tokens(range(len(self.examples)))

    def count_tokens(self, part: range) -> int:
        """Targets in the rows of a mini-batch."""
        return sum(self.examples[n][0].n_targets for n in part)

    def micro_batches(
        self, part: range, budget: int, device: torch.device
    ) -> Iterator[tuple[list[int], Tensor, Tensor, bool]]:
        """(rows, tokens [b, T], targets [b, T], is it the last) of this rank's share of a part.

        See sft.micro_batches. Where the ranks do not divide the rows, some get NO_TARGETS beside
        theirs, under another row's number, whose values its mask of 0 hides.
        """
        _, world = rank_and_world()
        missing = -len(part) % world
        numbers = [*part] + [part[0]] * missing
        examples = [self.examples[n] for n in part] + [NO_TARGETS] * missing
        for which, *batch in micro_batches(examples, budget, device):
            yield [numbers[n] for n in which], *batch


def read_rlvr_prompts(c: RolloutSettings, source: Source, tokenizer: Tokenizer) -> list[Prompt]:
    """Prompts that are short enough, with worked examples where they are GSM8K's."""
    return read_prompts(source, tokenizer, c.prompt_length, c.shots, c.verifier)


def sample_rollouts(
    model: OLMo2, tokenizer: Tokenizer, prompts: list[Prompt], c: RolloutSettings, step: int
) -> Rollouts:
    """Sample this step's answers and let the verifiers score them.

    The old log-probabilities are, in fp32, those of sampling itself. In bf16 (CUDA) a forward with
    a cache rounds otherwise than one without, by more than the clip may bear, so the trainer's own
    forward computes them. What servers say is compared with it, too.
    """
    numbers = batch_indices(len(prompts), c.prompts, step, c.seed)
    completions = sample_groups(model, tokenizer, [prompts[n] for n in numbers], c, step)
    examples = [(answer.example,) for answer in completions]
    sampled = [answer.log_probs for answer in completions]
    on_cuda = model.lm_head.weight.device.type == "cuda"
    trainers = score_log_probs(model, examples, c) if on_cuda or model.servers else sampled
    old_logprobs = trainers if on_cuda else sampled
    # Their scores are those of the rows' verifiers, VERIFIERS in tasks/conversations.py.
    rewards = torch.tensor(
        [c.reward * answer.score if answer.ended else c.no_eos for answer in completions]
    )
    size = len(completions) // c.minibatches
    parts = [range(i, i + size) for i in range(0, len(completions), size)]
    stats = rollout_stats(completions, rewards, c.samples)
    if model.servers:
        stats["logprob_gap"] = check_log_probs(sampled, trainers)
    return Rollouts(parts, examples, rewards, old_logprobs, stats)


# Mean difference of log-probabilities between two ways to compute them, in nats a token. Kernels
# that round in bf16 differ by hundredths; other weights, or another temperature, by more.
MOST_GAP = 0.2


def check_log_probs(sampled: list[Tensor], trainers: list[Tensor]) -> float:
    """The mean difference between the sampler's log-probabilities and the trainer's own.

    Raises UserError where it is so large that they cannot be of the same model.
    """
    total, n_targets = 0.0, 0
    for ours, theirs in zip(sampled, trainers):  # [T], and [1, T] with padding
        total += (ours - theirs.flatten()[: len(ours)]).abs().sum().item()
        n_targets += int(ours.count_nonzero())
    gap = total / max(1, n_targets)
    if not gap <= MOST_GAP:
        raise UserError(
            f"the sampler's log-probabilities are {gap:.3g} nats a token from the trainer's: it "
            "has other weights, or is no vLLM with --logprobs-mode processed_logprobs",
            everywhere=True,
        )
    return gap


def rollout_stats(completions: list[Completion], rewards: Tensor, samples: int) -> dict[str, float]:
    """Means over answers; signal: share of groups of unequal rewards."""
    counts = [(answer.length, answer.score, answer.ended) for answer in completions]
    length, right, ended = np.mean(counts, axis=0).tolist()
    reward = rewards.sum().item() / len(rewards)
    stats = {"reward": reward, "right": right, "length": length, "ended": ended}
    if samples > 1:
        groups = rewards.view(-1, samples)
        stats["signal"] = (groups != groups[:, :1]).any(1).double().mean().item()
    return stats


def score_log_probs(model: OLMo2, rows: list[tuple[Example]], c: RolloutSettings) -> list[Tensor]:
    """Log-probabilities [1, T] of each row's targets, at the temperature of sampling."""
    return score_rows(model, rows, c, lambda x, y: model.log_probs(x, y, c.temperature))


def pad_like(mask: Tensor, values: list[Tensor] | Tensor, rows: list[int] | None = None) -> Tensor:
    """Some rows of values [T] or [1, T], of several lengths, as one [b, T]; 0 where the mask is."""
    chosen = values if rows is None else [values[n] for n in rows]
    width = mask.shape[1]
    padded = pad_rows([row.flatten()[:width] for row in chosen], width=width)
    return padded.to(mask.device) * mask


def log_rollouts(
    run: Run, c: RolloutSettings, rollouts: Rollouts, norms: list[float], lr: float, **more: float
) -> None:
    """Log a step: losses are means over updates; KL, clipped share and entropy are per token.

    Of what was sampled, the mean of -log p estimates the entropy.
    """
    n_tokens = rollouts.n_tokens
    updates = len(rollouts.parts) * c.passes
    seen = n_tokens * c.passes
    per = {"loss": updates, "value_loss": updates, "clip_fraction": seen, "kl": seen}
    means = {name: value / per[name] for name, value in run.all_sum().items()}
    entropy = -sum(row.sum() for row in rollouts.old_logprobs)
    grad_norm = float(np.max(norms))  # unlike max, it keeps NaN
    run.log(
        n_tokens,
        skipped=not math.isfinite(grad_norm),
        **means,
        **more,
        entropy=entropy.item() / n_tokens,
        **rollouts.stats,
        lr=lr,
        grad_norm=grad_norm,
    )
