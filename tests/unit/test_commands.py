"""What the command line makes of its arguments, and how it prints."""

import io
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from orchestrator.cli.commands import app
from orchestrator.cli.output import print_json
from orchestrator.errors import InputError
from tests.conftest import command, environment, write_project


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"n": NaN}', "is not JSON"),
        ('{"n": 1e999}', "is not JSON"),
        ('{"s": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ("@/nowhere/x.json", "No such file"),
        ("@/", "Is a directory"),
    ],
)
def test_an_input_that_no_event_can_carry_is_refused(text, message):
    """Also what Python's own reader takes: it would be refused by everybody behind."""
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["run", "w", "--input", text], catch_exceptions=False)


@pytest.mark.parametrize("command", [["run", "w"], ["runs", "wait", "x"]])
def test_a_timeout_that_is_no_duration_is_one_line(command):
    """And not a traceback."""
    with pytest.raises(InputError, match=r"--timeout must be a duration.*'5x'"):
        CliRunner().invoke(app, [*command, "--timeout", "5x"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r1", "r2", "--step", "a"], "--step is of one run; give one ID"),
        (["r1", "--step", "a/x"], "--step must be STEP, or STEP/INDEX with an item's number from 0, not 'a/x'"),
        (["r1", "--step", "a/"], "not 'a/'"),
    ],
)
def test_a_step_to_cancel_that_is_not_said_clearly_is_one_line(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["runs", "cancel", *arguments, "--project", str(tmp_path)], catch_exceptions=False)


def test_a_definition_is_drawn_and_listed_without_the_secrets_that_the_gateway_needs(tmp_path):
    """They are in the gateway's environment, and not in that of everybody who wants to look."""
    write_project(
        tmp_path,
        {
            "tasks.py": "def f(): ...\n",
            "workflows/w.yaml": "workflow: w\non:\n  - webhook: {path: a, verify: {github: env:NO_SUCH}}\n"
            "steps: {f: {task: 'tasks:f'}}\n",
        },
    )
    where = ["--project", str(tmp_path)]
    for arguments in (["graph", "w"], ["build", "w"], ["workflows", "list"], ["workflows", "list", "--json"]):
        result = CliRunner().invoke(app, [*arguments, *where], catch_exceptions=False)
        assert result.exit_code == 0
    result = CliRunner().invoke(app, ["validate", *where], catch_exceptions=False)
    assert "on.0.webhook.verify.github: secret env:NO_SUCH: the environment has no variable" in result.output


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_value_is_printed_as_json(monkeypatch, encoding):
    """Half a surrogate pair is JSON by its escape, and a terminal may know ASCII only."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    value = {"a": "\ud800", "ü": "✓"}
    print_json(value)
    sys.stdout.flush()
    assert json.loads(written.getvalue()) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--type", ""], "type must be a string that is not empty"),
        (["--type", "t", "--source", ""], "source must be"),
        (["--type", "orchestrator.file.created"], "types that begin with `orchestrator.` are not for others"),
        (["--type", "t", "--source", "orchestrator:s3/b"], "sources that begin with `orchestrator:`"),
        (["--type", "t", "--id", "\udcff"], "is not Unicode"),
        (["--type", "t", "--data", "NaN"], "--data is not JSON"),
        (["--type", "orchestrator.run.succeeded"], "not for others to use"),
        (["--type", "t", "--source", "orchestrator:runs"], "not for others"),
    ],
)
def test_an_event_that_would_be_set_aside_is_not_emitted(options, message):
    """The one who emits it is told."""
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["events", "emit", *options], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validat"], "No such command 'validat'"),
        (["init"], "Missing argument"),
        (["validate", "--bogus"], "No such option"),
        (["runs", "list", "--limit", "0"], "Invalid value"),
    ],
)
def test_a_usage_error_is_one_line(arguments: list[str], message: str) -> None:
    """The exit code of a usage error is 2, as everywhere."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_pool_that_no_step_uses_is_a_warning(tmp_path):
    """Not a fault: a step may come. `default` is always there."""
    write_project(
        tmp_path,
        {
            "tasks.py": "def f(): ...\n",
            "workflows/w.yaml": "workflow: w\nsteps: {f: {task: 'tasks:f', pool: cpu}}\n",
            "orchestrator.toml": "[pools.default]\n[pools.cpu]\n[pools.gpu]\n",
        },
    )
    where = ["--project", str(tmp_path)]
    result = CliRunner().invoke(app, ["validate", *where], catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "warning: orchestrator.toml: pools.gpu: no step uses it\n")
    result = CliRunner().invoke(app, ["validate", "--json", *where], catch_exceptions=False)
    assert json.loads(result.stdout)["warnings"] == ["orchestrator.toml: pools.gpu: no step uses it"]
