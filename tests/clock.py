"""The CPU seconds of each test, subprocesses included: the slowest are printed, and those not marked slow bounded."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

SLOWEST = 10
START = pytest.StashKey[float]()
CPU = "cpu_seconds"

_charged = 0.0
_shared = 0.0
_sharing = False


def charge(seconds: float) -> None:
    """Add what a process that outlives the test spent for it."""
    global _charged
    _charged += seconds


def spent() -> float:
    """CPU seconds so far: of this process, of its children that have ended, and what was charged."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + _charged


@contextmanager
def shared() -> Iterator[None]:
    """What is made once for many tests is on nobody's clock."""
    global _shared, _sharing
    start, outer, _sharing = spent(), _sharing, True
    try:
        yield
    finally:
        _sharing = outer
        if not outer:
            _shared += spent() - start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--longest", type=float, default=30.0, help="CPU seconds of a test that is not marked slow")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef):
    with nullcontext() if fixturedef.scope == "function" else shared():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    item.stash[START] = spent() - _shared
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.when == "teardown":
        seconds, longest = spent() - _shared - item.stash[START], item.config.getoption("longest")
        report.user_properties.append((CPU, seconds))
        if seconds > longest and item.get_closest_marker("slow") is None:
            report.outcome = "failed"
            report.longrepr = f"{seconds:.0f} s of CPU time are more than {longest:g}: mark it slow, or make it faster"
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    seconds = {
        report.nodeid: value
        for group in terminalreporter.stats.values()
        for report in group
        for key, value in getattr(report, "user_properties", ())
        if key == CPU
    }
    terminalreporter.section(f"slowest {SLOWEST} tests, CPU seconds")
    for nodeid in sorted(seconds, key=seconds.__getitem__, reverse=True)[:SLOWEST]:
        terminalreporter.write_line(f"{seconds[nodeid]:7.1f}  {nodeid}")
    terminalreporter.write_line(f"{sum(seconds.values()):7.1f}  all tests, without what they share")
