"""The table of docs/slo.md: what each request counts as."""

from __future__ import annotations

import pytest

from jaxserve.protocol.records import Begun, Outcome
from jaxserve.telemetry.slo.judge import Verdict, judge
from jaxserve.telemetry.slo.objective import parse_objective
from tests.telemetry.slo.simulation import CHAT, MS, S, asked, ended

TTFT = "p99 ttft < 100 ms"
TPOT = "p99 tpot < 20 ms"
E2E = "p99 e2e < 2 s"
ERRORS = "error_rate < 1%"
AVAILABLE = "availability > 99%"
#: A request that keeps all of them.
WELL = {"first_token_ns": 50 * MS, "decode_ns": 100 * MS, "decode_tokens": 10}
NOTHING = {"first_token_ns": 0, "decode_ns": 0, "decode_tokens": 0}
LATE_FIRST = WELL | {"first_token_ns": 100 * MS}


@pytest.mark.parametrize(
    ("values", "verdicts"),
    [  # of ttft, tpot, e2e, error_rate, availability
        (WELL, "good good good good good"),
        (WELL | {"first_token_ns": 100 * MS - 1}, "good good good good good"),
        (LATE_FIRST, "late good good good good"),
        (WELL | {"decode_ns": 199 * MS}, "good good good good good"),
        (WELL | {"decode_ns": 200 * MS}, "good late good good good"),
        (WELL | {"done_ns": 2 * S - 1}, "good good good good good"),
        (WELL | {"done_ns": 2 * S}, "good good late good good"),
        (WELL | {"decode_ns": 0, "decode_tokens": 0}, "good unmeasured good good good"),
        (NOTHING, "unmeasured unmeasured good good good"),
        (WELL | {"first_token_ns": 30 * S, "done_ns": 40 * S}, "late good late good good"),
        (NOTHING | {"outcome": Outcome.SHED}, "shed shed shed shed shed"),
        (NOTHING | {"outcome": Outcome.FAILED}, "errored errored errored errored errored"),
        (WELL | {"outcome": Outcome.FAILED}, "errored errored errored errored errored"),
        (NOTHING | {"outcome": Outcome.EXPIRED}, "expired expired expired expired expired"),
        (
            NOTHING | {"outcome": Outcome.FAILED, "asked": asked(1)},
            "errored unmeasured errored errored errored",
        ),
        (NOTHING | {"outcome": Outcome.REFUSED}, "refused refused refused refused refused"),
        (LATE_FIRST | {"outcome": Outcome.REFUSED}, "refused refused refused refused refused"),
        (NOTHING | {"outcome": Outcome.LIMITED}, "limited limited limited limited limited"),
        (
            WELL | {"outcome": Outcome.LEFT},
            "cancelled cancelled cancelled cancelled cancelled",
        ),
        (LATE_FIRST | {"outcome": Outcome.LEFT}, "late cancelled cancelled cancelled cancelled"),
        (
            WELL | {"outcome": Outcome.LEFT, "decode_ns": 200 * MS},
            "cancelled late cancelled cancelled cancelled",
        ),
        (
            NOTHING | {"outcome": Outcome.LEFT, "done_ns": 99 * MS},
            "cancelled cancelled cancelled cancelled cancelled",
        ),
        (
            NOTHING | {"outcome": Outcome.LEFT, "done_ns": 3 * S},
            "late cancelled late cancelled cancelled",
        ),
        (
            NOTHING | {"outcome": Outcome.LEFT, "done_ns": 5 * S},
            "late cancelled late cancelled late",
        ),
        (
            WELL | {"outcome": Outcome.LEFT, "done_ns": 5 * S},
            "cancelled cancelled late cancelled cancelled",
        ),
    ],
)
def test_verdicts(values, verdicts):
    begun = Begun(request_id="1", arrived_ns=0, route=CHAT, model="m")
    record = ended(begun, **({"done_ns": 500 * MS} | values))
    found = [
        judge(parse_objective(text).indicator, record, overdue_ns=5 * S)
        for text in (TTFT, TPOT, E2E, ERRORS, AVAILABLE)
    ]
    assert " ".join(verdict.name.lower() for verdict in found) == verdicts


def test_nobody_is_overdue_where_the_bound_is_0():
    begun = Begun(request_id="1", arrived_ns=0, route=CHAT, model="m")
    record = ended(begun, 100 * S, **NOTHING, outcome=Outcome.LEFT)
    assert judge(parse_objective(AVAILABLE).indicator, record, 0) is Verdict.CANCELLED
