"""A program of its own, which mathematics.py starts: are pieces of LaTeX equal?

    echo '[[["x+1", "1+x", false]], true]' | python tasks/sympy_server.py    # "ready", then 1

A line on standard input is [pairs, strict] as JSON; a pair is [one text, the other, may their signs
differ]. It prints 1 if the texts of each pair are equal, 0 if not or if they cannot be read, and -
if the comparison died. It is made in a fork, whose time and memory are limited, so that no answer
can slow down or stop anything else.
"""

import json
import os
import resource
import signal
import sys

from sympy import Pow, nan, simplify, zoo
from sympy.parsing.latex import parse_latex

SECONDS = 0.45  # processor time of a verdict (upstream: 5 s a pair); what needs more is not equal
MEMORY = 2**31  # bytes that it may take


def has_value(expression) -> bool:
    """Is it divided by zero nowhere?"""
    if expression.has(zoo, nan):
        return False
    powers = expression.atoms(Pow)
    return not any(power.exp.is_negative and simplify(power.base) == 0 for power in powers)


def is_equal(first: str, second: str, sign: bool, strict: bool) -> bool:
    """strict: the texts are read to their end (else as far as possible), and must have a value."""
    a = parse_latex(first, strict=strict)
    b = parse_latex(second, strict=strict)
    if strict and not (has_value(a) and has_value(b)):
        return False
    return simplify(a - b) == 0 or (sign and simplify(a + b) == 0)


def compare(line: str) -> None:
    """End this process: status 0 if all pairs are equal, 1 if they are not or cannot be read."""
    equal = False
    try:
        if sys.platform == "linux":  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, wherever it is
        pairs, strict = json.loads(line)
        equal = all(is_equal(*pair, strict) for pair in pairs)
    finally:
        os._exit(0 if equal is True else 1)


def main() -> None:
    parse_latex("\\frac{1}{x}")  # loads the grammar, once, before the forks
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            compare(line)
        _, status = os.waitpid(child, 0)
        in_time = os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGPROF
        print(int(status == 0) if in_time else "-", flush=True)


if __name__ == "__main__":
    main()
