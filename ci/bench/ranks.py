"""Seconds from `Zygote.run` until every rank is inside the function, its process group made."""

from __future__ import annotations

import argparse
import statistics
import time

from parity.ranks import Zygote


def arrival() -> float:
    """This rank's clock, which all processes of a machine share."""
    return time.monotonic()


def measure(zygote: Zygote, world: int) -> tuple[float, float]:
    """Seconds to the last rank's arrival, and to the return of `run`."""
    began = time.monotonic()
    arrived = max(zygote.run(arrival, world=world))
    return arrived - began, time.monotonic() - began


def main() -> None:
    """Print cold and warm figures for 2 and 4 ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=20, help="warm runs of each size; the median is shown")
    repeat = parser.parse_args().repeat
    print(f"{'ranks':>5} {'zygote':>6} {'inside':>8} {'returned':>8}  seconds")
    for world in (2, 4):
        with Zygote() as zygote:
            inside, returned = measure(zygote, world)
            print(f"{world:>5} {'cold':>6} {inside:8.3f} {returned:8.3f}")
            warm = [measure(zygote, world) for _ in range(repeat)]
            inside, returned = (statistics.median(column) for column in zip(*warm, strict=True))
            print(f"{world:>5} {'warm':>6} {inside:8.3f} {returned:8.3f}")


if __name__ == "__main__":
    main()
