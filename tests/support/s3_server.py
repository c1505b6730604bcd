"""An S3 server on loopback that keeps a log and fails on demand: moto behind a lock, so that a conditional put is atomic.

moto looks whether the key is there and then puts, in two steps; without the lock two writers both win.
"""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Response

REGION = "eu-west-1"
KEY, SECRET = "AK", "SKSKSKSK"


@dataclass(eq=False)
class Request:
    """One request as the server saw it."""

    method: str
    bucket: str
    key: str
    query: dict[str, list[str]]
    range: str | None  # the Range header
    if_none_match: str | None
    nbytes: int  # of the body
    arrived_at: float
    answered_at: float = float("inf")
    status: int = 0

    @property
    def is_multipart(self) -> bool:
        """Whether it is one of the requests of a multipart upload."""
        return "uploads" in self.query or "uploadId" in self.query

    def __str__(self) -> str:
        return f"{self.method} {self.key}{' ' + self.range if self.range else ''} -> {self.status}"


@dataclass(frozen=True)
class Refuse:
    """Answer with an error and do nothing."""

    status: int
    code: str
    message: str = "injected by the test"


@dataclass(frozen=True)
class LoseReply:
    """Do what was asked, then answer with an error, or with nothing at all if ``status`` is 0."""

    status: int = 0
    code: str = "InternalError"


@dataclass(frozen=True)
class IgnoreCondition:
    """Do what was asked as if there were no If-None-Match."""


@dataclass(frozen=True)
class Hang:
    """Answer only once the server stops or the test lets go."""


Fault = Refuse | LoseReply | IgnoreCondition | Hang
_Environ = dict[str, Any]
_App = Callable[[_Environ, Callable[..., Any]], Iterable[bytes]]


class RequestLog(list[Request]):
    """Requests in order of arrival."""

    def by_method(self) -> Counter[str]:
        """How many of each method."""
        return Counter(r.method for r in self)

    def keys(self, method: str) -> list[str]:
        """Keys of one method's requests, sorted."""
        return sorted(r.key for r in self if r.method == method)

    def round_trips(self) -> int:
        """Length of the longest chain of requests each of which came after the answer to the one before."""
        chain, free_at = 0, float("-inf")
        for request in sorted(self, key=lambda r: r.answered_at):
            if request.arrived_at >= free_at:
                chain += 1
                free_at = request.answered_at
        return chain

    def __str__(self) -> str:
        return "\n".join(map(str, self))


class S3Server:
    """The server: its address, its log, and how it misbehaves.

    Attributes:
        url: For ``endpoint_url``.
        latency_s: Added to every request. The log's round trips mean something only where this is large beside the
            time between two requests that a client sends together.
        fault: Asked about every request before it is done.
        log: Requests since the last ``recording``.
    """

    def __init__(self) -> None:
        self.latency_s = 0.0
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.log = RequestLog()
        self.released = threading.Event()
        self._writing = threading.Lock()
        self._inner: _App = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._app, threaded=True, request_handler=_QuietHandler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> S3Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def storage_options(self, **changes: Any) -> dict[str, Any]:
        """What s3fs needs to reach this server."""
        return s3fs_options(self.url, **changes)

    def client(self) -> Any:
        """A plain client, that knows nothing of trajstore."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name=REGION,
        )

    def make_bucket(self, name: str) -> None:
        """Create a bucket in the region of ``storage_options``."""
        client = self.client()
        client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        client.close()

    @contextmanager
    def recording(self, *, latency_s: float = 0.0) -> Iterator[RequestLog]:
        """The requests of the block, as a log of its own."""
        self.log = RequestLog()
        self.latency_s = latency_s
        try:
            yield self.log
        finally:
            self.latency_s = 0.0

    @contextmanager
    def failing(self, fault: Callable[[Request], Fault | None]) -> Iterator[None]:
        """Misbehave during the block."""
        self.released.clear()
        self.fault = fault
        try:
            yield
        finally:
            self.fault = lambda request: None
            self.released.set()

    def _app(self, environ: _Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        arrived_at = time.monotonic()
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)  # read outside the lock
        bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        request = Request(
            method=environ["REQUEST_METHOD"],
            bucket=bucket,
            key=key,
            query=parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True),
            range=environ.get("HTTP_RANGE"),
            if_none_match=environ.get("HTTP_IF_NONE_MATCH"),
            nbytes=len(body),
            arrived_at=arrived_at,
        )
        self.log.append(request)
        if self.latency_s:
            time.sleep(self.latency_s)

        def respond(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            request.status = int(status.split()[0])
            request.answered_at = time.monotonic()
            return start_response(status, headers, *rest)

        return self._answer(request, environ, respond)

    def _answer(self, request: Request, environ: _Environ, respond: Callable[..., Any]) -> Iterable[bytes]:
        match self.fault(request):
            case Refuse(status, code, message):
                return error_response(request, status, code, message)(environ, respond)
            case LoseReply(status, code):
                Response.from_app(self._do, environ).close()
                if status:
                    return error_response(request, status, code, "after it was done")(environ, respond)
                raise ConnectionAbortedError  # the handler closes the connection without a word
            case IgnoreCondition():
                environ.pop("HTTP_IF_NONE_MATCH", None)
            case Hang():
                self.released.wait()
                raise ConnectionAbortedError
        return self._do(environ, respond)

    def _do(self, environ: _Environ, respond: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("PUT", "POST", "DELETE"):
            return self._inner(environ, respond)
        with self._writing:
            return self._inner(environ, respond)


def s3fs_options(endpoint_url: str, **changes: Any) -> dict[str, Any]:
    """Options of s3fs for a server at ``endpoint_url``."""
    return {
        "endpoint_url": endpoint_url,
        "key": KEY,
        "secret": SECRET,
        "client_kwargs": {"region_name": REGION},
        **changes,
    }


def error_response(request: Request, status: int, code: str, message: str) -> Response:
    """An error as S3 words it."""
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>'
        f"<Resource>/{request.bucket}/{request.key}</Resource><RequestId>0</RequestId></Error>"
    )
    return Response("" if request.method == "HEAD" else text, status, content_type="application/xml")


class _QuietHandler(WSGIRequestHandler):
    """Logs nothing; a ConnectionError of the application ends the connection."""

    def log_request(self, *_: Any) -> None:
        pass

    def connection_dropped(self, *_: Any) -> None:
        self.close_connection = True
