"""Stage 2, mid-training: the same loop on better data, while the learning rate falls in a straight line to zero.

    python anneal.py                          # laptop: three orders of the embedded mix, from runs/tiny/pretrain; 2 minutes
    python anneal.py --ingredient 2                                # one of them: a cluster runs them side by side
    torchrun --nproc-per-node 8 anneal.py --size 7B --ingredient 1 # from runs/7B/pretrain, on tokens/dolmino/*
    python anneal.py --mix math=1 docs=9                           # a microanneal: what does 10 % math do?
    python anneal.py --study                                       # the paper's little study of such questions; 2 minutes

What this stage teaches: a model learns most about data that it sees while the rate falls (paper section 4). It goes on with
the weights and with Adam's moments, without warm-up, at the rate where stage 1 stopped. Steps, tokens and the order of the
data start again. All else is stage 1's; the table that each run prints is made by comparing the two settings.

The ingredients of a soup (soup.py) see the same data in another order: the seed is all that differs. Runs are folders as in
stage 1, runs/<size>/anneal-1 and on. A microanneal is a short one that judges a source of data: runs/<size>/micro-<mix>.
"""
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from infra.files import UserError, read_json
import pretrain
from eval import print_table
from model import run_cli
from pretrain import Count, leave_ranks, list_states, lr_at, one_voice, parse, read_metrics, run_training, size_of


@dataclass(frozen=True)
class Config(pretrain.Config):
    # ---- stage 2's own; the values of all others are stage 1's, from its run.json, but for what `recipe` changes
    init: str = ""  # stage 1: a run (its newest state), a training state, or a Hugging Face directory; none: runs/<size>/pretrain
    moments: tyro.conf.Suppress[bool] = True
    out: str = ""  # the runs' folders are this and -1, -2, …; none: runs/<size>/anneal; a microanneal's: runs/<size>/micro-<mix>
    ingredient: Count = 0  # run this one alone: 1, 2, …; 0: all, one after the other
    fresh_optimizer: bool = False  # start Adam at zero: for weights that have no moments, as those of a Hugging Face directory
    study: bool = False  # microanneals of one small source of math: 35 % of the tokens, 10 %, and 50 % by repeating it


# Published (paper section 4, Tables 9 to 13; official stage-2 yamls; OLMo-core's 32B script). Each ingredient: data order and
# length. The rate is 0 at `horizon`; the last ten of 1B's to 13B's steps lie beyond it and change nothing. The 1B's release
# is its third ingredient alone; 7B, 13B and 32B are soups. (The paper speaks of four for the 32B; three were released.)
def ingredients(batch: int, *runs: tuple[int, int, int]) -> list[dict]:
    return [dict(seed=seed, tokens=steps * batch * 4096, horizon=billions * 10**9) for seed, steps, billions in runs]


INGREDIENTS = {
    "1B": ingredients(512, (42_069, 23_852, 50), (666, 23_852, 50), (42, 23_852, 50)),
    "7B": ingredients(1024, (42, 11_931, 50), (42_069, 11_931, 50), (666, 11_931, 50)),
    "13B": ingredients(2048, (1110, 11_931, 100), (2662, 11_931, 100), (6209, 11_931, 100), (2662, 35_773, 300)),
    "32B": ingredients(2048, (1110, 11_921, 100), (2662, 11_921, 100), (2662, 35_763, 300)),
    "tiny": [dict(seed=seed, tokens=600 * 1024) for seed in (42, 42_069, 666)],  # ours: a quarter of stage 1 each, the seeds of the 7B
}
LR = {"1B": 7.4487e-5, "7B": 6.1499e-5, "13B": 9e-5}  # published start; the 7B's is the rate of step 928,000, 646 before its last

# Billions of tokens per source, as listed for the runs of 50B, 100B and 300B (official yamls: what was loaded, not the
# paper's Table 13). A source that has fewer is repeated. In the list of 100B, one part of math stood three times, the rest twice.
DOLMINO = {50: dict(dclm=24.31, flan=8.54, pes2o=3.01, wiki=3.66, stackexchange=1.26, math=10.69),
           100: dict(dclm=51.47, flan=17.08, pes2o=9.76, wiki=7.32, stackexchange=2.52, math=24.79),
           300: dict(dclm=156.26, flan=34.16, pes2o=58.55, wiki=14.64, stackexchange=5.04, math=42.77)}
# Ours. In the published list of 50B: web, papers and wiki 60 %, instructions 17 %, question and answer 2 %, math 21 %.
LAPTOP_MIX = ("prose=30", "math=45", "qa=15", "instruct=10")

# The paper's little study (Table 12) at our scale: one small source of math, of 90,112 tokens, and more or less web around it.
# Seen once, it is 35 % or 10 % of the tokens; seen twice, half of them.
STUDY = {"math-35-65": (("sums=35", "docs=65"), 90_112 * 100 // 35), "math-10-90": (("sums=10", "docs=90"), 90_112 * 10),
         "math-twice": (("sums=50", "docs=50"), 90_112 * 4)}
LADDER = (42, 42_069, 666)  # seeds, ours as well: each anneal a tenth of stage 1


def recipe(size: str, k: int) -> dict:
    """What ingredient k (from 1) of a size changes in stage 1's settings, but for the learning rate. Raises UserError."""
    runs = INGREDIENTS.get(size) or [dict(seed=seed, tokens=pretrain.RECIPES[size]["tokens"] // 10) for seed in LADDER]
    if not 1 <= k <= len(runs):
        raise UserError(f"--ingredient {k}: {size} has 1 to {len(runs)}")
    run = {"horizon": runs[k - 1]["tokens"], **runs[k - 1]}
    mix = LAPTOP_MIX
    if size in ("1B", "7B", "13B", "32B"):
        mix = tuple(f"tokens/dolmino/{source}={weight}" for source, weight in DOLMINO[run["horizon"] // 10**9].items())
    return dict(run, mix=mix, data=(), val=(), moments=True, warmup=0, schedule="linear", lr_floor=0.0)


@dataclass(frozen=True)
class Stage1:
    """Where an anneal starts: `settings`, and a training state or a Hugging Face directory at `path`."""
    settings: pretrain.Config
    path: Path
    tokens: int  # seen so far
    has_moments: bool

    @property
    def accuracy(self) -> dict[str, float]:
        """Its answers to held-out questions at this state, if it was asked."""
        rows = read_metrics(self.path.parent)
        return next((row["accuracy"] for row in rows if row["event"] == "questions" and row["tokens"] == self.tokens), {})

    @property
    def lr(self) -> float:
        """The rate of its last step."""
        return lr_at(self.tokens, self.settings)


def find_stage1(c: Config) -> Stage1:
    """Stage 1 of --init: a run (its newest state), a training state, or a Hugging Face directory. Raises UserError.

    Its settings are those in the run's run.json; where there is none, the recipe of --size.
    """
    path = Path(c.init or f"runs/{c.size}/pretrain")
    if not path.exists():
        raise UserError(f"{path} does not exist: run stage 1 first (python pretrain.py{'' if c.size == 'tiny' else f' --size {c.size}'}), or name a run, a training state or a "
                        "Hugging Face directory with --init")
    if (path / "run.json").exists():
        states = list_states(path)
        if not states:
            raise UserError(f"{path} has no training state yet: let stage 1 get to one, or name another run with --init")
        path = states[0]
    settings = pretrain.Config(size=c.size, **pretrain.RECIPES[c.size])
    if (path.parent / "run.json").exists():
        stored = {name: entry["value"] for name, entry in read_json(path.parent / "run.json")["config"].items()}
        names = {f.name for f in dataclasses.fields(pretrain.Config)}
        settings = pretrain.Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items() if name in names})
    has_moments = (path / "state.json").exists()
    state = path if has_moments else next(iter(list_states(path.parent)), None)  # hf/ is of the run's newest state
    tokens = read_json(state / "state.json")["tokens"] if state else settings.tokens
    return Stage1(settings, path, tokens, has_moments)


def flags_in(arguments: list[str]) -> set[str]:
    """The settings that a command line names."""
    return {word[2:].split("=")[0].replace("-", "_").removeprefix("no_") for word in arguments if word.startswith("--")}


def settings_of(arguments: list[str], stage1: Stage1, k: int, **more) -> tuple[Config, dict[str, str]]:
    """(settings of ingredient k, where each came from): stage 1's < the recipe < `more` < flags. Raises UserError."""
    s = stage1.settings
    changes = {**recipe(s.size, k), "init": str(stage1.path), "out": f"runs/{s.size}/anneal", "ingredient": k, "lr": start_lr(stage1), **more}
    default = Config(**{**vars(s), **changes})
    c = parse(default, arguments, __doc__)
    flags = flags_in(arguments)
    if "data" in flags and "mix" not in flags:
        c = dataclasses.replace(c, mix=())
    if "tokens" in flags and "horizon" not in flags:
        c = dataclasses.replace(c, horizon=c.tokens)
    if not c.lr:
        raise UserError(f"{stage1.path} ended at a learning rate of 0: give one to start from, with --lr")
    c = dataclasses.replace(c, init=str(stage1.path), moments=c.moments and not c.fresh_optimizer, ingredient=k, study=False,
                            out=c.out if "out" in more else f"{c.out}-{k}")
    return c, {name: "flag" if name in flags else "anneal" if name in changes else "stage 1" for name in vars(c)}


def start_lr(stage1: Stage1) -> float:
    """Where stage 1 stopped, or the published start where stage 1 was the published one."""
    published = pretrain.Config(size=stage1.settings.size, **pretrain.RECIPES[stage1.settings.size])
    same = all(getattr(stage1.settings, name) == getattr(published, name) for name in ("lr", "warmup", "schedule", "horizon", "lr_floor"))
    return LR.get(published.size, stage1.lr) if same and stage1.tokens == published.tokens else stage1.lr


def differences(stage1: Stage1, c: Config) -> list[tuple[str, str, str]]:
    """(setting, in stage 1, in this anneal) of all that differs."""
    s, lr = stage1.settings, f"{c.lr:.4e}"
    lr += " at the start" if c.lr == stage1.lr else ", the published start" if c.lr == LR.get(c.size) else ", by --lr"
    rows = [("weights", s.init or f"random, --init-seed {s.init_seed}", c.init),
            ("Adam's moments", "carried over" if s.moments else "from zero", "carried over" if c.moments else "from zero, by --fresh-optimizer"),
            ("step, tokens, order", f"stopped at {stage1.tokens:,} tokens", "from zero"),
            ("learning rate", f"peak {s.lr:g}, {stage1.lr:.4e} where it stopped", lr),
            ("data", show(s.mix or s.data) or "embedded corpus", show(c.mix or c.data))]
    told = {"init", "moments", "lr", "data", "mix", "out"}
    return rows + [(name, show(value), show(getattr(c, name))) for name, value in vars(s).items()
                   if name not in told and value != getattr(c, name)]


def show(value) -> str:
    return f"{value:,}" if type(value) is int else " ".join(value) if isinstance(value, tuple) else str(value)


def print_differences(stage1: Stage1, c: Config, before: Config | None) -> None:
    """The table of an anneal against stage 1; of the next ones, against the one before."""
    if before:
        rows = [("setting", Path(before.out).name, Path(c.out).name)]
        rows += [(name, show(value), show(getattr(c, name))) for name, value in vars(before).items()
                 if value != getattr(c, name) and name not in ("out", "ingredient")]
    else:
        rows = [("setting", "stage 1", Path(c.out).name), *differences(stage1, c)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print("\n" + "\n".join(f"{name:{widths[0]}}  {old:{widths[1]}}  {new}".rstrip() for name, old, new in rows) + "\n", flush=True)


def print_scores(stage1: Stage1, runs: list[Path]) -> None:
    """What the runs, and with a microanneal all others that can be compared with it, have come to, beside stage 1."""
    table, micro = {}, runs[0].name.startswith("micro-")
    fixed = lambda run: [read_json(run / "run.json")["config"][name]["value"] for name in ("init", "val_tokens", "questions", "val")]
    for run in [path.parent for path in sorted(runs[0].parent.glob("micro-*/run.json"))] if micro else runs:
        rows = read_metrics(run)
        evals, questions = ([row for row in rows if row["event"] == event] for event in ("eval", "questions"))
        if fixed(run) == fixed(runs[0]) and len(evals) > 1:
            for name, bpb, right in ((f"stage 1, {stage1.path.name}", evals[0]["bpb"], stage1.accuracy),
                                     (f"{run}, {evals[-1]['tokens']:,} tokens" if micro else str(run), evals[-1]["bpb"], questions[-1]["accuracy"] if questions else {})):
                columns = {f"{source} bpb": value for source, value in bpb.items() if not (micro and source == "mix")}  # each has its own
                table[name] = table.get(name, {}) | columns | {f"{task} %": value for task, value in right.items()}
    if table:  # else there was no held-out text
        print()
        print_table(table, digits=4)
    if len(runs) > 1 and not micro:
        print("next: python soup.py" + ("" if runs[0].parent == Path("runs/tiny") else f" {' '.join(map(str, runs))}"))


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    size = size_of(arguments)
    whole = pretrain.Config(size=size, **pretrain.RECIPES[size])
    default = Config(**{**vars(whole), **recipe(size, 1), "lr": LR.get(size, lr_at(whole.tokens, whole))})
    asked = parse(default, arguments, __doc__)  # for --help and to find stage 1; its settings are the defaults then
    given = flags_in(arguments)
    if asked.plan:
        asked = dataclasses.replace(asked, moments=False, mix=(), init="")  # a plan needs no checkpoint and no data
        pretrain.check(asked)
        with one_voice():
            return pretrain.report(asked)
    stage1 = find_stage1(asked)
    if size != stage1.settings.size and "size" in given:
        raise UserError(f"{stage1.path} is of size {stage1.settings.size}, not {size}")
    if not (stage1.has_moments or asked.fresh_optimizer):
        raise UserError(f"{stage1.path} has weights but no optimizer state: start from a training state (runs/…/step<N>-tokens<T>), or "
                        "let Adam start at zero with --fresh-optimizer")
    if asked.study and (clash := given & {"mix", "data", "tokens", "ingredient", "out"}):
        raise UserError(f"--study sets --{', --'.join(sorted(clash))} itself")
    if asked.study and stage1.settings.size != "tiny":
        raise UserError(f"--study has the laptop's lengths: ask a {stage1.settings.size} with --mix and --tokens")
    if "seed" in given and not (asked.ingredient or asked.study or "mix" in given):
        raise UserError("--seed would give every ingredient the same order: name one of them with --ingredient")
    folder = Path("runs") / stage1.settings.size
    if asked.study:
        runs = [settings_of(arguments, stage1, 1, mix=mix, tokens=tokens, horizon=tokens, out=str(folder / f"micro-{name}"))
                for name, (mix, tokens) in STUDY.items()]
    elif "mix" in given and not asked.ingredient:
        name = "-".join(part.split("/")[-1].replace("=", "") for part in asked.mix)
        runs = [settings_of(arguments, stage1, 1, out=asked.out or str(folder / f"micro-{name}"))]
    else:
        every = range(1, len(INGREDIENTS.get(stage1.settings.size, LADDER)) + 1)
        runs = [settings_of(arguments, stage1, k) for k in ([asked.ingredient] if asked.ingredient else every)]
    for c, _ in runs:
        missing = [part for part in c.mix if part.startswith("tokens/dolmino/") and not Path(part.split("=")[0]).exists()]
        if missing:
            raise UserError(f"no {', '.join(missing)}: {c.size} anneals on Dolmino, the Hub's allenai/dolmino-mix-1124; tokenise each source by python "
                            "data.py FOLDER --tokenizer olmo2 --out tokens/dolmino --name dclm (and so on), or give your own --mix or --data")
        pretrain.check(c)
    with one_voice():
        before = None
        for c, origin in runs:
            print_differences(stage1, c, before)
            run_training(c, origin)
            before = c
        print_scores(stage1, [Path(c.out) for c, _ in runs])
    leave_ranks()


if __name__ == "__main__":
    run_cli(main)
