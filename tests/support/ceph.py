"""A real S3 server for tests: Ceph with one monitor, one in-memory OSD and one gateway, all on loopback.

It differs from moto where it matters: it checks credentials, who loses a conditional put is told so by ``OSError(22)``, and
multipart uploads ignore the condition.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.s3_server import KEY, SECRET

_BINARIES = ("monmaptool", "ceph-mon", "ceph", "ceph-osd", "radosgw", "radosgw-admin")
_START_TIMEOUT_S = 90.0
_OSD_ATTEMPTS = 5
_MEMORY_BYTES = 2 << 30

_CONFIG = """\
[global]
fsid = {fsid}
mon_host = v1:{monitor}/0
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
mon_max_pg_per_osd = 1000
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
log_file = {folder}/log/$name.log
admin_socket = {folder}/run/$name.asok
run_dir = {folder}/run
keyring = {folder}/keyring
osd_objectstore = memstore
memstore_device_bytes = {memory}
osd_memory_target = 939524096
debug_ms = 0
rgw_frontends = beast endpoint=127.0.0.1:{gateway} tcp_nodelay=1
rgw_enable_apis = s3, admin
rgw_dns_name = 127.0.0.1
"""


def missing_binaries() -> list[str]:
    """What is not installed of what a cluster needs."""
    return [name for name in _BINARIES if shutil.which(name) is None]


@contextmanager
def ceph_server(folder: Path) -> Iterator[str]:
    """Start a cluster whose user is ``s3_server.KEY`` and yield the gateway's URL; it stops when the block ends.

    Args:
        folder: Empty; its path must be short, because sockets are made in it.
    """
    for name in ("mon", "osd", "log", "run", "rgw"):
        (folder / name).mkdir(parents=True)
    fsid = str(uuid.uuid4())
    monitor, gateway = f"127.0.0.1:{_free_port()}", _free_port()
    config = folder / "ceph.conf"
    config.write_text(_CONFIG.format(fsid=fsid, monitor=monitor, gateway=gateway, folder=folder, memory=_MEMORY_BYTES))
    environ = {**os.environ, "CEPH_CONF": str(config)}

    def run(*command: str) -> None:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")

    with ExitStack() as stack:

        def start(*command: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [*command, "-f"], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(_stop, process)
            return process

        run("monmaptool", "--create", "--addv", "a", f"[v1:{monitor}]", "--fsid", fsid, f"{folder}/monmap")
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{folder}/monmap")
        start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        run("ceph", "--connect-timeout", "60", "osd", "create", osd)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        run("ceph", "osd", "crush", "add-bucket", "h1", "host")
        run("ceph", "osd", "crush", "move", "h1", "root=default")
        run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=h1")
        _start_osd(start, environ)
        start("radosgw", "-n", "client.rgw")
        _wait_for_port(gateway)
        run(
            *("radosgw-admin", "user", "create", "--uid=t", "--display-name=t"),
            *(f"--access-key={KEY}", f"--secret={SECRET}"),
        )
        yield f"http://127.0.0.1:{gateway}"


def _start_osd(start, environ: dict[str, str]) -> None:
    """An OSD that asks for its place before it has the monitor map is refused and ends: then it is started again."""
    for _ in range(_OSD_ATTEMPTS):
        process = start("ceph-osd", "-i", "0")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            told = subprocess.run(
                ["ceph", "osd", "stat"], env=environ, capture_output=True, text=True, timeout=60, check=False
            )
            if "1 up" in told.stdout:
                return
            time.sleep(0.2)
    raise RuntimeError("the OSD does not come up")


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
