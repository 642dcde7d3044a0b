"""Every error a caller of jaxserve can meet, each with its code and HTTP status.

The one table from error to status is this module: `http` renders whatever derives from
`JaxserveError` and nothing else. Messages give the value, the limit and the remedy.
"""

from __future__ import annotations

from typing import ClassVar


class JaxserveError(Exception):
    """Base of all typed errors.

    Attributes:
        code: stable machine-readable name, OpenAI's where it has one.
        status: HTTP status at the edge.
        retryable: whether the same request may succeed later.
        param: name of the offending request field, if one is to blame.
        retry_after_s: when the same request may succeed, where that is known.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(JaxserveError):
    """The request can never succeed as it is."""

    code = "invalid_value"
    status = 400


class ContextTooLong(InvalidRequest):
    """Prompt plus requested output does not fit the model's context."""

    code = "context_length_exceeded"


class GrammarError(InvalidRequest):
    """A grammar is wrong, too complex, or leaves no token to sample."""

    code = "invalid_grammar"


class PayloadTooLarge(InvalidRequest):
    """The body is larger than `http.max_body_bytes`."""

    code = "payload_too_large"
    status = 413


class RequestTimeout(InvalidRequest):
    """The body did not come within `http.body_timeout_s`."""

    code = "request_timeout"
    status = 408


class HeadTooLarge(InvalidRequest):
    """The request line and headers are longer than what is read."""

    code = "header_too_large"
    status = 431


class UnsupportedMediaType(InvalidRequest):
    """The body is not declared to be JSON."""

    code = "unsupported_media_type"
    status = 415


class Unauthenticated(JaxserveError):
    """No valid API key was given."""

    code = "invalid_api_key"
    status = 401


class Forbidden(JaxserveError):
    """The key is valid, but its role does not allow this."""

    code = "forbidden"
    status = 403


class ModelNotFound(JaxserveError):
    """No model of that name is served here."""

    code = "model_not_found"
    status = 404


class AdapterNotFound(ModelNotFound):
    """No adapter of that name is registered, or found under `lora.root`."""


class InvalidAdapter(InvalidRequest):
    """An adapter's files are missing, cut off or malformed, or do not fit the base model."""

    code = "invalid_adapter"


class AdapterInUse(JaxserveError):
    """Requests of an adapter run, and unloading it was asked not to wait for them."""

    code = "adapter_in_use"
    status = 409
    retryable = True


class TooLargeForLimit(InvalidRequest):
    """The request is more than a rate limit lets anybody have at once."""

    code = "request_exceeds_rate_limit"


class RateLimited(JaxserveError):
    """A rate limit of the key, its user or its tenant is reached."""

    code = "rate_limit_exceeded"
    status = 429
    retryable = True


class BudgetExceeded(JaxserveError):
    """The tenant has spent its budget of the month."""

    code = "budget_exceeded"
    status = 402


class BudgetLimited(BudgetExceeded):
    """The same, where `metering.over_budget_status` is 429."""

    code = "budget_limited"
    status = 429
    retryable = True


class Overloaded(JaxserveError):
    """The waiting queue is full, or the server drains."""

    code = "overloaded"
    status = 503
    retryable = True


class DeadlineExceeded(JaxserveError):
    """The request's deadline passed before it was done."""

    code = "deadline_exceeded"
    status = 504
    retryable = True


class Cancelled(JaxserveError):
    """The request was cancelled by its client."""

    code = "cancelled"
    status = 499


class OutOfPages(JaxserveError):
    """The KV page pool cannot hold this sequence even when it is alone."""

    code = "out_of_pages"
    status = 400


class DeviceFailure(JaxserveError):
    """The device or the engine process failed while requests were in flight."""

    code = "engine_failure"
    status = 503
    retryable = True


class HostLost(DeviceFailure):
    """One of the hosts that share the model ended, fell silent, or was never met."""


class RequestQuarantined(JaxserveError):
    """The engine process ended each time it ran this request, at last with this one alone."""

    code = "request_quarantined"


class EmbeddingNotFinite(JaxserveError):
    """The model gave no vector for a text: a number in it is not finite, or all are zero."""

    code = "embedding_not_finite"


class LedgerUnavailable(JaxserveError):
    """The ledger cannot be written or read now: disk full, file damaged, database away."""

    code = "ledger_unavailable"
    status = 503
    retryable = True


class ConfigError(JaxserveError):
    """A configuration key, value or combination is wrong; ends start-up."""

    code = "config_error"


class WeightsError(JaxserveError):
    """A model directory, file or tensor is missing, truncated or of a wrong shape."""

    code = "weights_error"


class UnsupportedModel(WeightsError):
    """The checkpoint's architecture or a feature of it is not implemented."""

    code = "unsupported_model"
