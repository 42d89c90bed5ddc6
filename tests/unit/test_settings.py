"""Settings: where they come from, and every refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.errors import SettingsError
from orchestrator.pools import PoolKind, PoolSettings, pools_from_json, pools_to_json
from orchestrator.retries import RetryPolicy
from orchestrator.settings import Settings, mask_url, read_secret
from orchestrator.workflows import Defaults


def load(tmp_path: Path, text: str = "", environ: dict[str, str] | None = None, **flags: object) -> Settings:
    (tmp_path / "orchestrator.toml").write_text(text)
    return Settings.load(tmp_path, environ=environ or {}, **flags)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text = "[settings]\ngrace_s = 1\nlog_bytes = 1\nport = 1\n"
    environ = {"ORCHESTRATOR_GRACE_S": "2", "ORCHESTRATOR_PORT": "2", "HOME": "/"}
    found = load(tmp_path, text, environ, port=3, host=None)
    assert (found.log_bytes, found.grace_s, found.port, found.host) == (1, 2, 3, "127.0.0.1")


def test_without_any_setting_everything_is_embedded_and_in_the_project(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert found.is_embedded
    assert found.data_dir == tmp_path / ".orchestrator"
    assert found.blobs_dir == tmp_path / ".orchestrator" / "blobs"


def test_one_redis_url_serves_both(tmp_path: Path) -> None:
    found = load(tmp_path, environ={"ORCHESTRATOR_BROKER_URL": "redis://h/0"})
    assert (found.ledger_url, found.is_embedded) == ("redis://h/0", False)


def test_rabbitmq_takes_the_messages_and_redis_the_ledger(tmp_path: Path) -> None:
    found = load(tmp_path, environ={"ORCHESTRATOR_BROKER_URL": "amqp://h//", "ORCHESTRATOR_LEDGER_URL": "redis://h/0"})
    assert (found.broker_url, found.ledger_url) == ("amqp://h//", "redis://h/0")


def test_urls_may_be_kept_in_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text("redis://:secret@h/0\n")
    monkeypatch.setenv("BROKER", "amqp://user:secret@h//")
    found = load(tmp_path, environ={"ORCHESTRATOR_BROKER_URL": f"file:{tmp_path}/url"})
    assert (found.broker_url, found.ledger_url) == ("redis://:secret@h/0", "redis://:secret@h/0")
    text = f'[settings]\nbroker_url = "env:BROKER"\nledger_url = "file:{tmp_path}/url"\n'
    found = load(tmp_path, text)
    assert (found.broker_url, found.ledger_url) == ("amqp://user:secret@h//", "redis://:secret@h/0")


def test_a_url_that_is_not_where_it_should_be_is_told_without_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "odd").write_text("http://secret@h/0\n")
    with pytest.raises(SettingsError, match=r"broker_url: secret file:/nowhere/x: No such file"):
        load(tmp_path, environ={"ORCHESTRATOR_BROKER_URL": "file:/nowhere/x"})
    with pytest.raises(SettingsError, match=r"broker_url: what file:.*empty holds is empty"):
        load(tmp_path, environ={"ORCHESTRATOR_BROKER_URL": f"file:{tmp_path}/empty"})
    with pytest.raises(SettingsError, match="ledger_url must be a redis") as caught:
        load(tmp_path, environ={"ORCHESTRATOR_LEDGER_URL": f"file:{tmp_path}/odd"})
    assert "secret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[settings]\ngrace = 3", "settings.grace: unknown setting 'grace'; did you mean 'grace_s'?"),
        ("[setting]\n", "unknown section 'setting'; did you mean 'settings'?"),
        ("[settings]\ngrace_s = -1", "settings.grace_s: must be a whole number, not negative, not -1"),
        ("[settings]\nmaximum_losses = 0", "settings.maximum_losses: must be at least 1, not 0"),
        ("[settings]\ngrace_s = 'x'", "settings.grace_s: must be a whole number, not negative, not 'x'"),
        ("[settings]\nhost = 3", "settings.host: must be a text, not 3"),
        ("[settings]\nfsync = 'no'", "fsync must be everysec or always"),
        ("[settings]\nledger_url = 'amqp://x'", "ledger_url must be a redis:// URL"),
        ("[settings]\nledger_url = 'valkey://x'", "ledger_url must be a redis:// URL"),  # redis-py does not know it
        ("[settings]\nbroker_url = 'unix:///x'", "broker_url must be a redis:// or an amqp:// URL"),  # nor kombu this
        ("[settings]\nbroker_url = 'amqp://x'", "broker_url is set but ledger_url is not"),
        ("[settings]\nbroker_url = 'rabbit:hunter2@h'", "broker_url must be a redis:// or an amqp:// URL"),
        ("[settings]\nblobs_url = 'ftp://x'", "blobs_url must be a file:// URL"),
        ("[pools.a]\nconcurrency = 0", "pools.a.concurrency: must be at least 1, not 0"),
        ("[pools.a]\nsize = 1", "pools.a.size: unknown key 'size'"),
        ("[pools.a]\nmin = 3\nmax = 2", "orchestrator.toml: pools.a.min: 3 is above max 2"),
        ("[pools.a]\nmin = 3\nconcurrency = 2", "pools.a.min: 3 is above max 2 (which is concurrency)"),
        ("[pools.a]\nmin = 90_000", "pools.a.min: 90000 is above max"),
        ("[pools.a]\nmin = -1", "pools.a.min: must be at least 0, not -1"),
        ("[pools.a]\nmax = 0", "pools.a.max: must be at least 1, not 0"),
        ("[pools.a]\nmax = 1_000_000", "pools.a.max: must be at most 100000, not 1000000"),
        ("[pools.a]\nmax = 1.5", "pools.a.max: must be a whole number, not 1.5"),
        ("[pools.a]\nmax = true", "pools.a.max: must be a whole number, not True"),
        ("[pools.a]\nkind = 'gevent'", "pools.a.kind: must be one of prefork, threads, not 'gevent'"),
        ("[pools.a]\nmemory = 'much'", "pools.a.memory: must be a number of bytes, or text such as 10KB"),
        ("[pools.a]\nmemory = 1", "pools.a.memory: must be from 1MB to 1000000GB"),
        ("[pools.a]\ncpu = 0", "pools.a.cpu: must be more than 0, not 0"),
        ("[pools.a]\ncpu = nan", "pools.a.cpu: must be at most 10000, not nan"),
        ("[pools.a]\ngpu = 0.5", "pools.a.gpu: must be a whole number, not 0.5"),
        ("[pools.a]\nidle_after = 0", "pools.a.idle_after: must be more than 0, not 0"),
        ("[pools.a]\nidle_after = 'soon'", "pools.a.idle_after: must be a duration"),
        ("[pools.a]\ntarget = 'soon'", "pools.a.target.start_within: must be a duration"),
        (
            "[pools.a]\ntarget = {within = '5s'}",
            "pools.a.target.within: unknown key 'within'; did you mean 'start_within'",
        ),
        ("[pools.a]\ntarget = []", "pools.a.target: must be a mapping, not a list"),
        ("[pools.a]\nmax_tasks_per_process = 0", "pools.a.max_tasks_per_process: must be at least 1, not 0"),
        (
            "[pools.a]\nkind = 'threads'\nmax_tasks_per_process = 5",
            "pools.a.max_tasks_per_process: belongs to a pool of kind prefork",
        ),
        ("[pools]\na = 1", "pools.a: must be a table"),
        ("settings = 3", "settings: must be a table, as in [settings]"),
        ("pools = 3", "pools: must be a table, as in [pools]"),
        ("secrets = ['a']", "secrets: must be a table, as in [secrets]"),
        ("[pools.'a b']", "use letters, digits, '_' and '-' in a pool's name"),
        ("[settings]\nport = 99999999", "port must be at most 65535"),
        ("[settings]\nhost = ''", "host must not be empty"),
        ("[settings]\nbroker_url = 'redis://:hunter2/x@h:1/0'", "broker_url is not a URL; quote"),
        ("[settings]\nbroker_url = 'redis://:a@hunter2@h:1/0'", "broker_url is not a URL; quote"),
        ("[settings]\nsentry_dsn = 'https://hunter2@h'", "sentry_dsn must be env:NAME, file:PATH or a DSN"),
        ("[settings]\nsentry_dsn = 'hunter2'", "sentry_dsn must be env:NAME, file:PATH or a DSN"),
        ("[secrets]\nA = 'hunter2'", "secrets.A: must be env:NAME or file:PATH, never the secret itself"),
        ("defaults = 3", "defaults: must be a table, as in [defaults]"),
        (
            "[defaults]\nretries = 3",
            "orchestrator.toml: defaults.retries: unknown key 'retries'; did you mean 'retry'?",
        ),
        ("[defaults]\nretry = 0", "orchestrator.toml: defaults.retry: must be a whole number from 1"),
        ("[defaults]\nretry = 'x'", "orchestrator.toml: defaults.retry: must be a mapping, or the number of attempts"),
        (
            "[defaults.retry]\njitter = 'x'",
            "orchestrator.toml: defaults.retry.jitter: must be one of full, equal, none",
        ),
        ("[defaults.retry]\nnap = 1", "orchestrator.toml: defaults.retry.nap: unknown key 'nap'"),
        ("[defaults]\ntimeout = 0", "orchestrator.toml: defaults.timeout: must be more than 0, not 0"),
        ("[defaults]\ntimeout = 'soon'", "orchestrator.toml: defaults.timeout: must be a duration, such as"),
        ("[defaults]\nmemory = '1XB'", "orchestrator.toml: defaults.memory: must be a number of bytes"),
        ("[defaults]\nmemory = 0", "orchestrator.toml: defaults.memory: must be from 1MB to 1000000GB"),
        ("[settings", "orchestrator.toml: "),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert "hunter2" not in str(error.value)


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load(
            tmp_path,
            "[settings]\nnope = 1\n[other]\n[defaults]\ntimeout = 0\nretry = {jitter = 1, maximum_attempts = 0}\n",
            {"ORCHESTRATOR_PROT": "1"},
        )
    assert str(error.value).count(";") >= 2
    for field in ("timeout", "retry.jitter", "retry.maximum_attempts"):
        assert f"defaults.{field}: must be" in str(error.value)
    assert "ORCHESTRATOR_PROT: unknown setting 'prot'; did you mean 'port'?" in str(error.value)


def test_defaults_of_steps_are_read(tmp_path: Path) -> None:
    assert load(tmp_path).defaults == Defaults()
    text = "[defaults]\ntimeout = '1h'\nmemory = '1GiB'\n[defaults.retry]\nmaximum_attempts = 5\njitter = 'none'\n"
    retry = RetryPolicy(maximum_attempts=5, jitter="none")
    assert load(tmp_path, text).defaults == Defaults(retry=retry, timeout_s=3600.0, memory=2**30)
    assert load(tmp_path, "[defaults]\nretry = 5").defaults == Defaults(retry=RetryPolicy(maximum_attempts=5))


def test_passwords_are_masked() -> None:
    assert mask_url("redis://:secret@h:1/0") == "redis://:***@h:1/0"
    assert mask_url("amqp://u:p@h//") == "amqp://u:***@h//"
    assert mask_url("redis://h:1/0") == "redis://h:1/0"


def test_secrets_are_read_by_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    (tmp_path / "s").write_text("y\n")
    assert (read_secret("env:A_SECRET"), read_secret(f"file:{tmp_path / 's'}")) == ("x", "y")
    with pytest.raises(SettingsError, match="the environment has no variable NOT_THERE"):
        read_secret("env:NOT_THERE")
    with pytest.raises(SettingsError, match="No such file"):
        read_secret(f"file:{tmp_path / 'no'}")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="it is not text in UTF-8"):
        read_secret(f"file:{tmp_path / 'bytes'}")
    for path in ("~nobody-of-that-name/x", "a\0b"):
        with pytest.raises(SettingsError, match="it is no path"):
            read_secret(f"file:{path}")


@pytest.mark.parametrize(
    "text", ["", "ann", "ann:", ":secret", "ann:s\u00e9cret", "ann:secret\nbob:secret", "ann:a\tb"]
)
def test_a_password_that_nobody_could_give_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MONITOR", text)
    settings = Settings.load(tmp_path, environ={}, monitor_auth="env:MONITOR")
    with pytest.raises(SettingsError, match="env:MONITOR holds is not `user:password`, one line of ASCII"):
        settings.read_monitor_auth()


def test_a_dsn_is_read_where_it_is_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dsn = "https://hunter2@sentry.example/path/42"
    monkeypatch.setenv("A_DSN", dsn)
    (tmp_path / "dsn").write_text(f"{dsn}\n")
    (tmp_path / "odd").write_text("hunter2")
    for given in (dsn, "env:A_DSN", f"file:{tmp_path / 'dsn'}"):
        found = load(tmp_path, environ={"ORCHESTRATOR_SENTRY_DSN": given})
        assert found.read_sentry_dsn() == dsn
        assert "hunter2" not in repr(found)
    assert load(tmp_path).read_sentry_dsn() == ""
    with pytest.raises(SettingsError, match="is no DSN") as error:
        load(tmp_path, environ={"ORCHESTRATOR_SENTRY_DSN": f"file:{tmp_path / 'odd'}"}).read_sentry_dsn()
    assert "hunter2" not in str(error.value)


def test_a_pool_says_its_limits(tmp_path: Path) -> None:
    """All keys; the short form of the target; one bound stands for the other."""
    text = (
        "[pools.a]\nmin = 1\nmax = 8\nconcurrency = 4\nkind = 'prefork'\nmemory = '2GB'\ncpu = 0.5\ngpu = 1\n"
        "max_tasks_per_process = 100\nidle_after = '2m'\ntarget = {start_within = '500ms'}\n"
        "[pools.b]\nconcurrency = 3\ntarget = '1s'\n[pools.c]\nmax = 50\nkind = 'threads'\n"
        "[pools.d]\nkind = 'threads'\n[pools.e]\nmax = 90\n"
    )
    pools = load(tmp_path, text).pools
    assert pools["a"] == PoolSettings(
        minimum=1, maximum=8, concurrency=4, memory=2 * 10**9, cpu=0.5, gpu=1, max_tasks_per_process=100,
        idle_after_s=120.0, start_within_s=0.5,
    )  # fmt: skip
    assert (pools["b"].maximum, pools["b"].start_within_s, pools["b"].minimum) == (3, 1.0, 0)
    assert (pools["d"].maximum, pools["d"].concurrency) == (16, 16)
    assert (pools["e"].maximum, pools["e"].concurrency) == (90, os.cpu_count())
    assert (pools["c"].maximum, pools["c"].concurrency, pools["c"].kind) == (50, 50, PoolKind.THREADS)
    assert load(tmp_path).pool("other") == PoolSettings()
    assert pools_from_json(json.loads(json.dumps(pools_to_json(pools)))) == pools
