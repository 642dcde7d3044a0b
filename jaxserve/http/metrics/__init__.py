"""Prometheus metrics: `cells` hold what `counting` counts, `collecting` and `aliases` show it."""

from jaxserve.http.metrics.cells import create_shared as create_shared
from jaxserve.http.metrics.counting import Metrics as Metrics
from jaxserve.http.metrics.exposition import CONTENT_TYPE as CONTENT_TYPE
