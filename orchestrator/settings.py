"""Settings: one frozen object, from flags, then `ORCHESTRATOR_*`, then `orchestrator.toml`, then defaults.

The environment is read here, once, when `Settings.load` is called; never at import. Unknown keys are errors.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ValidationError

from orchestrator import schema
from orchestrator.errors import SettingsError, unknown
from orchestrator.pools import PoolSettings as PoolSettings
from orchestrator.workflows import DEFAULT_POOL, Defaults

FILE_NAME = "orchestrator.toml"
ENVIRONMENT_PREFIX = "ORCHESTRATOR_"

#: Schemes of the URLs of servers.
_REDIS = ("redis", "rediss")
_AMQP = ("amqp", "amqps")

_SECTIONS = ("settings", "pools", "secrets", "defaults")
_DSN = re.compile(r"(env:.+|file:.+|https?://[^/@\s]+@[^/@\s]+(/[^/@\s]+)*/\d+|)\Z")
_Model = TypeVar("_Model", bound=BaseModel)
_POOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,50}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. Durations end in `_s` and are seconds.

    With `broker_url` and `ledger_url` empty, `up` starts an embedded server in `data_dir` and both are its.
    """

    project: Path
    data_dir: Path
    #: Where messages travel; a Redis or an AMQP (RabbitMQ) URL, given as such or as `env:NAME` or `file:PATH`.
    broker_url: str = ""
    #: Where runs are recorded; a Redis URL, given alike.
    ledger_url: str = ""
    #: Where large values are kept; `file:///...`.
    blobs_url: str = ""
    #: When the embedded server writes to disk: `everysec` or `always`.
    fsync: str = "everysec"
    #: Address and port of the gateway: webhooks and the API; port 0 takes a free one and keeps it.
    host: str = "127.0.0.1"
    port: int = 0
    #: Address and port of its health and metrics.
    health_host: str = "127.0.0.1"
    health_port: int = 0
    #: Address and port of the monitor (Flower).
    monitor_host: str = "127.0.0.1"
    monitor_port: int = 5555
    #: What it asks for: `env:NAME` or `file:PATH` of `user:password`; empty: nothing, and only on this machine.
    monitor_auth: str = ""
    #: Address and port of the embedded server.
    server_host: str = "127.0.0.1"
    server_port: int = 0
    #: How long runs are kept after they have ended.
    retention_s: int = 30 * 86400
    #: How long events are kept, and how many at most.
    events_retention_s: int = 30 * 86400
    events_maximum: int = 100_000
    #: How many runs may lie between an event and its first cause; then it is a dead letter.
    maximum_hops: int = 16
    #: How long dead letters are kept.
    dead_letters_retention_s: int = 30 * 86400
    #: How long an event is recognised when it comes again.
    dedupe_s: int = 7 * 86400
    #: Values of more bytes go to the blob store.
    payload_bytes: int = 64 * 1024
    #: Captured output kept for an attempt, in bytes.
    log_bytes: int = 64 * 1024
    #: How long a step waits for a function that cannot be imported: a deployment may be in progress.
    deploy_wait_s: int = 300
    #: How long steps in progress may go on when `up` or a worker is told to stop.
    grace_s: int = 30
    #: How long a step may go on after it was told to stop, because of its timeout or a cancel; then it is killed.
    stop_grace_s: float = 10.0
    #: A step whose process died this often is not run again.
    maximum_losses: int = 5
    #: How often a watched folder is looked through for files that no notification told of.
    rescan_s: float = 30.0
    #: Where dead letters are reported: a Sentry DSN, or `env:NAME` or `file:PATH` of one; empty: nowhere.
    sentry_dsn: str = field(default="", repr=False)
    #: A file that a role of its own touches every second as long as it does its work; empty: none.
    health_file: str = ""
    pools: Mapping[str, PoolSettings] = field(default_factory=dict)
    #: Name -> `env:NAME` or `file:PATH`; what `{{ secrets.NAME }}` reads.
    secrets: Mapping[str, str] = field(default_factory=dict)
    #: `[defaults]`: what steps take that say nothing themselves, nor their @task or workflow.
    defaults: Defaults = field(default_factory=Defaults)

    @classmethod
    def load(cls, project: Path, *, environ: Mapping[str, str] | None = None, **flags: Any) -> Settings:
        """Read the settings of a project; `flags` that are None do not count.

        Raises SettingsError with all faults at once.
        """
        environ = os.environ if environ is None else environ
        table, problems = _read_file(project / FILE_NAME)
        values: dict[str, Any] = {}
        kinds = _kinds()
        for section in _SECTIONS:
            if not isinstance(table.get(section, {}), dict):
                problems.append(f"{FILE_NAME}: {section}: must be a table, as in [{section}]")
                table[section] = {}
        for name, value in table.get("settings", {}).items():
            _set(values, kinds, name, value, f"{FILE_NAME}: settings.{name}", problems)
        for name, text in environ.items():
            if name.startswith(ENVIRONMENT_PREFIX):
                _set(values, kinds, name.removeprefix(ENVIRONMENT_PREFIX).lower(), text, name, problems)
        for name, value in flags.items():
            if value is not None:
                _set(values, kinds, name, value, f"--{name.replace('_', '-')}", problems)
        for name in ("broker_url", "ledger_url"):
            _resolve(values, name, problems)
        values["pools"] = _pools(table.get("pools", {}), problems)
        values["secrets"] = _secrets(table.get("secrets", {}), problems)
        values["defaults"] = _defaults(table.get("defaults", {}), problems)
        for section in table:
            if section not in _SECTIONS:
                problems.append(f"{FILE_NAME}: {unknown('section', section, _SECTIONS)}")
        values["data_dir"] = (project / values.get("data_dir", ".orchestrator")).expanduser().resolve()
        if values.get("fsync", "everysec") not in ("everysec", "always"):
            problems.append(f"fsync must be everysec or always, not {values['fsync']!r}")
        if _scheme(values.get("ledger_url") or "redis://") not in _REDIS:
            problems.append("ledger_url must be a redis:// URL, because the ledger is kept in Redis")
        if _scheme(values.get("broker_url") or "redis://") not in (*_REDIS, *_AMQP):
            problems.append("broker_url must be a redis:// or an amqp:// URL")
        if bool(values.get("ledger_url")) and not values.get("broker_url"):
            values["broker_url"] = values["ledger_url"]
        elif _scheme(values.get("broker_url", "")) in _REDIS and not values.get("ledger_url"):
            values["ledger_url"] = values["broker_url"]
        elif values.get("broker_url") and not values.get("ledger_url"):
            problems.append("broker_url is set but ledger_url is not; set it to the redis:// URL of the ledger")
        if not values.get("blobs_url", "file://").startswith("file://"):
            problems.append("blobs_url must be a file:// URL")
        for name in ("port", "health_port", "monitor_port", "server_port"):
            if not 0 <= values.get(name, 0) <= 65535:
                problems.append(f"{name} must be at most 65535, not {values[name]}")
        for name in ("host", "health_host", "monitor_host", "server_host"):
            if not values.get(name, "x").strip():
                problems.append(f"{name} must not be empty; 127.0.0.1 is this machine alone")
        if values.get("monitor_auth") and not values["monitor_auth"].startswith(("env:", "file:")):
            problems.append("monitor_auth must be env:NAME or file:PATH of `user:password`, never the password itself")
        if not _DSN.match(values.get("sentry_dsn", "")):
            problems.append("sentry_dsn must be env:NAME, file:PATH or a DSN as https://KEY@HOST/PROJECT")
        problems += [problem for name in ("broker_url", "ledger_url") for problem in _url_problems(name, values)]
        if problems:
            raise SettingsError("; ".join(problems))
        return cls(project=project, **values)

    @property
    def has_redis_broker(self) -> bool:
        """Whether messages travel on Redis."""
        return not self.broker_url or _scheme(self.broker_url) in _REDIS

    def read_sentry_dsn(self) -> str:
        """Return the DSN that `sentry_dsn` is or refers to; empty if none is set. Raises SettingsError, without it."""
        if not self.sentry_dsn.startswith(("env:", "file:")):
            return self.sentry_dsn
        dsn = read_secret(self.sentry_dsn).strip()
        if not _DSN.match(dsn) or dsn.startswith(("env:", "file:")):
            raise SettingsError(f"sentry_dsn: what {self.sentry_dsn} holds is no DSN as https://KEY@HOST/PROJECT")
        return dsn

    def read_monitor_auth(self) -> str:
        """Return the `user:password` that `monitor_auth` refers to; empty if it is not set. Raises SettingsError."""
        if not self.monitor_auth:
            return ""
        text = read_secret(self.monitor_auth).strip()
        user, _, password = text.partition(":")
        if not user or not password or not (text.isascii() and text.isprintable()):
            raise SettingsError(
                f"monitor_auth: what {self.monitor_auth} holds is not `user:password`, one line of ASCII characters"
            )
        return text

    @property
    def is_embedded(self) -> bool:
        """Whether `up` starts a server of its own."""
        return not self.broker_url

    @property
    def blobs_dir(self) -> Path:
        return Path(urlsplit(self.blobs_url).path) if self.blobs_url else self.data_dir / "blobs"

    def evolve(self, **changes: Any) -> Settings:
        """Return a copy with some settings changed."""
        return replace(self, **changes)

    def pool(self, name: str) -> PoolSettings:
        """Return the settings of a pool; one that is not declared has all at its default."""
        return self.pools.get(name, PoolSettings())

    @property
    def declared_pools(self) -> Mapping[str, PoolSettings] | None:
        """The pools that a step may name; None when none is declared, and then any name is a pool."""
        return {DEFAULT_POOL: PoolSettings(), **self.pools} if self.pools else None


def _resolve(values: dict[str, Any], name: str, problems: list[str]) -> None:
    """Put the URL in the place of a reference to it."""
    if values.get(name, "").startswith(("env:", "file:")):
        reference = values.pop(name)
        try:
            values[name] = read_secret(reference).strip()
        except SettingsError as exc:
            problems.append(f"{name}: {exc}")
        else:
            if not values[name]:
                problems.append(f"{name}: what {reference} holds is empty")


def _scheme(url: str) -> str:
    return url.partition("://")[0]


def _url_problems(name: str, values: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with a URL, without a piece of it: a password that is not quoted may be any piece."""
    try:
        port = urlsplit(values.get(name, "")).port
    except ValueError:
        port = -1
    is_odd = port == -1 or values.get(name, "").count("@") > 1
    return [f"{name} is not a URL; quote `@`, `/`, `:` and `#` in its password as %40, %2F, %3A, %23"] if is_odd else []


def mask_url(url: str) -> str:
    """Return a URL without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user = parts.username or ""
    return urlunsplit(parts._replace(netloc=f"{user}:***@{parts.netloc.rpartition('@')[2]}"))


def read_secret(reference: str) -> str:
    """Return the secret that `env:NAME` or `file:PATH` refers to. Raises SettingsError; the message holds no secret."""
    kind, _, where = reference.partition(":")
    if kind == "env":
        value = os.environ.get(where)
        if value is None:
            raise SettingsError(f"secret {reference}: the environment has no variable {where}")
        return value
    try:
        return Path(where).expanduser().read_text(encoding="utf-8").rstrip("\n")
    except OSError as exc:
        raise SettingsError(f"secret {reference}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise SettingsError(f"secret {reference}: it is not text in UTF-8") from exc
    except (RuntimeError, ValueError) as exc:  # ~somebody who is not there; a zero byte
        raise SettingsError(f"secret {reference}: it is no path") from exc


def _read_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), []
    except FileNotFoundError:
        return {}, []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        return {}, [f"{FILE_NAME}: {exc}"]


def _kinds() -> dict[str, Any]:
    kinds = get_type_hints(Settings)
    return {f.name: kinds[f.name] for f in fields(Settings) if f.name not in ("project", *_SECTIONS)}


def _set(
    values: dict[str, Any], kinds: Mapping[str, Any], name: str, value: Any, place: str, problems: list[str]
) -> None:
    if name not in kinds:
        problems.append(f"{place}: {unknown('setting', name, kinds)}")
        return
    kind = kinds[name]
    try:
        if kind is Path:
            values[name] = Path(value)
        elif kind in (int, float):
            if isinstance(value, bool):
                raise ValueError
            values[name] = kind(value)
            if values[name] < 0:
                raise ValueError
            if name == "maximum_losses" and values[name] == 0:  # a step has lost no process before it begins
                problems.append(f"{place}: must be at least 1, not {value!r}")
        elif isinstance(value, str):
            values[name] = value
        else:
            raise ValueError
    except (TypeError, ValueError):
        what = {int: "a whole number, not negative", float: "a number, not negative"}.get(kind, "a text")
        problems.append(f"{place}: must be {what}, not {value!r}")


def _pools(table: dict[str, Any], problems: list[str]) -> dict[str, PoolSettings]:
    pools = {}
    for name, entry in table.items():
        if not _POOL_NAME.match(name):
            problems.append(f"{FILE_NAME}: pools.{name!r}: use letters, digits, '_' and '-' in a pool's name")
        if not isinstance(entry, dict):
            problems.append(f"{FILE_NAME}: pools.{name}: must be a table, as in [pools.{name}]")
            continue
        pool = _model(schema.Pool, entry, ("pools", name), problems)
        if pool is not None:
            problems += [f"{FILE_NAME}: pools.{name}.{key}: {message}" for key, message in pool.faults()]
            pools[name] = pool.build()
    return pools


def _secrets(table: Any, problems: list[str]) -> dict[str, str]:
    secrets = {}
    for name, reference in table.items():
        if not isinstance(reference, str) or not reference.startswith(("env:", "file:")):
            problems.append(f"{FILE_NAME}: secrets.{name}: must be env:NAME or file:PATH, never the secret itself")
            continue
        secrets[name] = reference
    return secrets


def _defaults(table: dict[str, Any], problems: list[str]) -> Defaults:
    defaults = _model(schema.Defaults, table, ("defaults",), problems)
    return Defaults() if defaults is None else defaults.build()


def _model(model: type[_Model], table: dict[str, Any], place: tuple[str, ...], problems: list[str]) -> _Model | None:
    """Read a table as a model says; None if there are problems."""
    try:
        return model.model_validate(table)
    except ValidationError as exc:
        for error in exc.errors(include_url=False):
            for where, message in schema.shape_faults((*place, *map(str, error["loc"])), error):
                problems.append(f"{FILE_NAME}: {'.'.join(where)}: {message}")
        return None
