"""Checkpoint soup: the average of the weights of several anneals, and why that works.

    python soup.py                                        # laptop: runs/tiny/anneal-* -> runs/tiny/soup; half a minute
    python soup.py A B C --out runs/mine/soup             # runs, checkpoints of runs, Hugging Face directories
    python soup.py A B --weights 3 1                      # not in equal parts
    python soup.py --greedy                               # only those that lower the held-out loss
    python soup.py runs/tiny/soup/soup.json --out again   # the same soup once more, from the record of the first

What this stage teaches: runs that begin at the same weights and see the same data in another order end in one basin. On the
straight lines between them the loss does not rise, it falls, and in their middle it is lower than at any of them (paper
section 4.5, Table 14). The figure shows these lines.

The average is plain: sum in fp32, divide, convert to the first ingredient's dtype (as OLMo-core's merge_hf_checkpoints.py). It is made a
tensor at a time, so that its size does not matter; scoring needs one model in memory, and the figure three (--points 0: no figure).
The released 7B, 13B and 32B are such soups, of their anneals in equal parts; the 1B is its third anneal alone.
"""
import contextlib
import hashlib
import platform
import shutil
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from infra.files import UserError, make_folder, read_json, replace_folder, write_json
from data import SOURCES, Tokenizer, embedded_corpus, get_tokenizer, mix_sources, token_files
from eval import accuracy, bits_per_byte_by_source, by_source, print_table
from model import SIZES, OLMo2, StoredWeights, best_device, check_tensors, find_weights, keep_freed_memory, read_config, run_cli, write_weights


@dataclass(frozen=True)
class Config:
    ingredients: tyro.conf.Positional[tuple[str, ...]] = ()  # runs, checkpoints, Hugging Face directories, or a soup.json; none: runs/<size>/anneal-*
    size: str = "tiny"  # of the default ingredients and folder
    weights: tuple[float, ...] = ()  # one per ingredient, relative to their sum; none: equal parts
    greedy: bool = False  # take the best ingredient, then each next one that lowers the held-out bits per byte
    out: str = ""  # the soup's folder; none: runs/<size>/soup
    data: tuple[str, ...] = ()  # held-out token folders or files; none: those of the ingredients, or the embedded ones
    score: bool = True  # measure the ingredients and the soup
    points: int = 11  # per line of the figure; 0: no figure
    val_tokens: int = 131_072  # held-out tokens per source
    questions: int = 500  # held-out questions per task, where the held-out text is embedded; 0: none
    device: str = "auto"  # auto, cpu, mps, cuda: for the scores


def average(paths: list[str], weights: list[float], out: Path) -> list[str]:
    """Write the weighted mean of the models at `paths` to `out`, a Hugging Face directory; returns a sha256 of each one's values.

    In memory are the sum of one tensor, in fp32, and its mean; what is read stays in the files, which are mapped. Raises UserError
    for ingredients of other shapes, settings or tokenizers, and for one that stands there twice.
    """
    folders, configs, tokenizers = [], [], []
    for path in paths:
        folder, files = find_weights(path)
        if files in folders:
            raise UserError(f"{path} stands there twice, the other time as {paths[folders.index(files)]}: give it more weight with --weights")
        folders.append(files)
        configs.append(read_config(folder))
        tokenizers.append(get_tokenizer(path))
    stored, config = [StoredWeights(files) for files in folders], configs[0]
    with torch.device("meta"):
        shapes = {name: p.detach().to(stored[0].dtype) for name, p in OLMo2(config).named_parameters()}
    for path, files, other, tokenizer in zip(paths, folders, configs, tokenizers):
        try:
            check_tensors(files, shapes)
        except UserError as error:
            raise UserError(str(error) if path == paths[0] else f"{path} does not go with {paths[0]}: {error}") from None
        if different := [f"{key} {value}, not {getattr(config, key)}" for key, value in vars(other).items() if value != getattr(config, key)]:
            raise UserError(f"{path} does not go with {paths[0]}: it has {'; '.join(different)}")
        if tokenizer.fingerprint != tokenizers[0].fingerprint:
            raise UserError(f"{path} does not go with {paths[0]}: it has another tokenizer, {tokenizer.name!r}")
    digests = [hashlib.sha256() for _ in paths]
    keep_freed_memory(False)  # or freed tensors would stand beside living ones

    def mean(name: str) -> Tensor:
        total = torch.zeros(shapes[name].shape)
        for ingredient, weight, digest in zip(stored, weights, digests):
            for where, part in ingredient.pieces(name):
                total[where].add_(part, alpha=weight)
                digest.update(part.view(torch.uint8).numpy())
        bar.update()
        return total.div_(sum(weights)).to(shapes[name].dtype)

    with tqdm(total=len(shapes), desc="average", unit=" tensors", disable=None, leave=False) as bar:
        write_weights(out, config, shapes, read=mean)
    keep_freed_memory(True)
    tokenizers[0].save(out)
    hashes = [digest.hexdigest() for digest in digests]
    for i, j in combinations(range(len(paths)), 2):
        if hashes[i] == hashes[j]:
            raise UserError(f"{paths[j]} holds the very weights of {paths[i]}: give one of them more weight with --weights")
    return hashes


def held_out(config: Config, paths: list[str], tokenizer: Tokenizer) -> tuple[dict[str, list[Path]], dict[str, float]]:
    """(held-out files by source, each source's share): of --data, else what the first ingredient's run was evaluated on, else the
    embedded ones of stage 2.

    ({}, {}) where there is nothing: the weights of others, without --data.
    """
    settings = run_settings(paths[0])
    if config.data or settings.get("val"):
        sources = by_source(token_files(config.data or settings["val"], "val"))
    elif settings.get("mix"):
        mix = {name: entry for name, entry in mix_sources(settings["mix"], "val", tokenizer).items() if entry[1]}
        total = sum(share for share, _ in mix.values())
        return {name: files for name, (_, files) in mix.items()}, {name: share / total for name, (share, _) in mix.items()}
    elif settings.get("data"):
        sources = by_source(token_files([path for path in settings["data"] if Path(path, "val").is_dir()], "val"))
    else:
        sources = by_source(token_files([embedded_corpus(tokenizer, stage=1 if settings else 2)], "val")) if tokenizer.name == "laptop" else {}
        sources.pop("sums", None)  # those of math
    return sources, dict.fromkeys(sources, 1 / max(1, len(sources)))


def run_settings(path: str) -> dict:
    """The settings of the run that a path is, or is a checkpoint of; {} where there is none."""
    for folder in (Path(path), Path(path).parent):
        if (folder / "run.json").exists():
            return {name: entry["value"] for name, entry in read_json(folder / "run.json")["config"].items()}
    return {}


def check_finished(path: str) -> None:
    """Refuse a run that has not come to its end, where the learning rate is 0; a checkpoint of it can still be named."""
    if not (Path(path) / "run.json").exists():
        return
    states = {read_json(state)["tokens"]: state.parent for state in Path(path).glob("step*-tokens*/state.json")}
    newest, asked = max(states, default=0), run_settings(path).get("tokens", 0)
    if (states or not (Path(path) / "hf").is_dir()) and newest < asked:
        raise UserError(f"{path} is not finished, it stands at {newest:,} of {asked:,} tokens: let it come to its end"
                        + (f", or name that checkpoint, {states[newest]}" if states else ""))


class Scores:
    """Held-out scores of models, on one set of data."""

    def __init__(self, config: Config, paths: list[str]):
        self.config, self.tokenizer = config, get_tokenizer(paths[0])
        self.sources, self.shares = held_out(config, paths, self.tokenizer) if config.score else ({}, {})
        self.seq_len = min(run_settings(paths[0]).get("seq_len", 4096), read_config(find_weights(paths[0])[0]).context)
        self.device = best_device(config.device)

    def bpb(self, model: OLMo2) -> dict[str, float]:
        """{source: bits per byte}, with `mix`."""
        return bits_per_byte_by_source(model, self.sources, self.seq_len, self.tokenizer, self.config.val_tokens, self.shares)

    def __call__(self, path: str | Path) -> dict[str, float]:
        """The columns of a model's row; {} without held-out data."""
        if not self.sources:
            return {}
        model = OLMo2.load(path, device=self.device)
        bpb = {f"{source} bpb": value for source, value in self.bpb(model).items()}
        tasks = ("math", "qa") if self.config.questions and self.sources.keys() & SOURCES.keys() else ()
        return bpb | {f"{task} %": 100 * accuracy(model, self.tokenizer, task, self.config.questions) for task in tasks}

    def line(self, one: str, other: str, ends: tuple[float, float]) -> list[float]:
        """Bits per byte of the mix at config.points places, evenly spaced, on the straight line between two models with these `ends`."""
        a, b, model = (OLMo2.load(path, device=self.device) for path in (one, other, one))
        inner = []
        for i in range(1, self.config.points - 1):
            with torch.no_grad():
                for p, p_a, p_b in zip(model.parameters(), a.parameters(), b.parameters()):
                    p.copy_(p_a.lerp(p_b, i / (self.config.points - 1)))
            inner.append(self.bpb(model)["mix"])
        return [ends[0], *inner, ends[1]]


def plot(lines: dict[tuple[str, str], list[float]], soup: float, equal: bool, path: Path) -> None:
    """Draw the lines between ingredients, and the soup, into a PNG file."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    names = {path: Path(path).name for pair in lines for path in pair}
    if len(set(names.values())) < len(names):
        names = {path: path for path in names}
    for (one, other), losses in lines.items():
        axis.plot([i / (len(losses) - 1) for i in range(len(losses))], losses, marker=".", label=f"{names[one]} to {names[other]}")
    axis.axhline(soup, color="black", linewidth=0.8, linestyle=":")
    axis.plot([0.5], [soup], "*", color="black", markersize=13, label=f"soup ({'equal' if equal else 'weighted'} parts)", zorder=5)
    axis.set(xlabel="place on the straight line between two ingredients", ylabel="held-out bits per byte of the mix", xlim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def choose(part: dict[str, float], rows: dict[str, dict[str, float]], scores: Scores, aside: Path) -> list[str]:
    """Greedy soup (Wortsman et al. 2022): from the best ingredient down, one stays if with it the soup has fewer bits per byte."""
    order = sorted(part, key=lambda path: rows[path]["mix bpb"])
    chosen, bpb = order[:1], rows[order[0]]["mix bpb"]
    for path in order[1:]:
        average([*chosen, path], [part[p] for p in [*chosen, path]], aside)
        if (now := scores(aside)["mix bpb"]) < bpb:
            chosen, bpb = [*chosen, path], now
    return chosen


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    paths, weights, recorded = list(config.ingredients), list(config.weights), None
    if len(paths) == 1 and paths[0].endswith(".json"):
        record = read_json(Path(paths[0]))
        try:
            recorded = {entry["path"]: entry["sha256"] for entry in record["ingredients"]}
            weights = [float(entry["weight"]) for entry in record["ingredients"]]
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{paths[0]} is no soup.json: expected ingredients, each with path, weight and sha256") from None
        paths = list(recorded)
        if config.weights or config.greedy:
            raise UserError("a soup.json has its weights: --weights and --greedy do not go with it")
    if config.size not in SIZES:
        raise UserError(f"unknown size {config.size!r}: sizes are {', '.join(SIZES)}")
    for path in paths:
        if recorded and not Path(path).exists():
            raise UserError(f"{path}, named by {config.ingredients[0]}, is not here: its paths count from the folder where that soup was made")
        find_weights(path)
    paths = paths or [str(path) for path in sorted(Path(f"runs/{config.size}").glob("anneal-*")) if (path / "run.json").exists()]
    weights = weights or [1.0] * len(paths)
    if len(paths) < (1 if recorded else 2):  # a greedy soup may have kept one
        raise UserError(f"a soup needs two ingredients or more, there {f'is {paths[0]}' if paths else 'is none'}: run python anneal.py"
                        f"{'' if config.size == 'tiny' else f' --size {config.size}'} first, or name runs, checkpoints or Hugging Face directories")
    if len(weights) != len(paths) or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"--weights {' '.join(map(str, weights))}: expected {len(paths)} numbers above 0, one per ingredient")
    if problems := [text for text, holds in [(f"--points {config.points} must be 2 or more (0: no figure)", config.points >= 0 and config.points != 1),
                                             (f"--val-tokens {config.val_tokens} must be at least 1", config.val_tokens >= 1),
                                             (f"--questions {config.questions} must be at least 0", config.questions >= 0)] if not holds]:
        raise UserError("; ".join(problems))
    out = Path(config.out or f"runs/{config.size}/soup")
    for path in paths:
        check_finished(path)
        if out.resolve() in [folder.resolve() for folder in (find_weights(path)[0], *find_weights(path)[0].parents)]:
            raise UserError(f"{path} lies in {out}, where the soup is to be: choose another folder with --out")
    ours = {"hf", ".saving-hf", ".old-hf", "soup.json", "soup.png"}
    if out.exists() and (not out.is_dir() or not {path.name for path in out.iterdir()} <= ours):
        raise UserError(f"{out} holds something else than a soup: choose another folder with --out")
    if (out / ".old-hf").exists() and not (out / "hf").exists():  # the machine went down between two renames
        (out / ".old-hf").rename(out / "hf")
    asked = {"ingredients": paths, "weights": weights, "greedy": config.greedy}
    if (out / "soup.json").exists() and (there := read_json(out / "soup.json").get("asked", asked)) != asked:
        raise UserError(f"{out} holds another soup, of {' '.join(there['ingredients'])}: remove it, or choose another folder with --out")
    scores = Scores(config, paths)
    if config.greedy and not scores.sources:
        raise UserError("--greedy judges by held-out text: give some with --data")
    aside = make_folder(out / ".saving-hf")
    try:
        hashes = dict(zip(paths, average(paths, weights, aside)))
        if recorded and (changed := [path for path in paths if hashes[path] != recorded[path]]):
            raise UserError(f"{', '.join(changed)}: other weights than those of {config.ingredients[0]}")
        rows = {path: scores(path) for path in tqdm(paths, desc="scores", unit=" models", disable=None, leave=False)}
        part = dict(zip(paths, weights))
        if config.greedy:
            paths = choose(part, rows, scores, aside)
            average(paths, [part[path] for path in paths], make_folder(aside))
        rows["soup"] = scores(aside)
        # At no time do record and figure stand beside another soup than theirs; what was asked for marks hf/ as ours meanwhile.
        (out / "soup.png").unlink(missing_ok=True)
        write_json(out / "soup.json", {"asked": asked})
        replace_folder(aside, out / "hf")
        write_json(out / "soup.json", {
            "ingredients": [{"path": path, "weight": part[path], "sha256": hashes[path], "scores": rows[path]} for path in paths],
            "scores": rows["soup"], "asked": asked, "versions": {"python": platform.python_version(), "torch": torch.__version__}})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # empty, if nothing has come of it
            out.rmdir()
    equal = len(set(part[path] for path in paths)) == 1
    print(f"{out / 'hf'}: the average of {', '.join(path if equal else f'{part[path]:g} {path}' for path in paths)}")
    if left := [path for path in asked["ingredients"] if path not in paths]:
        print(f"left out, since with them it had more bits per byte: {', '.join(left)}")
    if differ := [name for name in ("init", "mix", "data", "tokens", "lr") if len({str(run_settings(path).get(name)) for path in paths}) > 1]:
        print(f"note: the ingredients differ in {', '.join(differ)}")
    if not scores.sources:
        return print("not scored" + ": no held-out text is known, give some with --data" * config.score)
    print(f"held-out text {'of --data' if config.data else f'as for {paths[0]}' if run_settings(paths[0]) else 'that is embedded'}: "
          + ", ".join(f"{100 * share:.0f} % {source}" for source, share in scores.shares.items()))
    print_table(rows, digits=4)
    if config.points and len(paths) > 1:
        pairs = list(combinations(paths, 2))
        bar = tqdm(pairs, desc="figure", unit=" lines", disable=None, leave=False)
        lines = {pair: scores.line(*pair, tuple(rows[path]["mix bpb"] for path in pair)) for pair in bar}
        plot(lines, rows["soup"]["mix bpb"], equal, out / "soup.png")
        print(f"figure {out / 'soup.png'}")
    print(f"next: python sample.py {out} \"The\"")


if __name__ == "__main__":
    run_cli(main)
