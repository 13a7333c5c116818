"""Folders of safetensors files: where the tensors of one are, and where those of a new one will be. No torch.

Nothing of a folder is trusted: every header is held against its file, the index against the headers, and names of files
must stay in the folder. All that is wrong is said at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from converters.errors import CheckpointError, listing
from converters.files.extents import Chunk, Extent, FolderLayout
from converters.files.links import outside
from converters.files.module_order import in_module_order
from converters.files.safetensors_header import LONGEST, Header, parsed
from converters.tensors import CODE_OF, QUANTIZED, TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
"""As the hub has published most models; the default of huggingface_hub (transformers 5 writes up to 50 GB)."""
FORMAT = {"format": "pt"}
"""What transformers writes as metadata of a file, and asks for when it reads one."""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """How the files of a checkpoint are laid out, for another of the same tensors to follow byte for byte.

    Attributes:
        headers: Of each file, in the order of their names.
        index: The index's bytes, where there is one.
    """

    headers: Mapping[str, Header]
    index: bytes | None

    def shards(self) -> dict[str, list[str]]:
        """The keys of each file, in the order of their bytes."""
        return {name: list(header.tensors) for name, header in self.headers.items()}

    def files(self) -> dict[Path, bytes]:
        """The pattern as small files, to be kept beside a checkpoint of another format: see `read`."""
        kept = {Path(f"{name}.header"): header.preamble for name, header in self.headers.items()}
        return kept if self.index is None else kept | {Path(INDEX): self.index}

    @classmethod
    def read(cls, folder: Path) -> Pattern | None:
        """The pattern that was kept in a folder, or `None` if there is none.

        Raises:
            CheckpointError: Kept headers, or an index over them, that cannot be trusted.
        """
        headers = {path.name.removesuffix(".header"): _kept(path) for path in sorted(folder.glob("*.header"))}
        if not headers:
            return None
        problems = [f"{name}.header: {problem}" for name, header in headers.items() for problem in header.problems]
        index = _index(folder, problems) if (folder / INDEX).is_file() else None
        if index is not None:
            for name in index.promised.keys() | headers.keys():
                held = headers[name].tensors.keys() if name in headers else set()
                if held != index.promised.get(name, set()):
                    problems.append(f"{INDEX}: promises other tensors in {name} than its header")
        if problems:
            raise CheckpointError(listing(f"{folder}: a kept layout that cannot be trusted", problems))
        return cls(headers=headers, index=index.text if index else None)


def _kept(path: Path) -> Header:
    if not _plain(path.stem) or outside(path, path.parent) or path.stat().st_size > LONGEST + 8:
        return Header(
            problems=("not of a .safetensors file, a link out of the folder, or longer than a header may be",)
        )
    content = path.read_bytes()
    if len(content) < 8 or int.from_bytes(content[:8], "little") != len(content) - 8:
        return Header(problems=("not a header, or truncated",))
    return Header.parse(content)


class SafetensorsFiles:
    """The tensors of a Hugging Face checkpoint folder.

    Args:
        folder: Holds `model.safetensors`, or shards and their index. Links are followed where they stay in the folder,
            or lead where the hub's cache keeps its files.
        quantized: Show tensors of 8 and 4 bits too. They mean nothing without their scales, so only those who know of
            scales, and those who compare bytes, get to see them.

    Attributes:
        root: The folder.
        pattern: How its files are laid out.
        identities: Which files they are.
        remarks: What is odd about it and changes nothing: a size in the index that is not the files', which
            transformers does not read; shards that the index does not name.

    Raises:
        CheckpointError: No safetensors, or files that cannot be trusted: all that is wrong with them, by file and
            tensor.
    """

    left_alone: Mapping[str, str] = {}

    def __init__(self, folder: Path, *, quantized: bool = False) -> None:
        self.root = folder
        problems: list[str] = []
        index = _index(folder, problems) if _indexed(folder) else None
        headers = {name: _header(folder, name) for name in (sorted(index.promised) if index else [SINGLE])}
        self._where: dict[str, str] = {}
        for name, header in headers.items():
            problems += [f"{name}: {problem}" for problem in header.problems]
            if header.problems:
                continue
            held = header.tensors.keys()
            problems += [f"{name}: holds {key!r}, as {self._where[key]} does" for key in held & self._where.keys()]
            self._where |= dict.fromkeys(held, name)
            if index is not None:
                keys = index.promised[name]
                problems += [f"{name}: the index promises {key!r}, the file lacks it" for key in keys - held]
                problems += [f"{name}: holds {key!r}, which the index lacks" for key in held - keys]
            if not quantized:
                problems += [
                    f"{name}: {key!r} is quantised ({CODE_OF[info.dtype]}) and needs its scales; "
                    "make the checkpoint plain first: python -m converters dequantize SOURCE TARGET"
                    for key, info in header.tensors.items()
                    if info.dtype.startswith(QUANTIZED)
                ]
        if problems:
            raise CheckpointError(listing(f"{folder}: files that cannot be trusted", problems))
        self.pattern = Pattern(headers=headers, index=index.text if index else None)
        self.identities = {
            (folder / name).absolute(): header.identity for name, header in headers.items() if header.identity
        }
        self._infos = {key: info for header in headers.values() for key, info in header.tensors.items()}
        self.remarks = tuple(_remarks(folder, index, self._infos.values())) if index else ()

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return self._infos

    def extents(self, key: str) -> Sequence[Extent]:
        """The one box of a tensor."""
        name, shape = self._where[key], self._infos[key].shape
        offset = self.pattern.headers[name].offsets[key]
        return (Extent((self.root / name).absolute(), offset, (0,) * len(shape), shape),)

    def shards(self) -> dict[str, list[str]]:
        """The keys of each file, in the order of their bytes."""
        return self.pattern.shards()


def _header(folder: Path, name: str) -> Header:
    """The header of a file, which must be in the folder."""
    try:
        path = folder / name
        if not path.is_file():
            return Header(problems=("is a link to nothing" if path.is_symlink() else "is not there",))
        if place := outside(path, folder):
            return Header(problems=(f"is a link out of the folder, to {place}: open that folder, or copy the file",))
    except (OSError, ValueError, RuntimeError) as error:
        return Header(problems=(f"cannot be opened: {error}",))
    return Header.read(path)


@dataclass(frozen=True)
class _Index:
    text: bytes
    promised: Mapping[str, set[str]]  # keys by file
    total_size: Any


def _indexed(folder: Path) -> bool:
    """Whether the folder has an index, rather than a single file.

    Raises:
        CheckpointError: It has neither.
    """
    if (folder / INDEX).is_file():
        return True
    if (folder / SINGLE).is_file():
        return False
    found = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
    raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found {found}")


def _index(folder: Path, problems: list[str]) -> _Index:
    """The index; names of files that are none are added to `problems` and left out.

    Raises:
        CheckpointError: It is none, or a single file that it does not name stands beside it.
    """
    path = folder / INDEX
    if place := outside(path, folder):
        raise CheckpointError(f"{path}: is a link out of its folder, to {place}: open that folder, or copy the file")
    if path.stat().st_size > LONGEST:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, no index is longer than {LONGEST:,}")
    text, faults = path.read_bytes(), list[str]()
    fields = parsed(text.lstrip(), faults)
    where = None if fields is None else fields.get("weight_map")
    if fields is not None and not (
        isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())
    ):
        faults.append(f"not an index with a weight_map of names of files: {brief(where)}")
    if faults or fields is None or where is None:
        raise CheckpointError(listing(f"{path}: cannot be trusted", faults))
    promised: dict[str, set[str]] = {}
    for key, name in where.items():
        promised.setdefault(name, set()).add(key)
    astray = [name for name in promised if not _plain(name)]
    problems += [f"{INDEX}: names what is no .safetensors file of its folder: {name!r:.200}" for name in astray]
    if (folder / SINGLE).is_file() and SINGLE not in promised:
        raise CheckpointError(
            f"{folder}: holds both {SINGLE} and {INDEX}, and transformers reads the first; remove the one that is stale"
        )
    metadata = fields.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _Index(text, {name: keys for name, keys in promised.items() if name not in astray}, total)


def _plain(name: str) -> bool:
    """Whether a name is that of a weight file in the same folder."""
    return Path(name).name == name and name.endswith(".safetensors") and name.isprintable()


def _remarks(folder: Path, index: _Index, infos: Iterable[TensorInfo]) -> list[str]:
    total, said = sum(info.nbytes for info in infos), index.total_size
    out = (
        [f"{INDEX}: total_size is {brief(said)}, the tensors have {total:,} bytes"] if said not in (None, total) else []
    )
    strays = sorted({path.name for path in folder.glob("model-*-of-*.safetensors")} - index.promised.keys())
    return out + [f"{name}: the index does not name it" for name in strays]


def lay_out(
    tensors: Mapping[str, TensorInfo],
    *,
    like: Pattern | Mapping[str, Iterable[str]] | None = None,
    max_shard_bytes: int | None = None,
    sidecars: Mapping[Path, bytes] | None = None,
) -> FolderLayout:
    """The folder that holds `tensors`, as transformers' `save_pretrained` would write it.

    Args:
        tensors: Shape and dtype of each tensor, in any order: files are filled in that of transformers' modules.
        like: How another checkpoint is laid out, or which keys its files have. Where it has the same keys it is
            followed: the same files; where a file's tensors are the same too, the same header, and where all are, the
            same index.
        max_shard_bytes: Files of at most this size (a larger tensor has one of its own), whatever `like` says.
        sidecars: Other small files, by their paths in the folder.
    """
    known: Mapping[str, Header] = like.headers if isinstance(like, Pattern) else {}
    index = like.index if isinstance(like, Pattern) else None
    listed = like.shards() if isinstance(like, Pattern) else {name: list(keys) for name, keys in (like or {}).items()}
    if max_shard_bytes or not listed or Counter(chain(*listed.values())) != Counter(tensors.keys()):
        listed, known, index = split(tensors, max_shard_bytes or MAX_SHARD_BYTES), {}, None
    headers: dict[str, Header] = {}
    for name, keys in listed.items():
        held, old = {key: tensors[key] for key in keys}, known.get(name)
        if old is not None and old.tensors == held:
            headers[name] = old
        else:
            headers[name] = Header.of(held, FORMAT if old is None else old.metadata)
    small = dict(sidecars or {})
    if index is not None or list(headers) != [SINGLE]:
        kept = all(header is known.get(name) for name, header in headers.items())
        small[Path(INDEX)] = index if index is not None and kept else index_of(headers)
    return FolderLayout(
        sizes={Path(name): header.size for name, header in headers.items()},
        fixed={Path(name): [(0, header.preamble)] for name, header in headers.items()},
        chunks=[
            Chunk(key, info, Extent(Path(name), header.offsets[key], (0,) * len(info.shape), info.shape))
            for name, header in headers.items()
            for key, info in header.tensors.items()
        ],
        small=small,
    )


def split(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> dict[str, list[str]]:
    """The keys of each file when files are filled in turn, a tensor that is larger than a file by itself.

    Source: huggingface/huggingface_hub 1.x, serialization/_base.py, `split_state_dict_into_shards_factory`.
    """
    groups: list[list[str]] = []
    current: list[str] = []
    size = 0
    for key in in_module_order(tensors):
        info = tensors[key]
        if info.nbytes > max_shard_bytes:
            groups.append([key])  # before the file that is being filled: so the hub's files are numbered
            continue
        if size + info.nbytes > max_shard_bytes:
            groups.append(current)
            current, size = [], 0
        current.append(key)
        size += info.nbytes
    if current or not groups:
        groups.append(current)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{at:05}-of-{len(groups):05}.safetensors": group for at, group in enumerate(groups, start=1)}


def index_of(headers: Mapping[str, Header]) -> bytes:
    """The index over some files.

    Source: huggingface/transformers 5.23, modeling_utils.py, `PreTrainedModel.save_pretrained`.
    """
    where = {key: name for name, header in headers.items() for key in header.tensors}
    infos = [info for header in headers.values() for info in header.tensors.values()]
    total = {
        "total_parameters": sum(info.elements for info in infos),
        "total_size": sum(info.nbytes for info in infos),
    }
    text = json.dumps({"metadata": total, "weight_map": where}, indent=2, sort_keys=True) + "\n"
    return text.encode()
