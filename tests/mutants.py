"""The verdict on a run of the mutation tester (``make mutants``): who survived must be listed in ``mutants.toml``.

A mutant is known by its function and the line that it changes: mutmut's numbers move with the code. The list holds
regular expressions for such lines, each group with the reason why no test can, or need, see its mutants.
"""

import json
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_module_from_key, orig_function_and_class_names_from_key

LISTED = Path(__file__).with_suffix(".toml")
KILLED = ("killed", "timeout", "segfault")


def verdicts(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return by name of each mutant its source file and what became of it; files that were not tried are left out."""
    found = {}
    for meta in sorted(folder.rglob("*.py.meta")):
        source = meta.relative_to(folder).with_suffix("")
        exit_codes = json.loads(meta.read_text())["exit_code_by_key"]
        if any(exit_code is not None for exit_code in exit_codes.values()):
            found |= {name: (source, status_by_exit_code[exit_code]) for name, exit_code in exit_codes.items()}
    return found


def described(name: str, source: Path) -> str:
    """Return a mutant as ``module.function: its changed line``, ``-`` before a line that it leaves out."""
    function, owner = orig_function_and_class_names_from_key(name)
    where = ".".join(part for part in (get_module_from_key(name), owner, function) if part)
    changes = [line for line in get_diff_for_mutant(name, path=source).splitlines()[2:] if line[:1] in "+-"]
    added = [line[1:].strip() for line in changes if line[0] == "+"]
    return f"{where}: {' '.join(added) or '- ' + ' '.join(line[1:].strip() for line in changes)}"


def main(folder: Path = Path("mutants")) -> int:
    """Print the share killed by module and who survived without being listed; return the exit code."""
    wanted = tomllib.loads(LISTED.read_text())
    listed = {pattern: re.compile(pattern) for group in wanted["survivors"] for pattern in group["mutants"]}
    found = verdicts(folder)
    total, killed = Counter[str](), Counter[str]()
    for source, status in found.values():
        total[str(source)] += 1
        killed[str(source)] += status in KILLED
    for source in sorted(total):
        print(f"{source:32} {killed[source]:5} of {total[source]:5} killed")
    share = killed.total() / max(1, total.total())
    least = wanted["least-killed"]
    print(f"{'all':32} {killed.total():5} of {total.total():5} killed ({share:.1%}; {least:.0%} wanted)")
    survivors = {described(name, source): status for name, (source, status) in found.items() if status not in KILLED}
    unlisted = sorted(text for text in survivors if not any(each.search(text) for each in listed.values()))
    for mutant in unlisted:
        print(f"{survivors[mutant]}, not listed in {LISTED.name}: {mutant}")
    untried = {meta.name.split(".")[0] for meta in folder.rglob("*.py.meta")} - {s.stem for s, _ in found.values()}
    for pattern, each in listed.items():
        elsewhere = any(pattern.startswith(f"{name}\\.") for name in untried)
        if not elsewhere and not any(each.search(text) for text in survivors):
            print(f"listed in {LISTED.name}, but no survivor: {pattern}")
    return int(bool(unlisted) or share < least)


if __name__ == "__main__":
    sys.exit(main())
