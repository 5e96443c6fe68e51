"""Every published number of every stage and size, as tables, and the settings of stages 1 and 2.

A recipe holds what differs from the defaults of a stage's settings. Values are Ai2's where a source
is named, and ours where the comment says so. Post-training's settings stand in sft.py, dpo.py and
rlvr.py; their recipes are here.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import tyro

from infra.settings import (
    AboveZero,
    BelowOne,
    Bytes,
    Count,
    Length,
    NotNegative,
    Positive,
    Rate,
    RunSettings,
)
from shape import SIZES, ModelConfig

# ------------------------------------------------------------------------------------------
# Stage 1: settings


@dataclass(frozen=True)
class PretrainSettings(RunSettings):
    """Stage 1. The defaults are those of the 1B to 13B (official yamls; paper Table 1)."""

    # ---- what is trained, on what

    # token files (.npy), folders made by data.py, or @LIST of such files (lists.py); none: the
    # embedded corpus (tiny to 760M)
    data: tuple[str, ...] = ()
    # folder or URL from which relative paths in a list count; none: the list's own folder
    data_root: str = ""
    # of each list only so many tokens, each source its share; 0: all
    take: Count = 0
    # of a list's files that are elsewhere: fetch what training needs when it needs it, and keep so
    # many bytes of it (500GB); 0: download all of them first
    data_cache: Bytes = 0
    # held-out token files or folders; none: the val/ of --data
    val: tuple[str, ...] = ()
    # instead of --data: source=weight, …, shares of --tokens; sources are paths, or docs code prose
    # math qa instruct sums
    mix: tuple[str, ...] = ()
    # laptop, olmo2, or a folder with tokenizer.json
    tokenizer: str = "olmo2"
    # start from the weights of a run, checkpoint, Hugging Face directory or model on the Hub, or of
    # a published training state (released.py); none: random
    init: str = ""
    # a schedule of its own for the weights of --init: over --tokens, 5 % of warm-up to the rate at
    # which stage 2 of the size began, then a line to 0
    fresh_schedule: bool = False
    # take Adam's moments, too, from the training state that --init names
    moments: bool = False
    # the run's folder; none: runs/<size>/pretrain, or with --init runs/<size>/continued
    out: str = ""

    # ---- a shape of your own; 0: as in --size (or write a line into SIZES, in shape.py)

    # blocks
    layers: Count = 0
    # width of the model
    d_model: Count = 0
    # of attention; each is d_model / heads wide
    heads: Count = 0
    # of keys and values (GQA); 0: with --heads as many, else as in --size
    kv_heads: Count = 0
    # hidden width of the MLP
    ffn: Count = 0

    # ---- batches

    # tokens of an instance (paper Table 1)
    seq_len: Length = 4096
    # instances per optimizer step, over all processes
    batch: Positive = 512
    # instances per forward and backward of a process, at most; fewer take less memory, other last
    # bits
    micro_batch: Positive = 4
    # length of the run, rounded up to whole steps; at its start, warm-up and horizon follow, unless
    # a flag names one of them
    tokens: Positive = 0
    # of the order of the data (official yamls)
    seed: Count = 6198
    # of the random weights (official yamls)
    init_seed: Count = 6198
    # index of the first epoch in the order's seed: OLMo 0, OLMo-core 1
    first_epoch: Count = 0
    # neighbouring instances that stay together in the shuffled order; a file's tail below that is
    # dropped
    chunk: Positive = 1
    # no loss on instances with an n-gram 32 times in a row (paper section 3.1)
    mask_repeats: bool = True

    # ---- optimizer (paper section 3.3; OLMo olmo/optim.py)

    # peak learning rate
    lr: Rate = 4e-4
    # tokens of linear warm-up from 0 (official yamls)
    warmup: Count = 8_388_608_000
    # how the rate falls after the warm-up
    schedule: Literal["cosine", "linear"] = "cosine"
    # tokens at which it would reach its floor; may lie beyond the end of the run
    horizon: Positive = 5_000_000_000_000
    # the floor, as a share of lr
    lr_floor: BelowOne = 0.1
    # of AdamW: share of the old mean of gradients that a step keeps
    beta1: BelowOne = 0.9
    # of AdamW: the same for the mean of their squares
    beta2: BelowOne = 0.95
    # of AdamW; 1e-5 was OLMo-0424's (paper Fig. 9)
    eps: AboveZero = 1e-8
    # of everything, norms and head too, but the input embedding (paper Fig. 10)
    weight_decay: NotNegative = 0.1
    # coefficient of the squared log-normaliser (paper Table 1; what ran is in the recipes)
    z_loss: NotNegative = 1e-5
    # SkipStep: skip when loss or gradient norm is so many standard deviations above the last 128
    # steps; 0: only if not finite
    skip_sigma: NotNegative = 0.0

    # ---- ablations of the architecture (paper section 3; model.py): the first of each is OLMo 2

    # where the norms stand
    norm_position: Literal["reordered", "pre"] = "reordered"
    # RMSNorm on queries and keys
    qk_norm: bool = True
    # layernorm: without parameters
    norm: Literal["rms", "layernorm"] = "rms"
    # olmo0424: scaled by width and depth
    init_scheme: Literal["olmo2", "olmo0424"] = "olmo2"
    # standard deviation of the input embedding, under olmo2
    embed_std: AboveZero = 0.02

    # ---- on the way

    # steps between training states (official yamls); the last step is always saved
    save_every: Positive = 1000
    # newest states to keep; 0: all
    keep: Count = 0
    # steps between evaluations and samples
    eval_every: Positive = 1000
    # held-out tokens per source, always the same ones
    val_tokens: Positive = 131_072
    # held-out questions per task at the end of a run on the embedded corpus; 0: none
    questions: Count = 500
    # text that the samples continue; none: no samples
    sample: str = "The"

    MAY_CHANGE: ClassVar = RunSettings.MAY_CHANGE | frozenset(
        "tokens val_tokens sample data_root data_cache".split()
    )


# ------------------------------------------------------------------------------------------
# Stage 1: recipes
#
# Published: official yamls and launch scripts of OLMo (1B, 7B, 13B) and OLMo-core (32B); paper
# Table 3. Steps are those of the last released stage-1 checkpoint. Where the sources disagree, the
# value is the one that ran:
#   13B rate       9e-4 by Table 3 and the launch script; its yaml says 3e-4
#   warm-up        8.39B tokens by the yamls of 1B to 13B; the paper says 2,000 steps for all
#   z-loss         1e-4 in 1B to 13B: the code (OLMo olmo/train.py) never reads the 1e-5 of yamls
#                  and paper, and uses its own default
#   32B optimizer  began with AdamW; SkipStep came after two weeks, and never advanced Adam's step
#                  (OLMo-core, branch 32B), which hardly matters so late
#   32B order      of pairs of instances: its script sets max_target_sequence_length to 8,192
# Layouts (launch scripts): 1B and 13B sharded within a node of 8 GPUs, the 7B's 512 GPUs held 2
# replicas, the 32B's 1,024 held 4. On these the 32B recomputed the MLPs, on fewer GPUs whole
# blocks.

RELEASED = ("1B", "7B", "13B", "32B")

# Ours, for 14M to 760M, after OLMo's ladder (scripts/ladder.py). The rest: `ladder_recipe`.
LADDER = dict(
    seq_len=1024, batch=128, micro_batch=8, skip_sigma=6.0, save_every=500, keep=3, eval_every=500
)

# The formatter would give each value a line of its own.
# fmt: off
PRETRAIN: dict[str, dict] = {
    # Ours, for a laptop. As in the release, the horizon lies a quarter beyond the end of the run.
    "tiny": dict(
        tokenizer="laptop", seq_len=128, batch=8, micro_batch=8, tokens=2500 * 1024,
        lr=1e-2, warmup=50 * 1024, horizon=3125 * 1024, skip_sigma=6.0,
        save_every=625, keep=3, eval_every=625, log_every=50),
    "14M": dict(
        LADDER, tokens=280_000_000, lr=0.00929, warmup=14_000_000, horizon=350_000_000),
    "30M": dict(
        LADDER, tokens=600_000_000, lr=0.0072, warmup=30_000_000, horizon=750_000_000),
    "60M": dict(
        LADDER, tokens=1_200_000_000, lr=0.00572, warmup=60_000_000, horizon=1_500_000_000),
    "190M": dict(
        LADDER, tokens=3_800_000_000, lr=0.00389, warmup=190_000_000, horizon=4_750_000_000),
    "370M": dict(
        LADDER, tokens=7_400_000_000, lr=0.00312, warmup=370_000_000, horizon=9_250_000_000),
    "760M": dict(
        LADDER, tokens=15_200_000_000, lr=0.00245, warmup=760_000_000, horizon=19_000_000_000),
    # Released.
    "1B": dict(
        lr=4e-4, batch=512, micro_batch=4, tokens=1_907_359 * 512 * 4096,  # 4.0T
        z_loss=1e-4, shard=8, reshard=False, sample="The meaning of life is"),
    "7B": dict(
        lr=3e-4, batch=1024, micro_batch=2, tokens=928_646 * 1024 * 4096,  # 3.9T, one epoch
        z_loss=1e-4, shard=256, recompute=0.25, sample="The meaning of life is"),
    "13B": dict(
        lr=9e-4, batch=2048, micro_batch=2, tokens=596_057 * 2048 * 4096,  # 5.0T
        z_loss=1e-4, shard=8, recompute=0.5, sample="The meaning of life is"),
    "32B": dict(
        lr=6e-4, batch=2048, micro_batch=2, tokens=721_901 * 2048 * 4096,  # 6.1T
        warmup=2000 * 2048 * 4096, horizon=774_861 * 2048 * 4096,  # 2,000 steps; 6.5T
        seed=34_521, init_seed=12_536, first_epoch=1, chunk=2, skip_sigma=6.0,
        mask_repeats=False, shard=256, recompute=1.0, recompute_part="mlp",
        sample="The meaning of life is"),
}
# fmt: on


def pretrain_recipe(size: str) -> dict:
    """What a size changes in the defaults; of a line of your own in SIZES, what the ladder says."""
    return PRETRAIN.get(size) or ladder_recipe(SIZES[size])


def ladder_recipe(shape: ModelConfig) -> dict:
    """The ladder's recipe for N parameters: 20 N tokens, lr = 4.7e-3 (N / 108M)^(-1/3).

    N leaves out the input embedding. Source: OLMo scripts/ladder.py.
    """
    n = shape.matrices
    lr = round(4.7e-3 * (n / 108e6) ** (-1 / 3), 6)
    recipe = dict(LADDER, tokens=20 * n, lr=lr, warmup=n, horizon=25 * n)
    recipe["seq_len"] = min(LADDER["seq_len"], shape.context)
    if shape.vocab == SIZES["tiny"].vocab:
        recipe["tokenizer"] = "laptop"
    return recipe


# ------------------------------------------------------------------------------------------
# Stage 2


@dataclass(frozen=True)
class AnnealSettings(PretrainSettings):
    """Stage 2's own; all others are stage 1's, but for what `recipe` in anneal.py changes."""

    # stage 1: a run (its newest state), a training state, a published one (folder, URL or
    # LIST.csv@STEP), or a Hugging Face directory; none: runs/<size>/pretrain
    init: str = ""
    # decided by --fresh-optimizer
    moments: tyro.conf.Suppress[bool] = True
    # stage 2 has a schedule of its own
    fresh_schedule: tyro.conf.Suppress[bool] = False
    # the shape is that of stage 1: blocks
    layers: tyro.conf.Suppress[Count] = 0
    # width of the model, of stage 1
    d_model: tyro.conf.Suppress[Count] = 0
    # heads of attention, of stage 1
    heads: tyro.conf.Suppress[Count] = 0
    # heads of keys and values, of stage 1
    kv_heads: tyro.conf.Suppress[Count] = 0
    # width of the MLP, of stage 1
    ffn: tyro.conf.Suppress[Count] = 0
    # the runs' folders are this and -1, -2, …; none: runs/<size>/anneal; of a microanneal:
    # runs/<size>/micro-<mix>
    out: str = ""
    # run this one alone: 1, 2, …; 0: all, one after the other
    ingredient: Count = 0
    # start Adam at zero: for weights without moments, as those of a Hugging Face directory
    fresh_optimizer: bool = False


# Published (paper section 4, Tables 9 to 13; official stage-2 yamls; OLMo-core's 32B script): order
# of the data, length, and the tokens at which the rate is 0. The last ten steps of 1B to 13B lie
# beyond that and change nothing. The 1B's release is its third ingredient alone; 7B, 13B and 32B
# are soups. (The paper speaks of four for the 32B; three were released.)
INGREDIENTS: dict[str, list[dict]] = {
    "tiny": [  # ours: a quarter of stage 1 each, with the seeds of the 7B
        dict(seed=42, tokens=600 * 1024, horizon=600 * 1024),
        dict(seed=42_069, tokens=600 * 1024, horizon=600 * 1024),
        dict(seed=666, tokens=600 * 1024, horizon=600 * 1024),
    ],
    "1B": [
        dict(seed=42_069, tokens=23_852 * 512 * 4096, horizon=50_000_000_000),
        dict(seed=666, tokens=23_852 * 512 * 4096, horizon=50_000_000_000),
        dict(seed=42, tokens=23_852 * 512 * 4096, horizon=50_000_000_000),
    ],
    "7B": [
        dict(seed=42, tokens=11_931 * 1024 * 4096, horizon=50_000_000_000),
        dict(seed=42_069, tokens=11_931 * 1024 * 4096, horizon=50_000_000_000),
        dict(seed=666, tokens=11_931 * 1024 * 4096, horizon=50_000_000_000),
    ],
    "13B": [
        dict(seed=1110, tokens=11_931 * 2048 * 4096, horizon=100_000_000_000),
        dict(seed=2662, tokens=11_931 * 2048 * 4096, horizon=100_000_000_000),
        dict(seed=6209, tokens=11_931 * 2048 * 4096, horizon=100_000_000_000),
        dict(seed=2662, tokens=35_773 * 2048 * 4096, horizon=300_000_000_000),
    ],
    "32B": [
        dict(seed=1110, tokens=11_921 * 2048 * 4096, horizon=100_000_000_000),
        dict(seed=2662, tokens=11_921 * 2048 * 4096, horizon=100_000_000_000),
        dict(seed=2662, tokens=35_763 * 2048 * 4096, horizon=300_000_000_000),
    ],
}
# Ours, for 14M to 760M: the seeds of the 7B, each anneal a tenth of stage 1.
LADDER_SEEDS = (42, 42_069, 666)

# Published learning rate at the start; the 7B's is the rate of step 928,000, 646 before its last.
ANNEAL_LR = {"1B": 7.4487e-5, "7B": 6.1499e-5, "13B": 9e-5}

# Billions of tokens per source, by the length of the run (official yamls: what was loaded, not the
# paper's Table 13). A source that has fewer is repeated. In the list of 100B, one part of math
# stood three times, the rest twice.
# fmt: off
DOLMINO: dict[int, dict[str, float]] = {
    50: dict(dclm=24.31, flan=8.54, pes2o=3.01, wiki=3.66, stackexchange=1.26, math=10.69),
    100: dict(dclm=51.47, flan=17.08, pes2o=9.76, wiki=7.32, stackexchange=2.52, math=24.79),
    300: dict(dclm=156.26, flan=34.16, pes2o=58.55, wiki=14.64, stackexchange=5.04, math=42.77),
}
# fmt: on

# Ours. In the published list of 50B: web, papers and wiki 60 %, instructions 17 %, question and
# answer 2 %, math 21 %.
LAPTOP_MIX = ("prose=30", "math=45", "qa=15", "instruct=10")

# ------------------------------------------------------------------------------------------
# Post-training
#
# Published: open-instruct docs/olmo2.md (1B) and scripts/train/olmo2/*.sh (7B, 13B), paper Tables
# 17, 18 and 26, the 32B's card. Where they disagree:
#   7B rates       SFT 2e-5, DPO 1e-6 by the scripts, taken here; 1e-5 and 8e-7 in the archived
#                  launches of December 2024 and in olmo2_1124_7b_sft.yaml
#   SFT mixture    of 7B and 13B: November's by paper and yaml, taken here; the scripts name that of
#                  February (-0225)
#   SFT warm-up    0.03 in every script; a caption says 0.3
#   13B SFT batch  128 by the paper, taken here; 64 in its script
#   32B BOS        none on its card, taken here; its script passes --add_bos
#   7B PPO beta    0.05 in Table 18, taken here; 0.07 in the text
#   32B GRPO beta  0.01 on its card, taken here; 0.1 in the text
# Micro-batches, recomputation and how often to save are ours.

TULU_1124 = ("allenai/tulu-3-sft-olmo-2-mixture",)
TULU_0225 = ("allenai/tulu-3-sft-olmo-2-mixture-0225",)
# Preference pairs from some 20 models, judged by GPT-4o (paper Table 27).
PAIRS_1B = ("allenai/olmo-2-0425-1b-preference-mix",)
PAIRS_7B = ("allenai/olmo-2-1124-7b-preference-mix",)
PAIRS_13B = ("allenai/olmo-2-1124-13b-preference-mix",)
PAIRS_32B = ("allenai/olmo-2-0325-32b-preference-mix",)
RLVR_MIX = ("allenai/RLVR-GSM-MATH-IF-Mixed-Constraints",)
RLVR_GSM = ("allenai/RLVR-GSM",)
RLVR_MATH = ("allenai/RLVR-MATH",)
LAPTOP_QUIZ = ("embedded/sums", "embedded/constraints")

# The formatter would give each value a line of its own.
# fmt: off
POSTTRAIN: dict[str, dict[str, dict]] = {
    "sft": {
        "tiny": dict(  # ours
            data=("embedded/instruct",), val=("embedded/instruct",), quiz=LAPTOP_QUIZ,
            lr=2e-3, warmup=0.03, batch=16, epochs=1, max_length=128, replay=0.1,
            response_length=48, eval_every=400, log_every=100),
        "1B": dict(lr=3e-5, batch=128, data=TULU_0225, warmup=0.03, drop=True),
        "7B": dict(
            lr=2e-5, batch=128, data=TULU_1124, warmup=0.03, drop=True, recompute=1.0),
        "13B": dict(
            lr=5e-6, batch=128, data=TULU_1124, warmup=0.03, drop=True, recompute=1.0),
        "32B": dict(
            lr=4e-6, batch=256, data=TULU_0225, warmup=0.03, drop=True, bos=False, recompute=1.0),
    },
    "prefs": {
        "tiny": dict(  # ours
            data=("embedded/constraints",), val=("embedded/constraints",), quiz=LAPTOP_QUIZ,
            prompts=256, prompt_length=80, response_length=48, steps=4, questions=400),
        "1B": dict(data=RLVR_MIX),
        "7B": dict(data=RLVR_MIX),
        "13B": dict(data=RLVR_MIX),
        "32B": dict(data=RLVR_MIX),
    },
    "rm": {
        "tiny": dict(  # ours
            lr=5e-4, batch=32, prompt_length=80, questions=400),
        "7B": dict(lr=3e-6, eps=1e-5, data=PAIRS_7B, drop=True, recompute=1.0),
        "13B": dict(lr=3e-6, eps=1e-5, data=PAIRS_13B, drop=True, recompute=1.0),
    },
    "dpo": {
        "tiny": dict(  # ours
            lr=2e-4, warmup=0.1, batch=32, max_length=128, quiz=LAPTOP_QUIZ,
            response_length=48, questions=400),
        "1B": dict(lr=2.5e-6, seed=111, data=PAIRS_1B, warmup=0.1, drop=True),
        "7B": dict(
            lr=1e-6, data=PAIRS_7B, warmup=0.1, drop=True, recompute=1.0),
        "13B": dict(
            lr=8e-7, seed=8, data=PAIRS_13B, warmup=0.1, drop=True, recompute=1.0),
        "32B": dict(
            lr=2e-6, data=PAIRS_32B, warmup=0.1, drop=True, recompute=1.0),
    },
    "ppo": {
        "tiny": dict(  # ours
            data=LAPTOP_QUIZ, quiz=LAPTOP_QUIZ, prompts=128, prompt_length=80, response_length=48,
            steps=30, lr=3e-4, value_lr=2e-3, eval_every=20),
        "7B": dict(  # 100,000 episodes
            lr=4e-7, prompts=224, steps=446, data=RLVR_MIX, save_every=20, keep=0, recompute=1.0),
        "13B": dict(  # 200,000 episodes
            lr=3e-7, prompts=248, steps=806, beta=0.1, data=RLVR_MIX, save_every=20, keep=0,
            recompute=1.0),
    },
    "grpo": {
        "tiny": dict(  # ours
            data=LAPTOP_QUIZ, quiz=LAPTOP_QUIZ, prompts=16, samples=8, prompt_length=80,
            response_length=48, steps=40, lr=3e-4, eval_every=20),
        # 2,000,000 episodes. Its micro-batches were of one answer, so that a token counts by the
        # length of its answer.
        "1B": dict(
            lr=5e-7, schedule="constant", prompts=48, steps=2604, data=RLVR_MIX,
            denominator="sequence", save_every=20, keep=0),
        "32B": dict(  # of 10M episodes planned, step 320 was released
            lr=5e-7, schedule="constant", prompts=112, steps=320, data=RLVR_MIX,
            save_every=20, keep=0, recompute=1.0),
    },
}
# fmt: on

# Rounds after the first: what they change. The 13B's began at step 480 of the first and, as it
# seems, at step 180 of the second, each with a new value model.
LATER_ROUNDS: dict[tuple[str, str], list[dict]] = {
    ("grpo", "1B"): [dict(data=RLVR_MATH)],
    ("ppo", "13B"): [dict(data=RLVR_GSM, beta=0.03), dict(data=RLVR_MATH, beta=0.1)],
}
