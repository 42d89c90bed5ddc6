"""The definitions in force, in the data directory, for `up` and the control process to tell each other."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.errors import UnavailableError
from orchestrator.project import Project
from orchestrator.workflows import Workflow

#: In the data directory.
DEFINITIONS = "definitions.json"


def write_definitions(data_dir: Path, project: Project) -> None:
    """Write the definitions in force, atomically. Raises UnavailableError."""
    body = {"workflows": [w.to_json() for w in project.workflows.values()], "code_hash": project.code_hash}
    draft = data_dir / f"{DEFINITIONS}.tmp"
    try:
        draft.write_text(json.dumps(body))
        draft.replace(data_dir / DEFINITIONS)
    except OSError as exc:
        raise UnavailableError(
            f"cannot write to the data directory {data_dir}: {exc.strerror}; free space, or fix its permissions"
        ) from exc


def read_definitions(data_dir: Path) -> tuple[list[Workflow], str]:
    """Return (workflows, hash of the code) as last written."""
    body = json.loads((data_dir / DEFINITIONS).read_text())
    return [Workflow.from_json(workflow) for workflow in body["workflows"]], body["code_hash"]
