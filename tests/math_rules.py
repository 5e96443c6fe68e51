"""How kind are the two rules for mathematical answers, that of rewards and that of the tables?

    python tests/math_rules.py FILE ...     # requests.jsonl.gz of minerva_math

Each published answer is compared with itself, and with its mutants: the first digit, or the last,
is one more. Prints how many each rule accepts, and the mutants that it accepts.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from infra.files import json_lines  # noqa: E402
from tasks.flex_match import flex_math  # noqa: E402
from tasks.mathematics import last_box, verify_math  # noqa: E402


def mutants(gold: str) -> list[str]:
    """The answer with another first digit, and with another last one."""
    digits = [i for i, character in enumerate(gold) if character in "0123456789"]
    made = {}
    for i in (*digits[:1], *digits[-1:]):
        made[f"{gold[:i]}{(int(gold[i]) + 1) % 10}{gold[i + 1 :]}"] = None
    return list(made)


def main(paths: list[str]) -> None:
    golds = {}  # in order, each once
    for path in paths:
        for _, row in json_lines(Path(path)):
            golds[last_box(row["doc"]["solution"])] = None
    pairs = {"published answers": [(gold, gold) for gold in golds if gold]}
    pairs["with another digit"] = [(wrong, gold) for gold in golds for wrong in mutants(gold)]
    for name, rule in (("rewards", verify_math), ("tables", flex_math)):
        for kind, texts in pairs.items():
            accepted = [pair for pair in texts if rule(f"\\boxed{{{pair[0]}}}", pair[1])]
            print(f"{name}: {len(accepted):,} of {len(texts):,} {kind} are right")
            if kind != "published answers":
                print("".join(f"    {wrong!r} for {gold!r}\n" for wrong, gold in accepted), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
