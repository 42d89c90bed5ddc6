"""Drawings of a plan."""

import pytest

from orchestrator.drawing import dot, mermaid, tree
from orchestrator.plan import Plan
from orchestrator.workflows import Phase, Step, Workflow


@pytest.mark.parametrize("word", ["end", "graph", "style", "default"])
def test_a_step_named_like_a_word_of_mermaid_does_not_break_the_drawing(word):
    """Mermaid reads `end --> b` as the end of a subgraph."""
    steps = (Step(id="a", task="t:a"), Step(id=word, task="t:a", needs=("a",)), Step(id="b", task="t:a", needs=(word,)))
    assert mermaid(Plan.of(Workflow(name="w", steps=steps))).splitlines() == [
        "flowchart LR",
        '  a["a"]',
        f'  step-{word}["{word}"]',
        '  b["b"]',
        f"  a --> step-{word}",
        f"  step-{word} --> b",
    ]


HOOKS = Plan.of(
    Workflow(
        name="w",
        steps=(
            Step(id="a", task="t:a"),
            Step(id="nap", sleep={"$expr": 'a["pause"]'}),
            Step(id="b", task="t:a", needs=("nap",)),
            Step(id="tell", phase=Phase.ON_FAILURE, task="t:a"),
            Step(id="wait", phase=Phase.FINALLY, until="2026-01-31T06:00:00Z"),
            Step(id="clean", phase=Phase.FINALLY, task="t:a", needs=("wait",), foreach=[1]),
        ),
    )
)


def test_hooks_and_waits_are_drawn():
    """A hook is a graph of its own; a wait says what it waits for."""
    assert tree(HOOKS).splitlines() == [
        "w",
        "└─ a",
        '   └─ nap (sleep a["pause"])',
        "      └─ b",
        "on_failure",
        "└─ tell",
        "finally",
        "└─ wait (until 2026-01-31T06:00:00Z)",
        "   └─ clean (foreach)",
    ]
    assert mermaid(HOOKS).splitlines() == [
        "flowchart LR",
        '  a["a"]',
        "  nap[\"nap (sleep a['pause'])\"]",
        '  b["b"]',
        '  subgraph hook-on_failure["on_failure"]',
        '    tell["tell"]',
        "  end",
        '  subgraph hook-finally["finally"]',
        '    wait["wait (until 2026-01-31T06:00:00Z)"]',
        '    clean[["clean (foreach)"]]',
        "  end",
        "  a --> nap",
        "  nap --> b",
        "  wait --> clean",
    ]
    assert dot(HOOKS).splitlines()[6:] == [
        '  subgraph "cluster_on_failure" {',
        '    label="on_failure";',
        '    "tell" [label="tell"];',
        "  }",
        '  subgraph "cluster_finally" {',
        '    label="finally";',
        '    "wait" [label="wait (until 2026-01-31T06:00:00Z)"];',
        '    "clean" [label="clean (foreach)", peripheries=2];',
        "  }",
        '  "a" -> "nap";',
        '  "nap" -> "b";',
        '  "wait" -> "clean";',
        "}",
    ]
