"""Anonymous memory and seconds that a rank takes to load its part of a checkpoint: `python ci/bench/load.py MODEL`.

The floor in memory is the rank's own parameters, since a copy goes from the mapped file straight into them; the floor
in time is reading its bytes once. Both are printed beside what was measured.
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from converters.topology import Topology
from parity.ranks import Zygote


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def load(folder: Path, topology: Topology) -> dict[str, Any]:
    """Build this rank's model empty, load it, and say what that took."""
    from converters.bridge import AutoBridge
    from converters.megatron import runtime
    from parity.converter import Settings, built

    runtime.install()
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    chunks = built(provider, Settings(topology=topology, precision="fp32"))
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    for parameter in parameters:
        parameter.data.zero_()  # resident, so that what follows counts only what loading takes
    before, peak, done = anonymous(), [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    bridge.load_hf_weights(chunks)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    held = sum(p.numel() * p.element_size() for p in parameters)
    largest = max(p.numel() * p.element_size() for p in parameters)
    began = time.perf_counter()
    for parameter in parameters:
        parameter.data.clone()
    copy = time.perf_counter() - began
    return {"held": held, "largest": largest, "above": max(peak) - before, "seconds": seconds, "copy": copy}


def main() -> None:
    """Print a line a rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tp", type=int, default=2)
    options = parser.parse_args()
    from parity.subjects import subject

    found = subject(options.model)
    topology = Topology(tp=options.tp)
    with Zygote() as zygote:
        for run in ("first", "page cache warm"):
            for rank, took in enumerate(zygote.run(load, found.folder, topology, world=topology.world_size)):
                mib = {name: took[name] / 2**20 for name in ("held", "largest", "above")}
                print(
                    f"{run}, rank {rank}: {mib['held']:.0f} MiB of parameters (largest {mib['largest']:.0f}) loaded in "
                    f"{took['seconds']:.2f} s; copying them in memory takes {took['copy']:.2f} s; peak anonymous "
                    f"memory above the model {mib['above']:.1f} MiB"
                )


if __name__ == "__main__":
    main()
