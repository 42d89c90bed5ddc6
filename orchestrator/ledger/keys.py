"""The key layout of the ledger, the only place where it is written down.

All keys of a run carry the run's id as hash tag, so that one script can work on them on a Redis Cluster too. They
live as long as the run is in flight and get a TTL (`retention`) when it ends. The rest is listed below.

Fields of the hashes, with `slot` = step id, or `step/index` for an item of a fan-out:

| key | field | value |
|---|---|---|
| run | workflow state episode plan event event_id input output error parent fence cleared | |
| | priority | high or low; absent: normal |
| | phase left | which steps are at work (main: empty, on_failure, finally), and how many of them have not ended |
| | hooks | whether there are steps of on_failure or finally |
| | bad hook_failed | a step, a hook, that failed or was cancelled |
| | end_state end_output end_error | what the run comes to when its hooks have ended |
| | stopping cancel_requested | why nothing further of the phase begins (cancelled, timeout) |
| | reruns | runs that were started anew from this one |
| | reopen_id | the request that opened the episode, which may come twice |
| | used_wall used_cpu used_memory | the same of all its steps, over all episodes |
| | created_at started_at finished_at deadline | ms since the epoch |
| graph | step | [pool, rule, upstreams, [downstream], [read], flags, phase] (plan.py) |
| states | slot | state |
| | u:step f:step k:step | upstream steps ended, failed, skipped |
| | n:step d:step b:step x:step c:step | items in all, ended, failed, cancelled, handed out (`max_parallel`) |
| | s:slot | it was cancelled by itself while it was at work, and is to stop |
| | w:slot | id of the nested run that is waited for; `~`: its time is waited for |
| units | unit | fence:k:hi, with the item and end of a header part (`step/lo-hi`); fence 0: not begun |
| leases | unit | (sorted set) when the lease runs out, ms |
| outbox | unit, or a chore | (sorted set) since when it waits to be published or done, ms |
| timers | unit, ~slot, $deadline | (sorted set) due at, ms: the next attempt, a sleep's end, the run's timeout |
| outputs | slot | payload (payloads.py) |
| attempts | slot@attempt | JSON: worker, code, started_at, fence, finished_at, state, error |
| | slot#a slot#l slot#x | attempts beyond the first, losses, what each loss was (JSON objects joined by commas) |
| | slot#b slot#k | attempts and losses of earlier episodes |
| | step#wall step#cpu step#memory | what all attempts of a step and of its items took: us, us, MB-ms |
| | slot#u slot#m | since when no function was found for it, ms; arguments that were mended (payload) |
| items | per:step, step:chunk | items per chunk, payload of a chunk: the list that `foreach` gave |
| | again:step | items still to be handed out in a further episode |
| logs | slot@attempt | captured text |

Chores in the outbox (engine.py does them): `!slot` a step that will not be tried again is to be made known as a dead
letter, or, if it runs again, to be one no longer; `^ended` whoever waits for this run is to be told; `^close` (never in
the outbox) it has ended and that is all; `^cancel:slot` the nested run of a slot is to be cancelled; `^await:slot` the
nested run of a slot may have ended before the slot waited for it again.
"""

from __future__ import annotations

import json
import uuid

from orchestrator.errors import one_line

PREFIX = "orchestrator"

#: What is added up of what attempts take (see above).
USED = ("wall", "cpu", "memory")
#: The keys of one run, in the order in which they are given to the script as KEYS.
RUN_KEYS = ("run", "graph", "states", "units", "leases", "outbox", "outputs", "attempts", "items", "logs", "timers")

#: Run ids by creation time, ms; permanent, trimmed with the retention.
RUNS = f"{PREFIX}:runs"
#: Runs in flight by creation time; permanent; what the rescuer looks at.
ACTIVE = f"{PREFIX}:active"
#: Runs by when something in them is due, ms; permanent; a hint for timers.py, what holds are the timers of each run.
TIMERS = f"{PREFIX}:timers"
#: Workflow name -> plan hash and definition in force, as JSON; permanent.
WORKFLOWS = f"{PREFIX}:workflows"
#: The ends of which runs are events, as JSON: ["workflow:state", ...]; permanent.
FOLLOWED = f"{PREFIX}:followed-runs"
#: Events by time of acceptance, ms; permanent, trimmed with their retention.
EVENTS = f"{PREFIX}:events"
#: Messages that nobody can process, until they are drained into dead letters; a list; permanent. On the broker's
#: server too, where that is another Redis.
SET_ASIDE = f"{PREFIX}:set-aside"
#: Dead letters by when they last became one, ms; permanent, trimmed with their retention.
DEAD_LETTERS = f"{PREFIX}:dead-letters"
#: Ids of dead letters of steps that are still to be reported; a list; permanent, empty unless there is a `sentry_dsn`.
UNREPORTED = f"{DEAD_LETTERS}:unreported"
#: Says that it was logged that dead letters will expire; TTL of a day.
EXPIRY_WARNED = f"{DEAD_LETTERS}:warned"
#: What metrics count since ever (counters.py): field -> number; permanent, some fields for each workflow and pool.
COUNTERS = f"{PREFIX}:counters"
#: Name -> scope and digest of a bearer token of the API, as JSON; permanent.
TOKENS = f"{PREFIX}:tokens"
#: Entries of the audit log by time, ms, and id -> entry as JSON; permanent, trimmed to a number of them.
AUDIT = f"{PREFIX}:audit"
AUDIT_ENTRIES = f"{AUDIT}:entries"
#: Channel on which the end of each run is told, as JSON: run, workflow, state, error (JSON text, or empty).
RUN_ENDED = f"{PREFIX}:run-ended"
#: Schedule's name -> how far it has come, as JSON (schedules.py); permanent, a row for each schedule that there was
#: within the retention.
SCHEDULES = f"{PREFIX}:schedules"
#: Names of schedules that are paused -> since when, ms; permanent.
PAUSED_SCHEDULES = f"{PREFIX}:schedules:paused"
#: Backfill's id -> what it is and how far it has come, as JSON (schedules.py); permanent, gone a week after its end.
BACKFILLS = f"{PREFIX}:backfills"
#: Worker's name -> its last report, as JSON (pools.py), and -> how many processes it is to have; permanent, a row for
#: each worker that there is.
WORKERS = f"{PREFIX}:workers"
TARGETS = f"{PREFIX}:workers:targets"
#: Pool -> what the autoscaler saw and decided last, as JSON (pools.py); permanent.
POOLS = f"{PREFIX}:pools"
#: Pool -> what the autoscaler remembers of it, as JSON (workers/pools.py); permanent.
POOL_MEMORIES = f"{PREFIX}:pools:memories"
#: Pool -> its size as set by hand; permanent.
PINS = f"{PREFIX}:pools:pinned"
#: "pool|place" -> why its workers do not start there; permanent, empty as long as they do.
POOL_FAULTS = f"{PREFIX}:pools:faults"
#: Pools to which something was published, for the autoscaler; a list; permanent, bounded.
WAKE = f"{PREFIX}:pools:wake"
#: Says that somebody monitors; TTL of some seconds.
MONITORED = f"{PREFIX}:monitored"
#: Version of what is in force here; who is of another one does not start; permanent.
VERSION = f"{PREFIX}:version"
#: Written to see whether the server takes writes; gone at once.
PROBE = f"{PREFIX}:probe"


def leader_key(role: str) -> str:
    """Key that holds who leads where one of several processes does the work; its TTL is the leader's lease."""
    return f"{PREFIX}:leader:{role}"


#: Every key that has no TTL although no run is in flight.
PERMANENT = (
    RUNS, ACTIVE, TIMERS, WORKFLOWS, FOLLOWED, EVENTS, SET_ASIDE, DEAD_LETTERS, UNREPORTED, COUNTERS, TOKENS, AUDIT,
    AUDIT_ENTRIES, SCHEDULES, PAUSED_SCHEDULES, BACKFILLS, WORKERS, TARGETS, POOLS, POOL_MEMORIES, PINS, POOL_FAULTS,
    WAKE, VERSION, f"{PREFIX}:marks:*", f"{PREFIX}:plan:*", f"{PREFIX}:definitions:*",
)  # fmt: skip


def set_aside_record(raw: bytes, reason: str, at_ms: int, *, detail: str = "", queue: str = "") -> str:
    """Return an entry of SET_ASIDE: JSON with raw (its bytes as latin-1), reason (its code, see deadletters.py), detail
    (why, in one line, without anything of a body), at (ms since the epoch), queue. No two are equal.
    """
    entry = {"raw": raw.decode("latin-1"), "reason": reason, "detail": one_line(detail), "at": at_ms, "queue": queue}
    return json.dumps(entry | {"id": uuid.uuid4().hex})


def dead_letter_key(letter: str) -> str:
    """Key of a dead letter, as JSON; TTL is their retention and a day."""
    return f"{PREFIX}:dead-letter:{letter}"


def dead_letter_raw_key(letter: str) -> str:
    """Key of the bytes of a message that is a dead letter; the same TTL."""
    return f"{PREFIX}:dead-letter:{letter}:raw"


def run_keys(run: str) -> list[str]:
    """Return the keys of a run in the order of RUN_KEYS."""
    base = f"{PREFIX}:{{{run}}}:"
    return [base + name for name in RUN_KEYS]


def run_key(run: str, name: str) -> str:
    """Return one key of a run; `name` is one of RUN_KEYS."""
    return f"{PREFIX}:{{{run}}}:{name}"


def plan_key(plan: str) -> str:
    """Key of a plan's text; permanent, a few KB for each version of a workflow."""
    return f"{PREFIX}:plan:{plan}"


def seen_key(event_key: str) -> str:
    """Key that says an event was dealt with; TTL is the dedupe window."""
    return f"{PREFIX}:seen:{event_key}"


def event_key(event_key: str) -> str:
    """Key of the record of an event (eventlog.py), a hash; TTL is the retention of events and a day.

    event (payload) accepted_at verdict definitions (hash) verdicts (JSON, by workflow); duplicates duplicate_at.
    """
    return f"{PREFIX}:event:{event_key}"


def event_id_key(digest: str) -> str:
    """Key of the keys of the events with an id, by the digest of it, a set; the same TTL."""
    return f"{PREFIX}:event-id:{digest}"


def definitions_key(definitions: str) -> str:
    """Key of definitions that were in force, JSON: workflow -> plan; permanent, 80 bytes a workflow each time."""
    return f"{PREFIX}:definitions:{definitions}"


def queue_keys(queue: str) -> list[str]:
    """Return our keys beside a Redis list that somebody else fills, on its server: what was waited for and is not yet
    taken (a list), what is taken (a hash, id -> message) and until when (a sorted set, ms); gone when they are empty.
    """
    return [f"{PREFIX}:queue:{{{queue}}}:{name}" for name in ("arrived", "taken", "until")]


def taken_keys(trigger: str) -> list[str]:
    """Return the keys of what a queue's trigger has taken and not yet acknowledged, where the broker gives it no id: a
    hash id -> digest and owner, and until when each owner is known to live (a sorted set, ms); TTL of a day.
    """
    return [f"{PREFIX}:taken:{{{trigger}}}:{name}" for name in ("ids", "owners")]


def marks_key(source: str) -> str:
    """Hash path -> identity of the files that a watch has handled; permanent, each field lives as long as its file."""
    return f"{PREFIX}:marks:{source}"


def objects_key(bucket: str, shard: str) -> str:
    """Hash of some records of the objects of a bucket (objects.py); TTL of 400 days from when one is seen."""
    return f"{PREFIX}:{{s3:{bucket}}}:{shard}"


def listing_key(bucket: str) -> str:
    """Key that says how far a bucket was listed, as JSON (triggers/listing.py); the same TTL."""
    return f"{PREFIX}:{{s3:{bucket}}}:listing"
