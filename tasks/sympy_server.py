"""A program of its own, which verifiers.py starts: are two pieces of LaTeX equal?

    echo '["x+1", "1+x"]' | python tasks/sympy_server.py    # "ready", then 1

For each line on standard input, a pair of texts as JSON, it prints 1 if they are equal, else 0.
Each pair is compared in a fork, whose time and memory are limited, so that no answer can slow down
or stop anything else.
"""

import json
import os
import resource
import signal
import sys

from sympy import simplify
from sympy.parsing.latex import parse_latex

SECONDS = 0.45  # processor time of a comparison (upstream: 5 s); what needs more is not equal
MEMORY = 2**31  # bytes that it may take


def compare(line: str) -> None:
    """End this process: status 0 if the pair is equal, 1 if it is not or cannot be read."""
    equal = False
    try:
        if sys.platform == "linux":  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, wherever it is
        first, second = map(parse_latex, json.loads(line))
        equal = simplify(first - second) == 0
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
        print(int(status == 0), flush=True)


if __name__ == "__main__":
    main()
