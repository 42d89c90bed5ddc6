"""docker-compose.yml and what it is built from fit the command line, the settings and each other."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from ruamel.yaml import YAML

from orchestrator.cli.commands import app
from orchestrator.settings import ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
TEXT = (ROOT / "docker-compose.yml").read_text()


def substituted(text: str) -> str:
    """Put the defaults in the place of variables, as docker-compose does."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text).replace("$$", "$")


FILE: dict[str, Any] = YAML(typ="safe", pure=True).load(substituted(TEXT))
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
ROLES = {name: one for name, one in SERVICES.items() if one["image"].startswith("orchestrator:") and "command" in one}


def test_it_is_understood_by_the_old_docker_compose_too() -> None:
    """1.29 refuses a top-level `name:`, and the new one warns of `version:`."""
    assert set(FILE) - {key for key in FILE if key.startswith("x-")} == {"services", "volumes"}


def test_every_service_of_the_issue_is_there() -> None:
    assert set(SERVICES) == {
        "secrets", "token", "valkey", "gateway", "dispatcher", "triggers", "beat", "worker", "autoscaler", "flower",
        "prometheus", "grafana",
    }  # fmt: skip
    assert {name for name, one in SERVICES.items() if one.get("profiles")} == {"prometheus", "grafana"}


@pytest.mark.parametrize("name", sorted(ROLES))
def test_every_command_is_one_with_its_options(name: str) -> None:
    node: Any = typer.main.get_command(app)
    arguments = shlex.split(ROLES[name]["command"])
    while hasattr(node, "commands"):
        assert arguments[0] in node.commands, f"no command {arguments[0]}"
        node = node.commands[arguments.pop(0)]
    node.make_context(node.name, arguments)  # reads them, and runs nothing


@pytest.mark.parametrize("name", sorted(ROLES))
def test_every_setting_is_one(name: str, tmp_path: Path) -> None:
    environ: dict[str, Any] = ROLES[name]["environment"]
    known = {f"{ENVIRONMENT_PREFIX}{one.name}".upper() for one in fields(Settings)}
    assert {one for one in environ if one.startswith(ENVIRONMENT_PREFIX)} <= known
    # What they refer to is made at the first start.
    values = {one: str(value).replace("file:/secrets/server-url", "redis://valkey") for one, value in environ.items()}
    Settings.load(tmp_path, environ=values)


def test_what_is_needed_for_a_night_alone_is_said_for_every_service() -> None:
    for name, one in SERVICES.items():
        is_once = name in ("secrets", "token")
        assert one["restart"] == ("no" if is_once else "unless-stopped"), name
        assert one["mem_limit"], name
        assert one["cpus"], name
        assert one["logging"]["options"]["max-size"], name
        assert one["healthcheck"].get("test") or is_once, name
        assert one["stop_grace_period"], name
        assert "no-new-privileges:true" in one["security_opt"], name
        assert not one.get("privileged"), name


def test_ports_are_published_on_this_machine_alone() -> None:
    published = {name: port for name, one in SERVICES.items() for port in one.get("ports", [])}
    assert set(published) == {"gateway", "flower", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in published.values()), published


def test_every_variable_is_explained_at_the_top_and_has_a_default() -> None:
    head = TEXT.partition("\nx-base")[0]
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", TEXT))
    assert used == set(re.findall(r"\bORC_\w+", head))
    assert not re.findall(r"(?<!\$)\$\{\w+(?!:-)[^}\w]", TEXT)


def test_images_are_pinned_and_ours_has_the_version_of_the_package() -> None:
    images = {one["image"] for one in SERVICES.values()}
    images |= set(re.findall(r"^ARG \w+_IMAGE=(.+)$", (INFRA / "docker" / "Dockerfile").read_text(), re.MULTILINE))
    for image in images:
        name, _, tag = image.partition(":")
        assert re.search(r"\d", tag), f"{image} has no version"
        assert "latest" not in tag
        if name == "orchestrator":
            assert tag == version("orchestrator")
    label = re.search(r'image\.version="([^"]+)"', (INFRA / "docker" / "Dockerfile").read_text())
    assert label is not None
    assert label[1] == version("orchestrator")


def test_volumes_are_declared_and_what_is_mounted_from_here_exists() -> None:
    for name, one in SERVICES.items():
        for volume in one.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in FILE["volumes"], (
                f"{name}: {volume}"
            )


def test_no_file_names_a_package_index_or_holds_a_secret() -> None:
    for path in (ROOT / "docker-compose.yml", *(one for one in INFRA.rglob("*") if one.is_file())):
        if path.suffix == ".whl":
            continue
        text = path.read_text()
        assert not re.search(r"(index-url|INDEX_URL)[ =:]+\S*://", text), path
        assert not re.search(r"(?i)(password|requirepass|token)[ =:]+['\"]?[A-Za-z0-9+/_-]{16,}", text), path


DASHBOARD = json.loads((INFRA / "monitoring" / "grafana" / "dashboards" / "orchestrator.json").read_text())


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def test_the_dashboard_reads_from_the_data_source_that_is_provisioned() -> None:
    folder = INFRA / "monitoring" / "grafana" / "provisioning"
    (source,) = YAML(typ="safe", pure=True).load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = YAML(typ="safe", pure=True).load((folder / "dashboards" / "orchestrator.yml").read_text())[
        "providers"
    ]
    for panel in panels():
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": source["type"], "uid": source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    mounts = [volume.split(":") for volume in SERVICES["grafana"]["volumes"]]
    assert ["./infra/monitoring/grafana/dashboards", provider["options"]["path"], "ro"] in mounts


def test_the_dashboard_has_a_panel_for_each_thing_and_none_lies_on_another() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Runs", "Steps", "Pools", "Dead letters"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24, panel["title"]
        cells |= own


def test_prometheus_asks_the_gateway_where_it_has_its_metrics() -> None:
    scrapes = YAML(typ="safe", pure=True).load((INFRA / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    port = SERVICES["gateway"]["environment"]["ORCHESTRATOR_HEALTH_PORT"]
    assert scrapes[0]["static_configs"][0]["targets"] == [f"gateway:{port}"]
