"""Settings as frozen dataclasses: types with a range, and where each value came from.

A script's Config has one field per flag, with its comment above it; tyro makes the command line of
it and the comments become the help. Values come from: the class < the recipe of --size < the flags.
"""

import argparse
import contextlib
import math
import os
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Annotated, ClassVar, Literal

import tyro

from infra.files import UserError

# ------------------------------------------------------------------------------------------
# Types


def parse_count(text: str) -> int:
    """A whole number, written 1000000, 1_000_000, 1e6 or 1M, exactly: a float has only 53 bits.

    >>> parse_count("1.5e3"), parse_count("100M"), parse_count("9007199254740993")
    (1500, 100000000, 9007199254740993)
    """
    try:
        powers = {"K": "e3", "M": "e6", "B": "e9", "T": "e12"}
        digits = text.replace("_", "")
        value = Decimal(digits[:-1] + powers.get(digits[-1:], digits[-1:]))
    except ArithmeticError:
        raise ValueError(f"{text} is not a whole number") from None
    if not (value.is_finite() and abs(value) < 2**63):
        raise ValueError(f"{text} is not a whole number below 2^63")
    if value != int(value):
        raise ValueError(f"{text} is not a whole number")
    return int(value)


WHOLE_NUMBER = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT",
    instance_from_str=lambda words: parse_count(words[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


def parse_bytes(text: str) -> int:
    """A number of bytes, as 500GB, 500G or 1e9.

    >>> parse_bytes("500GB"), parse_bytes("1.5K"), parse_bytes("0")
    (500000000000, 1500, 0)
    """
    try:
        return parse_count(text.upper().removesuffix("B").replace("G", "B"))
    except ValueError:
        raise ValueError(f"{text} is no number of bytes, as 500GB or 20M") from None


BYTES = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="BYTES",
    instance_from_str=lambda words: parse_bytes(words[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class Range:
    """The values that a setting may have, and the words for them. NaN is in no range."""

    words: str
    low: float = -math.inf
    high: float = math.inf

    def holds(self, value) -> bool:
        """Is it a number in the range? What comes from a file may be anything."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high and math.isfinite(value)


JUST_ABOVE_0 = math.nextafter(0, 1)
JUST_BELOW_1 = math.nextafter(1, 0)

Count = Annotated[int, WHOLE_NUMBER, Range("at least 0", 0)]
Bytes = Annotated[int, BYTES, Range("at least 0", 0)]
Positive = Annotated[int, WHOLE_NUMBER, Range("at least 1", 1)]
Threads = Annotated[int, WHOLE_NUMBER, Range("from 0 to 1024", 0, 1024)]
Seconds = Annotated[int, WHOLE_NUMBER, Range("from 1 to 1000000", 1, 10**6)]
TwoOrMore = Annotated[int, WHOLE_NUMBER, Range("at least 2", 2)]
Length = Annotated[int, WHOLE_NUMBER, Range("from 2 to 16777216", 2, 2**24)]
Number = Annotated[float, Range("a number")]
NotNegative = Annotated[float, Range("at least 0", 0)]
AboveZero = Annotated[float, Range("above 0", JUST_ABOVE_0)]
Temperature = Annotated[float, Range("from 0.001 to 1000", 1e-3, 1e3)]
Rate = Annotated[float, Range("above 0, and at most 100", JUST_ABOVE_0, 100)]
Share = Annotated[float, Range("from 0 to 1", 0, 1)]
WeightsDtype = Literal["auto", "float32", "bfloat16"]
PositiveShare = Annotated[float, Range("above 0, and at most 1", JUST_ABOVE_0, 1)]
BelowOne = Annotated[float, Range("from 0 to below 1", 0, JUST_BELOW_1)]


def check_ranges(settings) -> None:
    """Raise UserError that names every value out of its range or its choices."""
    check_values(type(settings), vars(settings))


def check_values(cls: type, values: dict, where: str = "") -> None:
    """`check_ranges` for {setting: value} of a class, as it may stand in someone's run.json.

    where: the file, for the error. Names that the class does not have are left out.
    """
    problems = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, value in values.items():
        words = wanted(hints.get(name, typing.Any), value)
        if words:
            problems.append(f"--{name.replace('_', '-')} {value} must be {words}")
    if problems:
        raise UserError(f"{where}{'; '.join(problems)}")


def wanted(hint, value) -> str:
    """What a setting of this type must be, if the value is something else; else ""."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Range) and not mark.holds(value):
            return mark.words
    marks = getattr(hint, "__metadata__", ())
    if (WHOLE_NUMBER in marks or BYTES in marks) and not isinstance(value, int):
        return "a whole number"
    if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        return " or ".join(typing.get_args(hint))
    if hint in (str, bool) and type(value) is not hint:
        return "text" if hint is str else "true or false"
    is_list = isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    return "a list of texts" if hint == tuple[str, ...] and not is_list else ""


# ------------------------------------------------------------------------------------------
# What every run shares


@dataclass(frozen=True)
class RunSettings:
    """Settings that every training stage has."""

    # tiny, 14M, 30M, 60M, 190M, 370M, 760M, 1B, 7B, 13B, 32B
    size: str = "tiny"
    # the run's folder
    out: str = ""
    # largest global L2 norm of the gradient
    clip: AboveZero = 1.0

    # steps between training states; the last step is always saved
    save_every: Positive = 500
    # newest states to keep; 0: all
    keep: Count = 1
    # steps between evaluations on held-out data
    eval_every: Positive = 100
    # steps between lines on the terminal (metrics.jsonl has every step)
    log_every: Positive = 10
    # Weights & Biases project; none: nothing is sent
    wandb: str = ""
    # write TensorBoard's files, too, into tensorboard/ in the run's folder
    tensorboard: bool = False

    # auto, cpu, mps, cuda
    device: str = "auto"
    # CPU threads (they change the last bits of sums); 0: torch's choice
    threads: Threads = 0
    # torch.compile blocks and loss: a slow start, then faster steps; auto: on GPUs
    compile: Literal["auto", "yes", "no"] = "auto"
    # processes that share one copy of the weights (FSDP), at most; others are replicas; 0: all
    # share
    shard: Count = 0
    # free a block's gathered weights between forward and backward (ZeRO-3); no: keep them (ZeRO-2)
    reshard: bool = True
    # activation checkpointing: share of the blocks that run their forward again in the backward
    recompute: Share = 0.0
    # what of such a block runs again
    recompute_part: Literal["block", "mlp"] = "block"
    # on GPUs, too, the same bits each time; slower (a CPU has them anyway)
    deterministic: bool = False
    # write states while training goes on; takes CPU memory for a copy
    async_save: bool = False
    # seconds that a process waits for another one before it gives up
    timeout: Seconds = 600

    # What may differ when a run goes on. Data must still be the same (their hash is compared).
    # Those from `device` on may change the last bits of the numbers.
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        "data val out save_every keep eval_every questions log_every wandb tensorboard "
        "async_save timeout deterministic "
        "device threads compile micro_batch micro_tokens shard reshard recompute "
        "recompute_part rollouts rollouts_folder rollouts_model rollouts_timeout".split()
    )


# ------------------------------------------------------------------------------------------
# The command line


@contextlib.contextmanager
def silence_other_ranks(errors: bool = False) -> Iterator[None]:
    """Let rank 0 alone print; with `errors`, keep the other ranks off standard error, too."""
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", 0)):
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            if errors:
                stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def parse_flags(default, arguments: list[str], description: str | None, prog: str | None = None):
    """`default` with the flags of a command line; tyro ends the process at a wrong flag."""
    with silence_other_ranks(errors=True):
        return tyro.cli(
            type(default), default=default, args=arguments, description=description, prog=prog
        )


def flag_value(arguments: list[str], name: str, default: str) -> str:
    """The value of one flag, which must be known before the rest of the command line is read.

    >>> flag_value(["--seed", "1", "--size=7B"], "size", "tiny"), flag_value([], "size", "tiny")
    ('7B', 'tiny')
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", default=default)
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # a flag without its value: tyro will say it
        return default
    return getattr(known, name)


def flags_in(arguments: list[str]) -> set[str]:
    """The settings that a command line names.

    >>> sorted(flags_in(["--seed", "1", "--lr=2", "--no-qk-norm"]))
    ['lr', 'qk_norm', 'seed']
    """
    return {
        word[2:].split("=")[0].replace("-", "_").removeprefix("no_")
        for word in arguments
        if word.startswith("--")
    }


def where_from(config, default, layers: dict[str, Collection[str]]) -> dict[str, str]:
    """{setting: where its value came from}: "flag", a layer that has it, or "default"."""
    origin = {}
    for field in fields(config):
        labels = (label for label, names in layers.items() if field.name in names)
        origin[field.name] = next(labels, "default")
        if getattr(config, field.name) != getattr(default, field.name):
            origin[field.name] = "flag"
    return origin
