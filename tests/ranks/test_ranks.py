"""Ranks that work: what they see, what they return, and that each run has fresh ones."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rank_functions
import torch

from parity.ranks import Zygote, ZygoteError


def test_import_of_the_interface_is_light() -> None:
    code = "import sys, parity.ranks; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {name for name in ("torch", "numpy", "pytest", "transformers", "megatron") if f"'{name}'" in loaded}


@pytest.mark.parametrize("world", [1, 4])
def test_results_come_in_rank_order(
    zygote: Zygote, world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLOUR", "green")
    monkeypatch.setenv("FRUIT", "pear")
    results = zygote.run(rank_functions.place, world=world, env={"FRUIT": "plum"})
    for rank, (found, size, environ, cwd) in enumerate(results):
        assert (found, size, cwd) == (rank, world, str(tmp_path))
        assert environ == {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "COLOUR": "green",
            "FRUIT": "plum",
        }


def test_collectives_work(zygote: Zygote) -> None:
    for result in zygote.run(rank_functions.summed, 2.0, world=4, dtype="bfloat16"):
        assert torch.equal(result, torch.tensor([12.0, 12.0], dtype=torch.bfloat16))


def test_a_rank_may_return_while_others_work(zygote: Zygote) -> None:
    assert zygote.run(rank_functions.early_return, world=4, timeout=120) == [0.0, 3.0, 3.0, 3.0]


def test_a_group_is_whole_before_a_rank_goes_on(zygote: Zygote) -> None:
    """Else a rank that has nothing more to do is gone while its peers connect to it, and they fail."""
    assert zygote.run(rank_functions.late_for_a_group, world=2) == [True, True]
    off = {"TORCH_DIST_INIT_BARRIER": "0"}
    assert zygote.run(rank_functions.late_for_a_group, world=2, env=off) == [False, True]


def test_threads(zygote: Zygote) -> None:
    assert zygote.run(rank_functions.torch_threads) == [1]
    with Zygote(preload=["torch"], threads=2) as two:
        assert two.run(rank_functions.torch_threads, backend=None) == [2]


def test_every_run_has_fresh_processes(zygote: Zygote) -> None:
    first = zygote.run(rank_functions.remembered, 1, world=2)
    second = zygote.run(rank_functions.remembered, 2, world=2)
    assert [calls for _, calls in first + second] == [[1], [1], [2], [2]]
    assert len({pid for pid, _ in first + second}) == 4
    assert zygote.run(rank_functions.left_behind) == [None]
    assert rank_functions.calls == []


def test_tensors_and_arrays_travel(zygote: Zygote) -> None:
    (result,) = zygote.run(rank_functions.large, backend=None)
    assert torch.equal(result["large"], torch.arange(10_000_000, dtype=torch.float32))
    assert torch.equal(torch.cat([result["head"], result["tail"]]), torch.arange(8, dtype=torch.bfloat16))
    assert result["head"].untyped_storage().data_ptr() == result["tail"].untyped_storage().data_ptr()
    assert result["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert result["empty"].shape == (0, 4)
    assert isinstance(result["parameter"], torch.nn.Parameter)
    assert result["parameter"].requires_grad
    assert result["parameter"].tolist() == [1.0, 1.0]
    assert result["fp8"].dtype == torch.float8_e4m3fn
    assert result["fp8"].float().tolist() == [0.5, -448.0]
    sent = {"a": np.arange(6).reshape(2, 3), "t": torch.eye(3)}
    for got in zygote.run(rank_functions.same, sent, world=2, backend=None):
        assert isinstance(got, dict)
        assert np.array_equal(got["a"], sent["a"])
        assert torch.equal(got["t"], torch.eye(3))


def test_results_name_no_module_of_megatron(zygote: Zygote, tmp_path: Path) -> None:
    """Else the process that runs the tests would import it, to read them."""
    (names,) = zygote.run(rank_functions.pickled, str(tmp_path / "pickle"), backend=None)
    assert "parity.pickled" in names
    assert [name for name in names if name.startswith("megatron")] == []


def test_a_function_by_name(zygote: Zygote) -> None:
    assert zygote.run("rank_functions:same", 7, world=2, backend=None) == [7, 7]


@pytest.mark.parametrize("name", ["no_such_package.in_this.by_file", "json", "by_file"])
def test_a_module_that_cannot_be_imported_by_its_name(
    zygote: Zygote, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `--import-mode=importlib`, or where another module of that name comes first."""
    path = tmp_path / "by_file.py"
    path.write_text(
        textwrap.dedent("""
            from dataclasses import dataclass

            @dataclass
            class Point:
                x: int

            class Mover:
                @staticmethod
                def moved(point):
                    return Point(point.x + 1)
        """)
    )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    for parent in name.split(".")[:-1]:
        monkeypatch.setitem(sys.modules, name[: name.index(parent) + len(parent)], ModuleType(parent))
    assert zygote.run(module.Mover.moved, module.Point(1), world=2, backend=None) == [module.Point(2)] * 2


SCRIPT = """
from dataclasses import dataclass
from parity.ranks import Zygote

@dataclass
class Point:
    x: int

def moved(point):
    return Point(point.x + 1)

if {guard}:
    with Zygote(preload=[]) as zygote:
        print(zygote.run(moved, Point(1), world=2, backend=None) == [Point(2), Point(2)])
"""


def run_script(folder: Path, guard: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(guard=guard))
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=120)


def test_a_function_of_a_script(tmp_path: Path) -> None:
    ran = run_script(tmp_path, "__name__ == '__main__'")
    assert (ran.stdout, ran.stderr) == ("True\n", "")


def test_a_script_that_would_start_ranks_from_ranks(tmp_path: Path) -> None:
    ran = run_script(tmp_path, "True")
    assert ran.stdout == ""
    assert "ZygoteError: a rank cannot start ranks: in a script, put what does under `if __name__" in ran.stderr


def test_zygotes_side_by_side(zygote: Zygote) -> None:
    results: dict[int, list[object]] = {}

    def work(index: int, own: Zygote) -> None:
        results[index] = own.run(rank_functions.same, index, world=2, backend=None)

    with Zygote(preload=[]) as one, Zygote(preload=[]) as two:
        threads = [threading.Thread(target=work, args=item) for item in enumerate((one, two, zygote, zygote))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {index: [index, index] for index in range(4)}


def test_preload_leaves_out_what_is_not_installed() -> None:
    with Zygote(preload=["no_such_distribution.module", "json.tool"]) as zygote:
        (modules,) = zygote.run(rank_functions.modules, backend=None)
    assert "json.tool" in modules
    assert "torch" not in modules


def test_preload_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged_distribution.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        Zygote(preload=["damaged_distribution"]) as zygote,
        pytest.raises(ZygoteError, match="No module named 'no_such_dependency'"),
    ):
        zygote.run(rank_functions.same, 1, backend=None)


def test_preload_that_starts_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with (
        Zygote(preload=["json", "threaded"]) as zygote,
        pytest.warns(RuntimeWarning, match="importing threaded started 1 thread: .*`preload`"),
    ):
        assert zygote.run(rank_functions.same, 1, backend=None) == [1]


def test_default_preload_starts_no_thread(recwarn: pytest.WarningsRecorder) -> None:
    with Zygote() as zygote:
        zygote.run(rank_functions.same, 1)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_closed_zygote_starts_again() -> None:
    zygote = Zygote(preload=[])
    zygote.close()
    assert zygote.run(rank_functions.same, 1, backend=None) == [1]
    zygote.close()
    zygote.close()
    assert zygote.run(rank_functions.same, 2, backend=None) == [2]
    zygote.close()


def test_requests_that_cannot_be(zygote: Zygote) -> None:
    def local() -> None: ...

    with pytest.raises(ValueError, match="at the top level of a module"):
        zygote.run(local)
    with pytest.raises(ValueError, match="at the top level of a module"):
        zygote.run(lambda: None)
    with pytest.raises(ValueError, match="'module:qualname', found 'nonsense'"):
        zygote.run("nonsense")
    with pytest.raises(ValueError, match="one coord a rank, found 1 for world=2"):
        zygote.run(rank_functions.same, 1, world=2, coords=["tp=0"])
    with pytest.raises(ValueError, match="found world=0"):
        zygote.run(rank_functions.same, 1, world=0)
    with pytest.raises(TypeError, match=r"arguments of rank_functions:same must be what pickle can carry: no pickle"):
        zygote.run(rank_functions.same, rank_functions.NotForPickle())
