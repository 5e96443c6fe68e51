"""infra/settings.py and the settings of all stages: ranges, choices, where values come from, help."""

import dataclasses
import doctest
import math

import pytest
from tyro import _docstrings

from infra import distributed, files, metrics, settings, sharding
from infra.files import UserError
from infra.settings import check_ranges, flag_value, parse_flags, where_from
from plan import PlanSettings
from posttrain import STAGES, RecipeSettings
from recipes import POSTTRAIN, PRETRAIN, AnnealSettings, PretrainSettings

ALL = [PretrainSettings, AnnealSettings, PlanSettings, RecipeSettings, *STAGES.values()]


@pytest.mark.parametrize("module", [files, settings, distributed, sharding, metrics])
def test_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_all_values_out_of_range_are_named_at_once():
    c = PretrainSettings(lr=math.nan, batch=0, seq_len=1, lr_floor=1.0, schedule="steps", tokens=1)
    with pytest.raises(UserError) as error:
        check_ranges(c)
    assert str(error.value).split("; ") == [
        "--seq-len 1 must be from 2 to 16777216",
        "--batch 0 must be at least 1",
        "--lr nan must be above 0, and at most 100",
        "--schedule steps must be cosine or linear",
        "--lr-floor 1.0 must be from 0 to below 1",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_a_rate_is_a_number_above_0(value):
    with pytest.raises(UserError, match="--lr .* must be above 0"):
        check_ranges(PretrainSettings(lr=value, tokens=1))
    check_ranges(PretrainSettings(lr=5e-324, tokens=1))


@pytest.mark.parametrize("size", PRETRAIN)
def test_recipes_are_in_range(size):
    check_ranges(PretrainSettings(size=size, **PRETRAIN[size]))
    for stage, recipes in POSTTRAIN.items():
        if size in recipes:
            check_ranges(STAGES[stage](size=size, **recipes[size]))


@pytest.mark.parametrize("cls", ALL)
def test_every_setting_has_a_help_text_of_its_own(cls):
    """tyro gives a field without a comment the comment of its neighbour."""
    texts = {}
    for field in dataclasses.fields(cls):
        text = _docstrings.get_field_docstring(cls, field.name, ())
        assert text, f"{field.name} has no comment"
        assert text not in texts, f"{field.name} and {texts[text]} share a comment"
        texts[text] = field.name


def test_whole_numbers_are_written_as_people_write_them():
    default = PretrainSettings(tokens=1)
    assert parse_flags(default, ["--tokens", "1e6"], "").tokens == 1_000_000
    assert parse_flags(default, ["--tokens=2_097_152"], "").tokens == 2_097_152
    with pytest.raises(SystemExit) as error:
        parse_flags(default, ["--tokens", "1.5"], "")
    assert error.value.code == 2


@pytest.mark.parametrize("text", ["inf", "nan", "1e400", "1e30", "9223372036854775808", "", "x"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(SystemExit) as error:
        parse_flags(PretrainSettings(tokens=1), [f"--seed={text}"], "")
    assert error.value.code == 2


def test_a_seed_is_exact():
    seed = 2**53 + 1  # as a float it would be 2^53
    assert parse_flags(PretrainSettings(tokens=1), ["--seed", str(seed)], "").seed == seed


def test_one_flag_is_read_before_the_rest():
    assert flag_value(["--lr", "1", "--size", "7B"], "size", "tiny") == "7B"
    assert flag_value(["--size=1B", "--size", "7B"], "size", "tiny") == "7B"
    assert flag_value(["--size"], "size", "tiny") == "tiny"
    assert flag_value(["--sizes", "7B"], "size", "tiny") == "tiny"


def test_where_values_come_from():
    default = PretrainSettings(size="7B", **PRETRAIN["7B"])
    c = dataclasses.replace(default, lr=1.0)
    origin = where_from(c, default, {"recipe 7B": PRETRAIN["7B"]})
    assert (origin["lr"], origin["batch"], origin["beta1"]) == ("flag", "recipe 7B", "default")
