"""EventPattern: EventBridge's documented examples, each refusal, and the algebra of patterns.

Sections are cited from the sources below; the names of the sections are theirs.

- UG: Amazon EventBridge User Guide, "Comparison operators for use in event patterns"
  (eb-create-pattern-operators.html), "Event patterns" (eb-event-patterns.html), "Arrays in event patterns"
  (eb-event-patterns-arrays.html) and "Matching null values and empty strings" (eb-event-patterns-null-values.html).
- ER: README of github.com/aws/event-ruler, the matcher behind EventBridge.
- SNS: Amazon SNS Developer Guide, "String value matching" (the same matcher; it documents anything-but on arrays).
"""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.errors import OrchestratorError
from orchestrator.patterns import ABSENT, MAX_COMBINATIONS, MAX_DEPTH, EventPattern, Mismatch, PatternError

RULER_EVENT: dict[str, Any] = {
    "version": "0",
    "id": "ddddd4-aaaa-7777-4444-345dd43cc333",
    "detail-type": "EC2 Instance State-change Notification",
    "source": "aws.ec2",
    "account": "012345679012",
    "time": "2017-10-02T16:24:49Z",
    "region": "us-east-1",
    "resources": ["arn:aws:ec2:us-east-1:123456789012:instance/i-000000aaaaaa00000"],
    "detail": {
        "c-count": 5,
        "d-count": 3,
        "x-limit": 301.8,
        "source-ip": "10.0.0.33",
        "instance-id": "i-000000aaaaaa00000",
        "state": "running",
    },
}
NULLS_EVENT = {"source": "aws.autoscaling", "resources": [], "detail": {"eventVersion": "", "responseElements": None}}
EMPLOYEES = {
    "employees": [
        {"firstName": "John", "lastName": "Doe"},
        {"firstName": "Anna", "lastName": "Smith"},
        {"firstName": "Peter", "lastName": "Jones"},
    ]
}
NESTED_EMPLOYEES = {"employees": [EMPLOYEES["employees"][:2], EMPLOYEES["employees"][2:]]}
SONGS = {
    "Year": 1966,
    "Genres": [{"Pop": True}, {"Classical": False}],
    "Songs": [
        {
            "Name": "Paperback Writer",
            "Writers": [{"First": "John", "Last": "Lennon"}, {"First": "Paul", "Last": "McCartney"}],
        },
        {
            "Name": "Paint It Black",
            "Writers": [{"First": "Mick", "Last": "Jagger"}, {"First": "Keith", "Last": "Richards"}],
        },
    ],
}


def matches(pattern: object, event: dict[str, Any]) -> bool:
    return EventPattern.compile(pattern).matches(event)


def detail(**fields: object) -> dict[str, Any]:
    return {"detail": {name.replace("_", "-"): value for name, value in fields.items()}}


DOCUMENTED: list[tuple[str, dict[str, Any], dict[str, Any], bool]] = [
    # (section, pattern, event, matches)
    (
        "ER Simple matching",
        {
            "detail-type": ["EC2 Instance State-change Notification"],
            "resources": ["arn:aws:ec2:us-east-1:123456789012:instance/i-000000aaaaaa00000"],
            "detail": {"state": ["initializing", "running"]},
        },
        RULER_EVENT,
        True,
    ),
    ("ER Simple matching", detail(state=["initializing", "stopped"]), RULER_EVENT, False),
    ("UG Event patterns: And", {"Location": ["New York"], "Day": ["Monday"]}, {"Location": "New York"}, False),
    (
        "UG Event patterns: And",
        {"Location": ["New York"], "Day": ["Monday"]},
        {"Location": "New York", "Day": "Monday"},
        True,
    ),
    ("UG Or", {"PaymentType": ["Credit", "Debit"]}, {"PaymentType": "Debit"}, True),
    ("UG Or", {"PaymentType": ["Credit", "Debit"]}, {"PaymentType": "Cash"}, False),
    ("UG Empty", {"LastName": [""]}, {"LastName": ""}, True),
    ("UG Empty", {"LastName": [""]}, {"LastName": None}, False),
    ("UG Equals", {"Name": ["Alice"]}, {"Name": "Alice"}, True),
    ("UG Equals", {"Name": ["Alice"]}, {"Name": "alice"}, False),
    ("UG Null values and empty strings", detail(eventVersion=[""]), NULLS_EVENT, True),
    ("UG Null values and empty strings", detail(responseElements=[None]), NULLS_EVENT, True),
    ("UG Null values and empty strings", detail(responseElements=[""]), NULLS_EVENT, False),
    ("UG Null values and empty strings", detail(eventVersion=[None]), NULLS_EVENT, False),
    ("UG Null values and empty strings", detail(absent=[None]), NULLS_EVENT, False),
    ("UG Arrays: an empty array holds no null", {"resources": [None]}, NULLS_EVENT, False),
    ("UG Arrays", {"resources": ["i-1", "i-2", "i-3"]}, {"resources": ["asg-1", "i-1"]}, True),
    ("UG Arrays", {"resources": ["i-1", "i-2", "i-3"]}, {"resources": ["asg-1", "i-4"]}, False),
    ("ER Prefix matching", {"time": [{"prefix": "2017-10-02"}]}, RULER_EVENT, True),
    ("ER Prefix matching: strings only", detail(c_count=[{"prefix": "5"}]), RULER_EVENT, False),
    ("UG Prefix matching", {"region": [{"prefix": "us-"}]}, {"region": "eu-west-1"}, False),
    (
        "UG Prefix ignoring case",
        {"service": [{"prefix": {"equals-ignore-case": "EventB"}}]},
        {"service": "eventb-x"},
        True,
    ),
    (
        "UG Prefix ignoring case",
        {"service": [{"prefix": {"equals-ignore-case": "EventB"}}]},
        {"service": "even"},
        False,
    ),
    ("ER Suffix matching", {"source": [{"suffix": "ec2"}]}, RULER_EVENT, True),
    ("UG Suffix matching", {"FileName": [{"suffix": ".png"}]}, {"FileName": "a.png"}, True),
    ("UG Suffix matching", {"FileName": [{"suffix": ".png"}]}, {"FileName": "a.PNG"}, False),
    (
        "UG Suffix ignoring case",
        {"FileName": [{"suffix": {"equals-ignore-case": ".png"}}]},
        {"FileName": "a.PNG"},
        True,
    ),
    ("UG Anything-but matching", detail(state=[{"anything-but": "initializing"}]), RULER_EVENT, True),
    ("UG Anything-but matching", detail(state=[{"anything-but": "running"}]), RULER_EVENT, False),
    ("UG Anything-but matching", detail(x_limit=[{"anything-but": 123}]), RULER_EVENT, True),
    ("UG Anything-but matching", detail(x_limit=[{"anything-but": 301.8}]), RULER_EVENT, False),
    ("UG Anything-but matching", detail(state=[{"anything-but": ["stopped", "overloaded"]}]), RULER_EVENT, True),
    ("UG Anything-but matching", detail(state=[{"anything-but": ["stopped", "running"]}]), RULER_EVENT, False),
    ("UG Anything-but matching", detail(x_limit=[{"anything-but": [100, 200, 300]}]), RULER_EVENT, True),
    ("UG Anything-but matching", detail(c_count=[{"anything-but": [5, 200, 300]}]), RULER_EVENT, False),
    (
        "UG Anything-but ignoring case",
        {"state": [{"anything-but": {"equals-ignore-case": "initializing"}}]},
        {"state": "INITIALIZING"},
        False,
    ),
    (
        "UG Anything-but ignoring case",
        {"state": [{"anything-but": {"equals-ignore-case": ["initializing", "stopped"]}}]},
        {"state": "running"},
        True,
    ),
    ("UG Anything-but on prefixes", detail(state=[{"anything-but": {"prefix": "init"}}]), RULER_EVENT, True),
    ("UG Anything-but on prefixes", detail(state=[{"anything-but": {"prefix": ["init", "run"]}}]), RULER_EVENT, False),
    ("UG Anything-but on suffixes", {"FileName": [{"anything-but": {"suffix": ".txt"}}]}, {"FileName": "a.txt"}, False),
    (
        "UG Anything-but on suffixes",
        {"FileName": [{"anything-but": {"suffix": [".txt", ".rtf"]}}]},
        {"FileName": "a.png"},
        True,
    ),
    (
        "UG Anything-but using wildcards",
        {"FilePath": [{"anything-but": {"wildcard": "*/lib/*"}}]},
        {"FilePath": "/usr/lib/a"},
        False,
    ),
    (
        "UG Anything-but using wildcards",
        {"FilePath": [{"anything-but": {"wildcard": ["*/lib/*", "*/bin/*"]}}]},
        {"FilePath": "/etc/a"},
        True,
    ),
    ("UG Anything-but: the field has to be there", {"state": [{"anything-but": "x"}]}, {"other": 1}, False),
    ("UG Anything-but: null is something else", {"state": [{"anything-but": "x"}]}, {"state": None}, True),
    (
        "UG Anything-but: another type is something else",
        {"state": [{"anything-but": {"prefix": "x"}}]},
        {"state": 1},
        True,
    ),
    (
        "SNS Anything-but matching",
        {"interests": [{"anything-but": ["rugby", "tennis"]}]},
        {"interests": ["rugby", "baseball"]},
        True,
    ),
    (
        "SNS Anything-but matching",
        {"interests": [{"anything-but": ["rugby", "tennis"]}]},
        {"interests": ["rugby"]},
        False,
    ),
    (
        "SNS Anything-but wildcard",
        {"interests": [{"anything-but": {"wildcard": "*ball"}}]},
        {"interests": ["hockey", "rugby"]},
        True,
    ),
    (
        "SNS Anything-but wildcard",
        {"interests": [{"anything-but": {"wildcard": "*ball"}}]},
        {"interests": ["baseball", "basketball"]},
        False,
    ),
    (
        "ER Numeric matching",
        detail(
            c_count=[{"numeric": [">", 0, "<=", 5]}],
            d_count=[{"numeric": ["<", 10]}],
            x_limit=[{"numeric": ["=", 3.018e2]}],
        ),
        RULER_EVENT,
        True,
    ),
    ("ER Numeric matching", detail(c_count=[{"numeric": [">", 5]}]), RULER_EVENT, False),
    ("ER Numeric matching", detail(c_count=[{"numeric": [">=", 5]}]), RULER_EVENT, True),
    ("ER Numeric matching", detail(c_count=[{"numeric": [">", 0, "<", 5]}]), RULER_EVENT, False),
    ("ER Numeric matching: numbers only", {"n": [{"numeric": [">", 0]}]}, {"n": "5"}, False),
    ("ER Numeric matching: numbers only", {"n": [{"numeric": [">", 0]}]}, {"n": True}, False),
    ("UG Numeric (equals)", {"Price": [{"numeric": ["=", 100]}]}, {"Price": 100.0}, True),
    ("ER IP Address Matching", detail(source_ip=[{"cidr": "10.0.0.0/24"}]), RULER_EVENT, True),
    ("UG IP address matching", {"ip": [{"cidr": "10.0.0.0/24"}]}, {"ip": "10.0.0.255"}, True),
    ("UG IP address matching", {"ip": [{"cidr": "10.0.0.0/24"}]}, {"ip": "10.1.1.0"}, False),
    ("UG IP address matching", {"ip": [{"cidr": "10.0.0.0/24"}]}, {"ip": "localhost"}, False),
    ("UG IP address matching", {"ip": [{"cidr": "10.0.0.0/8"}]}, {"ip": 167772161}, False),
    (
        "ER IP Address Matching: IPv6",
        {"ip": [{"cidr": "2001:db8:1234:1a00::/64"}]},
        {"ip": "2001:0db8:1234:1a00:0000:0000:0000:0000"},
        True,
    ),
    (
        "ER IP Address Matching: IPv6",
        {"ip": [{"cidr": "2001:db8:1234:1a00::/64"}]},
        {"ip": "2001:db8:1234:1a01::"},
        False,
    ),
    ("ER IP Address Matching: IPv6", {"ip": [{"cidr": "::/0"}]}, {"ip": "10.0.0.1"}, False),
    ("ER Exists matching", detail(c_count=[{"exists": True}]), RULER_EVENT, True),
    ("ER Exists matching", detail(c_count=[{"exists": False}]), RULER_EVENT, False),
    ("ER Exists matching", detail(c_count=[{"exists": False}]), {"detail": {"state": "x"}}, True),
    (
        "ER Exists matching: leaf nodes only",
        detail(c_count=[{"exists": False}]),
        {"detail": {"c-count": {"c1": 100}}},
        True,
    ),
    (
        "ER Exists matching: leaf nodes only",
        detail(c_count=[{"exists": True}]),
        {"detail": {"c-count": {"c1": 100}}},
        False,
    ),
    ("UG Exists matching: null is there", {"a": [{"exists": True}]}, {"a": None}, True),
    ("UG Exists matching: a missing parent", {"a": {"b": {"c": [{"exists": False}]}}}, {"x": 1}, True),
    ("UG Exists matching: an empty array", {"a": [{"exists": False}]}, {"a": []}, True),
    ("SNS anything-but with exists false", {"a": [{"anything-but": "x"}, {"exists": False}]}, {}, True),
    (
        "UG Equals-ignore-case matching",
        {"detail-type": [{"equals-ignore-case": "ec2 instance state-change notification"}]},
        RULER_EVENT,
        True,
    ),
    ("ER Equals-ignore-case matching", {"source": [{"equals-ignore-case": "EC2"}]}, RULER_EVENT, False),
    (
        "UG Matching using wildcards",
        {"EventBusArn": [{"wildcard": "arn:aws:events:us-east-1:*:event-bus/*"}]},
        {"EventBusArn": "arn:aws:events:us-east-1:123456789012:event-bus/mine"},
        True,
    ),
    ("UG Matching using wildcards", {"FilePath": [{"wildcard": "dir/*.png"}]}, {"FilePath": "dir/a/b.png"}, True),
    ("UG Matching using wildcards", {"FilePath": [{"wildcard": "dir/*.png"}]}, {"FilePath": "dir/a.jpg"}, False),
    ("UG Wildcards: escape", {"v": [{"wildcard": "a\\*b*"}]}, {"v": "a*bc"}, True),
    ("UG Wildcards: escape", {"v": [{"wildcard": "a\\*b*"}]}, {"v": "aXbc"}, False),
    ("UG Wildcards: escape", {"v": [{"wildcard": "a\\\\*"}]}, {"v": "a\\z"}, True),
    ("UG Wildcards: only * is one", {"v": [{"wildcard": "a?c"}]}, {"v": "abc"}, False),
    ("UG Exact values know no wildcard", {"v": ["*"]}, {"v": "a"}, False),
    (
        "ER Complex example",
        {
            "time": [{"prefix": "2017-10-02"}],
            "detail": {
                "state": [{"anything-but": "initializing"}],
                "c-count": [{"numeric": [">", 0, "<=", 5]}],
                "d-count": [{"numeric": ["<", 10]}],
                "x-limit": [{"anything-but": [100, 200, 300]}],
                "source-ip": [{"cidr": "10.0.0.0/8"}],
            },
        },
        RULER_EVENT,
        True,
    ),
    (
        "UG Or (multiple fields)",
        {"$or": [{"c": [{"numeric": [">", 0]}]}, {"d": [{"numeric": ["<", 10]}]}]},
        {"c": -1, "d": 3},
        True,
    ),
    (
        "UG Or (multiple fields)",
        {"$or": [{"c": [{"numeric": [">", 0]}]}, {"d": [{"numeric": ["<", 10]}]}]},
        {"c": -1, "d": 30},
        False,
    ),
    (
        "ER Rule examples with $or: normal",
        {"source": ["aws.cloudwatch"], "$or": [{"metricName": ["CPU"]}, {"namespace": ["AWS/EC2"]}]},
        {"source": "aws.cloudwatch", "namespace": "AWS/EC2"},
        True,
    ),
    (
        "ER Rule examples with $or: normal",
        {"source": ["aws.cloudwatch"], "$or": [{"metricName": ["CPU"]}, {"namespace": ["AWS/EC2"]}]},
        {"source": "other", "namespace": "AWS/EC2"},
        False,
    ),
    (
        "ER Rule examples with $or: parallel",
        {"$or": [{"m": [1]}, {"n": [1]}], "detail": {"$or": [{"s": [1]}, {"t": [1]}]}},
        {"n": 1, "detail": {"t": 1}},
        True,
    ),
    (
        "ER Rule examples with $or: parallel",
        {"$or": [{"m": [1]}, {"n": [1]}], "detail": {"$or": [{"s": [1]}, {"t": [1]}]}},
        {"n": 1, "detail": {}},
        False,
    ),
    ("ER Rule examples with $or: and inside", {"$or": [{"a": [1]}, {"b": [1], "c": [1]}]}, {"b": 1}, False),
    ("ER Rule examples with $or: and inside", {"$or": [{"a": [1]}, {"b": [1], "c": [1]}]}, {"b": 1, "c": 1}, True),
    (
        "ER Rule examples with $or: nested",
        {"$or": [{"a": [1]}, {"b": [1], "$or": [{"c": [1]}, {"d": [1]}]}]},
        {"b": 1, "d": 1},
        True,
    ),
    (
        "ER Rule examples with $or: nested",
        {"$or": [{"a": [1]}, {"b": [1], "$or": [{"c": [1]}, {"d": [1]}]}]},
        {"b": 1},
        False,
    ),
    ("ER JSON Array Matching", {"employees": {"firstName": ["Anna"]}}, EMPLOYEES, True),
    ("ER JSON Array Matching", {"employees": {"firstName": ["Anna"]}}, NESTED_EMPLOYEES, True),
    (
        "ER JSON Array Matching: consistent",
        {"employees": {"firstName": ["Anna"], "lastName": ["Jones"]}},
        EMPLOYEES,
        False,
    ),
    (
        "ER JSON Array Matching: consistent",
        {"employees": {"firstName": ["Anna"], "lastName": ["Jones"]}},
        NESTED_EMPLOYEES,
        False,
    ),
    (
        "ER JSON Array Matching: consistent",
        {"employees": {"firstName": ["Anna"], "lastName": ["Smith"]}},
        NESTED_EMPLOYEES,
        True,
    ),
    (
        "ER songsACTest",
        {
            "Year": [1966],
            "Songs": {"Name": ["Paperback Writer"], "Writers": {"First": ["Paul"], "Last": ["McCartney"]}},
        },
        SONGS,
        True,
    ),
    ("ER songsACTest", {"Genres": {"Pop": [True]}, "Songs": {"Name": ["Paint It Black"]}}, SONGS, True),
    ("ER songsACTest", {"Songs": {"Name": ["Paperback Writer"], "Writers": {"First": ["Mick"]}}}, SONGS, False),
    ("ER songsACTest", {"Songs": {"Writers": {"First": ["Mick"], "Last": ["McCartney"]}}}, SONGS, False),
    ("ER JSON text matching: types", {"xyz": [True]}, {"xyz": True}, True),
    ("ER JSON text matching: types", {"xyz": [True]}, {"xyz": "true"}, False),
    ("ER JSON text matching: types", {"xyz": [True]}, {"xyz": 1}, False),
    ("ER JSON text matching: types", {"xyz": [1]}, {"xyz": True}, False),
    ("ER JSON text matching: types", {"xyz": ["1"]}, {"xyz": 1}, False),
    ("ER JSON text matching: types", {"xyz": [1]}, {"xyz": "1"}, False),
    ("ER numeric exact match", {"xyz": [300]}, {"xyz": 3.0e2}, True),
    ("ER numeric exact match", {"xyz": [300.0]}, {"xyz": 300}, True),
]

OURS: list[tuple[str, dict[str, Any], dict[str, Any], bool]] = [
    ("numbers have no bound of 5e9", {"size": [{"numeric": [">", 10**12]}]}, {"size": 10**12 + 1}, True),
    ("integers beyond floats are exact", {"n": [2**53]}, {"n": 2**53 + 1}, False),
    ("a range may name the upper end first", {"n": [{"numeric": ["<", 5, ">", 1]}]}, {"n": 3}, True),
    ("a name with a dot is one name", {"a.b": [1]}, {"a": {"b": 1}}, False),
    ("a name with a dot is one name", {"a.b": [1]}, {"a.b": 1}, True),
    ("a list of texts ignoring case", {"a": [{"equals-ignore-case": ["x", "y"]}]}, {"a": "Y"}, True),
    ("case folding is Unicode's", {"a": [{"equals-ignore-case": "straße"}]}, {"a": "STRASSE"}, True),
    ("some element lacks the field", {"a": {"b": [{"exists": False}]}}, {"a": [{"b": 1}, {"c": 1}]}, True),
    ("every element has the field", {"a": {"b": [{"exists": False}]}}, {"a": [{"b": 1}, {"b": 2}]}, False),
    ("a parent that is text has no fields", {"a": {"b": [{"exists": False}]}}, {"a": "text"}, True),
    ("a parent that is text has no fields", {"a": {"b": [1]}}, {"a": "text"}, False),
    ("scalars beside objects in an array", {"a": {"b": [1]}}, {"a": [7, {"b": 1}]}, True),
    ("scalars beside objects in an array", {"a": [7]}, {"a": [7, {"b": 1}]}, True),
    (
        "a field of the event may be named as an operator",
        {"prefix": ["a"], "numeric": [1]},
        {"prefix": "a", "numeric": 1},
        True,
    ),
    ("$or and its siblings may name one field", {"n": [1, 2], "$or": [{"n": [1, 3]}, {"m": [1]}]}, {"n": 2}, False),
    ("an empty prefix is any string", {"a": [{"prefix": ""}]}, {"a": 1}, False),
    ("an empty wildcard is the empty string", {"a": [{"wildcard": ""}]}, {"a": ""}, True),
    ("the ends of a wildcard do not overlap", {"a": [{"wildcard": "ab*ba"}]}, {"a": "aba"}, False),
]


@pytest.mark.parametrize(("section", "pattern", "event", "expected"), DOCUMENTED)
def test_documented_examples_of_eventbridge(
    section: str, pattern: dict[str, Any], event: dict[str, Any], expected: bool
) -> None:
    """What EventBridge documents holds here."""
    assert matches(pattern, event) is expected, section


@pytest.mark.parametrize(("case", "pattern", "event", "expected"), OURS)
def test_choices_of_ours(case: str, pattern: dict[str, Any], event: dict[str, Any], expected: bool) -> None:
    """What the documentation leaves open, or where the module's docstring says that we differ."""
    assert matches(pattern, event) is expected, case


def nested(depth: int, leaf: object) -> Any:
    pattern = leaf
    for _ in range(depth):
        pattern = {"a": pattern}
    return pattern


REFUSED: list[tuple[object, str, str]] = [
    # (pattern, path of the fault, part of the message)
    ([], "", 'a pattern is an object such as {"source": ["shop"]}, not an empty array'),
    (None, "", "not null"),
    ("text", "", 'not "text"'),
    ({}, "", "an empty object names no field"),
    ({"data": {}}, "data", "an empty object names no field"),
    ({1: ["a"]}, "", "a field name is a string, not 1"),
    ({"source": "shop"}, "source", 'rules stand in an array: ["shop"], not "shop"'),
    ({"source": None}, "source", "rules stand in an array: [null], not null"),
    ({"a": {"b": True}}, "a.b", "[true], not true"),
    ({"a": []}, "a", "an empty array matches nothing"),
    ({"a": [[1]]}, "a", "or an operator, not an array of 1"),
    ({"a": [float("nan")]}, "a", "or an operator, not NaN"),
    ({"a": [10**400]}, "a", "or an operator, not 1000"),
    ({"a": [b"bytes"]}, "a", "or an operator, not"),
    ({"a": [{}]}, "a", "an operator is an object with one name, not 0"),
    ({"a": [{"prefix": "a", "suffix": "b"}]}, "a", "an operator is an object with one name, not 2"),
    ({"a": [{"prefx": "b"}]}, "a", 'unknown operator "prefx"; did you mean "prefix"?'),
    ({"a": [{"Anything_But": "b"}]}, "a", 'did you mean "anything-but"?'),
    ({"a": [{"zzz": "b"}]}, "a", 'unknown operator "zzz"; known are prefix, suffix'),
    ({"a": [{1: "b"}]}, "a", "unknown operator 1"),
    ({"a": [{"prefix": 1}]}, "a", '"prefix" takes a string, not 1'),
    ({"a": [{"prefix": ["b"]}]}, "a", '"prefix" takes a string, not an array of 1'),
    ({"a": [{"prefix": {"wildcard": "b"}}]}, "a", '"prefix" takes a string or {"equals-ignore-case"'),
    ({"a": [{"prefix": {"equals-ignore-case": 1}}]}, "a", '"prefix equals-ignore-case" takes a string, not 1'),
    ({"a": [{"suffix": None}]}, "a", '"suffix" takes a string, not null'),
    ({"a": [{"suffix": {}}]}, "a", '"suffix" takes a string or'),
    ({"a": [{"equals-ignore-case": 1}]}, "a", '"equals-ignore-case" takes a string, not 1'),
    ({"a": [{"equals-ignore-case": []}]}, "a", "not an empty list"),
    ({"a": [{"equals-ignore-case": ["b", 1]}]}, "a", '"equals-ignore-case" takes a string, not 1'),
    ({"a": [{"wildcard": 1}]}, "a", '"wildcard" takes a string, not 1'),
    ({"a": [{"wildcard": "b**c"}]}, "a", "no two * in a row"),
    ({"a": [{"wildcard": "b\\c"}]}, "a", "knows the escapes"),
    ({"a": [{"wildcard": "b\\"}]}, "a", "knows the escapes"),
    ({"a": [{"anything-but": []}]}, "a", "not an empty array"),
    ({"a": [{"anything-but": True}]}, "a", "only strings or only numbers, or an object with one of prefix"),
    ({"a": [{"anything-but": [None]}]}, "a", "only strings or only numbers"),
    ({"a": [{"anything-but": ["b", 1]}]}, "a", "only strings or only numbers"),
    ({"a": [{"anything-but": {}}]}, "a", "an object with one of prefix, suffix, equals-ignore-case, wildcard"),
    ({"a": [{"anything-but": {"numeric": ["<", 1]}}]}, "a", "an object with one of prefix"),
    ({"a": [{"anything-but": {"prefix": "b", "suffix": "c"}}]}, "a", "and nothing else"),
    ({"a": [{"anything-but": {"prefix": {"equals-ignore-case": "b"}}}]}, "a", '"anything-but prefix" takes a string'),
    ({"a": [{"anything-but": {"prefix": ""}}]}, "a", "an empty prefix excludes every string"),
    ({"a": [{"anything-but": {"suffix": ["b", ""]}}]}, "a", "an empty suffix excludes every string"),
    ({"a": [{"anything-but": {"wildcard": ["**"]}}]}, "a", "no two * in a row"),
    ({"a": [{"anything-but": {"wildcard": []}}]}, "a", "not an empty list"),
    ({"a": [{"numeric": 1}]}, "a", '"numeric" takes [">", 0] or a range like [">=", 0, "<", 10], not 1'),
    ({"a": [{"numeric": []}]}, "a", "not an empty array"),
    ({"a": [{"numeric": [">"]}]}, "a", "not an array of 1"),
    ({"a": [{"numeric": [">", 0, "<", 1, "<", 2]}]}, "a", "not an array of 6"),
    ({"a": [{"numeric": ["==", 0]}]}, "a", '"numeric" compares by one of < <= = > >=, not by "=="'),
    ({"a": [{"numeric": [0, ">"]}]}, "a", "not by 0"),
    ({"a": [{"numeric": [">", "0"]}]}, "a", 'compares with a number, not with "0"'),
    ({"a": [{"numeric": [">", True]}]}, "a", "not with true"),
    ({"a": [{"numeric": ["<", float("inf")]}]}, "a", "not with Infinity"),
    ({"a": [{"numeric": [">", 0, ">", 1]}]}, "a", "as a range one of > >= and one of < <="),
    ({"a": [{"numeric": ["=", 0, "<", 1]}]}, "a", "as a range one of > >= and one of < <="),
    ({"a": [{"numeric": [">", 1, "<", 1]}]}, "a", "a range that no number is in: > 1 and < 1"),
    ({"a": [{"numeric": [">=", 2, "<=", 1]}]}, "a", "a range that no number is in"),
    ({"a": [{"exists": "true"}]}, "a", '"exists" takes true or false, not "true"'),
    ({"a": [{"exists": 1}]}, "a", '"exists" takes true or false, not 1'),
    ({"a": [{"cidr": 1}]}, "a", '"cidr" takes a string, not 1'),
    ({"a": [{"cidr": "ten/8"}]}, "a", 'a network such as "10.0.0.0/24"'),
    ({"a": [{"cidr": "10.0.0.0/33"}]}, "a", 'not "10.0.0.0/33"'),
    ({"a": [{"cidr": "10.0.0.1"}]}, "a", 'such as "10.0.0.1/32"'),
    ({"a": [{"cidr": "10.0.0.0/255.0.0.0"}]}, "a", 'such as "10.0.0.0/8"'),
    ({"a": [{"cidr": "10.0.0.1/24"}]}, "a", 'the network is "10.0.0.0/24"'),
    ({"a": [{"cidr": "2001:db8::1/64"}]}, "a", 'the network is "2001:db8::/64"'),
    ({"a": {"suffix": ".csv"}}, "a.suffix", '"suffix" is an operator and stands in the array of a field'),
    ({"a": {"numeric": [">", 1]}}, "a.numeric", 'the array of a field: [{"numeric": …}]'),
    ({"a": {"anything-but": ["x"]}}, "a.anything-but", "is an operator"),
    ({"$or": {"a": [1]}}, "$or", "takes an array of at least two patterns, not an object"),
    ({"$or": [{"a": [1]}]}, "$or", "takes an array of at least two patterns, not an array of 1"),
    ({"$or": []}, "$or", "not an empty array"),
    ({"d": {"$or": [{"a": [1]}, 3]}}, "d.$or[1]", "a pattern is an object"),
    ({"d": {"$or": [{"a": [1]}, {}]}}, "d.$or[1]", "an empty object names no field"),
    ({"d": {"$or": [{"a": [1]}, {"b": 1}]}}, "d.$or[1].b", "rules stand in an array"),
    ({"line\nbreak": 1}, '"line\\nbreak"', "rules stand in an array"),
    (nested(MAX_DEPTH + 1, [1]), ".".join("a" * MAX_DEPTH), f"more than {MAX_DEPTH} objects inside each other"),
    ({str(i): {"$or": [{"a": [1]}, {"b": [1]}]} for i in range(10)}, "", f"more than {MAX_COMBINATIONS}"),
]


@pytest.mark.parametrize(("pattern", "path", "message"), REFUSED)
def test_refuses(pattern: object, path: str, message: str) -> None:
    """Each wrong pattern is refused with one fault, at its field, in one line."""
    with pytest.raises(PatternError) as refused:
        EventPattern.compile(pattern)
    ((at, text),) = refused.value.faults
    assert at == path
    assert message in text
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, OrchestratorError)


def test_reports_all_faults_at_once() -> None:
    """A fault does not hide the next one, not even in the same array."""
    pattern = {"a": [{"prefx": "x"}, {"exists": 1}, "good"], "b": {"c": 1, "$or": [{"d": []}, {}]}, "e": [1]}
    with pytest.raises(PatternError) as refused:
        EventPattern.compile(pattern)
    assert [at for at, _ in refused.value.faults] == ["a", "a", "b.c", "b.$or[0].d", "b.$or[1]"]
    assert str(refused.value).startswith('event pattern: a: unknown operator "prefx"; did you mean "prefix"?; a: ')


def test_a_pattern_at_the_limits_compiles() -> None:
    """The limits are what is allowed, not the first that is refused."""
    assert matches(nested(MAX_DEPTH, [1]), nested(MAX_DEPTH, 1))
    branches = [{"a": [n]} for n in range(MAX_COMBINATIONS)]
    assert matches({"$or": branches}, {"a": 999})


def test_refuses_a_pattern_that_nests_without_end() -> None:
    """Depth is a fault, not a RecursionError."""
    with pytest.raises(PatternError, match="objects inside each other"):
        EventPattern.compile(nested(100_000, [1]))


def test_an_event_that_nests_deeper_than_the_stack_is_matched() -> None:
    """Only the pattern's depth counts; arrays of the event are flattened without recursion."""
    deep: object = "found"
    for _ in range(100_000):
        deep = [deep]
    pattern = EventPattern.compile({"data": ["found"]})
    assert pattern.matches({"data": deep})
    assert str(EventPattern.compile({"data": ["other"]}).explain({"data": deep})).startswith("data: wanted")


def test_wildcards_take_linear_time() -> None:
    """The pattern and text on which a backtracking matcher would not end."""
    pattern = EventPattern.compile({"a": [{"wildcard": "*a" * 1000 + "*b"}]})
    started = time.perf_counter()
    assert not pattern.matches({"a": "a" * 200_000})
    assert time.perf_counter() - started < 2


EXPLAINED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"data": {"size": [{"numeric": [">", 10]}]}},
        {"data": {"size": 3}},
        'data.size: wanted [{"numeric":[">",10]}], saw 3',
    ),
    ({"source": ["a"], "type": ["b"]}, {"source": "a", "type": "c"}, 'type: wanted ["b"], saw "c"'),
    ({"data": {"a": ["ü", None]}}, {"id": "1"}, 'data.a: wanted ["ü",null], saw absent'),
    ({"a": [{"exists": False}]}, {"a": None}, 'a: wanted [{"exists":false}], saw null'),
    ({"a": ["x"]}, {"a": ["y", 1]}, 'a: wanted ["x"], saw ["y",1]'),
    ({"a": ["x"]}, {"a": "y" * 500}, 'a: wanted ["x"], saw "' + "y" * 198 + "…"),
    ({"a": ["x"]}, {"a": "\udc80"}, 'a: wanted ["x"], saw "\\udc80"'),
    (
        {"d": {"$or": [{"a": [1]}, {"b": {"c": [2]}}]}},
        {"d": {"a": 3, "b": {"c": 4}}},
        'd.$or: wanted [{"a":[1]},{"b":{"c":[2]}}], saw {"a":3,"b.c":4}',
    ),
    ({"$or": [{"a": [1]}, {"b": [2]}]}, {}, '$or: wanted [{"a":[1]},{"b":[2]}], saw absent'),
    ({"$or": [{"a": [1]}, {"b": [1]}], "c": [1]}, {"c": 2}, '$or: wanted [{"a":[1]},{"b":[1]}], saw absent'),
    ({"e": {"f": [1], "g": [1]}}, {"e": [{"f": 1, "g": 2}]}, "e.g: wanted [1], saw 2"),
    ({"e": {"f": [1], "g": [1]}}, {"e": [{"f": 1}, {"g": 1}]}, 'e: wanted {"f":[1],"g":[1]}, saw [{"f":1},{"g":1}]'),
]


@pytest.mark.parametrize(("pattern", "event", "sentence"), EXPLAINED)
def test_explains_which_clause_said_no(pattern: dict[str, Any], event: dict[str, Any], sentence: str) -> None:
    """The sentence names the first field that says no, what it wanted and what it saw."""
    assert str(EventPattern.compile(pattern).explain(event)) == sentence


def test_a_mismatch_tells_absent_from_the_text_absent() -> None:
    """The marker is no JSON value."""
    pattern = EventPattern.compile({"a": [1]})
    assert pattern.explain({}) == Mismatch(path="a", clause="[1]", value=ABSENT)
    assert str(pattern.explain({"a": "absent"})) == 'a: wanted [1], saw "absent"'


def test_patterns_are_values() -> None:
    """Equality is that of the JSON; what is displayed is what was written, and nobody can change it."""
    written: dict[str, Any] = {"b": [1], "a": [{"prefix": "x"}]}
    pattern = EventPattern.compile(written)
    assert pattern.text == '{"b":[1],"a":[{"prefix":"x"}]}'
    assert pattern == EventPattern.compile({"a": [{"prefix": "x"}], "b": [1]})
    assert hash(pattern) == hash(EventPattern.compile(copy.deepcopy(written)))
    assert pattern != EventPattern.compile({"b": [True], "a": [{"prefix": "x"}]})
    assert repr(pattern) == "EventPattern.compile({'b': [1], 'a': [{'prefix': 'x'}]})"
    written["b"].append(2)
    pattern.pattern["b"].append(2)
    assert pattern.pattern == {"b": [1], "a": [{"prefix": "x"}]}
    assert not pattern.matches({"b": 2, "a": "x"})


# Properties. Names and values come from small sets, so that patterns and events meet.

names = st.sampled_from(["a", "b", "c"])
texts = st.text(alphabet="ab*\\é", max_size=5)
numbers = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, 1.0, -2.0, 1e300, 2**70]))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))
events = st.dictionaries(names, values, max_size=3)
wildcards = st.lists(st.sampled_from(["a", "b", "*", "\\*", "\\\\", "é"]), max_size=7).map("".join)
some_texts = st.lists(texts.filter(bool), min_size=1, max_size=2)
operators = st.one_of(
    st.builds(lambda name, text: {name: text}, st.sampled_from(["prefix", "suffix", "equals-ignore-case"]), texts),
    st.builds(lambda name, text: {name: {"equals-ignore-case": text}}, st.sampled_from(["prefix", "suffix"]), texts),
    st.builds(lambda text: {"wildcard": text}, wildcards.filter(lambda text: "**" not in text)),
    st.builds(lambda sign, bound: {"numeric": [sign, bound]}, st.sampled_from(["<", "<=", "=", ">", ">="]), numbers),
    st.builds(lambda is_there: {"exists": is_there}, st.booleans()),
    st.builds(lambda excluded: {"anything-but": excluded}, some_texts | st.lists(numbers, min_size=1, max_size=2)),
    st.builds(lambda excluded: {"anything-but": {"prefix": excluded}}, some_texts),
    st.just({"cidr": "10.0.0.0/8"}),
)
leaves = st.lists(scalars | operators, min_size=1, max_size=2)
patterns = st.recursive(
    st.dictionaries(names, leaves, min_size=1, max_size=2),
    lambda inner: st.one_of(
        st.dictionaries(names, inner, min_size=1, max_size=2),
        st.builds(lambda one, two, fields: {**fields, "$or": [one, two]}, inner, inner, inner),
    ),
    max_leaves=6,
)
words = ["a", "$or", "prefix", "suffix", "equals-ignore-case", "wildcard", "anything-but", "numeric", "exists", "cidr"]
anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["<", ">", "1.0.0.0/8"])
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(words) | st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(patterns, events)
def test_matches_is_that_explain_has_nothing_to_say(pattern: dict[str, Any], event: dict[str, Any]) -> None:
    """`explain` is None exactly for the events that match, and its sentence can be printed."""
    compiled = EventPattern.compile(pattern)
    mismatch = compiled.explain(event)
    assert compiled.matches(event) is (mismatch is None)
    str(mismatch).encode()


@given(patterns, patterns, patterns, events)
def test_or_distributes(
    left: dict[str, Any], right: dict[str, Any], fields: dict[str, Any], event: dict[str, Any]
) -> None:
    """`$or` is the or of its branches, and is combined with its siblings by and."""
    assume("$or" not in fields)
    either = matches(left, event) or matches(right, event)
    assert matches({"$or": [left, right]}, event) is either
    assert matches({**fields, "$or": [left, right]}, event) is (matches(fields, event) and either)


@given(patterns, events)
def test_fields_are_combined_by_and(pattern: dict[str, Any], event: dict[str, Any]) -> None:
    """A pattern matches exactly when each of its fields does alone."""
    assert matches(pattern, event) is all(matches({name: wanted}, event) for name, wanted in pattern.items())


@given(leaves, values)
def test_rules_and_elements_are_combined_by_or(rules: list[Any], value: object) -> None:
    """A leaf matches exactly when one of its rules does alone; an array of scalars when one element does."""
    assert matches({"a": rules}, {"a": value}) is any(matches({"a": [rule]}, {"a": value}) for rule in rules)


@given(leaves, st.lists(scalars, min_size=1, max_size=3))
def test_an_array_matches_when_an_element_does(rules: list[Any], elements: list[Any]) -> None:
    """For every operator, `anything-but` included."""
    assert matches({"a": rules}, {"a": elements}) is any(matches({"a": rules}, {"a": each}) for each in elements)


@given(st.lists(texts, min_size=1, max_size=3) | st.lists(numbers, min_size=1, max_size=3), scalars)
def test_anything_but_negates_exact_match(excluded: list[Any], value: object) -> None:
    """On a leaf that is there; on one that is not, neither matches."""
    assert matches({"a": [{"anything-but": excluded}]}, {"a": value}) is not matches({"a": excluded}, {"a": value})
    assert not matches({"a": [{"anything-but": excluded}]}, {})


@given(st.sampled_from(["prefix", "suffix", "equals-ignore-case"]), texts.filter(bool), scalars)
def test_anything_but_negates_the_operators_it_takes(name: str, text: str, value: object) -> None:
    """`anything-but` with an operator inside; wildcard is the same code."""
    negated = {"a": [{"anything-but": {name: text}}]}
    assert matches(negated, {"a": value}) is not matches({"a": [{name: text}]}, {"a": value})


@given(st.dictionaries(names, values, max_size=2), names)
def test_exists_false_negates_exists_true(event: dict[str, Any], name: str) -> None:
    """A field is a leaf that is there, or it is not."""
    assert matches({name: [{"exists": True}]}, event) is not matches({name: [{"exists": False}]}, event)


@given(scalars, scalars)
def test_exact_match_is_equality_of_json(wanted: object, value: object) -> None:
    """Types are never mixed, and numbers are compared as numbers."""
    same_type = isinstance(wanted, bool) is isinstance(value, bool)
    assert matches({"a": [wanted]}, {"a": value}) is (same_type and wanted == value)


def naive_wildcard(pattern: str, text: str) -> bool:
    """Match by trying everything; exponential, and obviously right."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(naive_wildcard(pattern[1:], text[i:]) for i in range(len(text) + 1))
    literal, rest = (pattern[1], pattern[2:]) if pattern[0] == "\\" else (pattern[0], pattern[1:])
    return bool(text) and text[0] == literal and naive_wildcard(rest, text[1:])


@given(wildcards, st.text(alphabet="ab*\\é", max_size=8))
def test_wildcards_agree_with_trying_everything(wildcard: str, text: str) -> None:
    """Against a reference that backtracks."""
    assume("**" not in wildcard.replace("\\\\", "..").replace("\\*", ".."))
    assert matches({"a": [{"wildcard": wildcard}]}, {"a": text}) is naive_wildcard(wildcard, text)


@given(anything)
def test_compile_refuses_with_pattern_error_only(pattern: object) -> None:
    """Whatever JSON somebody writes: a pattern, or all its faults, each in one line."""
    try:
        compiled = EventPattern.compile(pattern)
    except PatternError as exc:
        refused = exc
    else:
        assert EventPattern.compile(json.loads(compiled.text)) == compiled
        return
    assert refused.faults
    assert "\n" not in str(refused)


@given(patterns, st.dictionaries(names, anything))
def test_matching_never_raises(pattern: dict[str, Any], event: dict[str, Any]) -> None:
    """Whatever JSON arrives, NaN included."""
    str(EventPattern.compile(pattern).explain(event))
