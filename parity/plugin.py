"""The pytest plugin: `pytest --model NAME --tp 2` checks a model, and without `--model` nothing changes.

Loading it imports pytest and the standard library only; torch, transformers and Megatron-Core wait for a test.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from converters.errors import ConversionError, listing
from parity.case import Case, matrix
from parity.options import OPTIONS, Options, resolve, tool_table
from parity.record import Record
from parity.report import CASE_PROPERTY, write

if TYPE_CHECKING:
    from parity.ranks import Zygote
    from parity.subjects import Subject

SUITE = "parity.suite"
"""The package whose checks `--model` runs when no path is given."""

VERSIONED = ("llama-parity", "torch", "transformers", "megatron-core", "transformer-engine")


@dataclass(kw_only=True)
class State:
    """What one run of pytest with `--model` knows."""

    options: Options
    cases: list[Case] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


STATE = pytest.StashKey[State]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare every option of the table, on the command line and for ini files."""
    group = parser.getgroup("parity", "parity of converted models (with --model)")
    for option in OPTIONS:
        group.addoption(f"--{option.name}", **option.arguments)
        if option.in_files:
            parser.addini(option.dest, option.meaning, default=None)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, object, object]:
    """Under `-n`, keep the cases of one topology on one worker, unless another way was asked for."""
    if config.getoption("parity_model") is not None:
        if getattr(config.option, "numprocesses", None) and config.getoption("dist", None) == "no":
            config.option.dist = "loadgroup"
        # A worker reads its own command line, where no mode was named.
        if getattr(config, "workerinput", {}).get("parity_loadgroup"):
            config.option.loadgroup = True
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # noqa: ANN401 - a pytest-xdist type, and xdist is optional
    """Tell a worker that tests are distributed by group."""
    node.workerinput["parity_loadgroup"] = node.config.getoption("dist") == "loadgroup"


def pytest_configure(config: pytest.Config) -> None:
    """Read the options at once, and put the shipped suite in place of testpaths where no path was given."""
    command_line = {option.key: config.getoption(option.dest) for option in OPTIONS}
    if command_line["model"] is None:
        stray = [f"--{option.name}" for option in OPTIONS if command_line[option.key] is not None]
        if stray:
            raise pytest.UsageError(f"{', '.join(stray)}: no effect without --model; add --model NAME")
        return
    ini = {option.key: config.getini(option.dest) for option in OPTIONS if option.in_files}
    config.stash[STATE] = State(options=resolve(command_line, ini, tool_table(config.rootpath)))
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        # Modules by name, not a folder: the ini file's patterns for file names and the conftest files
        # above the package do not apply to them.
        config.args = suite_modules()
        config.option.pyargs = True


def suite_modules() -> list[str]:
    """The modules of the shipped suite, by name.

    Raises:
        pytest.UsageError: The installation holds none.
    """
    found = sorted(f"{SUITE}.{path.stem}" for path in _suite_folder().glob("test_*.py"))
    if not found:
        raise pytest.UsageError(f"no checks in {_suite_folder()}: the installation of llama-parity is incomplete")
    return found


def _suite_folder() -> Path:
    module = importlib.import_module(SUITE)
    assert module.__file__ is not None
    return Path(module.__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Resolve the models and build the matrix, before any worker starts; say at once if nothing is left of it."""
    state = session.config.stash.get(STATE, None)
    if state is None:
        return
    from parity.subjects import config_of

    try:
        state.cases, state.left_out = matrix(state.options, config_of)
    except ConversionError as error:
        raise pytest.UsageError(f"--model {','.join(state.options.models)}: {error}") from error
    if not state.cases:
        reasons = listing("no case is possible", (f"{name}: {why}" for name, why in state.left_out))
        raise pytest.UsageError(f"{reasons}\nAsk for other sizes of --tp, --pp, --vpp, --cp or another --sp")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The models, the matrix, what was left out of it and why, and the versions at work."""
    state = config.stash.get(STATE, None)
    if state is None:
        return []
    options = state.options
    weights = {
        "checkpoint": "the checkpoint's",
        "seeded": "seeded: random, from a fixed seed",
    }[options.weights]
    size = "" if options.size == "full" else f", {options.size} size"
    kept = "" if options.layers is None else f", first {options.layers} layers"
    lines = [f"parity: {', '.join(options.models)} (weights: {weights}{size}{kept})"]
    lines += [f"parity: {len(state.cases)} of {len(state.cases) + len(state.left_out)} combinations are cases"]
    lines += [f"  left out {name}: {why}" for name, why in state.left_out]
    lines += [f"  note on {case.id}: {case.note}" for case in state.cases if case.note]
    versions = [f"{name} {version}" for name in VERSIONED if (version := _version(name))]
    return [*lines, f"parity: {', '.join(versions)}"]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Keep a collection of everything (`pytest .`) out of the suite when there is no model to check."""
    if STATE in config.stash or collection_path != Path(__file__).parent / "suite":
        return None
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]).resolve() for arg in config.args]
    inside = any(path == collection_path or collection_path in path.parents for path in asked)
    return None if inside or config.option.pyargs else True


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> None:
    """Make the suite's checks tests whatever the ini file's pattern for function names is."""
    if _in_suite(collector) and name.startswith("test_") and inspect.isfunction(obj):
        obj.__test__ = True  # type: ignore[attr-defined]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for `case` one run for each case of the matrix."""
    if "case" not in metafunc.fixturenames:
        return
    fixtures = metafunc.definition._fixtureinfo.name2fixturedefs.get("case", ())
    if not fixtures or fixtures[-1].func is not _case_function:
        return
    state = metafunc.config.stash.get(STATE, None)
    if state is None:
        skip = pytest.mark.skip(reason="no model to check: add --model NAME")
        metafunc.parametrize("case", [pytest.param(None, marks=skip, id="no-model")], indirect=True, scope="session")
    else:
        ids = [case.id for case in state.cases]
        metafunc.parametrize("case", state.cases, ids=ids, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tell each test its case, the worker that it shares, and, in the suite, that warnings are no errors."""
    if STATE not in config.stash:
        return
    grouped = config.pluginmanager.hasplugin("xdist")
    for item in items:
        case = item.callspec.params.get("case") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
        if isinstance(case, Case):
            item.user_properties.append((CASE_PROPERTY, case.id))
            if grouped:
                item.add_marker(pytest.mark.xdist_group(case.topology_id))
        if _in_suite(item):
            item.add_marker(pytest.mark.filterwarnings("default"))


def _in_suite(node: pytest.Item | pytest.Collector) -> bool:
    return node.path.parent == _suite_folder()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the table of measurements."""
    state = config.stash.get(STATE, None)
    if state is not None and not config.option.collectonly:
        write(terminalreporter, [case.id for case in state.cases], len(state.left_out))


def _case_function(request: pytest.FixtureRequest) -> Case:
    """The case under check: one model in one parallel layout, precision and backend."""
    case = request.param
    assert isinstance(case, Case)
    return case


case = pytest.fixture(scope="session", name="case")(_case_function)


@pytest.fixture(scope="session")
def subject(case: Case, _subjects: Callable[[Case], Subject]) -> Subject:
    """The model of `case`: its config and weights, built once a session."""
    return _subjects(case)


@pytest.fixture(scope="session")
def _subjects() -> Callable[[Case], Subject]:
    known: dict[str, Subject] = {}

    def of(case: Case) -> Subject:
        from parity.subjects import subject

        if case.model_id not in known:
            known[case.model_id] = subject(
                case.model,
                revision=case.revision,
                weights=case.weights,
                size=case.size,
                layers=case.layers,
                trust_remote_code=case.trust_remote_code,
            )
        return known[case.model_id]

    return of


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process that forks ranks, closed at the end of the session."""
    from parity.ranks import Zygote

    with Zygote() as running:
        yield running


@pytest.fixture
def record(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Record:
    """Stores what a check measured, then fails the test if that exceeds its bound."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    case = params.get("case")
    return Record(record_property, case.id if isinstance(case, Case) else request.node.nodeid)
