"""The definitions that the documents show are sound, and what they say about settings is complete."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from orchestrator.definitions import json_schema, read_definition
from orchestrator.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{path.name}:{n}", text)
        for path in DOCUMENTS
        for n, text in enumerate(re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize(("name", "text"), blocks("yaml"), ids=lambda value: value if ":" in value[:20] else "")
def test_yaml_in_the_documents_is_a_definition(name: str, text: str) -> None:
    if not text.startswith("workflow:"):  # a part of one
        text = "workflow: w\n" + text + ("" if "steps:" in text else "steps: {a: {task: 't:f'}}\n")
    assert read_definition(Path("workflows/x.yaml"), text).faults == []
    Draft202012Validator(json_schema()).validate(YAML(typ="safe", pure=True).load(text))


@pytest.mark.parametrize(("name", "text"), blocks("python"), ids=lambda value: value if ":" in value[:20] else "")
def test_python_in_the_documents_compiles(name: str, text: str) -> None:
    compile(text, name, "exec")


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    missing = [f.name for f in fields(Settings) if f.name != "project" and f"`{f.name}`" not in text]
    assert missing in ([], ["pools", "secrets", "defaults"])


def test_every_relative_link_leads_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
