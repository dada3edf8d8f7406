"""Runs benchmarks; prints one line a bound, writes JSON and Markdown, exits with 1 if a bound was missed."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.outcome import Outcome, Plan, machine

NAMES = ("aggregate", "round", "precision", "transport", "pfl", "growth", "start", "held")
BY_NAME_ALONE = ("deploy_round",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help=f"default: all of {', '.join(NAMES)}; besides: {', '.join(BY_NAME_ALONE)}",
        metavar="NAME",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after the warm-up (default 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the results")
    default_cache = os.environ.get("FEDJETS_BENCH_CACHE") or "~/.cache/fedjets/bench"
    parser.add_argument("--cache", type=Path, default=Path(default_cache), help="folder of the rivals' environments")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.names) - {*NAMES, *BY_NAME_ALONE}:
        parser.error(f"{', '.join(sorted(unknown))}: no such benchmark; choose of {', '.join(NAMES + BY_NAME_ALONE)}")
    if chosen.quick and chosen.output == Path("results/bench"):
        parser.error("--quick measures nothing: give it an --output of its own")
    chosen.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every benchmark ends what it started
    missed = False
    for name in chosen.names or NAMES:
        scratch = Path(tempfile.mkdtemp(prefix=f"fedjets-bench-{name}-"))
        plan = Plan(1 if chosen.quick else chosen.rounds, chosen.quick, scratch, chosen.cache.expanduser().absolute())
        try:
            outcome: Outcome = import_module(f"benchmarks.{name}").measure(plan)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for bound in outcome.bounds:
            print(f"{name}: {bound.line()}", flush=True)
        write(outcome, chosen.output)
        missed |= not all(bound.holds for bound in outcome.bounds)
    return int(missed and not chosen.quick)


def write(outcome: Outcome, folder: Path) -> None:
    """Write one benchmark's JSON, its picture if it has one, and the Markdown of all that the folder holds."""
    facts = machine()
    content = outcome.as_json() | {"machine": facts, "markdown": outcome.as_markdown()}
    (folder / f"{outcome.name}.json").write_text(json.dumps(content, indent=2) + "\n")
    if (figure := outcome.picture()) is not None:
        figure.savefig(folder / f"{outcome.name}.png", dpi=120, bbox_inches="tight")
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    text = "# Benchmarks\n\nMedians and ranges of interleaved measurements.\n\n"
    (folder / "README.md").write_text(
        text + "\n".join(f"{part['markdown']}\n{told(part['machine'])}\n" for part in parts)
    )


def told(facts: Mapping[str, Any]) -> str:
    """Return the line that says where a benchmark was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    vectors = f" ({facts['vectors']})" if "vectors" in facts else ""  # files of earlier releases do not tell it
    return f"*{facts['cpu']}{vectors}, {facts['cores']} cores, Python {facts['python']}, {versions}*"


if __name__ == "__main__":
    sys.exit(main())
