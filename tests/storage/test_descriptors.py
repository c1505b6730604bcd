"""Files kept open: how many, and until when."""

import os
import subprocess
import sys
import threading

import pytest

import trajstore
from trajstore.storage import local
from trajstore.storage.descriptors import OpenFiles
from trajstore.storage.filesystem import ByteRange
from trajstore.storage.local import LocalFilesystem


def open_numbers():
    return {int(name) for name in os.listdir("/proc/self/fd")}


@pytest.fixture
def paths(tmp_path):
    made = []
    for number in range(20):
        made.append(str(tmp_path / str(number)))
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    return made


def test_no_more_than_so_many_stay_open_and_none_after_close(paths):
    before = open_numbers()
    files = OpenFiles(keep=4)
    for path in paths:
        files.get(path)
    assert len(open_numbers() - before) == 4
    files.close()
    files.close()
    assert open_numbers() == before


def test_a_file_is_opened_once_and_the_one_used_longest_ago_goes_first(paths):
    files = OpenFiles(keep=2)
    first = files.get(paths[0]).number
    files.get(paths[1])
    assert files.get(paths[0]).number == first
    files.get(paths[2])  # paths[1] goes
    assert files.get(paths[0]).number == first
    files.close()


def test_whoever_reads_a_file_keeps_it_open(paths):
    files = OpenFiles(keep=1)
    held = files.get(paths[7])
    files.get(paths[8])
    files.close()
    assert os.pread(held.number, 10, 0) == bytes([7]) * 10


def test_many_threads_read_right_bytes_while_files_come_and_go(paths):
    files = OpenFiles(keep=3)
    wrong = []

    def read(seed):
        for step in range(500):
            number = (seed * 7 + step * 13) % len(paths)
            file = files.get(paths[number])
            if os.pread(file.number, 100, 0) != bytes([number]) * 100:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    assert not wrong


def test_ranges_are_read_straight_into_memory(tmp_path):
    filesystem = LocalFilesystem(str(tmp_path))
    filesystem.store({"a/b": [bytes(range(200))]})
    one, two = bytearray(10), bytearray(25)
    filesystem.read_into("a/b", 5, [memoryview(one), memoryview(two)])
    assert bytes(one + two) == bytes(range(5, 40))
    assert bytes(one) == bytes(filesystem.read_ranges([ByteRange("a/b", 5, 15)])[0])
    with pytest.raises(trajstore.CorruptionError, match="ends at byte 200"):
        filesystem.read_into("a/b", 190, [memoryview(one), memoryview(two)])
    with pytest.raises(trajstore.MissingObjectError):
        filesystem.read_into("a/c", 0, [memoryview(one)])
    filesystem.close()


def test_more_objects_are_stored_than_files_may_be_open(tmp_path):
    filesystem = LocalFilesystem(str(tmp_path))
    code = (
        "import resource, sys\n"
        "from trajstore.storage.local import LocalFilesystem\n"
        "filesystem = LocalFilesystem(sys.argv[1])\n"
        "streams = [filesystem.stream(f's/{n}') for n in range(20)]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (350, 350))\n"
        "for stream in streams: stream.write([b'stream'])\n"
        "filesystem.store({f'a/{n % 7}/{n}': [str(n).encode()] for n in range(1000)}, streams)\n"
    )
    subprocess.run([sys.executable, "-c", code, filesystem.root], check=True)
    numbers = range(1000)
    found = filesystem.read_many([f"a/{n % 7}/{n}" for n in numbers])
    assert found == [str(n).encode() for n in numbers]
    assert filesystem.read_many([f"s/{n}" for n in range(20)]) == [b"stream"] * 20


def test_of_many_files_every_one_is_synced_before_any_folder(tmp_path, monkeypatch):
    filesystem = LocalFilesystem(str(tmp_path))
    filesystem.store({"0": [b"1"]})  # the store's own folder is there
    calls = []
    synced, folder_synced = filesystem._fsync_file, filesystem._fsync_directory
    monkeypatch.setattr(local, "_OPEN_TOGETHER", 3)
    monkeypatch.setattr(filesystem, "_fsync_file", lambda d, n: (synced(d, n), calls.append(n)))
    monkeypatch.setattr(filesystem, "_fsync_directory", lambda p: (folder_synced(p), calls.append("folder")))
    for count in (1, 3, 4, 10):
        calls.clear()
        keys = [f"{count}/{n}" for n in range(count)]
        filesystem.store({key: [b"1"] for key in keys})
        assert sorted(calls[:count]) == sorted(keys)
        assert set(calls[count:]) == {"folder"}
