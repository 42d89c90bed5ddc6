"""Drawings of a plan: a tree for a terminal, Mermaid and DOT for documents; pure text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.plan import Plan
from orchestrator.workflows import Phase, TriggerRule

#: Words of Mermaid's flowcharts; as the id of a node they break the drawing.
_MERMAID_WORDS = frozenset(
    {"call", "class", "classDef", "click", "default", "direction", "end", "flowchart", "graph", "href", "linkStyle"}
    | {"interpolate", "style", "subgraph", "_blank", "_parent", "_self", "_top"}
)


def tree(plan: Plan) -> str:
    """Return the workflow as an indented tree; a step with several upstream steps stands below the last of them."""
    last = {step_id: above[-1] for step_id, above in _upstream_by_order(plan).items() if above}
    children: dict[str, list[str]] = {}
    roots: dict[Phase, list[str]] = {phase: [] for phase in Phase}
    for step_id in plan.topological():
        below = children.setdefault(last[step_id], []) if step_id in last else roots[plan.steps[step_id].phase]
        below.append(step_id)
    lines = []
    for phase, first in roots.items():
        if first:
            lines.append(str(phase) if phase.is_hook else plan.workflow.name)
            lines += _branches(plan, first, children, last)
    return "\n".join(lines)


def _branches(
    plan: Plan, roots: list[str], children: Mapping[str, list[str]], last: Mapping[str, str]
) -> Iterator[str]:
    # An explicit stack: a chain of a thousand steps is deeper than Python's own.
    stack = [(step_id, "", n == len(roots) - 1) for n, step_id in enumerate(roots)][::-1]
    while stack:
        step_id, indent, is_last = stack.pop()
        yield f"{indent}{'└─ ' if is_last else '├─ '}{_label(plan, step_id)}{_joins(plan, step_id, last)}"
        below = children.get(step_id, [])
        indent += "   " if is_last else "│  "
        stack += [(child, indent, n == len(below) - 1) for n, child in enumerate(below)][::-1]


def mermaid(plan: Plan) -> str:
    """Return the workflow as a Mermaid flowchart."""
    lines = ["flowchart LR"]
    for phase in Phase:
        nodes = []
        for step_id in _of_phase(plan, phase):
            label = _label(plan, step_id).replace('"', "'")
            shape = f'[["{label}"]]' if plan.steps[step_id].is_fan_out else f'["{label}"]'
            nodes.append(f"  {_node(step_id)}{shape}")
        if phase.is_hook and nodes:
            nodes = [f'  subgraph hook-{phase}["{phase}"]', *(f"  {node}" for node in nodes), "  end"]
        lines += nodes
    lines += [f"  {_node(up)} --> {_node(step_id)}" for step_id, above in plan.upstream.items() for up in above]
    return "\n".join(lines)


def _node(step_id: str) -> str:
    # No step's id has a hyphen, so this is never another step.
    return f"step-{step_id}" if step_id in _MERMAID_WORDS else step_id


def dot(plan: Plan) -> str:
    """Return the workflow in Graphviz's DOT."""
    name = plan.workflow.name.replace('"', "'")
    lines = [f'digraph "{name}" {{', "  rankdir=LR;", "  node [shape=box];"]
    for phase in Phase:
        nodes = []
        for step_id in _of_phase(plan, phase):
            label = _label(plan, step_id).replace('"', "'")
            extra = ", peripheries=2" if plan.steps[step_id].is_fan_out else ""
            nodes.append(f'  "{step_id}" [label="{label}"{extra}];')
        if phase.is_hook and nodes:
            nodes = [f'  subgraph "cluster_{phase}" {{', f'    label="{phase}";', *(f"  {n}" for n in nodes), "  }"]
        lines += nodes
    lines += [f'  "{up}" -> "{step_id}";' for step_id, above in plan.upstream.items() for up in above]
    return "\n".join([*lines, "}"])


def _of_phase(plan: Plan, phase: Phase) -> list[str]:
    return [step_id for step_id, step in plan.steps.items() if step.phase is phase]


def _label(plan: Plan, step_id: str) -> str:
    step = plan.steps[step_id]
    notes = []
    if step.is_fan_out:
        notes.append("foreach" if step.max_parallel is None else f"foreach, {step.max_parallel} at a time")
    if step.workflow is not None:
        notes.append(f"workflow {step.workflow}")
    if step.is_wait:
        notes.append(f"sleep {_shown(step.sleep)}" if step.sleep is not None else f"until {_shown(step.until)}")
    if step.if_ is not None:
        notes.append("if")
    if step.trigger_rule is not TriggerRule.ALL_SUCCESS:
        notes.append(str(step.trigger_rule))
    return step_id + (f" ({'; '.join(notes)})" if notes else "")


def _shown(template: Any) -> str:
    """Return template data as one line: a constant as it is, an expression by its source."""
    text = next(iter(template.values())) if isinstance(template, dict) else template
    return " ".join(str(text).split())


def _upstream_by_order(plan: Plan) -> dict[str, list[str]]:
    place = {step_id: n for n, step_id in enumerate(plan.topological())}
    return {step_id: sorted(above, key=place.__getitem__) for step_id, above in plan.upstream.items()}


def _joins(plan: Plan, step_id: str, last: Mapping[str, str]) -> str:
    others = [up for up in plan.upstream[step_id] if up != last.get(step_id)]
    return f"  <- also {', '.join(others)}" if others else ""
