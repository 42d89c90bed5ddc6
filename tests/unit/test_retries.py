"""RetryPolicy and the signals of steps: what is computed, and each refusal."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import orchestrator
from orchestrator.errors import DefinitionError
from orchestrator.retries import MOST_ATTEMPTS, Jitter, RetryPolicy, kinds_of, read_policy
from orchestrator.signals import Fail, Retry, StepCancelled, StepTimeout

ERROR = st.sampled_from(["ValueError", "OSError", "shop.errors.NoStock", "Fehler_2"])


@st.composite
def policies(draw):
    """Any policy that makes sense."""
    initial, maximum = sorted(draw(st.tuples(*[st.floats(0, 3e9)] * 2)))
    never = draw(st.lists(ERROR, max_size=2))
    return RetryPolicy(
        maximum_attempts=draw(st.integers(1, MOST_ATTEMPTS)),
        initial_interval=initial,
        backoff_coefficient=draw(st.floats(1, 1e300)),
        maximum_interval=maximum,
        jitter=draw(st.sampled_from(Jitter)),
        non_retryable_errors=never,
        retryable_errors=[name for name in draw(st.lists(ERROR, max_size=2)) if name not in never],
    )


POLICY = policies()
CHANCE = st.floats(0, 1, exclude_max=True)
FAILED = st.integers(1, MOST_ATTEMPTS)


def test_the_defaults_are_those_that_are_documented():
    """Three attempts, the pauses from one second to five minutes, all of it left to chance."""
    policy = RetryPolicy()
    assert policy == RetryPolicy(
        maximum_attempts=3, initial_interval="1s", backoff_coefficient=2, maximum_interval="5m", jitter="full"
    )
    assert [policy.delay_s(failed, 0.5) for failed in (1, 2, 3, 9, 10, 11)] == [0.5, 1, 2, 128, 150, 150]
    assert (policy.may_retry(2, ["OSError"]), policy.may_retry(3, ["OSError"])) == (True, False)


@pytest.mark.parametrize(("jitter", "low", "high"), [(Jitter.FULL, 0, 8), (Jitter.EQUAL, 4, 8), (Jitter.NONE, 8, 8)])
def test_jitter(jitter, low, high):
    """All of the interval, its second half, nothing."""
    policy = RetryPolicy(initial_interval=2, jitter=jitter)
    assert policy.delay_s(3, 0) == low
    assert policy.delay_s(3, math.nextafter(1, 0)) == pytest.approx(high)


@given(POLICY, FAILED, CHANCE)
def test_a_delay_is_within_its_bounds(policy, failed, chance):
    """Whatever the numbers are: nothing overflows, and nothing is waited for longer than was said."""
    delay = policy.delay_s(failed, chance)
    assert 0 <= delay <= policy.maximum_interval
    assert delay <= replace(policy, jitter=Jitter.NONE).delay_s(failed, chance)
    if policy.jitter is Jitter.NONE:
        assert delay >= policy.initial_interval


@given(POLICY, FAILED, FAILED)
def test_without_jitter_pauses_do_not_shrink(policy, one, other):
    """More failed attempts, no shorter a pause."""
    policy = replace(policy, jitter=Jitter.NONE)
    first, later = sorted((one, other))
    assert policy.delay_s(first, 0.5) <= policy.delay_s(later, 0.5)


class NoStockError(LookupError):
    """An error of a project."""


HERE = f"{__name__}.NoStockError"


def test_errors_are_told_by_their_names_and_those_of_their_bases():
    """Bare, and with the module where they have one of their own."""
    assert kinds_of(NoStockError) == ("NoStockError", HERE, "LookupError", "Exception", "BaseException")


@pytest.mark.parametrize(
    ("given", "is_retried"),
    [
        ({}, True),
        ({"non_retryable_errors": ["NoStockError"]}, False),
        ({"non_retryable_errors": [HERE]}, False),
        ({"non_retryable_errors": [NoStockError]}, False),
        ({"non_retryable_errors": ["LookupError"]}, False),
        ({"non_retryable_errors": [LookupError]}, False),
        ({"non_retryable_errors": ["other.NoStockError", "KeyError"]}, True),
        ({"retryable_errors": ["LookupError"]}, True),
        ({"retryable_errors": ["KeyError", OSError]}, False),
        ({"retryable_errors": ["LookupError"], "non_retryable_errors": ["NoStockError"]}, False),
    ],
)
def test_which_errors_are_tried_again(given, is_retried):
    """What is never tried again wins."""
    policy = RetryPolicy(**given)
    assert policy.may_retry(1, kinds_of(NoStockError)) is is_retried
    assert not policy.may_retry(3, kinds_of(NoStockError))


@given(POLICY)
def test_a_policy_comes_back_from_json_as_it_was(policy):
    """And from what a definition writes, which is the same."""
    body = json.loads(json.dumps(policy.to_json()))
    assert RetryPolicy.from_json(body) == policy
    assert read_policy(body) == (policy, [])


def test_a_number_is_short_for_that_many_attempts():
    """And a policy stands for itself."""
    assert read_policy(5) == (RetryPolicy(maximum_attempts=5), [])
    assert read_policy({}) == (RetryPolicy(), [])
    assert read_policy(RetryPolicy(jitter="none")) == (RetryPolicy(jitter="none"), [])
    assert RetryPolicy(maximum_attempts=5).to_json() == {"maximum_attempts": 5}


@pytest.mark.parametrize(
    ("value", "key", "message"),
    [
        (0, "", "must be a whole number from 1 (no retry) to 10000, not 0"),
        (10_001, "", "must be a whole number from 1 (no retry) to 10000, not 10001"),
        (True, "", "must be a mapping, or the number of attempts, not True"),
        ("5", "", "must be a mapping, or the number of attempts, not '5'"),
        ([], "", "must be a mapping, or the number of attempts, not []"),
        ({"nap": 5}, "nap", "unknown key 'nap'; known: maximum_attempts, initial_interval, backoff_coefficient"),
        ({"maximum_atempts": 5}, "maximum_atempts", "did you mean 'maximum_attempts'?"),
        ({"maximum_attempts": 0}, "maximum_attempts", "must be a whole number from 1"),
        ({"maximum_attempts": 1.5}, "maximum_attempts", "must be a whole number from 1"),
        ({"maximum_attempts": True}, "maximum_attempts", "must be a whole number from 1"),
        ({"maximum_attempts": "5"}, "maximum_attempts", "must be a whole number from 1"),
        ({"initial_interval": -1}, "initial_interval", "must be a duration, such as 30, 500ms"),
        ({"initial_interval": "soon"}, "initial_interval", "must be a duration, such as 30, 500ms"),
        ({"initial_interval": None}, "initial_interval", "must be a duration, such as 30, 500ms"),
        ({"maximum_interval": "-5m"}, "maximum_interval", "must be a duration, such as 30, 500ms"),
        ({"maximum_interval": "99999d"}, "maximum_interval", "is too long"),
        ({"maximum_interval": "1s", "initial_interval": 2}, "maximum_interval", "(1 s) is below initial_interval (2"),
        ({"maximum_interval": 0.5}, "maximum_interval", "maximum_interval (0.5 s) is below initial_interval (1 s)"),
        ({"initial_interval": "10m"}, "initial_interval", "maximum_interval (300 s) is below initial_interval (600 s)"),
        ({"backoff_coefficient": 0.9}, "backoff_coefficient", "must be a number from 1, not 0.9"),
        ({"backoff_coefficient": math.nan}, "backoff_coefficient", "must be a number from 1, not nan"),
        ({"backoff_coefficient": math.inf}, "backoff_coefficient", "must be a number from 1, not inf"),
        ({"backoff_coefficient": 10**400}, "backoff_coefficient", "is too large"),
        ({"backoff_coefficient": "2"}, "backoff_coefficient", "must be a number from 1, not '2'"),
        ({"backoff_coefficient": True}, "backoff_coefficient", "must be a number from 1, not True"),
        ({"jitter": "ful"}, "jitter", "must be one of full, equal, none, not 'ful'; did you mean 'full'?"),
        ({"jitter": []}, "jitter", "must be one of full, equal, none, not []"),
        ({"non_retryable_errors": "ValueError"}, "non_retryable_errors", "must be a list of names of errors"),
        ({"retryable_errors": {"a": 1}}, "retryable_errors", "must be a list of names of errors"),
        ({"retryable_errors": 5}, "retryable_errors", "must be a list of names of errors"),
        ({"retryable_errors": ["a b"]}, "retryable_errors", "'a b' cannot be an error's name"),
        ({"retryable_errors": ["a..b"]}, "retryable_errors", "'a..b' cannot be an error's name"),
        ({"retryable_errors": ["None"]}, "retryable_errors", "'None' cannot be an error's name"),
        ({"retryable_errors": [""]}, "retryable_errors", "'' cannot be an error's name"),
        ({"retryable_errors": [5]}, "retryable_errors", "5 cannot be an error's name"),
        ({"retryable_errors": [int]}, "retryable_errors", "<class 'int'> cannot be an error's name"),
        (
            {"retryable_errors": ["A", "B"], "non_retryable_errors": ["B"]},
            "retryable_errors",
            "'B' is in non_retryable_errors too",
        ),
    ],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused(value, key, message):
    """One thing is wrong in each; it is named once, with its key."""
    policy, ((found, words),) = read_policy(value)
    assert (policy, found) == (None, key)
    assert message in words


def test_all_that_is_wrong_with_a_policy_is_said_at_once():
    """Where it is made in Python: with the place of the call."""
    faulty = {"maximum_attempts": 0, "initial_interval": "2m", "maximum_interval": "1m", "jitter": 1}
    with pytest.raises(DefinitionError) as caught:
        RetryPolicy(**faulty)
    assert [fault.field for fault in caught.value.faults] == [
        "RetryPolicy.maximum_attempts",
        "RetryPolicy.jitter",
        "RetryPolicy.maximum_interval",
    ]
    line = test_all_that_is_wrong_with_a_policy_is_said_at_once.__code__.co_firstlineno + 4
    assert {(fault.file, fault.line) for fault in caught.value.faults} == {(__file__, line)}
    _, faults = read_policy(faulty)
    assert [key for key, _ in faults] == ["maximum_attempts", "jitter", "maximum_interval"]


VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=5))
KEY = st.sampled_from(sorted(RetryPolicy.__slots__)) | st.text(max_size=5)


@given(VALUE | st.dictionaries(KEY, VALUE))
def test_no_value_raises(value):
    """Whatever is written, it is a policy or has a fault."""
    policy, faults = read_policy(value)
    assert (policy is None) == bool(faults)
    assert policy is None or policy.delay_s(1, 0.5) >= 0


def test_a_step_can_ask_to_be_tried_again():
    """What it asks for is checked where it asks."""
    signal = Retry("5m", reason="no stock yet")
    assert (signal.after_s, signal.reason, str(signal)) == (300.0, "no stock yet", "no stock yet")
    assert (Retry().after_s, Retry(after=0).after_s) == (None, 0.0)
    assert str(Retry()) == "the step asked to be tried again"
    for nonsense in ("soon", -1, True):
        with pytest.raises(ValueError, match="must be a duration"):
            Retry(after=nonsense)
    assert str(Fail("no such customer")) == "no such customer"


def test_except_exception_does_not_stop_what_ends_a_step():
    """A step that catches all of its own errors ends all the same."""
    assert not issubclass(StepTimeout, Exception)
    assert not issubclass(StepCancelled, Exception)


def test_every_public_name_is_there():
    """They are loaded when they are asked for."""
    assert {name for name in orchestrator.__all__ if getattr(orchestrator, name) is None} == set()
    assert orchestrator.RetryPolicy is RetryPolicy
    assert orchestrator.Retry is Retry
    with pytest.raises(AttributeError):
        _ = orchestrator.nothing
