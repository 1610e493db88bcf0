"""The plug-in's registration, with vLLM or without: what it says, and that it never raises."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from moe_runtime.integrations import vllm as plugin


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """vLLM, where it is imported, keeps its loggers' messages from the root logger, where caplog listens."""
    monkeypatch.setattr(plugin.logger, "propagate", False)
    plugin.logger.addHandler(caplog.handler)
    caplog.set_level(logging.DEBUG, logger=plugin.logger.name)
    yield caplog
    plugin.logger.removeHandler(caplog.handler)


def fake_vllm(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    module = ModuleType("vllm")
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.parametrize("value", [None, "0"])
def test_does_nothing_unless_asked(
    value: str | None, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(plugin.ENABLE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(plugin.ENABLE_VARIABLE, value)
    monkeypatch.setattr(plugin, "_offer", lambda: pytest.fail("it looked for vLLM"))
    assert plugin.register() == "MOE_RUNTIME_VLLM is not set to 1"
    assert not log.records


def test_says_that_vllm_is_missing(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(plugin.ENABLE_VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "vllm", None)
    reason = plugin.register()
    assert reason is not None and reason.startswith("vLLM cannot be imported")
    assert log.messages == [f"moe_runtime offers no experts: {reason}"]


@pytest.mark.parametrize("version", ["0.32.9", "0.34.0", "1.0.0", "0.330.0"])
def test_says_that_vllm_is_another_version(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.ENABLE_VARIABLE, "1")
    fake_vllm(monkeypatch, version)
    assert plugin.register() == f"vLLM is {version}; the plug-in is for 0.33.x"


def test_says_what_value_it_does_not_know(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(plugin.ENABLE_VARIABLE, "yes")
    assert plugin.register() == "MOE_RUNTIME_VLLM is 'yes'; accepted: 0 or 1"
    assert len(log.messages) == 1


def test_a_failure_is_logged_and_stays_here(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    """A vLLM of the right version without the modules that it should have."""
    monkeypatch.setenv(plugin.ENABLE_VARIABLE, "1")
    fake_vllm(monkeypatch, "0.33.0")
    for name in [name for name in sys.modules if name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    reason = plugin.register()
    assert reason is not None and reason.startswith("ModuleNotFoundError: ")
    assert f"moe_runtime offers no experts: {reason}" in log.messages


def test_entry_point() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["moe_runtime"].split(":")
    assert getattr(import_module(module), function) is plugin.register


def test_importing_the_plugin_imports_no_vllm() -> None:
    code = "import sys, moe_runtime.integrations.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
