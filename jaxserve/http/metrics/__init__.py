"""Prometheus metrics: `cells` hold what `counting` counts, `collecting` and `aliases` show it."""

from jaxserve.http.metrics.cells import create_shared as create_shared
from jaxserve.http.metrics.counting import Metrics as Metrics
from jaxserve.http.metrics.exposition import CONTENT_TYPE as CONTENT_TYPE
from jaxserve.http.metrics.exposition import END as END
from jaxserve.http.metrics.exposition import OPEN_CONTENT_TYPE as OPEN_CONTENT_TYPE
from jaxserve.http.metrics.exposition import wants_open as wants_open
