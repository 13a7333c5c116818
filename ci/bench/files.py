"""Checkpoint files converted beside `cp` of the same bytes: seconds, CPU, memory, and what more tensors cost.

    python ci/bench/files.py                                   # Llama-3.2-1B in bfloat16, 2.5 GB; needs 10 GB of disk
    python ci/bench/files.py --model SmolLM2-135M --repeat 3   # smaller, and sooner done
    python ci/bench/files.py --only speed --json files.json

Random weights, made first. The contestants take turns within each round, another one first in each, on one file system
with the source in the page cache; what was written before is on disk, and removed, before each begins. All are whole
processes, imports included (of compiled modules, as an installed package has them). Ratios are taken within a round,
and their median is shown: a machine that does other things too slows down all of a round alike. `cp` leaves its bytes
to the kernel and a conversion does not, so each is measured both ways: `cp` against a conversion whose fsync is left
out, `cp` and `sync` against the conversion as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

PARTS = ("speed", "memory", "tensors", "start")
UNSYNCED = "import os, sys; os.fsync = os.fdatasync = lambda handle: None; from converters.__main__ import main; "
UNSYNCED += "sys.exit(main(sys.argv[1:]))"
Config = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds on the clock, and of CPU for itself and for the kernel."""

    seconds: float
    user: float
    kernel: float


def make(folder: Path, config: Config, *, sparse: bool = False) -> int:
    """Write a checkpoint of random finite bfloat16 numbers, or of zeros that take no place on disk.

    Returns:
        Bytes of its tensors.
    """
    import numpy as np

    from converters.files.safetensors import lay_out
    from converters.models import family_of
    from converters.tensors import TensorInfo

    shapes = family_of(config).plan("hf", "megatron", config).source_tensors
    infos = {key: TensorInfo(shape, "bfloat16") for key, shape in shapes.items()}
    layout = lay_out(infos)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    for path, size in layout.sizes.items():
        with (folder / path).open("wb") as file:
            for at in () if sparse else range(0, size, 1 << 24):
                drawn = generator.integers(0, 2**64, (min(1 << 24, size - at) + 7) // 8, np.uint64)
                file.write((drawn & np.uint64(0xBFFF_BFFF_BFFF_BFFF)).tobytes()[: size - at])
            file.truncate(size)
            for at, data in layout.fixed[path]:
                file.seek(at)
                file.write(data)
    for path, data in layout.small.items():
        (folder / path).write_bytes(data)
    return sum(info.nbytes for info in infos.values())


def run(*command: str | Path) -> Cost:
    """Run a process to its end.

    Raises:
        SystemExit: It failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args)} ended with {process.returncode}")  # type: ignore[arg-type]
    return Cost(seconds, usage.ru_utime, usage.ru_stime)


def conversion(name: str, source: Path, target: Path, *options: str) -> list[str]:
    """The arguments of an import or an export."""
    there, back = ("--hf", "--megatron") if name == "import" else ("--megatron", "--hf")
    return [name, there, str(source), back, str(target), "--quiet", *options]


def speed(folder: Path, config: Config, repeat: int, workers: list[str]) -> dict[str, Any]:
    """Rounds of `cp`, import and export, each with what it writes on disk in the end, and without."""
    nbytes = make(folder / "hf", config)
    run(sys.executable, "-m", "converters", *conversion("import", folder / "hf", folder / "megatron"))
    target, costs = folder / "target", dict[str, list[Cost]]()
    for number in range(repeat + 1):
        turns = list(contestants(folder, target, workers))
        for name, command in turns[number % len(turns) :] + turns[: number % len(turns)]:
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            found = run(*command)
            if number:  # the first round warms up
                costs.setdefault(name, []).append(found)
    shutil.rmtree(target)
    rows = {}
    for name, found in costs.items():
        cp = costs["cp" if name.endswith("unsynced") or name == "cp" else "cp, sync"]
        times, theirs = [one.seconds for one in found], [one.seconds for one in cp]
        cpu = [(one.user + one.kernel) / nbytes * 1e9 for one in found]
        rows[name] = {
            "seconds": statistics.median(times),
            "best": min(times),
            "rate": nbytes / statistics.median(times),
            "of cp": statistics.median(their / our for their, our in zip(theirs, times, strict=True)),
            "best of cp": min(theirs) / min(times),
            "cpu per GB": statistics.median(cpu),
        }
    return {"bytes": nbytes, "repeat": repeat, "load": os.getloadavg()[0], "runs": rows}


def contestants(folder: Path, target: Path, workers: list[str]) -> Iterator[tuple[str, list[str | Path]]]:
    """Each with its name and its command."""
    hf, megatron = folder / "hf", folder / "megatron"
    yield "cp", ["cp", "-r", hf, target]
    yield "cp, sync", ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', hf, target]
    for name, source in (("import", hf), ("export", megatron)):
        arguments = conversion(name, source, target, *workers)
        yield f"{name}, unsynced", [sys.executable, "-c", UNSYNCED, *arguments]
        yield name, [sys.executable, "-m", "converters", *arguments]


def memory(folder: Path, config: Config) -> dict[str, Any]:
    """Peaks of anonymous memory for the model and for one with four times its layers (of zeros)."""
    out = {}
    for times in (1, 4):
        here = folder / f"times{times}"
        nbytes = make(here / "hf", {**config, "num_hidden_layers": config["num_hidden_layers"] * times}, sparse=True)
        for name, source, target in (("import", "hf", "megatron"), ("export", "megatron", "again")):
            arguments = conversion(name, here / source, here / target)
            found = subprocess.run(
                [sys.executable, __file__, "--watch", *arguments], check=True, capture_output=True, text=True, cwd=ROOT
            )
            out[f"{name}, {nbytes / 1e9:.1f} GB"] = json.loads(found.stdout)
        shutil.rmtree(here)
    return out


def watch(arguments: list[str]) -> None:
    """Convert in this process, and print by how much its anonymous memory grew at most, in bytes."""
    import converters.convert
    import converters.files.dcp
    import converters.files.pending
    import converters.files.stream  # noqa: F401 (so that imports are not counted)
    from converters.__main__ import main

    before, peak, done = anonymous(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    status = main(arguments)
    done.set()
    watcher.join()
    print(json.dumps({"peak": peak[0], "imports": before}))
    sys.exit(status)


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def tensors(folder: Path, config: Config, repeat: int) -> dict[str, Any]:
    """Seconds to import checkpoints of ever more tensors, all of them tiny."""
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {**config, **tiny, "head_dim": 8, "vocab_size": 64}
    out = {}
    for layers in (1, 250, 500, 1000, 2000):
        here = folder / f"layers{layers}"
        make(here / "hf", {**sizes, "num_hidden_layers": layers})
        for name, source, target in (("import", "hf", "megatron"), ("export", "megatron", "again")):
            times = []
            for _ in range(repeat):
                shutil.rmtree(here / target, ignore_errors=True)
                arguments = conversion(name, here / source, here / target)
                times.append(run(sys.executable, "-m", "converters", *arguments).seconds)
            out[f"{name}, {9 * layers + 2:,} tensors"] = {"seconds": statistics.median(times), "best": min(times)}
        shutil.rmtree(here)
    return out


def start(folder: Path, repeat: int) -> dict[str, Any]:
    """Whole processes on a model of 135 million parameters, and of an interpreter that does nothing."""
    from converters.sources import read_config

    make(folder / "hf", read_config("SmolLM2-135M"))
    out = {}
    run(sys.executable, "-m", "converters", *conversion("import", folder / "hf", folder / "megatron"))
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "import": [sys.executable, "-m", "converters", *conversion("import", folder / "hf", folder / "target")],
        "export": [sys.executable, "-m", "converters", *conversion("export", folder / "megatron", folder / "target")],
    }
    for name, command in commands.items():
        times = []
        for _ in range(repeat):
            shutil.rmtree(folder / "target", ignore_errors=True)
            times.append(run(*command).seconds)
        out[name] = {"seconds": statistics.median(times), "best": min(times)}
    return out


def show(found: dict[str, Any]) -> None:
    """Print tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "speed" in found:
        speed = found["speed"]
        title = f"{speed['bytes'] / 1e9:.2f} GB, medians of {speed['repeat']}, load {speed['load']:.1f}"
        table = Table("", "s", "best s", "GB/s", "of cp's rate", "best of best", "CPU s/GB", title=title)
        for name, row in speed["runs"].items():
            figures = (row["seconds"], row["best"], row["rate"] / 1e9, row["of cp"], row["best of cp"])
            table.add_row(name, *(f"{figure:.2f}" for figure in (*figures, row["cpu per GB"])))
        console.print(table)
    if "memory" in found:
        table = Table("anonymous memory", "peak MB above imports", "imports MB")
        for name, row in found["memory"].items():
            table.add_row(name, f"{row['peak'] / 1e6:.1f}", f"{row['imports'] / 1e6:.1f}")
        console.print(table)
    for part, title in (("tensors", "tiny tensors"), ("start", "135 million parameters, whole processes")):
        if part in found:
            table = Table(title, "s", "best s")
            for name, row in found[part].items():
                table.add_row(name, f"{row['seconds']:.2f}", f"{row['best']:.2f}")
            console.print(table)


def main() -> None:
    """Measure, and show it."""
    if sys.argv[1:2] == ["--watch"]:
        watch(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="meta-llama/Llama-3.2-1B", help="whose config is used (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--workers", type=int, help="threads of a conversion (default: its own)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    from converters.sources import read_config

    config, found = read_config(options.model), dict[str, Any]()
    workers = ["--workers", str(options.workers)] if options.workers else []
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for part in options.only:
            folder = Path(name) / part
            folder.mkdir()
            if part == "speed":
                found[part] = speed(folder, config, options.repeat, workers)
            elif part == "memory":
                found[part] = memory(folder, config)
            elif part == "tensors":
                found[part] = tensors(folder, config, options.repeat)
            else:
                found[part] = start(folder, options.repeat)
            shutil.rmtree(folder)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
