"""The table of names, against the package of OpenTelemetry's conventions."""

from __future__ import annotations

import pytest
from opentelemetry.semconv import schemas
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, user_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes import error_attributes, http_attributes, service_attributes

from jaxserve.http.records import WORK_ROUTES
from jaxserve.telemetry import semconv

KNOWN = {
    value
    for module in (
        *(gen_ai_attributes, gen_ai_metrics, user_attributes),
        *(error_attributes, http_attributes, service_attributes),
    )
    for value in vars(module).values()
    if isinstance(value, str)
}
OURS = {
    name: value
    for name, value in vars(semconv).items()
    if isinstance(value, str) and name.isupper() and "." in value and "://" not in value
}


@pytest.mark.parametrize("name", sorted(set(OURS) - {"HOST_NAME", "PROCESS_PID"}))
def test_each_name_is_one_of_the_conventions(name: str) -> None:
    assert OURS[name] in KNOWN


def test_the_schema_is_one_that_there_is() -> None:
    assert semconv.SCHEMA_URL in {schema.value for schema in schemas.Schemas}


def test_each_route_that_asks_for_work_has_an_operation() -> None:
    assert semconv.OPERATIONS.keys() == WORK_ROUTES


def test_the_buckets_are_those_of_the_conventions() -> None:
    assert semconv.BUCKETS["gen_ai.server.request.duration"] == (
        *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    )
    assert semconv.BUCKETS["gen_ai.client.token.usage"] == (
        *(1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216),
        67108864,
    )
    for bounds in semconv.BUCKETS.values():
        assert list(bounds) == sorted(set(bounds))
