"""Post-training: all stages in order, and the table of what each brings. Or one stage alone.

    python posttrain.py                       # laptop: all stages after runs/tiny/soup; 4 minutes
    python posttrain.py --rl ppo              # as the 7B and 13B were made: with PPO
    python posttrain.py --share 0.05          # a quick look, in runs/tiny-quick
    python posttrain.py sft                   # one stage: sft, prefs, rm, dpo, ppo, grpo
    python posttrain.py dpo --size 7B --help  # the published values of a stage and a size
    python posttrain.py grpo --data rlvr.jsonl --init some/folder --out runs/mine    # your prompts
    torchrun --nproc-per-node 8 posttrain.py sft --size 1B --init allenai/OLMo-2-0425-1B

The stages are in sft.py, dpo.py and rlvr.py. Each that trains is a run as in stage 1,
runs/<size>/sft and so on, with run.json, metrics.jsonl, curves.png, training states and hf/.
Source: paper section 5; open-instruct.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data import embedded_corpus, get_tokenizer, token_files
from dpo import (
    DPOSettings,
    PrefsSettings,
    RewardModelSettings,
    dpo_loss as dpo_loss,  # the objectives: names that people import from here
    make_preference_pairs,
    reward_loss as reward_loss,
    sequence_scores as sequence_scores,
    train_dpo,
    train_reward_model,
)
from eval import print_table, table_row
from infra.checkpoint import find_weights
from infra.distributed import best_device, rank_and_world, run_cli, shutdown_distributed
from infra.files import UserError, did_you_mean, write_json
from infra.hub import is_hub_name
from infra.metrics import Curve, Panel, plot_curves
from infra.run import open_run
from infra.settings import (
    Count,
    Positive,
    Rate,
    Threads,
    check_ranges,
    flag_value,
    parse_flags,
    silence_other_ranks,
    where_from,
)
from infra.sharding import check_divides, shard_size
from likelihood import bits_per_byte_by_source, by_source
from model import OLMo2
from pretrain import read_size
from recipes import LAPTOP_QUIZ, LATER_ROUNDS, POSTTRAIN
from rlvr import (
    GRPOSettings,
    PPOSettings,
    RolloutSettings,
    gae as gae,
    grpo_advantages as grpo_advantages,
    grpo_loss as grpo_loss,
    ppo_losses as ppo_losses,
    train_grpo,
    train_ppo,
)
from sft import SFTSettings, StageSettings, score_completions, train_sft
from tasks.conversations import Source, read_prompts

STAGES: dict[str, type[StageSettings]] = {
    "sft": SFTSettings,
    "prefs": PrefsSettings,
    "rm": RewardModelSettings,
    "dpo": DPOSettings,
    "ppo": PPOSettings,
    "grpo": GRPOSettings,
}

TRAINERS: dict[str, Callable] = {
    "sft": train_sft,
    "prefs": make_preference_pairs,
    "rm": train_reward_model,
    "dpo": train_dpo,
    "ppo": train_ppo,
    "grpo": train_grpo,
}

# What a stage starts from, in runs/<size>: the first that is there. The released 1B was made of its
# third ingredient alone.
PREVIOUS_STAGE = {
    "sft": ("soup", "anneal-3", "anneal-1", "pretrain"),
    "prefs": ("sft",),
    "rm": ("sft",),
    "dpo": ("sft",),
    "ppo": ("dpo",),
    "grpo": ("dpo",),
}

# ------------------------------------------------------------------------------------------
# The settings of a stage


def resolve_settings(
    stage: str, arguments: list[str], folder: Path | None = None, **more
) -> tuple[StageSettings, dict[str, str]]:
    """(a stage's settings, where each came from).

    class < recipe of --size < the runs before, in `folder` < `more` < flags. A size without a
    recipe of its own has another one's rates, and no data. Raises UserError.
    """
    size = read_size(arguments)
    folder = folder or Path("runs", size)
    like, recipe = recipe_of(stage, size)
    number = more.get("round") or read_round(arguments)
    recipe = recipe | later_round(stage, size, number)
    chain = continue_from(stage, size, folder, number, recipe.get("data", ()))
    default = STAGES[stage](**{**recipe, **chain, **more, "size": size})
    c = parse_flags(default, arguments, __doc__, prog=f"posttrain.py {stage}")
    if c.data != default.data:
        c = without_held_out(c, default)
    return c, where_from(c, default, {"runs before": chain, f"recipe {like}": recipe})


def recipe_of(stage: str, size: str) -> tuple[str, dict]:
    """(the size whose recipe it is, the recipe)."""
    recipes = POSTTRAIN[stage]
    if size in recipes:
        return size, recipes[size]
    like = "1B" if "1B" in recipes else "7B"
    return like, recipes[like] | {"data": ()}


def read_round(arguments: list[str]) -> int:
    """The --round of a command line, known before the rest is read, as --size is."""
    text = flag_value(arguments, "round", "1")
    return int(text) if text.isdigit() else 1


def later_round(stage: str, size: str, number: int) -> dict:
    """What a round changes in the recipe. Raises UserError for one that there is not."""
    rounds = [{}, *LATER_ROUNDS.get((stage, size), [])]
    if not 1 <= number <= len(rounds):
        raise UserError(f"--round {number}: {size} has {len(rounds)} of {stage}")
    return rounds[number - 1]


def continue_from(stage: str, size: str, folder: Path, number: int, data: tuple[str, ...]) -> dict:
    """The settings that name runs: where a stage starts, what was made for it, where it goes."""
    has_rounds = issubclass(STAGES[stage], RolloutSettings)
    before = (f"{stage}-{number - 1}",) if number > 1 else PREVIOUS_STAGE[stage]
    chain = {
        "out": str(folder / (f"{stage}-{number}" if has_rounds else stage)),
        "init": str(first_that_exists(folder, before)),
    }
    if stage == "ppo":
        chain["value"] = str(folder / "rm")
    train, val = folder / "prefs/train.jsonl", folder / "prefs/val.jsonl"
    if stage in ("rm", "dpo") and (size == "tiny" or train.exists()):
        chain["data"] = (*data, str(train))  # one's own pairs, beside the released ones
        chain["val"] = (str(val),) if size == "tiny" or val.exists() else ()
    return chain


def first_that_exists(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of some runs that is there, or the first."""
    there = [name for name in names if (folder / name).exists()]
    return folder / (there or names)[0]


def without_held_out(c: StageSettings, default: StageSettings) -> StageSettings:
    """Settings without the laptop's held-out rows and replay, where no flag has named them.

    They were held out of the default data, and say nothing of other data.
    """
    changes = {}
    for name, nothing in (("val", ()), ("quiz", ()), ("replay", 0.0)):
        if hasattr(c, name) and getattr(c, name) == getattr(default, name):
            changes[name] = nothing
    return replace(c, **changes)


def check(c: StageSettings) -> None:
    """Raise UserError for settings out of range, or that do not go together, before all work."""
    check_ranges(c)
    if not c.data:
        raise UserError(
            f"--data: {c.size} has no data of its own for this stage, name some: files, or data "
            "sets on the Hub"
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    shard_size(c.shard, world)
    if hasattr(c, "batch"):
        check_divides("--batch", c.batch, world, f"{world} processes")
    if c.rollouts_folder and not c.rollouts:
        raise UserError("--rollouts-folder is for servers that sample: name them with --rollouts")
    if isinstance(c, RolloutSettings):
        # A mini-batch holds whole groups. The processes need not divide its rows.
        check_divides("--prompts", c.prompts, c.minibatches, f"--minibatches {c.minibatches}")
    for flag in ("init", "value", "judge"):
        check_exists(flag, getattr(c, flag, ""), c.size)
    for source in (*c.data, *c.val):
        if Path(source).parent.name == "prefs" and not Path(source).exists():
            raise UserError(
                f"{source} does not exist: make preference pairs first (python posttrain.py prefs"
                f"{size_flag(c.size)}), or name your own with --data"
            )


def check_exists(flag: str, path: str, size: str) -> None:
    """Raise UserError for a model that is not there, with the command that makes it."""
    if not path or Path(path).exists() or is_hub_name(path):
        return
    stage = Path(path).name.split("-")[0]
    script = f"posttrain.py {stage}" if stage in STAGES else f"{stage}.py"
    first = ""
    if Path(path).parent == Path("runs", size):
        first = f"make it first (python {script}{size_flag(size)}), or "
    raise UserError(
        f"{path} does not exist: {first}name a run, a checkpoint, a Hugging Face directory or a "
        f"model on the Hub with --{flag}"
    )


def size_flag(size: str) -> str:
    """The --size of a command to type; none for the default."""
    return "" if size == "tiny" else f" --size {size}"


# ------------------------------------------------------------------------------------------
# All stages


@dataclass(frozen=True)
class RecipeSettings:
    """All stages, one after the other; for other settings, run them one by one."""

    # tiny, 14M, 30M, 60M, 190M, 370M, 760M, 1B, 7B, 13B, 32B
    size: str = "tiny"
    # auto: as the size was released
    rl: Literal["auto", "grpo", "ppo"] = "auto"
    # the base model; none: the soup in runs/<size>, or what comes nearest
    init: str = ""
    # the folder of the runs; none: runs/<size>
    out: str = ""
    # of every stage
    seed: Count = 1
    # of each stage's steps: 0.05 for a quick look, in runs/<size>-quick
    share: Rate = 1.0
    # held-out questions of each kind in the table at the end, which tiny alone has
    questions: Positive = 500
    # auto, cpu, mps, cuda
    device: str = "auto"
    # CPU threads; 0: torch's choice
    threads: Threads = 0


def stages_of(size: str, rl: str) -> list[tuple[str, int]]:
    """(stage, round) of a size, in order: 1B and 32B were released with GRPO, 7B and 13B with PPO.

    >>> stages_of("7B", "auto")
    [('sft', 1), ('prefs', 1), ('rm', 1), ('dpo', 1), ('ppo', 1)]
    """
    if rl == "auto":
        rl = "ppo" if size in ("7B", "13B") else "grpo"
    stages = ["sft", "prefs", "rm", "dpo"] if rl == "ppo" else ["sft", "prefs", "dpo"]
    n_rounds = 1 + len(LATER_ROUNDS.get((rl, size), []))
    return [(stage, 1) for stage in stages] + [(rl, k) for k in range(1, n_rounds + 1)]


def run_recipe(arguments: list[str]) -> None:
    """Run all stages of a size; for tiny, print and draw what each brings."""
    size = read_size(arguments)
    c = parse_flags(RecipeSettings(size=size), arguments, __doc__)
    check_ranges(c)
    quick = "" if c.share == 1 else "-quick"
    folder = Path(c.out or f"runs/{size}{quick}")
    base = c.init or str(first_that_exists(Path("runs", size), PREVIOUS_STAGE["sft"]))
    models = [base]
    with silence_other_ranks():
        for stage, number in stages_of(size, c.rl):
            more = settings_of_recipe(c, stage, number, base)
            settings, origin = resolve_settings(stage, ["--size", size], folder, **more)
            check(settings)
            print(f"---- {stage}{f' {number}' if number > 1 else ''}", flush=True)
            run_stage(stage, settings, origin)
            if stage not in ("prefs", "rm"):
                models.append(settings.out)
        if size == "tiny":
            report(c, folder, models)
        else:
            print(f"next: python eval.py {' '.join(models)} --tasks gsm8k ifeval")


def settings_of_recipe(c: RecipeSettings, stage: str, number: int, base: str) -> dict:
    """What the recipe's own flags set in a stage."""
    more = {"seed": c.seed, "device": c.device, "threads": c.threads}
    if stage == "sft":
        more["init"] = base
    if issubclass(STAGES[stage], RolloutSettings):
        more["round"] = number
    if stage != "prefs":
        more["share"] = c.share
        if c.questions < StageSettings.questions:
            more["questions"] = c.questions
    return more


def run_stage(stage: str, c: StageSettings, origin: dict[str, str]) -> None:
    """Run one stage from its beginning, or from where it was stopped, to its end."""
    with open_run(stage, c, origin) as run:
        try:
            TRAINERS[stage](c, run)
        except UserError as error:
            # Servers may have gone, and all ranks know it; what is trained is whole.
            if c.rollouts and getattr(error, "everywhere", False):
                run.save_what_is_done()
            raise


# ------------------------------------------------------------------------------------------
# What each stage brings


def report(c: RecipeSettings, folder: Path, models: list[str]) -> None:
    """Print and draw what each stage brings, on text and questions that no stage trains on.

    models: the base, then what each stage has made. Writes pipeline.json and pipeline.png.
    """
    pretrained = Path(models[0]).parent / "pretrain"
    if (pretrained / "hf").exists() and Path(models[0]) != pretrained:
        models = [str(pretrained), *models]
    # Of the other --rl, if it has been run, too.
    others = [str(run) for run in (*folder.glob("grpo-*"), *folder.glob("ppo-*"))]
    models = models + [run for run in others if Path(run, "hf").exists() and run not in models]
    table = {path: measure(path, c) for path in models}
    if rank_and_world()[0] == 0:
        print_table(table)
        write_json(folder / "pipeline.json", table)
        plot_pipeline(folder / "pipeline.png", table)
        print(f"drawn in {folder}/pipeline.png; talk to it: python sample.py {models[-1]}")


def measure(path: str, c: RecipeSettings) -> dict[str, float]:
    """A model's row: held-out bits per byte, and scores of greedy answers."""
    model = OLMo2.load(path, device=best_device(c.device))
    tokenizer = get_tokenizer(find_weights(path)[0])
    held_out = by_source(token_files([embedded_corpus(tokenizer)], "val"))
    sources = {name: held_out[name] for name in ("docs", "code")}
    bpb = bits_per_byte_by_source(model, sources, min(256, model.config.context), tokenizer)
    questions = read_prompts(Source(LAPTOP_QUIZ, c.seed, held_out=c.questions), tokenizer)
    return table_row(bpb, {}) | score_completions(model, tokenizer, questions, max_new_tokens=48)


def plot_pipeline(path: Path, table: dict[str, dict[str, float]]) -> None:
    """Draw each column of the table, stage by stage."""
    stages = [Path(model).name for model in table]
    panels = []
    for column in next(iter(table.values())):
        values = [row[column] for row in table.values()]
        panels.append(Panel(column, [Curve(stages, values, style={"marker": "o"})]))
    plot_curves(path, panels)


# ------------------------------------------------------------------------------------------
# The command line


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-"):
        run_recipe(arguments)
    else:
        stage = arguments[0]
        if stage not in STAGES:
            raise UserError(
                f"no stage {stage!r}{did_you_mean(stage.lower(), STAGES)}: the stages are "
                f"{', '.join(STAGES)}; without one, all run in order"
            )
        c, origin = resolve_settings(stage, arguments[1:])
        check(c)
        with silence_other_ranks():
            run_stage(stage, c, origin)
    shutdown_distributed()


if __name__ == "__main__":
    run_cli(main)
