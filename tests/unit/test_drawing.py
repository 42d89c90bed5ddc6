"""Drawings of a plan."""

import pytest

from orchestrator.drawing import mermaid
from orchestrator.plan import Plan
from orchestrator.workflows import Step, Workflow


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
