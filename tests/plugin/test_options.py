"""Every option: what it reads, from where, and what it says about a wrong value."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from parity.options import OPTIONS, Options, option_table, resolve, tool_table

ROOT = Path(__file__).parents[2]


def read(**command_line: str) -> Options:
    return resolve({"model": "m", **command_line})


def test_defaults() -> None:
    options = read()
    assert options == Options(
        models=("m",),
        revision=None,
        tp=(1,),
        pp=(1,),
        vpp=(1,),
        cp=(1,),
        sp=(False,),
        precision=("fp32",),
        backend=("megatron",),
        weights="checkpoint",
        size="full",
        layers=None,
        device="auto",
        trust_remote_code=False,
        rank_timeout=300.0,
        dp=(1,),
        converter="llama-parity",
        max_floors=10.0,
        parity_report=(),
        against=None,
        golden=None,
        regen_golden=False,
    )


@pytest.mark.parametrize(
    ("key", "text", "field", "value"),
    [
        ("model", "a/b,./c", "models", ("a/b", "./c")),
        ("revision", "v1.0", "revision", "v1.0"),
        ("tp", "1,2, 4", "tp", (1, 2, 4)),
        ("pp", "2", "pp", (2,)),
        ("vpp", "2,1", "vpp", (2, 1)),
        ("cp", "2", "cp", (2,)),
        ("sp", "off,on", "sp", (False, True)),
        ("precision", "bf16,fp32", "precision", ("bf16", "fp32")),
        ("backend", "megatron", "backend", ("megatron",)),
        ("weights", "seeded", "weights", "seeded"),
        ("size", "tiny", "size", "tiny"),
        ("layers", "3", "layers", 3),
        ("device", "cuda", "device", "cuda"),
        ("trust_remote_code", "on", "trust_remote_code", True),
        ("rank_timeout", "2.5", "rank_timeout", 2.5),
        ("dp", "1,2", "dp", (1, 2)),
        ("converter", "mine:Converter", "converter", "mine:Converter"),
        ("max_floors", "2.5", "max_floors", 2.5),
        ("parity_report", "a.html,b.json", "parity_report", (Path("a.html"), Path("b.json"))),
        ("against", "./other", "against", "./other"),
        ("golden", "kept/here", "golden", Path("kept/here")),
        ("regen_golden", "on", "regen_golden", True),
    ],
)
def test_reads(key: str, text: str, field: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)  # where goldens are not made anew
    assert getattr(read(**{key: text}), field) == value


def test_every_option_is_tried_above() -> None:
    tried = {mark.args[1][i][0] for mark in test_reads.pytestmark for i in range(len(mark.args[1]))}  # type: ignore[attr-defined]
    assert tried == {option.key for option in OPTIONS}
    assert len(OPTIONS) == len(dataclasses.fields(Options))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("model", "a,,b", "--model: expected a name, found nothing"),
        ("tp", "0", "--tp: expected a whole number of at least 1, found '0'"),
        ("tp", "2,two", "found 'two'"),
        ("tp", "2,2", "--tp: expected each value once, found 2 more than once"),
        ("pp", "-1", "--pp: expected a whole number"),
        ("layers", "1,2", "--layers: expected a whole number of at least 1, found '1,2'"),
        ("sp", "yes", "--sp: expected off or on, found 'yes'"),
        ("precision", "bf61", r"--precision: expected fp32 or bf16 or .*, found 'bf61' \(did you mean 'bf16'\?\)"),
        ("backend", "megatorn", r"did you mean 'megatron'\?"),
        ("weights", "sedeed", r"--weights: expected checkpoint or seeded, found 'sedeed' \(did you mean 'seeded'\?\)"),
        ("size", "small", "--size: expected full or tiny, found 'small'"),
        ("device", "gpu", "--device: expected auto or cpu or cuda, found 'gpu'"),
        (
            "max_floors",
            "11",
            "--max-floors: expected a number above 0 and at most 10, since a gate may only be tightened",
        ),
        ("max_floors", "0", "at most 10"),
        ("rank_timeout", "0", "--rank-timeout: expected a number of seconds above 0, found '0'"),
        ("rank_timeout", "nan", "above 0, found 'nan'"),
        ("rank_timeout", "inf", "above 0, found 'inf'"),
    ],
)
def test_wrong_value(key: str, text: str, message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        read(**{key: text})


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(pytest.UsageError) as caught:
        resolve({"model": "m", "tp": "x", "size": "y"}, {}, {"precison": "fp32"})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "precison in [tool.parity]",
        "--tp",
        "--size",
    ]


def test_tiny_has_seeded_weights() -> None:
    assert read(size="tiny").weights == "seeded"
    with pytest.raises(pytest.UsageError, match="--weights checkpoint: --size tiny has no checkpoint"):
        read(size="tiny", weights="checkpoint")


def test_command_line_goes_before_ini_before_tool_table() -> None:
    ini, table = {"tp": "4", "pp": "4"}, {"tp": [8], "pp": 8, "vpp": 8}
    options = resolve({"model": "m", "tp": "2"}, ini, table)
    assert (options.tp, options.pp, options.vpp) == ((2,), (4,), (8,))


def test_tool_table_reads_toml_values(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.parity]\ntp = [1, 2]\nsp = [false, true]\nprecision = "bf16,fp32"\nrank-timeout = 7.5\nlayers = 2\n'
    )
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    options = resolve({"model": "m"}, {}, tool_table(deep))
    assert options.tp == (1, 2)
    assert options.sp == (False, True)
    assert options.precision == ("bf16", "fp32")
    assert options.rank_timeout == 7.5
    assert options.layers == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"precison": "bf16"}, r"precison in \[tool.parity\]: no such option \(did you mean 'precision'"),
        ({"model": "x"}, r"model in \[tool.parity\]: give it on the command line, as --model"),
        ({"trust-remote-code": True}, "give it on the command line, as --trust-remote-code"),
        ({"tp": [1, "x"]}, r"tp in \[tool.parity\]: expected a whole number of at least 1, found 'x'"),
        ({"tp": True}, "found 'on'"),
        ({"tp": []}, "expected at least one value, found none"),
        ({"layers": [1, 2]}, "layers in .*: expected one value, found 2: 1, 2"),
    ],
)
def test_wrong_tool_table(table: dict[str, object], message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        resolve({"model": "m"}, {}, table)


@pytest.mark.parametrize(
    ("text", "message"), [("[tool.parity", "no valid TOML"), ("tool.parity = 1", "expected a table")]
)
def test_broken_pyproject(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(pytest.UsageError, match=message):
        tool_table(tmp_path)


def test_readme_holds_the_current_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    opening, closing = "<!-- options -->", "<!-- /options -->"
    assert text.count(opening) == text.count(closing) == 1
    found = text.partition(opening)[2].partition(closing)[0].strip()
    assert found == option_table(), f"put this between {opening} and {closing}:\n{option_table()}"
