"""A folder that ranks write together: each puts its own bytes into the same files. One process is one rank."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from converters import artefacts, collective, execute
from converters.errors import CheckpointError, ConfigError, ConversionError
from converters.execute import Store
from converters.files.extents import FolderLayout
from converters.files.safetensors import Pattern, lay_out
from converters.plan import Plan
from converters.stores import safetensors
from converters.stores.modules import ModuleStore
from converters.tensors import TensorInfo, check_tensors
from converters.topology import Mesh

Part = tuple[Plan, Store]
"""What one model chunk gives to an export: the plan restricted to it, and its tensors."""


def parts_of(
    whole: Plan,
    held: Iterable[tuple[torch.nn.Module, Mesh]],
    *,
    padding: str = "verify",
    stored: Callable[[torch.nn.Module], Store] = ModuleStore,
) -> list[Part]:
    """For each model chunk of this rank its part of the export, checked on every rank. Collective.

    Args:
        whole: The plan from the model to the folder's column.
        held: This rank's chunks and their places.
        padding: `verify`: padding rows and biases that the folder's model lacks must still be zero. `drop`: let go of
            what training made of them.
        stored: A chunk as a store.

    Raises:
        CheckpointError: On some rank, tensors that do not fit, or a constant that is not what it must be.
    """
    if padding not in ("verify", "drop"):
        raise ConfigError(f"padding={padding!r}, expected 'verify' or 'drop'")
    parts: list[Part] = []
    faults: list[str] = []
    for chunk, mesh in held:
        try:
            plan, store = whole.restrict(source=mesh), stored(chunk)
            check_tensors(plan.source_tensors, store.tensors(), f"the model at {mesh.coord}")
            if padding == "verify":
                faults += [
                    f"{fault}; if training changed it, export with padding='drop'"
                    for fault in execute.constant_faults(plan.constants, store.tensor)
                ]
            parts.append((plan, store))
        except ConversionError as error:
            faults.append(f"{mesh.coord}: {error}")
    collective.agree(faults)
    return parts


def dtypes_of(parts: Sequence[Part]) -> dict[str, str]:
    """The dtype of each exported tensor: that of the parameter that it moves from, on whichever rank. Collective."""
    own = {
        copy.target.key: store.tensors()[copy.source.key].dtype
        for plan, store in parts
        for copy in plan.copies
        if copy.kind != "verify"
    }
    return collective.merged_dtypes(own)


def save(
    target: Path,
    whole: Plan,
    parts: Sequence[Part],
    *,
    config: Callable[[], bytes],
    like: Pattern | None = None,
    carry_from: Path | None = None,
    code: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a folder, complete or not at all. Collective; the ranks are of one machine, since they map the same files.

    Args:
        target: The folder to make.
        whole: The plan from the model to the folder's column.
        parts: This rank's, from `parts_of`.
        config: Makes the bytes of config.json; called on the first rank.
        like: How a checkpoint to follow is laid out.
        carry_from: The folder whose other files are taken over.
        code: Take Python files too.
        overwrite: Replace the target where it exists.

    Raises:
        CheckpointError: The target exists or cannot be written, or a value that must be equal is not.
    """
    dtypes = dtypes_of(parts)
    filled = {key: dtype for key, dtype in _fill_dtypes(whole, dtypes).items() if key not in dtypes}
    infos = {key: TensorInfo(shape, (dtypes | filled)[key]) for key, shape in whole.target_tensors.items()}
    files = lay_out(infos, like=like)
    partial = Path(
        collective.on_first(
            lambda: str(prepare(target, files, config(), carry_from=carry_from, code=code, overwrite=overwrite))
        )
    )
    try:
        _write(partial, files, parts)
        collective.on_first(lambda: artefacts.commit(partial, target))
    except BaseException:
        if collective.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def prepare(
    target: Path,
    files: FolderLayout,
    config: bytes,
    *,
    carry_from: Path | None = None,
    code: bool = False,
    overwrite: bool = False,
) -> Path:
    """A folder beside `target` with the weights' files at full size, the config, and every file that is carried over.

    Raises:
        CheckpointError: The target exists or cannot be written; nothing is left behind.
    """
    partial = artefacts.begin(target, overwrite=overwrite)
    try:
        safetensors.create(partial, files)
        (partial / "config.json").write_bytes(config)
        if carry_from is not None:
            for file in artefacts.carried(carry_from, code=code):
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(carry_from / file, partial / file)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            size = sum(files.sizes.values())
            raise CheckpointError(f"cannot write {size:,} bytes of weights beside {target}: {error}") from error
        raise
    return partial


def fill_dtype(key: str, dtypes: Mapping[str, str]) -> str:
    """The dtype of a tensor that is all constants: a bias has that of its weight.

    Raises:
        CheckpointError: Nothing says which.
    """
    weight = key.removesuffix("bias") + "weight"
    if weight not in dtypes:
        raise CheckpointError(f"{key} is made of constants, and nothing says in which dtype")
    return dtypes[weight]


def _fill_dtypes(plan: Plan, dtypes: Mapping[str, str]) -> dict[str, str]:
    return {key: fill_dtype(key, dtypes) for key in plan.target_tensors if key not in dtypes}


def _write(partial: Path, files: FolderLayout, parts: Sequence[Part]) -> None:
    faults: list[str] = []
    try:
        mapped = safetensors.MappedFiles(partial, files)
        for plan, store in parts:
            for copy in plan.copies:
                if copy.kind != "verify" and not copy.source_replica:
                    execute.apply(copy, store.tensor(copy.source.key).cpu(), mapped.tensor(copy.target.key))
            for fill in plan.fills:  # every rank writes the same
                execute.fill(fill, mapped.tensor(fill.region.key))
    except (OSError, RuntimeError) as error:
        # The others are about to wait for this rank: it tells them, rather than leave.
        faults.append(f"rank {collective.rank()} on {platform.node()} cannot write {partial}: {error}")
    collective.agree(faults)  # and every part is in place
    for plan, store in parts:
        for copy in plan.copies:
            if copy.kind == "verify":
                second, first = store.tensor(copy.source.key).cpu(), mapped.tensor(copy.target.key)
                fault = execute.tied_fault(copy, second, first)
                faults += [fault] if fault else []
    collective.agree(faults)
