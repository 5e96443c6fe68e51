"""A reward of your own: a function in a file of yours that scores answers.

    # my_rewards.py
    def score(messages, answer, label):
        '''Short answers, as long as the label is in them.'''
        return max(0.0, 1 - len(answer) / 200) if str(label) in answer else 0.0

    python posttrain.py grpo --data tasks.jsonl --verifier my_rewards.py:score

messages: the row's, up to the question. answer: the model's text, without EOS. label: whatever
stands under "ground_truth" in the row, or None. It returns a number from 0 to 1, which --reward
multiplies; true and false are 1 and 0.

The file is code, and it runs in the training process with all its rights: run only what you trust.
Rows cannot name such a file; the command line alone can.
"""

import functools
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable
from pathlib import Path

from infra.files import UserError, did_you_mean


def own_score(name: str, messages: list[dict], answer: str, label) -> float:
    """What the function `name`, FILE.py:FUNCTION, gives an answer, in [0, 1]. Raises UserError."""
    try:
        value = load_reward(name)(messages, answer, label)
        score = float(value)
    except UserError:
        raise
    except Exception as error:  # of code that is not ours
        raise UserError(f"--verifier {name}: {where_raised(error)}") from error
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise UserError(f"--verifier {name} returned {value!r}: expected a number from 0 to 1")
    return score


@functools.cache
def load_reward(name: str) -> Callable:
    """The function of FILE.py:FUNCTION; the file is run once. Raises UserError."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise UserError(f"--verifier {name}: expected FILE.py:FUNCTION, as in my_rewards.py:score")
    if not Path(file).is_file():
        raise UserError(f"--verifier {name}: {file} does not exist")
    spec = importlib.util.spec_from_file_location(f"own_reward_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--verifier {name}: {where_raised(error)}") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        near = did_you_mean(function, vars(module))
        raise UserError(f"--verifier {name}: {file} has no function {function}{near}")
    try:
        inspect.signature(reward).bind([], "", None)
    except TypeError:
        raise UserError(
            f"--verifier {name}: expected {function}(messages, answer, label), not "
            f"{function}{inspect.signature(reward)}"
        ) from None
    return reward


def where_raised(error: Exception) -> str:
    """An error of somebody's code, with the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}: {type(error).__name__}: {error}"
