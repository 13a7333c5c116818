"""The pytest plugin: `pytest --model NAME --tp 2` checks a model, and without `--model` nothing changes.

Loading it imports pytest and the standard library only; torch, transformers and Megatron-Core wait for a test.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from converters.errors import ConversionError
from parity.case import Case, matrix
from parity.options import OPTIONS, Options, resolve, tool_table
from parity.record import Record
from parity.report.facts import CASE_PROPERTY
from parity.report.run import claim_all, summarise

if TYPE_CHECKING:
    from parity.ranks import Zygote
    from parity.subjects import Subject

SUITE = "parity.suite"
"""The package whose checks `--model` runs when no path is given."""
COMPARISON = "parity.suite.comparison"
"""The package that takes its place with `--against`."""

VERSIONED = ("llama-parity", "torch", "transformers", "megatron-core", "transformer-engine")


@dataclass(kw_only=True)
class State:
    """What one run of pytest with `--model` knows."""

    options: Options
    cases: list[Case] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    interrupted: bool = False


STATE = pytest.StashKey[State]()
LEFT_OUT = "parity_left_out"
"""What a worker of pytest-xdist tells at its end."""
SHARED = pytest.StashKey[bool]()
"""Whether the distribution over xdist workers is left to this plugin."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare every option of the table, on the command line and for ini files."""
    group = parser.getgroup("parity", "parity of converted models (with --model)")
    for option in OPTIONS:
        group.addoption(f"--{option.name}", **option.arguments)
        if option.in_files:
            parser.addini(option.dest, option.meaning, default=None)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, object, object]:
    """Note, before pytest-xdist fills in its own default, whether a way to distribute tests was asked for."""
    config.stash[SHARED] = config.getoption("dist", None) == "no"
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the cases of one topology on one worker, for its subject and ranks, unless `--dist` asks for another way."""
    state = config.stash.get(STATE, None)
    if state is None or not config.stash.get(SHARED, False):
        return None
    from parity.scheduling import ByTopology

    return ByTopology(config, log, {case.id: case.topology_id for case in state.cases})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker left out when it collected: the process that writes reports collects nothing."""
    state = node.config.stash.get(STATE, None)
    if state is not None:
        told = map(tuple, getattr(node, "workeroutput", {}).get(LEFT_OUT, ()))
        state.left_out += [one for one in told if one not in state.left_out]


def pytest_configure(config: pytest.Config) -> None:
    """Read the options at once, and put the shipped suite in place of testpaths where no path was given."""
    command_line = {option.key: config.getoption(option.dest) for option in OPTIONS}
    if command_line["model"] is None:
        stray = [f"--{option.name}" for option in OPTIONS if command_line[option.key] is not None]
        if stray:
            raise pytest.UsageError(f"{', '.join(stray)}: no effect without --model; add --model NAME")
        return
    ini = {option.key: config.getini(option.dest) for option in OPTIONS if option.in_files}
    config.stash[STATE] = State(options=resolve(command_line, ini, tool_table(config.invocation_params.dir)))
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        # A package by name, not a folder: the conftest files above it do not apply to it.
        config.args = [COMPARISON if config.stash[STATE].options.against else SUITE]
        config.option.pyargs = True
    if any(
        Path(config.invocation_params.dir, model) == config.rootpath for model in config.stash[STATE].options.models
    ):
        # pytest takes `--model FOLDER` for a path and the folder for its root; no cache is to be written into it.
        for name in ("lfplugin", "nfplugin"):
            config.pluginmanager.unregister(name=name)


def _suite_folder() -> Path:
    module = importlib.import_module(SUITE)
    assert module.__file__ is not None
    return Path(module.__file__).parent


def _suite_folders() -> tuple[Path, Path]:
    return _suite_folder(), _suite_folder() / "comparison"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Resolve the models and build the matrix, before any worker starts; say at once if nothing is left of it."""
    state = session.config.stash.get(STATE, None)
    if state is None:
        session.config.pluginmanager.register(_case_fixture([]))
        return
    from parity import converter
    from parity.subjects import config_of

    try:
        converter.require(state.options.converter)
        if state.options.against is not None:
            config_of(state.options.against)
        state.cases, state.left_out = matrix(state.options, config_of)
        if any(case.backend == "te" for case in state.cases) and state.options.converter != converter.OWN:
            reason = converter.without_te(converter.find(state.options.converter))
            without = [case for case in state.cases if reason and case.backend == "te"]
            state.left_out += [(case.id, reason) for case in without]
            state.cases = [case for case in state.cases if case not in without]
    except ConversionError as error:
        raise pytest.UsageError(f"--model {','.join(state.options.models)}: {error}") from error
    if not state.cases:
        reasons = "\n".join(_by_reason(state.left_out))
        raise pytest.UsageError(
            f"none of the {len(state.left_out)} combinations asked for is possible\n{reasons}\n"
            "Ask for other sizes of --tp, --pp, --vpp, --cp or another --sp"
        )
    claim_all(session.config, state.options.parity_report)
    session.config.pluginmanager.register(_case_fixture(state.cases))


def _case_fixture(cases: list[Case]) -> ModuleType:
    """A plugin with the fixture `case`: a test that asks for it runs once for each of `cases`, or is skipped.

    A fixture made here rather than `pytest_generate_tests`: a project's own fixture or parameter of this name goes
    first.
    """

    def case(request: pytest.FixtureRequest) -> Case:
        """The case under check: one model in one parallel layout, precision and backend; it needs --model."""
        if not cases:
            pytest.skip("no model to check: add --model NAME")
        found = request.param
        assert isinstance(found, Case)
        return found

    plugin = ModuleType("parity.plugin.case")
    ids = [case.id for case in cases]
    plugin.case = pytest.fixture(scope="session", params=cases or None, ids=ids or None)(case)  # type: ignore[attr-defined]
    return plugin


def _by_reason(lines: Iterable[tuple[str, str]]) -> list[str]:
    """`(id, reason)` pairs as text: each reason once, the ids that it holds for beneath it."""
    grouped: dict[str, list[str]] = {}
    for name, reason in lines:
        grouped.setdefault(reason, []).append(name)
    return [line for reason, names in grouped.items() for line in [f"  {reason}:", *(f"    {name}" for name in names)]]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The models, the matrix, what was left out of it and why, and the versions at work."""
    state = config.stash.get(STATE, None)
    if state is None:
        return []
    options = state.options
    from parity.subjects import weights_note

    weights = "; ".join(dict.fromkeys(weights_note(model, options.weights) for model in options.models))
    size = "" if options.size == "full" else f", {options.size} size"
    kept = "" if options.layers is None else f", first {options.layers} layers"
    lines = [f"parity: {', '.join(options.models)} (weights: {weights}{size}{kept})"]
    asked = len(state.cases) + len(state.left_out)
    lines += [f"parity: {asked} combination{'s' * (asked != 1)} asked for, {len(state.cases)} to check"]
    if state.left_out:
        lines += [f"parity: {len(state.left_out)} left out", *_by_reason(state.left_out)]
    lines += _by_reason((case.id, case.note) for case in state.cases if case.note)
    versions = [f"{name} {version}" for name in VERSIONED if (version := _version(name))]
    return [*lines, f"parity: {', '.join(versions)}"]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Keep a collection of everything (`pytest .`) out of the suite when there is no model to check, and the suite from
    the comparison of two.
    """
    if collection_path == _suite_folder() / "comparison":
        return config.args != [COMPARISON] or None
    if STATE in config.stash or collection_path != _suite_folder():
        return None
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]).resolve() for arg in config.args]
    inside = any(path == collection_path or collection_path in path.parents for path in asked)
    return None if inside or config.option.pyargs else True


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect the suite's modules whatever the ini file's patterns for file names are."""
    if file_path.parent not in _suite_folders() or not file_path.match("test_*.py"):
        return None
    if parent.session.isinitpath(file_path) or any(map(file_path.match, parent.config.getini("python_files"))):
        return None  # pytest collects it
    return pytest.Module.from_parent(parent, path=file_path)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> None:
    """Make the suite's checks tests whatever the ini file's pattern for function names is."""
    if _in_suite(collector) and name.startswith("test_") and inspect.isfunction(obj):
        obj.__test__ = True  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tell each test its case and, in the suite, that warnings are no errors whatever the ini file says."""
    if STATE not in config.stash:
        return
    for item in items:
        case = _case_under(item)
        if case is not None:
            item.user_properties.append((CASE_PROPERTY, case.id))
        if _in_suite(item):
            item.add_marker(pytest.mark.filterwarnings("default"))


def _case_under(item: pytest.Item) -> Case | None:
    """The case that a test is parametrised with."""
    callspec = getattr(item, "callspec", None)
    case = None if callspec is None else callspec.params.get("case")
    return case if isinstance(case, Case) else None


def _in_suite(node: pytest.Item | pytest.Collector) -> bool:
    return node.path.parent in _suite_folders()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Note whether tests were left unrun, as after Ctrl-C or with -x."""
    state = session.config.stash.get(STATE, None)
    if state is not None:
        stopped = bool(session.shouldfail or session.shouldstop)
        state.interrupted = stopped or exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the table of measurements, and the report files that were asked for."""
    state = config.stash.get(STATE, None)
    if state is not None and not config.option.collectonly:
        versions = {name: version for name in VERSIONED if (version := _version(name))}
        summarise(
            terminalreporter,
            options=state.options,
            cases=state.cases,
            left_out=state.left_out,
            versions=versions,
            started=state.started,
            interrupted=state.interrupted,
        )


@pytest.fixture(scope="session")
def subject(case: Case, _subjects: Callable[[Case], Subject]) -> Subject:
    """The model of `case`: its config and weights, built once a session."""
    return _subjects(case)


@pytest.fixture(scope="session")
def _subjects() -> Callable[[Case], Subject]:
    known: dict[str, Subject] = {}

    def of(case: Case) -> Subject:
        from parity.subjects import subject

        if case.slug not in known:
            known[case.slug] = subject(
                case.model,
                revision=case.revision,
                weights=case.weights,
                size=case.size,
                layers=case.layers,
                trust_remote_code=case.trust_remote_code,
            )
        return known[case.slug]

    return of


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process that forks ranks, closed at the end of the session."""
    from parity.ranks import Zygote

    with Zygote() as running:
        yield running


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Stores what a check measured, then fails the test if that exceeds its bound."""
    # What the fixture `record_property` does, which warns when a JUnit file is written.
    properties = request.node.user_properties
    case = _case_under(request.node)
    return Record(
        lambda name, value: properties.append((name, value)), request.node.nodeid if case is None else case.id
    )
