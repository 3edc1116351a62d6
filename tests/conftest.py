"""What every suite shares: how hard Hypothesis tries, and that no check is skipped unnoticed in CI.

A test names the commands it runs with `@pytest.mark.needs("nbdinfo")`, or asks the `require_tool`
fixture for a command's path. Without the command it is skipped, and in CI it fails. What the host
itself cannot do (no loop devices, no FUSE) is `pytest.skip("host: ...")`; any other skip fails CI.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

IS_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
HOST_LACKS = "host: "

# Ordinary users lack the sbin directories, where mkfs.ext4 and sfdisk live.
os.environ["PATH"] = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)

# No deadline: the suites share two cores with builds, and a slow machine is not a bug.
for profile, examples in (("dev", 50), ("ci", 200), ("deep", 5000)):
    hypothesis.settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if IS_CI else "dev"))


def tool_path(command: str) -> str:
    """Return where a command is; skip the test without it, and in CI fail it."""
    found = shutil.which(command)
    if found is not None:
        return found
    if IS_CI:
        pytest.fail(f"{command} is missing: tools/bootstrap test must install it", pytrace=False)
    pytest.skip(f"{command} is missing: run tools/bootstrap test")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for command in marker.args:
            tool_path(command)


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """`require_tool("nbdinfo")` returns its path, or skips here and fails in CI."""
    return tool_path


@pytest.fixture(autouse=True)
def _own_state(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Keep every test off the user's own volumes, and its output plain."""
    state: Path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("STILLBLOCK_STATE", str(state))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    yield
    shutil.rmtree(state, ignore_errors=True)


_skipped: list[tuple[str, str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))


def _skips_that_fail_ci() -> list[tuple[str, str]]:
    return [(node, reason) for node, reason in _skipped if not reason.startswith(HOST_LACKS)]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if IS_CI and exitstatus == pytest.ExitCode.OK and _skips_that_fail_ci():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if IS_CI:
        for node, reason in _skips_that_fail_ci():
            terminalreporter.write_line(f"SKIPPED IN CI, so this run fails: {node}: {reason}")
