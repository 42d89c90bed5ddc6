"""Expressions: what keeps its type, what stays data, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ExpressionError
from orchestrator.expressions import RESERVED_NAMES, data, evaluate, expression, is_step_id, parse, references

NAMES = {
    "event": {"data": {"path": "a.csv", "number": "123", "list": "[1,2]", "code": "{{ secrets.KEY }}"}},
    "order": {"items": [1, 2], "keys": "k", "total": 3},
    "rows": [3, 1, 2],
    "none": None,
}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("{{ rows }}", [3, 1, 2]),
        ("{{ rows | length }}", 3),
        ("{{ rows | length > 2 }}", True),
        ("{{ rows[0] / 2 }}", 1.5),
        ("{{ -1 }}", -1),
        ("{{ - rows[0] }}", -3),
        ("{{- rows -}}", [3, 1, 2]),
        ("  {{ rows }}\n", [3, 1, 2]),
        ("{{ event.data.number }}", "123"),
        ("{{ event.data.list }}", "[1,2]"),
        ("{{ event.data.code }}", "{{ secrets.KEY }}"),
        ("{{ 'x}}y' }}", "x}}y"),
        ("{{ {'a': {'b': 1}} }}", {"a": {"b": 1}}),
        ("{{ rows | sort | list }}", [1, 2, 3]),
        ("{{ rows | reverse }}", [2, 1, 3]),
        ("{{ rows | map('string') }}", ["3", "1", "2"]),
        ("{{ order.keys }}", "k"),
        ("{{ order.items }}", [1, 2]),
        ("{{ order['items'] }}", [1, 2]),
        ("{{ order.values() }}", [[1, 2], "k", 3]),
        ("{{ range(3) }}", [0, 1, 2]),
        ("{{ '<b>' | escape }}", "&lt;b&gt;"),
        ("n = {{ rows | length }}", "n = 3"),
        ("{{ rows[0] }}{{ rows[1] }}", "31"),
        ("{{ rows[0] }} {{ rows[1] }}", "3 1"),
        ("{{ event.data.code }}!", "{{ secrets.KEY }}!"),
        ("all: {{ rows | map('string') }}", "all: ['3', '1', '2']"),
        ("{% if x %}", "{% if x %}"),
        ("{# {{ rows[0] }} #}", "{# 3 #}"),
        ("100% {", "100% {"),
        ({"a": ["{{ rows[0] }}", 1, None]}, {"a": [3, 1, None]}),
        ({"{{ rows }}": 1}, {"{{ rows }}": 1}),
        ({"$expr": "rows"}, {"$expr": "rows"}),
        ({"$text": "{{ rows }}"}, {"$text": "{{ rows }}"}),
        ({"$data": "{{ rows }}"}, {"$data": "{{ rows }}"}),
        (7, 7),
    ],
)
def test_a_value_as_written_evaluates_to(written, value):
    """A lone expression keeps its type, text becomes a string, and what it brings in is never parsed again."""
    found = evaluate(parse(written), NAMES)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("{{ rows", "bad expression"),
        ("{{ }}", "Expected an expression"),
        ("{{ rows | }}", "bad expression"),
        ("{{ a" + "(" * 500 + ")" * 500 + " }}", "too deeply nested"),
    ],
)
def test_an_expression_that_does_not_parse_is_refused(written, reason):
    """The error names the expression and the reason."""
    with pytest.raises(ExpressionError, match=reason):
        parse(written)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("rows | lenght", "no filter named 'lenght'"),
        ("rows is evn", "no test named 'evn'"),
        ("steps[rows].state", "write steps.NAME"),
        ("steps", "write steps.NAME"),
        ("self", "no meaning"),
        ("rows | random", "no filter named 'random'"),
    ],
)
def test_what_cannot_be_told_before_the_run_is_refused(source, reason):
    """References must be known when the definition is read."""
    with pytest.raises(ExpressionError, match=reason):
        references(expression(source))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("missing", "'missing' is undefined"),
        ("order.missing", "no attribute 'missing'"),
        ("[order.missing]", "no attribute 'missing'"),
        ("rows[9]", "has no element 9"),
        ("1 / 0", "ZeroDivisionError"),
        ("rows + 1", "TypeError"),
        ("rows.__class__", "unsafe"),
        ("''.__class__.__mro__", "unsafe"),
        ("rows.append(4)", "unsafe|not safely callable"),
        ("'{0.__class__}'.format(rows)", "unsafe"),
        ("range(10000000)", "Range too big"),
        ("order.total.bit_length", "is a method and not data"),
        ("lipsum", "'lipsum' is undefined"),
    ],
)
def test_a_bad_evaluation_is_an_error(source, reason):
    """Undefined names, wrong types and ways out of the sandbox raise ExpressionError."""
    with pytest.raises(ExpressionError, match=reason):
        evaluate(expression(source), NAMES)
    assert NAMES["rows"] == [3, 1, 2]


def test_undefined_in_text_is_an_error():
    """Nothing is silently left out of a text."""
    with pytest.raises(ExpressionError, match="'missing' is undefined"):
        evaluate(parse("a {{ missing }}"), NAMES)


def test_references_tell_names_steps_and_parameters():
    """What an expression reads is known without evaluating it."""
    read = references(
        parse({"a": "{{ split[0] + params.n }}", "b": "x {{ steps.load.state }} {{ steps['b'].errors }}"})
    )
    assert read.names == {"split", "params"}
    assert read.steps == {"load", "b"}
    assert read.step_ids == {"split", "load", "b"}
    assert read.params == {"n"}
    assert references(expression("dict(a=range(2))")).names == set()
    assert references(expression("params.get('n')")).params == set()


def test_data_is_never_an_expression():
    """`data` and plain values come through as they are."""
    for value in ("{{ rows }}", ["{{ rows }}"], {"$expr": "rows"}):
        assert evaluate(data(value), NAMES) == value
    assert references(data(["{{ rows }}"])).names == set()


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "true", "and", "self", "range", "", "1a", "a-b", "a b", "é"])
def test_what_cannot_be_written_as_a_name_is_no_step_id(name):
    """A step id is a name in expressions."""
    assert not is_step_id(name)


@pytest.mark.parametrize("name", ["a", "_a", "split_2", "result", "loop", "context"])
def test_names_that_jinja_uses_elsewhere_are_step_ids(name):
    """They evaluate to the step's output, not to something of Jinja's."""
    assert is_step_id(name)
    assert evaluate(expression(f"{name}.x"), {name: {"x": 1}}) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_any_value_passes_an_expression_unchanged(value):
    """What events and steps bring is only ever a value."""
    assert evaluate({"with": expression("step.x")}, {"step": {"x": value}}) == {"with": value}


@given(JSON)
def test_any_value_passes_as_data_unchanged(value):
    """`$data` protects whatever is in it."""
    assert evaluate(data(value), {}) == value
