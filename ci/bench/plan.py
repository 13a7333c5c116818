"""Seconds and peak memory of one proof, as a whole process, beside the interpreter alone: `python ci/bench/plan.py`.

The floor of a proof is the interpreter with the package imported; what is above it is compiling and checking the plan.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

FLAGS = ["--model", "meta-llama/Llama-3.1-405B", "--tp", "8", "--pp", "16", "--vpp", "2"]


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one process."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def main() -> None:
    """Time both, in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    commands = {
        "imports alone": [sys.executable, "-c", "import converters.__main__, converters.proof, rich.table"],
        "plan " + " ".join(FLAGS[1:]): [sys.executable, "-m", "converters", "plan", *FLAGS],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            found[name].append(measured(command))
    floor = statistics.median(seconds for seconds, _ in found["imports alone"])
    for name, results in found.items():
        seconds = statistics.median(second for second, _ in results)
        memory = max(peak for _, peak in results)
        print(f"{name}: {seconds:.2f} s, {memory:.0f} MiB peak, {seconds / floor:.1f} x the imports")


if __name__ == "__main__":
    main()
