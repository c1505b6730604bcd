"""Which failures of a bucket are worth another try, and how long to try.

Invariant: only failures that say nothing of the request itself are retried (throttling, time-outs, broken connections,
conflicts in progress); everything else is raised at once.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Iterator

import tenacity

ATTEMPTS = 6
PATIENCE_S = 60.0  # no further attempt after this long; a client's own time-outs and attempts come on top
MAX_WAIT_S = 4.0

_TRANSIENT_CODES = frozenset(
    [
        "408",
        "409",
        "425",
        "429",
        "500",
        "502",
        "503",
        "504",
        "ConditionalRequestConflict",
        "OperationAborted",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestTimeout",
        "RequestTimeTooSkewed",
        "InternalError",
        "ServiceUnavailable",
        "TooManyRequests",
        "BadDigest",
        "IncompleteBody",
        "XAmzContentSHA256Mismatch",
    ]
)
_FINAL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT})
_TRANSIENT_NAMES = frozenset(
    [
        "ClientError",
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "HTTPClientError",
        "ConnectionClosedError",
        "IncompleteRead",
        "ResponseStreamingError",
        "ResponseParserError",
        "ServerDisconnectedError",
        "ClientPayloadError",
        "ClientConnectionError",
        "ClientOSError",
        "ServerTimeoutError",
        "FSTimeoutError",
        "AioReadTimeoutError",
    ]
)


_CODE_ATTRIBUTES = ("status", "status_code", "code", "error_code")


def error_codes(error: BaseException) -> frozenset[str]:
    """Codes and HTTP statuses that a cloud client attached to an error or to what caused it."""
    codes: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code", "")))
            codes.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")))
        attributes = vars(cause)  # not getattr: aiohttp's `code` is a property that warns
        codes.update(str(v) for v in map(attributes.get, _CODE_ATTRIBUTES) if isinstance(v, int | str))
        cause = cause.__cause__
    return frozenset(codes - {""})


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    codes = error_codes(error)
    if codes & _TRANSIENT_CODES:
        return True
    if isinstance(error, TimeoutError | ConnectionError | asyncio.TimeoutError):
        return True
    if codes:  # the server answered, and it was none of the above
        return False
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError):
        return False
    if type(error).__name__ in _TRANSIENT_NAMES:
        return True
    return isinstance(error, OSError) and error.errno == errno.EIO and error.errno not in _FINAL_ERRNOS


def retrying() -> Iterator[tenacity.AttemptManager]:
    """Attempts with growing, jittered pauses; the last failure is raised as it is."""
    return iter(
        tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_after_delay(PATIENCE_S),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=MAX_WAIT_S),
            reraise=True,
        )
    )


def race_pause_s(lost: int, *, base_s: float, rng: random.Random) -> float:
    """Seconds to wait after losing a race for the ``lost``-th time: full jitter, doubling up to 64 times the base."""
    return rng.uniform(0, base_s * 2 ** min(lost, 6))
