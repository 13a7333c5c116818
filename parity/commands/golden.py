"""`parity golden list|diff|accept|verify`: look at golden values, decide about pending ones, verify them here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from converters.errors import ConversionError, near
from parity.bounds import FLOORS
from parity.checks.golden import DEFAULT, differences
from parity.golden.file import NAME, PENDING, GoldenError, accept, read, spelled, strays
from parity.golden.values import Compared, compare_all, noise, unmatched

TIMEOUT = 900.0


def add(commands: Any) -> None:
    """Declare `golden` and its actions."""
    golden = commands.add_parser(
        "golden",
        allow_abbrev=False,
        help="list, compare, accept and verify golden values",
        description="Golden values: what transformers said of a model once. `pytest --model NAME --regen-golden` makes "
        "them, every run holds the model to them, and one that disagrees leaves a pending file.",
    )
    actions = golden.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, run, many, meaning in (
        ("list", _list, None, "every golden: what it holds, what made it, and its state"),
        (
            "diff",
            _diff,
            "MODEL",
            "what is pending beside what is golden, the worst quantity first; 1 if beyond a bound",
        ),
        ("accept", _accept, "MODEL", "make what is pending the golden; not under CI"),
        ("verify", _verify, "[MODEL ...]", "compute the values anew on this machine, and find what nothing uses"),
    ):
        action = actions.add_parser(name, allow_abbrev=False, help=meaning, description=meaning.capitalize() + ".")
        if many is not None:
            action.add_argument(
                "models", nargs="*" if name == "verify" else 1, metavar="MODEL", help="its folder's name"
            )
        action.add_argument(
            "--golden", type=Path, default=DEFAULT, metavar="DIR", help="where goldens are (default: %(default)s)"
        )
        action.set_defaults(run=_reported(run))


def _reported(run: Any) -> Any:
    """`run` with errors as text: exit status 1."""

    def reported(asked: argparse.Namespace) -> int:
        try:
            return int(run(asked))
        except ConversionError as error:
            print(error)
            return 1

    return reported


def _list(asked: argparse.Namespace) -> int:
    table = _table("model", "weights", "quantities", "kB", "made", "with", "state")
    for home in _homes(asked.golden):
        state = ", ".join(f"{name}: {'pending' if name == PENDING else 'unused'}" for name in strays(home))
        try:
            golden = read(home / NAME)
        except GoldenError as error:
            table.add_row(home.name, "", "", "", "", "", Text(str(error).partition("\n")[0]))
            continue
        versions = {name: golden.header["versions"][name] for name in ("torch", "transformers")}
        size = f"{(home / NAME).stat().st_size / 1e3:.0f}"
        header = golden.header
        table.add_row(
            home.name,
            header["weights"],
            str(len(golden.quantities)),
            size,
            header["date"],
            spelled(versions),
            state or "ok",
        )
    _print(table)
    return 0


def _diff(asked: argparse.Namespace) -> int:
    home = _home(asked.golden, asked.models[0])
    if not (home / PENDING).is_file():
        print(f"{home.name}: nothing is pending")
        return 0
    old, new = read(home / NAME), read(home / PENDING)
    for name in sorted(old.header.keys() | new.header.keys()):
        then, now = old.header.get(name), new.header.get(name)
        if then != now:
            print(f"{name}: {then}\n{' ' * len(name)}  {now}")
    unmet = unmatched(old.quantities, new.quantities)
    worst = noise(old.quantities, new.quantities)
    unmet += worst.unmet if worst is not None else []
    found = compare_all(old.quantities, new.quantities, FLOORS)
    _print(_compared(found))
    print("\n".join(unmet))
    beyond = [one for one in found if not one.passed]
    print(
        f"{len(beyond)} of {len(found)} quantities beyond their bounds; "
        f"if that is right: parity golden accept {home.name}"
    )
    return 1 if beyond or unmet else 0


def _accept(asked: argparse.Namespace) -> int:
    home = _home(asked.golden, asked.models[0])
    golden = accept(home)
    print(f"{home / NAME}: {len(golden.quantities)} quantities of {golden.header['date']}, {golden.versions}")
    return 0


@dataclass(frozen=True, kw_only=True)
class _Verified:
    """One model's golden, held to this machine."""

    slug: str
    found: Sequence[Compared] = ()
    wrong: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        return not self.wrong and bool(self.found) and all(one.passed for one in self.found)


def _verify(asked: argparse.Namespace) -> int:
    from parity.ranks import Zygote

    homes = [_home(asked.golden, name) for name in asked.models] or list(_homes(asked.golden))
    if not homes:
        raise GoldenError(f"{asked.golden} holds no golden: make one with pytest --model NAME --regen-golden")
    loose = [] if asked.models else [path.name for path in asked.golden.iterdir() if _loose(path)]
    console = Console()
    results = []
    with Zygote() as zygote:
        for home in homes:
            with console.status(f"{home.name}: computing"):
                verified = _verified(home, zygote)
            results.append(verified)
            worst = max((one.ratio for one in verified.found), default=float("nan"))
            print(f"{home.name}: {'ok' if verified.passed else 'FAIL'}, at worst {worst:.2g} of a bound")
            if not verified.passed:
                print("\n".join(f"  {line}" for text in verified.wrong for line in text.splitlines()))
                _print(_compared([one for one in verified.found if not one.passed]))
    if loose:
        print("\n".join(f"{name}: unused: no folder of a model" for name in sorted(loose)))
    failed = sum(not one.passed for one in results) + len(loose)
    print(f"{len(results)} goldens: " + (f"{failed} wrong" if failed else "all hold"))
    return 1 if failed else 0


def _verified(home: Path, zygote: Any) -> _Verified:
    """Compute the values of one model anew, and hold them to the golden."""
    from parity.subjects import slug_of, subject

    unused = [
        f"{name}: nobody has decided: parity golden diff {home.name}" if name == PENDING else f"{name}: unused"
        for name in (strays(home) if home.is_dir() else [])
    ]
    try:
        golden = read(home / NAME)
    except GoldenError as error:
        return _Verified(slug=home.name, wrong=[str(error), *unused])
    options = {name: value for name, value in golden.header["options"].items() if name != "revision"}
    revision = golden.header["revision"] or golden.header["options"]["revision"]
    slug = slug_of(golden.header["model"], **options)
    if home.name != slug and not home.name.endswith(f"-{slug}"):
        unused.append(f"{NAME}: unused: the golden of {slug} in the folder of {home.name}")
    if options["size"] == "tiny":
        options["weights"] = None
    try:
        model = subject(golden.header["model"], revision=revision, progress=False, **options)
    except ConversionError as error:
        return _Verified(slug=home.name, wrong=[f"unused: no model has it: {error}", *unused])
    (now,) = zygote.run(
        "parity.golden.model:evaluate",
        model.folder,
        golden.probe,
        golden.places,
        backend=None,
        timeout=TIMEOUT,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    wrong = [*differences(golden, model.config, now), *unmatched(golden.quantities, now.quantities), *unused]
    worst = noise(golden.quantities, now.quantities)
    coarser = worst.unmet if worst is not None else []
    wrong += coarser
    found = compare_all(golden.quantities, now.quantities, FLOORS)
    if coarser or not all(one.passed for one in found):
        wrong.append(f"then: {golden.versions}\nnow:  {spelled(now.versions)}\nmake it anew with\n  {golden.command}")
    return _Verified(slug=home.name, found=found, wrong=wrong)


def _homes(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise GoldenError(f"there is no folder {folder}: name the one that holds goldens with --golden DIR")
    yield from sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _home(folder: Path, name: str) -> Path:
    known = [home.name for home in _homes(folder)]
    if name not in known:
        raise GoldenError(f"{folder / name} is missing{near(name, known)}; there are {', '.join(known) or 'none'}")
    return folder / name


def _loose(path: Path) -> bool:
    return path.is_file() and path.suffix != ".md" and not path.name.startswith(".")


def _compared(found: Sequence[Compared]) -> Table:
    table = _table("quantity", "golden", "now", "Δ", "bound", "Δ/bound", "where")
    for one in found:
        # Both in the quantity's own unit: the distance relative to what is alike is this one.
        unit = abs(one.now - one.then) / one.distance if one.distance > 0 else float("nan")
        table.add_row(
            one.name,
            f"{one.then:.9g}",
            f"{one.now:.9g}",
            f"{abs(one.now - one.then):.2e}",
            f"{one.bound * unit:.2e}" if unit == unit else f"{one.bound:.1e} rel.",
            f"{one.ratio:.2g}",
            one.where,
            style=None if one.passed else "bold red",
        )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console()
    # A log has no width: a row stays a line there.
    console.print(table) if console.is_terminal else Console(width=160).print(table)
