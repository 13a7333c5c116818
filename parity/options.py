"""The command line of the harness: one table that drives pytest, `parity check`, the ini file and the README."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from converters.errors import near
from parity.backends import BACKENDS, PRECISIONS
from parity.ci import refusal

if TYPE_CHECKING:
    from parity.subjects import Size, Weights

Parse = Callable[[str], Any]

SUFFIXES = (".json", ".md", ".html")
"""What the file of a report may end in, which says what is written into it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one run was asked for; the product of the tuples is its matrix of cases."""

    models: tuple[str, ...]
    revision: str | None
    tp: tuple[int, ...]
    pp: tuple[int, ...]
    vpp: tuple[int, ...]
    cp: tuple[int, ...]
    dp: tuple[int, ...]
    sp: tuple[bool, ...]
    precision: tuple[str, ...]
    backend: tuple[str, ...]
    weights: Weights
    size: Size
    layers: int | None
    device: str
    trust_remote_code: bool
    rank_timeout: float
    converter: str
    max_floors: float
    parity_report: tuple[Path, ...]
    against: str | None
    golden: Path | None
    regen_golden: bool


@dataclass(frozen=True, kw_only=True)
class Option:
    """One row of the table.

    Args:
        name: The option without its dashes; also the key in `[tool.parity]`, and `parity_<name>` in an ini file.
        parse: One value from text; its `ValueError` says what was expected.
        values: What may be written, for help texts.
        default: As it would be written, or empty for none.
        meaning: One sentence.
        many: A comma list, each value once.
        flag: Takes no value on the command line.
        in_files: May stand in an ini file or in `[tool.parity]`.
        repeated: Given several times, the comma lists add up instead of the last one counting.
    """

    name: str
    parse: Parse
    values: str
    default: str
    meaning: str
    many: bool = False
    flag: bool = False
    in_files: bool = True
    repeated: bool = False

    @property
    def dest(self) -> str:
        """The name in pytest's own namespace, out of the way of other plugins, and in an ini file."""
        return f"parity_{self.key.removeprefix('parity_')}"

    @property
    def key(self) -> str:
        """The name as a Python identifier."""
        return self.name.replace("-", "_")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `argparse.add_argument`; text stays text until `resolve` reads all of it at once."""
        default = f" (default: {self.default})" if self.default and not self.flag else ""
        shared = {"dest": self.dest, "default": None, "help": (self.meaning + default).replace("%", "%%")}
        if self.flag:
            return {**shared, "action": "store_const", "const": "on"}
        return {**shared, "action": Joined if self.repeated else "store", "metavar": self.values}


class Joined(argparse.Action):
    """Joins the comma lists of an option that is given several times."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Add `values` to what was given before."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def _text(text: str) -> str:
    if not text:
        raise ValueError("expected a name, found nothing")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ValueError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"expected a number of seconds above 0, found {text!r}")
    return seconds


def _floors(text: str) -> float:
    try:
        floors = float(text)
    except ValueError:
        floors = 0.0
    if not 0 < floors <= 10:
        raise ValueError(
            f"expected a number above 0 and at most 10, since a gate may only be tightened, found {text!r}"
        )
    return floors


def _report(text: str) -> Path:
    if Path(text).suffix not in SUFFIXES:
        raise ValueError(f"expected a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, found {text!r}")
    return Path(text)


def _one_of(*known: str) -> Parse:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"expected {' or '.join(known)}, found {text!r}{near(text, known)}")
        return text

    return parse


def _switch(text: str) -> bool:
    return bool(_one_of("off", "on")(text) == "on")


def _by_hand(text: str) -> bool:
    on = _switch(text)
    if on and (reason := refusal("making goldens anew")):
        raise ValueError(reason)
    return on


OPTIONS: tuple[Option, ...] = (
    Option(
        name="model",
        parse=_text,
        values="NAME[,NAME]",
        default="",
        meaning="Hub id, folder, or packaged name of the model to check.",
        many=True,
        in_files=False,
    ),
    Option(name="revision", parse=_text, values="REV", default="", meaning="Commit, tag or branch on the hub."),
    Option(name="tp", parse=_count, values="N[,N]", default="1", meaning="Tensor-parallel sizes.", many=True),
    Option(name="pp", parse=_count, values="N[,N]", default="1", meaning="Pipeline-parallel sizes.", many=True),
    Option(
        name="vpp", parse=_count, values="N[,N]", default="1", meaning="Model chunks per pipeline stage.", many=True
    ),
    Option(name="cp", parse=_count, values="N[,N]", default="1", meaning="Context-parallel sizes.", many=True),
    Option(name="dp", parse=_count, values="N[,N]", default="1", meaning="Data-parallel sizes.", many=True),
    Option(name="sp", parse=_switch, values="off|on[,...]", default="off", meaning="Sequence parallelism.", many=True),
    Option(
        name="precision",
        parse=_one_of(*PRECISIONS),
        values="|".join(PRECISIONS) + "[,...]",
        default="fp32",
        meaning="Precision of weights and activations; below bf16, of matrix products in Transformer Engine's layers.",
        many=True,
    ),
    Option(
        name="backend",
        parse=_one_of(*BACKENDS),
        values="|".join(BACKENDS),
        default="megatron",
        meaning="What the model is compared with.",
        many=True,
    ),
    Option(
        name="weights",
        parse=_one_of("checkpoint", "seeded"),
        values="checkpoint|seeded",
        default="",
        meaning="The checkpoint's own weights, or random ones from a fixed seed"
        " (default: checkpoint, but seeded with --size tiny).",
    ),
    Option(
        name="size",
        parse=_one_of("full", "tiny"),
        values="full|tiny",
        default="full",
        meaning="The model as published, or a small one of the same kind with seeded weights.",
    ),
    Option(name="layers", parse=_count, values="N", default="", meaning="Keep only the first N layers."),
    Option(
        name="device",
        parse=_one_of("auto", "cpu", "cuda"),
        values="auto|cpu|cuda",
        default="auto",
        meaning="Where ranks run; auto takes GPUs when there are enough of them for every rank.",
    ),
    Option(
        name="trust-remote-code",
        parse=_switch,
        values="",
        default="off",
        meaning="Run Python code that comes with the model.",
        flag=True,
        in_files=False,
    ),
    Option(
        name="rank-timeout",
        parse=_seconds,
        values="SECONDS",
        default="300",
        meaning="How long ranks may take over one check before it fails with every rank's stack.",
    ),
    Option(
        name="against",
        parse=_text,
        values="NAME",
        default="",
        meaning="Another checkpoint, held against the model instead of running the suite; also `parity compare A B`.",
        in_files=False,
    ),
    Option(
        name="max-floors",
        parse=_floors,
        values="N",
        default="10",
        meaning="Noise floors that a measurement may be away from its reference; fewer than 10 tighten every gate.",
    ),
    Option(
        name="converter",
        parse=_text,
        values="NAME|MODULE:ATTR",
        default="llama-parity",
        meaning="The converter to check: this package's own, an entry point of `parity.converters`, or any object.",
    ),
    Option(
        name="golden",
        parse=Path,
        values="DIR",
        default="",
        meaning="Where golden values are, one folder a model; given, every model must have some"
        " (default: golden, for the models it has).",
    ),
    Option(
        name="regen-golden",
        parse=_by_hand,
        values="",
        default="off",
        meaning="Write the golden values of the models anew; not under CI.",
        flag=True,
        in_files=False,
    ),
    Option(
        name="parity-report",
        parse=_report,
        values="FILE[,FILE]",
        default="",
        meaning="Write a report at the end: FILE ends in .json, .md or .html.",
        many=True,
        repeated=True,
    ),
)

MODEL = OPTIONS[0]


def add_to_argparse(parser: argparse.ArgumentParser, *, but: Sequence[str] = ()) -> None:
    """Add every option but the model, which `parity check` takes by position, and those named in `but`."""
    for option in OPTIONS[1:]:
        if option.name in but:
            continue
        parser.add_argument(f"--{option.name}", **option.arguments)


def tool_table(folder: Path) -> Mapping[str, object]:
    """The table `[tool.parity]` of the project that `folder` belongs to, empty where it has none.

    The project is that of the nearest `pyproject.toml`, in `folder` or above. pytest's own root is no guide here: it
    follows a folder given as `--model FOLDER`.
    """
    path = next((at / "pyproject.toml" for at in (folder, *folder.parents) if (at / "pyproject.toml").is_file()), None)
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("parity", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise pytest.UsageError(f"{path} is no valid TOML: {error}") from error
    if not isinstance(table, dict):
        raise pytest.UsageError(f"{path}: expected a table [tool.parity], found {table!r}")
    return table


def resolve(
    command_line: Mapping[str, str | None],
    ini: Mapping[str, object] | None = None,
    table: Mapping[str, object] | None = None,
) -> Options:
    """Read every option: from the command line, else the ini file, else `[tool.parity]`, else its default.

    Args:
        command_line: `Option.key` to the text given, or `None`.
        ini: `Option.key` to the value of `parity_<key>` in pytest's ini file, or `None`.
        table: `[tool.parity]`, with names spelled as on the command line or with underscores.

    Raises:
        pytest.UsageError: Every wrong value, and every name in `table` that no option has.
    """
    found: dict[str, Any] = {}
    wrong: list[str] = []
    tabled = {key.replace("-", "_"): value for key, value in (table or {}).items()}
    wrong += _misplaced(tabled)
    for option in OPTIONS:
        sources: list[tuple[str, object]] = [(f"--{option.name}", command_line.get(option.key))]
        if option.in_files:
            sources += [
                (f"{option.dest} in the ini file", (ini or {}).get(option.key)),
                (f"{option.name} in [tool.parity]", tabled.get(option.key)),
            ]
        sources += [(f"--{option.name}", option.default or None)]
        where, given = next(((where, given) for where, given in sources if given is not None), ("", None))
        try:
            found[option.key] = None if given is None else _read(option, given)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if not wrong and not found["model"]:
        wrong.append("--model: expected the model to check, found none")
    if not wrong and found["weights"] == "checkpoint" and found["size"] == "tiny":
        wrong.append(
            "--weights checkpoint: --size tiny has no checkpoint, its weights are seeded; leave out one of the two"
        )
    if wrong:
        raise pytest.UsageError("\n".join(wrong))
    found["weights"] = found["weights"] or ("seeded" if found["size"] == "tiny" else "checkpoint")
    found["models"] = found.pop("model")
    found["parity_report"] = found["parity_report"] or ()
    assert set(found) == {field.name for field in fields(Options)}
    return Options(**found)


def _misplaced(tabled: Mapping[str, object]) -> list[str]:
    """What is wrong with the names in `[tool.parity]`."""
    wrong = []
    allowed = {option.key: option for option in OPTIONS if option.in_files}
    for key in sorted(tabled.keys() - allowed.keys()):
        if any(option.key == key for option in OPTIONS):
            wrong.append(f"{key} in [tool.parity]: give it on the command line, as --{key.replace('_', '-')}")
        else:
            wrong.append(f"{key} in [tool.parity]: no such option{near(key, allowed)}; expected {', '.join(allowed)}")
    return wrong


def _read(option: Option, given: object) -> object:
    """The value of one option from text, or from the TOML value that says the same."""
    texts = [_plain(item) for item in given] if isinstance(given, Sequence) and not isinstance(given, str) else None
    if texts is None:
        texts = [text.strip() for text in _plain(given).split(",")] if option.many else [_plain(given)]
    if not option.many:
        if len(texts) != 1:
            raise ValueError(f"expected one value, found {len(texts)}: {', '.join(texts)}")
        return option.parse(texts[0])
    values = tuple(option.parse(text) for text in texts)
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise ValueError(f"expected each value once, found {', '.join(twice)} more than once")
    if not values:
        raise ValueError("expected at least one value, found none")
    return values


def _plain(value: object) -> str:
    """A TOML scalar as it would be written on the command line."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def option_table() -> str:
    """The options as a Markdown table, for the README."""
    rows = ["| Option | Values | Default | Meaning |", "|---|---|---|---|"]
    for option in OPTIONS:
        values = f"`{option.values}`".replace("|", "\\|") if option.values else ""
        default = f"`{option.default}`" if option.default else ""
        rows.append(f"| `--{option.name}` | {values} | {default} | {option.meaning} |")
    return "\n".join(rows)
