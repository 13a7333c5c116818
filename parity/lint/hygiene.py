"""Rules on what lies in the folder besides weights, and how."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from converters.files.links import outside
from parity.lint.folder import Folder
from parity.lint.rules import Remark, rule, some

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")
LEFTOVERS = ("*.partial", "*.incomplete", "*.tmp", "*.replaced", "*.journal", "*.part", "*.swp", "*~", ".nfs*", "core")
LICENSES = ("license*", "licence*", "copying*", "notice*")


@rule("permissions", "whoever may enter the folder can read every file, and not everybody can write it")
def permissions(folder: Folder) -> Iterator[Remark]:
    unread, written = [], []
    for path in folder.entries:
        at = folder.path / path
        if at.is_symlink() or not at.exists():
            continue
        mode = at.stat().st_mode
        needed = 0o555 if at.is_dir() else 0o444
        if mode & needed != needed:
            unread.append(f"{path.as_posix()} {stat.filemode(mode)}")
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            written.append(f"{path.as_posix()} {stat.filemode(mode)}")
    for found, what, advice in (
        (unread, "not everybody can read", "chmod -R a+rX"),
        (written, "everybody can write", "chmod -R o-w"),
    ):
        if found:
            yield Remark(
                severity="warning",
                where=some([name.partition(" ")[0] for name in found]),
                expected="-rw-r--r-- or the like",
                found=f"{len(found)} that {what}: {some(found, 2)}",
                advice=f"{advice} {folder.path.name}",
                items=tuple(found),
            )


@rule("links", "no link that leads out of the folder or nowhere")
def links(folder: Folder) -> Iterator[Remark]:
    bad = []
    for path in folder.entries:
        at = folder.path / path
        if at.is_symlink() and (not at.exists() or outside(at, folder.path)):
            bad.append(f"{path.as_posix()} -> {at.readlink()}" + ("" if at.exists() else " (nothing there)"))
    if bad:
        yield Remark(
            severity="error",
            where=some([name.partition(" ")[0] for name in bad]),
            expected="files, or links within the folder",
            found=some(bad),
            advice="put the files themselves there: a copy or an upload of the folder would lack them",
            items=tuple(bad),
        )


@rule("pickles", "no pickled file, which runs code when it is loaded")
def pickles(folder: Folder) -> Iterator[Remark]:
    found = [path.as_posix() for path in folder.entries if path.suffix in PICKLES]
    if found:
        yield Remark(
            severity="warning",
            where=some(found),
            expected="safetensors and text alone",
            found=f"{len(found)} pickled files",
            advice="remove them (optimizer states and training_args.bin belong to the run, not to a release)",
            items=tuple(found),
        )


@rule("code", "no Python file, and no auto_map that asks for one")
def code(folder: Folder) -> Iterator[Remark]:
    found = [path.as_posix() for path in folder.entries if path.suffix in (".py", ".pyc", ".so")]
    mapped = [name for name in ("config.json", "tokenizer_config.json") if "auto_map" in (folder.object(name) or {})]
    for where, what in ((found, "files of code"), (mapped, "auto_map, which asks loaders for remote code")):
        if where:
            yield Remark(
                severity="warning",
                where=some(where),
                expected="a model of a class that transformers has",
                found=what,
                advice="remove it, unless the model needs code of its own; users then have to trust it",
                items=tuple(where),
            )


@rule("leftovers", "nothing that an interrupted conversion left, in the folder or beside it")
def leftovers(folder: Folder) -> Iterator[Remark]:
    here = folder.path.resolve()
    beside = [
        path.name
        for path in here.parent.iterdir()
        if path.name.startswith(f".{here.name}.") and re.search(r"\.(partial|replaced|roundtrip-.*)$", path.name)
    ]
    inside = [
        path.as_posix()
        for path in folder.entries
        if any(fnmatch(path.name, pattern) for pattern in LEFTOVERS) or path.name == "journal"
    ]
    if inside or beside:
        yield Remark(
            severity="warning",
            where=some([*inside, *(f"../{one}" for one in beside)]),
            expected="finished files alone",
            found="what an interrupted write leaves",
            advice="see whether the folder is complete (the other rules say so), then remove them",
            items=(*inside, *(f"../{one}" for one in beside)),
        )


@rule("license", "the folder says under which licence it is")
def license_file(folder: Folder) -> Iterator[Remark]:
    named = any(fnmatch(path.name.lower(), pattern) for path in folder.entries for pattern in LICENSES)
    if not named and not _card_says(folder.path / "README.md"):
        yield Remark(
            severity="note",
            where=".",
            expected="a LICENSE file, or `license:` in the front matter of README.md",
            found="neither",
            advice="a derived model is under its source's licence: copy it",
        )


def _card_says(card: Path) -> bool:
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return front is not None and re.search(r"^license(_name)?:\s*\S", front[1], re.MULTILINE) is not None
