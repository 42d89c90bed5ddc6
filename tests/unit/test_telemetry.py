"""Log lines: what is in them, whatever a user does to `logging` and structlog; and what a step's text is made of."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import environment
from workers.capture import Captured

BEGIN = """
import logging, logging.config, sys, threading, structlog
from orchestrator.telemetry import bound, configure_logging, get_logger
from workers.capture import Captured, install
ours = get_logger("orchestrator.test")
configure_logging(role="worker", pool="default", is_terminal=False)
install()
captured = Captured(10_000)
"""


def run(code: str) -> tuple[list[dict[str, Any]], str]:
    """Run a user's code as a step does; return what came on stderr, line by line, and what was captured."""
    body = "\n".join(f"        {line}" for line in code.strip().splitlines())
    script = (
        f"{BEGIN}\nwith bound(mask=captured.mask, is_step=True, event_id='e1', run='r1', step='s/0', attempt=1):\n"
        f"    with captured:\n{body}\n    ours.info('ended')\n"
        "ours.info('after')\nprint(repr(captured.text()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()], eval(done.stdout)


def test_every_line_of_a_step_says_whose_it_is() -> None:
    lines, text = run("""
logging.getLogger("shop").warning("no %s", "stock", extra={"item": 3})
structlog.get_logger().info("priced", total=4)
logging.getLogger("shop").debug("not wanted")
""")
    shop, priced, ended, after = lines
    names = {"role": "worker", "pool": "default", "event_id": "e1", "run": "r1", "step": "s/0", "attempt": 1}
    assert shop.pop("timestamp").endswith("Z")
    assert shop == {"event": "no stock", "level": "warning", "logger": "shop", "item": 3, **names}
    assert (priced["event"], priced["total"], priced["run"]) == ("priced", 4, "r1")
    assert ended.items() >= names.items()
    assert after.keys() == {"event", "level", "logger", "timestamp", "role", "pool"}
    assert text.splitlines() == ["WARNING shop: no stock", "INFO __main__: priced total=4"]


@pytest.mark.parametrize(
    "configuration",
    [
        "logging.basicConfig()",
        "logging.basicConfig(force=True, level=logging.INFO)",
        "logging.config.dictConfig({'version': 1})",
        "logging.getLogger('shop').addHandler(logging.StreamHandler())",
        "logging.getLogger('shop').addHandler(logging.StreamHandler()); logging.getLogger('shop').propagate = False",
        "logging.getLogger('shop').addHandler(logging.StreamHandler(sys.stdout))",
        "structlog.configure(processors=[structlog.processors.KeyValueRenderer()], "
        "logger_factory=structlog.PrintLoggerFactory())",
        "structlog.configure(logger_factory=structlog.stdlib.LoggerFactory(), "
        "processors=[structlog.processors.JSONRenderer()])",
        "sys.stdout = sys.stderr = sys.__stdout__",
    ],
)
def test_a_users_configuration_breaks_nothing_and_doubles_nothing(configuration: str) -> None:
    lines, text = run(f'{configuration}\nlogging.getLogger("shop").info("sold")')
    assert [line["event"] for line in lines] == ["sold", "ended", "after"]
    assert all(line["run"] == "r1" for line in lines[:2])
    assert text.count("sold") == 1


def test_a_users_format_is_kept_in_the_text() -> None:
    _, text = run('logging.basicConfig(format="<%(message)s>")\nlogging.getLogger("shop").info("sold")')
    assert text == "<sold>\n"


def test_what_a_user_configures_for_structlog_holds_for_the_user() -> None:
    lines, text = run("""
structlog.configure(processors=[structlog.processors.KeyValueRenderer()], logger_factory=structlog.PrintLoggerFactory())
structlog.get_logger().info("priced", total=4)
""")
    assert [line["event"] for line in lines] == ["ended", "after"]
    assert text == "event='priced' total=4\n" or text == "total=4 event='priced'\n"


def test_threads_of_a_step_are_the_steps() -> None:
    lines, text = run("""
def work():
    logging.getLogger("shop").info("in a thread")
    structlog.get_logger("shop").info("structured")
thread = threading.Thread(target=work)
thread.start()
thread.join()
""")
    assert [line["run"] for line in lines[:2]] == ["r1", "r1"]
    assert text.splitlines() == ["INFO shop: in a thread", "INFO shop: structured"]


def test_an_exception_is_one_line() -> None:
    lines, text = run("""
try:
    {}["missing"]
except KeyError:
    logging.getLogger("shop").exception("broken")
    structlog.get_logger().exception("too")
""")
    for line in lines[:2]:
        assert line["level"] == "error"
        assert (line["exception"]["type"], line["exception"]["message"]) == ("KeyError", "'missing'")
        assert line["exception"]["traceback"].startswith("Traceback (most recent call last):\n")
    assert text.count("KeyError: 'missing'") == 2


def test_secrets_are_masked_wherever_they_stand() -> None:
    lines, text = run("""
secret = 'hun"ter\\n2é'
captured.hide(secret)
captured.hide("471108154711")
log = logging.getLogger("shop")
log.info("is %s or %r", secret, secret, extra={"deep": [{"a": (secret, b"x")}], "number": 471108154711, secret: 1})
structlog.get_logger().info("plain", token=secret)
import json, urllib.parse
log.info(json.dumps({"token": secret}) + urllib.parse.quote(secret))
try:
    raise ValueError(f"no {secret}")
except ValueError:
    log.exception("failed")
class Odd:
    def __str__(self): return secret
log.info("odd", extra={"odd": Odd()})
print(secret, [secret])
""")
    written = json.dumps(lines, ensure_ascii=False) + text
    assert "***" in written
    assert "ter" not in written.replace("failed", "").replace("after", "")
    assert "471108154711" not in written
    assert lines[0]["deep"] == [{"a": ["***", "b'x'"]}]
    assert lines[3]["exception"]["message"] == "no ***"


def test_a_secret_that_the_limit_cuts_in_two_is_not_shown() -> None:
    captured = Captured(12)
    captured.hide("hunter2")
    captured.write("it is: hunter2")
    assert captured.text() == "it is: \n[2 more characters were not kept]\n"


def test_ids_that_lines_are_looked_for_by_are_not_the_users_to_change() -> None:
    lines, _ = run("""
structlog.get_logger().info("x", run="mine", level="mine")
logging.getLogger("shop").info("y", extra={"step": "mine"})
""")
    assert (lines[0]["run"], lines[0]["run_"], lines[0]["level"], lines[0]["level_"]) == ("r1", "mine", "info", "mine")
    assert (lines[1]["step"], lines[1]["step_"]) == ("s/0", "mine")


def test_what_a_step_binds_in_structlog_ends_with_it() -> None:
    lines, _ = run("""
structlog.contextvars.clear_contextvars()
structlog.contextvars.bind_contextvars(customer=5)
structlog.get_logger().info("x")
with bound(is_step=True, run="r2"):
    pass
structlog.get_logger().info("y")
""")
    assert (lines[0]["customer"], lines[0]["run"]) == (5, "r1")
    assert "customer" not in lines[1]


def test_a_bad_log_call_fails_nothing_and_is_not_lost() -> None:
    lines, text = run("""
class Bad:
    def __str__(self): raise RuntimeError("no text")
log = logging.getLogger("shop")
log.info("%d", "x")
log.info("bad", extra={"bad": Bad(), "nan": float("nan"), "half": "\\udc80", "huge": 10 ** 5000})
loop = []
loop.append(loop)
log.info("loop", extra={"loop": loop, "long": "x" * 100_000})
""")
    assert lines[0]["event"] == "%d ('x',)"
    assert lines[1]["bad"] == "(its text could not be made: RuntimeError)"
    assert lines[1]["nan"] == "nan"
    assert len(lines[2]["long"]) < 20_000
    assert text.startswith("INFO shop: %d ('x',)\n")


def test_libraries_of_the_worker_are_not_the_steps_and_bring_no_fields() -> None:
    lines, _ = run("""
logging.basicConfig(force=True, level=logging.DEBUG)
logging.getLogger("celery.app.trace").error("failed", extra={"data": {"args": "the body"}})
logging.getLogger("kombu").info("chatter")
""")
    assert [line["event"] for line in lines] == ["failed", "ended", "after"]
    assert "the body" not in str(lines)


def test_the_lines_of_ours_are_cut() -> None:
    lines, _ = run("ours.info('long', error='x' * 5_000, units=list(range(1_000)))")
    assert len(lines[0]["error"]) == 501
    assert len(lines[0]["units"]) == 100


def test_a_terminal_gets_text() -> None:
    script = (
        f"{BEGIN}\nconfigure_logging(is_terminal=True)\ntry: 1/0\nexcept ZeroDivisionError: ours.exception('broken')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert "broken" in done.stderr
    assert "Traceback" in done.stderr
    assert not done.stderr.startswith("{")


def test_lines_that_nobody_takes_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.telemetry import get_logger

    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    get_logger("orchestrator.test").info("nobody hears it")
