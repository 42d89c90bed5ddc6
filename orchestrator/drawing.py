"""Drawings of a plan: a tree for a terminal, Mermaid and DOT for documents; pure text."""

from __future__ import annotations

from orchestrator.plan import Plan
from orchestrator.workflows import TriggerRule

#: Words of Mermaid's flowcharts; as the id of a node they break the drawing.
_MERMAID_WORDS = frozenset(
    {"call", "class", "classDef", "click", "default", "direction", "end", "flowchart", "graph", "href", "linkStyle"}
    | {"interpolate", "style", "subgraph", "_blank", "_parent", "_self", "_top"}
)


def tree(plan: Plan) -> str:
    """Return the workflow as an indented tree; a step with several upstream steps stands below the last of them."""
    lines = [plan.workflow.name]
    last = {step_id: above[-1] for step_id, above in _upstream_by_order(plan).items() if above}
    children: dict[str | None, list[str]] = {}
    for step_id in plan.topological():
        children.setdefault(last.get(step_id), []).append(step_id)
    # An explicit stack: a chain of a thousand steps is deeper than Python's own.
    stack = [(step_id, "", n == len(plan.roots) - 1) for n, step_id in enumerate(children.get(None, []))][::-1]
    while stack:
        step_id, indent, is_last = stack.pop()
        lines.append(f"{indent}{'└─ ' if is_last else '├─ '}{_label(plan, step_id)}{_joins(plan, step_id, last)}")
        below = children.get(step_id, [])
        indent += "   " if is_last else "│  "
        stack += [(child, indent, n == len(below) - 1) for n, child in enumerate(below)][::-1]
    return "\n".join(lines)


def mermaid(plan: Plan) -> str:
    """Return the workflow as a Mermaid flowchart."""
    lines = ["flowchart LR"]
    for step_id, step in plan.steps.items():
        label = _label(plan, step_id).replace('"', "'")
        shape = f'[["{label}"]]' if step.is_fan_out else f'["{label}"]'
        lines.append(f"  {_node(step_id)}{shape}")
    lines += [f"  {_node(up)} --> {_node(step_id)}" for step_id, above in plan.upstream.items() for up in above]
    return "\n".join(lines)


def _node(step_id: str) -> str:
    # No step's id has a hyphen, so this is never another step.
    return f"step-{step_id}" if step_id in _MERMAID_WORDS else step_id


def dot(plan: Plan) -> str:
    """Return the workflow in Graphviz's DOT."""
    name = plan.workflow.name.replace('"', "'")
    lines = [f'digraph "{name}" {{', "  rankdir=LR;", "  node [shape=box];"]
    for step_id, step in plan.steps.items():
        label = _label(plan, step_id).replace('"', "'")
        extra = ", peripheries=2" if step.is_fan_out else ""
        lines.append(f'  "{step_id}" [label="{label}"{extra}];')
    lines += [f'  "{up}" -> "{step_id}";' for step_id, above in plan.upstream.items() for up in above]
    return "\n".join([*lines, "}"])


def _label(plan: Plan, step_id: str) -> str:
    step = plan.steps[step_id]
    notes = []
    if step.is_fan_out:
        notes.append("foreach" if step.max_parallel is None else f"foreach, {step.max_parallel} at a time")
    if step.workflow is not None:
        notes.append(f"workflow {step.workflow}")
    if step.if_ is not None:
        notes.append("if")
    if step.trigger_rule is not TriggerRule.ALL_SUCCESS:
        notes.append(str(step.trigger_rule))
    return step_id + (f" ({'; '.join(notes)})" if notes else "")


def _upstream_by_order(plan: Plan) -> dict[str, list[str]]:
    place = {step_id: n for n, step_id in enumerate(plan.topological())}
    return {step_id: sorted(above, key=place.__getitem__) for step_id, above in plan.upstream.items()}


def _joins(plan: Plan, step_id: str, last: dict[str, str]) -> str:
    others = [up for up in plan.upstream[step_id] if up != last.get(step_id)]
    return f"  <- also {', '.join(others)}" if others else ""
