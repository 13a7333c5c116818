"""The small files of a Megatron checkpoint folder: trackers, `common.pt`, `metadata.json`, `run_config.yaml`.

Written without torch, and read without an unpickler.

Sources:
    args, common.pt: NVIDIA/Megatron-LM core_v0.16.1, megatron/training/checkpointing.py `generate_state_dict`,
        `load_args_from_checkpoint`, `check_checkpoint_args`, `_build_sharded_state_dict_metadata`.
    metadata.json: megatron/core/dist_checkpointing/core.py `CheckpointingConfig`, core_v0.16.1 and core_v0.19.2.
    train_state.pt: NVIDIA-NeMo/Megatron-Bridge 2026-08, src/megatron/bridge/training/state.py `TrainState`,
        checkpointing.py `save_checkpoint`, `_resolve_checkpoint_iteration`, model_load_save.py `load_model_config`.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from converters import pickled
from converters.errors import CheckpointError
from converters.files import torch_archive
from converters.files.links import check_inside
from converters.pickled import Named, Names, Outside, Symbol, shown
from converters.tensors import ITEMSIZE

TRACKER = Path("latest_checkpointed_iteration.txt")
STATE_TRACKER = Path("latest_train_state.pt")
COMMON, METADATA, RUN_CONFIG, TRAIN_STATE = (
    Path("common.pt"),
    Path("metadata.json"),
    Path("run_config.yaml"),
    Path("train_state.pt"),
)
VERSION = 3.0
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""What Megatron-LM says of the way in which the model's tensors are named."""
LARGEST_TEXT = 1 << 20
LONGEST_YAML = 4 * LARGEST_TEXT
"""With every alias written out: characters of values, and one for each value."""
NAMES = Names(
    objects=frozenset(
        {
            *("argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "_io.BytesIO", "datetime.timedelta"),
            *("pathlib.Path", "pathlib.PosixPath", "pathlib._local.PosixPath", "collections.defaultdict"),
            *("megatron.*", "numpy.*", "_codecs.*"),
        }
    )
)
"""Names in the state that Megatron keeps besides tensors. None of them is looked up."""
_STATE = {  # of the training: Megatron-Bridge's fields, with the storage and the format of each
    "step": ("LongStorage", "<q"),
    "consumed_train_samples": ("LongStorage", "<q"),
    "skipped_train_samples": ("LongStorage", "<q"),
    "consumed_valid_samples": ("LongStorage", "<q"),
    "floating_point_operations_so_far": ("DoubleStorage", "<d"),
    "do_train": ("BoolStorage", "<?"),
    "do_valid": ("BoolStorage", "<?"),
    "do_test": ("BoolStorage", "<?"),
}


# Writing


def common(args: Mapping[str, Any], *, iteration: int) -> bytes:
    """The file `common.pt`: the model's arguments, and that training has not begun.

    Args:
        args: Attributes of Megatron-LM's `argparse.Namespace`; `params_dtype` by name.
        iteration: Where training stands.
    """
    attributes = dict(args) | {"params_dtype": Symbol("torch", args["params_dtype"])}
    namespace = Named(Symbol("argparse", "Namespace"), (), attributes, new=True)
    return torch_archive.save(
        {
            "args": namespace,
            "checkpoint_version": VERSION,
            "iteration": iteration,
            "num_floating_point_operations_so_far": 0,
            "content_metadata": dict(CONTENT),
        }
    )


def metadata() -> bytes:
    """The file `metadata.json`, by which Megatron-Core knows a checkpoint."""
    return json.dumps(BACKENDS).encode()


def train_state(step: int) -> bytes:
    """The file `train_state.pt` of Megatron-Bridge: each field a tensor without dims."""
    values: dict[str, Any] = (
        dict.fromkeys(_STATE, 0) | {"step": step} | dict.fromkeys(("do_train", "do_valid", "do_test"), False)
    )
    hooks = Named(Symbol("collections", "OrderedDict"))
    state = {}
    records = {}
    for index, (name, (storage, code)) in enumerate(_STATE.items()):
        identity = Outside(("storage", Symbol("torch", storage), str(index), "cpu", 1))
        state[name] = Named(Symbol("torch._utils", "_rebuild_tensor_v2"), (identity, 0, (), (), False, hooks))
        records[f"data/{index}"] = struct.pack(code, values[name])
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        everything = {"data.pkl": pickled.write(state), "byteorder": b"little", **records, "version": b"3\n"}
        for name, content in everything.items():
            archive.writestr(zipfile.ZipInfo(f"train_state/{name}"), content)
    return out.getvalue()


def run_config(config: Mapping[str, Any]) -> bytes:
    """The file `run_config.yaml`."""
    import yaml

    return bytes(yaml.safe_dump(dict(config), sort_keys=True, encoding="utf-8"))


# Reading


def tracked(folder: Path) -> int | str | None:
    """What Megatron-LM's tracker says: an iteration, `release`, or `None` where there is no tracker.

    Raises:
        CheckpointError: It says something else.
    """
    if not (folder / TRACKER).is_file():
        return None
    said = read_bytes(folder / TRACKER).decode("utf-8", "replace").strip()
    if said == "release":
        return said
    if re.fullmatch(r"[0-9]{1,18}", said) is None:
        raise CheckpointError(
            f"{folder / TRACKER}: expected the number of an iteration, or 'release'; found {shown(said)!r}. "
            "Correct it, or name the iteration (--iteration)"
        )
    return int(said)


def tracked_step(folder: Path) -> int | None:
    """What Megatron-Bridge's tracker says, or `None` where there is none.

    Raises:
        CheckpointError: It is no train state.
    """
    path = folder / STATE_TRACKER
    if not path.is_file():
        return None
    content = read_bytes(path)
    state = torch_archive.read(content, where=str(path), names=NAMES)
    step = state.get("step") if type(state) is dict else None
    if type(step) is not torch_archive.Stored or step.info.dtype != "int64" or step.info.elements != 1:
        raise CheckpointError(f"{path}: expected a train state with a step; name the iteration (--iteration)")
    return int.from_bytes(content[step.offset : step.offset + ITEMSIZE["int64"]], "little", signed=True)


def read_common(path: Path) -> dict[str, Any]:
    """The state in a `common.pt`.

    Raises:
        CheckpointError: It is none, or names what Megatron does not keep there.
    """
    return state_of(read_mapped(path), str(path))


def state_of(found: Any, where: str) -> dict[str, Any]:
    """A state as a dict.

    Raises:
        CheckpointError: It is something else.
    """
    if type(found) is not dict:
        raise CheckpointError(f"{where}: expected a dict, found a {type(found).__name__}")
    return found


def read_mapped(path: Path) -> Any:
    """What `torch.save` wrote, tensors as places in the file; the file is mapped, and only its pickle is read.

    Raises:
        CheckpointError: It cannot be read, or names what Megatron does not keep there.
    """
    check_inside(path, path.parent)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return torch_archive.read(mapped, where=str(path), names=NAMES)


def args_of(state: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The attributes of the arguments in a state, dtypes by name; `None` where there are none.

    Raises:
        CheckpointError: They are no namespace.
    """
    found = state.get("args")
    if found is None:
        return None
    if type(found) is not Named or found.symbol.name not in ("Namespace", "SimpleNamespace"):
        raise CheckpointError(f"{where}: expected arguments as a Namespace, found {type(found).__name__}")
    return {
        name: value.name if type(value) is Symbol and value.module == "torch" else value
        for name, value in found.fields.items()
        if type(name) is str
    }


def read_run_config(path: Path) -> dict[str, Any]:
    """A `run_config.yaml`, by yaml's safe loader.

    Raises:
        CheckpointError: It is no YAML of plain values, has no model in it, or its aliases make it huge.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """PyYAML writes a value that is there twice as an alias; aliases of aliases can stand for more than fits."""

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            alias = self.check_event(yaml.AliasEvent)
            node = super().compose_node(parent, index)
            if alias and id(node) not in lengths:
                raise yaml.YAMLError("an alias of what it stands in")
            if node is not None and not alias:
                pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
                scalar = isinstance(node, yaml.ScalarNode)
                inside = len(node.value) if scalar else sum(lengths[id(part)] for pair in pairs for part in pair)
                lengths[id(node)] = 1 + inside
                if inside > LONGEST_YAML:
                    raise yaml.YAMLError("aliases of aliases, which are huge when they are written out")
            return node

    lengths: dict[int, int] = {}
    try:
        config = yaml.load(read_bytes(path), Loader)  # a SafeLoader
    except RecursionError:
        raise CheckpointError(f"{path}: YAML that is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path}: no YAML of plain values: {shown(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{path}: expected a `model` section, as Megatron-Bridge writes it")
    return config


def check_backend(path: Path) -> None:
    """Refuse a checkpoint that is not of the format torch_dist.

    Raises:
        CheckpointError: Another format, or no `metadata.json`.
    """
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {shown(error)}") from error
    backend = (
        (found.get("sharded_backend"), found.get("sharded_backend_version", 1)) if isinstance(found, dict) else found
    )
    if backend != ("torch_dist", 1):
        raise CheckpointError(
            f"{path}: expected the format torch_dist, version 1, found {shown(backend)}; "
            "load and save it once with Megatron (--ckpt-format torch_dist)"
        )


def read_bytes(path: Path) -> bytes:
    """A small file that lies in its folder.

    Raises:
        CheckpointError: It cannot be read, is a link out of the folder, or is not small.
    """
    check_inside(path, path.parent)
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, expected no more than {LARGEST_TEXT:,}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
