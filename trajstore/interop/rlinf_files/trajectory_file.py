"""One trajectory file: bytes to fields and back. No files here.

Invariant: a ``.pt`` file is never unpickled, and any byte of it that was changed is found (by the checksums of its zip
archive, which ``torch.load`` does not look at) or changes nothing; a ``.pkl`` file is read only with ``allow_pickle=True``.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from trajstore.errors import ColumnTypeError, CorruptionError, UntrustedPickleError

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER_BYTES = 30


def encode(fields: Mapping[str, Any], trajectory_format: str) -> memoryview:
    """The file of a trajectory: byte for byte what ``torch.save`` or ``pickle.dump`` of a dict of copies gives.

    Args:
        fields: Field -> tensor, dict, number, text or list of them; None is left out.
        trajectory_format: ``"pt"`` or ``"pkl"``.

    Raises:
        ColumnTypeError: A value of another type.
    """
    seen: set[int] = set()
    plain = {name: _plain(value, name, "this trajectory", seen) for name, value in fields.items() if value is not None}
    file = io.BytesIO()
    if trajectory_format == "pt":
        torch.save(plain, file)
    else:
        pickle.dump(plain, file)
    return file.getbuffer()


def decode(data: bytes, trajectory_format: str, *, where: str, allow_pickle: bool) -> dict[str, Any]:
    """The fields of a trajectory, its tensors on the CPU.

    Args:
        data: The file's bytes.
        trajectory_format: ``"pt"`` or ``"pkl"``.
        where: Names the file in errors.
        allow_pickle: Whether a ``.pkl`` may be unpickled, which can run any code.

    Raises:
        CorruptionError: The bytes are not what was written.
        UntrustedPickleError: Only unpickling could read it.
        ColumnTypeError: It holds something that a trajectory does not have.
    """
    if trajectory_format == "pkl":
        check_pickle(where, allow_pickle=allow_pickle)
        try:
            found = pickle.loads(data)  # noqa: S301 - the caller said so
        except Exception as error:  # whatever the objects in it raise
            raise CorruptionError(f"{where} cannot be unpickled ({error!r}); restore it from a copy") from error
    else:
        _check_archive(data, where)
        try:
            with warnings.catch_warnings():  # about protocols, before the error that says it all
                warnings.simplefilter("ignore")
                found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            reason = str(error).rsplit("Please file an issue", 1)[0].rsplit("WeightsUnpickler error:", 1)[-1].strip()
            raise UntrustedPickleError(
                f"{where} is damaged, or holds objects other than tensors, dicts, numbers and texts, which only unpickling "
                f"could read ({reason.splitlines()[0] if reason else 'no reason given'}); load it with torch.load("
                "weights_only=False) where you trust it, and save plain fields, or restore it from a copy"
            ) from error
        except Exception as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise CorruptionError(
                f"{where} is not what torch.save wrote ({type(error).__name__}: {reason}); restore it from a copy"
            ) from error
    if not isinstance(found, dict):
        raise ColumnTypeError(
            f"{where} holds a {type(found).__name__}, expected a dict of field -> tensor, dict or text"
        )
    return {name: _plain(value, str(name), where, None) for name, value in found.items()}


def check_pickle(where: str, *, allow_pickle: bool) -> None:
    """Raises UntrustedPickleError unless pickles may be read."""
    if not allow_pickle:
        raise UntrustedPickleError(
            f"{where} is a pickle: reading it can run any code that its writer chose; pass allow_pickle=True if you trust "
            "it, or have its writer save .pt files"
        )


def _plain(value: Any, name: str, where: str, seen: set[int] | None) -> Any:
    """A value without what no file should hold; with ``seen``, no two tensors share memory and none is part of a larger one.

    Args:
        value: Of a field.
        name: Of the field.
        where: Names the trajectory in errors.
        seen: Addresses of the storages that tensors had so far; None to leave them as they are.
    """
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        if seen is None:
            return tensor
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            # torch.save writes whole storages, and one that two tensors share once.
            tensor = tensor.clone()
        elif tensor.nbytes:
            seen.add(storage.data_ptr())
        return tensor
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise ColumnTypeError(f"{name} of {where} has the key {wrong[0]!r}, expected texts")
        return {key: _plain(inner, f"{name}/{key}", where, seen) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inside = [_plain(inner, name, where, seen) for inner in value]
        return inside if isinstance(value, list) else tuple(inside)
    if value is None or isinstance(value, int | float | str):
        return value
    raise ColumnTypeError(
        f"{name} of {where} is {type(value).__name__}, expected a tensor, a number, a text, or dicts and lists of them"
    )


def _check_archive(data: bytes, where: str) -> None:
    """The checksums of a zip archive hold. Files of ``torch.save`` before 1.6 are none, and have none."""
    if data[: len(_ZIP_MAGIC)] != _ZIP_MAGIC:
        return
    try:
        members = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        raise CorruptionError(f"{where} is a damaged archive ({error}); restore it from a copy") from error
    if not any(member.CRC for member in members):
        return  # torch.serialization.set_crc32_options(False)
    view = memoryview(data)
    for member in members:
        header = view[member.header_offset :][:_LOCAL_HEADER_BYTES]
        # Lengths of the name and of the padding, which stand before the bytes.
        skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        stored = view[member.header_offset + _LOCAL_HEADER_BYTES + skipped :][: member.file_size]
        if member.compress_type != zipfile.ZIP_STORED or zlib.crc32(stored) != member.CRC:
            raise CorruptionError(f"{where}: the checksum of {member.filename!r} does not hold; restore it from a copy")
