"""Sampling from an S3 server on loopback (moto, in a process of its own): ranges, requests, the cache on disk."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

import trajstore
from benchmarks.harness import Bar, Contender, Context, Measurement, paired_ratios, ratio_of_medians
from benchmarks.sampling_support import IMAGE, PREFETCH, image_rollouts, recorded_reads, write_store

WINDOWS, LENGTH = 64, 16
ROW_BYTES = 64 * 64 * 3
_REGION, _KEY, _SECRET, _BUCKET = "eu-west-1", "AK", "SKSKSKSK", "benchmarks"
_REQUEST = re.compile(r'"([A-Z]+) /([^ "?]*)[^"]*" \d+')
_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # werkzeug colours what is not a plain 200
_METADATA = ("pages.arrow", "zarr.json")


@dataclass(frozen=True)
class S3Server:
    """A running server and its log."""

    endpoint: str
    log: Path

    def storage_options(self) -> dict[str, Any]:
        """What s3fs needs to reach it."""
        return {
            "endpoint_url": self.endpoint,
            "key": _KEY,
            "secret": _SECRET,
            "client_kwargs": {"region_name": _REGION},
        }

    def requests(self, since: int = 0) -> list[tuple[str, str]]:
        """Method and key of each request that was answered after the log had ``since`` bytes."""
        return _REQUEST.findall(_STYLE.sub("", self.log.read_text()[since:]))

    def mark(self) -> int:
        """Where the log ends now."""
        return len(self.log.read_text())


@contextlib.contextmanager
def s3_server(scratch: Path) -> Iterator[S3Server]:
    """A server with an empty bucket, on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = scratch / "s3.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=stream, stderr=stream
        )
    try:
        server = S3Server(f"http://127.0.0.1:{port}", log)
        _await(process, port, log)
        client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=_KEY,
            aws_secret_access_key=_SECRET,
            region_name=_REGION,
        )
        client.create_bucket(Bucket=_BUCKET, CreateBucketConfiguration={"LocationConstraint": _REGION})
        client.close()
        yield server
    finally:
        process.terminate()
        process.wait()


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the S3 server did not start: {log.read_text()[-500:]}")
        time.sleep(0.05)


def from_s3(context: Context) -> Iterator[Measurement]:
    """Random windows out of a bucket against bare reads of the same ranges; requests; a second epoch from the disk."""
    rollouts = image_rollouts(context.pick(8_000, 2_000), kind="camera")
    steps = int(rollouts.lengths.sum())
    batches = context.pick(8, 3)
    with s3_server(context.scratch) as server:
        options = {"storage_options": server.storage_options()}
        url = write_store(f"s3://{_BUCKET}/store", rollouts, only=[IMAGE], segment_bytes=16 << 20, **options)
        cache_bytes = steps * ROW_BYTES // 4

        def fresh() -> tuple[trajstore.Store, Any]:
            """A store with nothing in memory but its metadata."""
            store = trajstore.open(url, cache_bytes=cache_bytes, **options)
            loader = store.trajectories.loader(WINDOWS, window=LENGTH, columns=[IMAGE], prefetch=PREFETCH)
            return store, loader

        def draw(opened: tuple[trajstore.Store, Any]) -> None:
            batch = iter(opened[1])
            for _ in range(batches):
                next(batch)

        def close(opened: tuple[trajstore.Store, Any]) -> None:
            opened[1].close()
            opened[0].close()

        mark = server.mark()
        opened = fresh()
        with recorded_reads(opened[0]) as reads:
            draw(opened)
            runs = list(reads)
        close(opened)
        heads = sum(method == "HEAD" for method, _ in server.requests(mark))
        if sum(method == "GET" for method, _ in server.requests(mark)) < len(runs):
            raise RuntimeError("the log of the S3 server does not show the requests that were made")
        root = f"{_BUCKET}/store"

        with trajstore.open(url, **options) as client_of:
            client = client_of._filesystem.fs  # the same client, at the concurrency that it has by itself

            def bare(_none: object) -> None:
                found = client.cat_ranges(
                    [f"{root}/{run.key}" for run in runs], [run.start for run in runs], [run.stop for run in runs]
                )
                if sum(map(len, found)) != sum(run.stop - run.start for run in runs):
                    raise RuntimeError("the bare reader did not get what it asked for")

            timings = context.measure(
                [
                    Contender(name="trajstore", prepare=fresh, run=draw, cleanup=close),
                    Contender(name="bare", run=bare),
                ],
                rounds=context.pick(7, 3),
                warmup=1,
            )
        read = sum(run.stop - run.start for run in runs)
        yield Measurement(
            name="s3 speed",
            what="random windows of frames from a loopback S3 server: speed / bare concurrent reads of the same ranges",
            measured=ratio_of_medians(timings, "bare", "trajstore"),
            bar=Bar("at least", 0.7),
            timings=timings,
            spread=paired_ratios(timings, "bare", "trajstore"),
            details={
                "ranges": len(runs),
                "read_mb": round(read / 1e6, 1),
                "bare_mb_s": round(read / timings["bare"].median_s / 1e6, 1),
            },
        )
        yield Measurement(
            name="s3 HEAD",
            what="the same, from opening the store to the last batch: HEAD requests",
            measured=float(heads),
            unit="requests",
            bar=Bar("at most", 0.0),
        )
        yield _second_epoch(context, server, url, cache_bytes=cache_bytes)


def _second_epoch(context: Context, server: S3Server, url: str, *, cache_bytes: int) -> Measurement:
    """GETs of step data in the second of two epochs, each by a handle of its own, that share a cache on disk."""
    counts = []
    for epoch in range(2):
        mark = server.mark()
        with (
            trajstore.open(
                url,
                cache_bytes=cache_bytes,
                cache_dir=context.scratch / "pages",
                storage_options=server.storage_options(),
            ) as store,
            store.trajectories.loader(256, columns=[IMAGE], order="shuffle", seed=epoch, prefetch=PREFETCH) as loader,
        ):
            for _ in loader:
                context.tick()
        counts.append(
            sum(
                method == "GET" and "/segments/" in key and not key.endswith(_METADATA)
                for method, key in server.requests(mark)
            )
        )
    if not counts[0]:
        raise RuntimeError("the log of the S3 server shows no request for step data in the first epoch")
    return Measurement(
        name="s3 cache_dir",
        what="an epoch of frames from S3 with `cache_dir` filled by the epoch before: GETs of step data",
        measured=float(counts[1]),
        unit="requests",
        bar=Bar("at most", 0.0),
        details={"first_epoch_gets": counts[0]},
    )
