"""The zip archives that `torch.save` writes: which records there are, and where (PKWARE's APPNOTE 6.3, 4.3 to 4.5)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

_MAX_DIRECTORY = 1 << 23  # bytes of the zip's central directory; a storage needs about 60
TORCHSCRIPT = "it is a TorchScript program; save the model's state_dict() with torch.save instead"


class Refused(Exception):
    """Why a file is not read; `read_checkpoint` adds the file's name."""


@dataclass(frozen=True, slots=True)
class Record:
    """One stored file of the zip: `size` bytes from `start`."""

    start: int
    size: int
    crc: int


def quote(text: str) -> str:
    """Text that came from the file, fit for a message: short, one line, nothing a terminal obeys."""
    return ascii(text if len(text) <= 100 else text[:100] + "...")


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise Refused("it is truncated or damaged; download or save it again")
    return data


def contents(file: BinaryIO, record: Record, limit: int) -> bytes:
    if record.size > limit:
        raise Refused(f"its description of the tensors takes {record.size} bytes, more than {limit}")
    data = _read_at(file, record.start, record.size)
    # PyTorch writes 0 where checksums are switched off.
    if record.crc and zlib.crc32(data) != record.crc:
        raise Refused("its description of the tensors is damaged (wrong checksum); download or save it again")
    return data


def zip_records(file: BinaryIO, file_size: int) -> dict[str, Record]:
    """The records by name, each one found to be uncompressed, inside the file, and apart from every other."""
    if file_size == 0:
        raise Refused("it is empty")
    head = _read_at(file, 0, min(file_size, 512))
    if not head.startswith(b"PK\3\4"):
        raise Refused(_what_it_is(head))
    count, directory_start, directory_size = _zip_end(file, file_size)
    if directory_size > _MAX_DIRECTORY:
        raise Refused(f"its zip directory takes {directory_size} bytes, more than {_MAX_DIRECTORY}")
    directory = _read_at(file, directory_start, directory_size)
    damaged = Refused("its zip directory is damaged; download or save it again")

    records: dict[str, Record] = {}
    spans: list[tuple[int, int]] = []
    at = 0
    for _ in range(count):
        if directory[at : at + 4] != b"PK\1\2" or at + 46 > len(directory):
            raise damaged
        flags, method, crc, packed, size, name_size, extra_size, comment_size, disk, header = struct.unpack_from(
            "<4xHH4x3I4H6xI", directory, at + 4
        )
        raw_name = directory[at + 46 : at + 46 + name_size]
        extra = directory[at + 46 + name_size : at + 46 + name_size + extra_size]
        at += 46 + name_size + extra_size + comment_size
        try:
            name = raw_name.decode()
            size, packed, header = _zip64_fields(extra, size, packed, header)
        except (UnicodeDecodeError, struct.error):
            raise damaged from None
        if method != 0 and "/code/" in name:
            raise Refused(TORCHSCRIPT)
        if flags & 1 or method != 0 or packed != size:
            raise Refused(f"its record {quote(name)} is compressed or encrypted, which torch.save never does")
        if at > len(directory) or disk != 0 or name in records or header + 30 > directory_start:
            raise damaged
        start = _data_start(file, header, raw_name, size)
        if start is None or start + size > directory_start:
            raise Refused(f"its record {quote(name)} is not where the zip directory says; download or save it again")
        records[name] = Record(start, size, crc)
        spans.append((header, start + size))
    if at != len(directory):
        raise damaged
    spans.sort()
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise Refused("its zip records overlap; download or save it again")
    return records


def _data_start(file: BinaryIO, header: int, name: bytes, size: int) -> int | None:
    """Where a record's bytes begin, after its local header; None if that disagrees with the central directory.

    The local header's extra block is not the directory's: PyTorch pads with it, so that storages start at multiples of
    64 bytes. Where flag 8 is set it may give the sizes as 0, because they follow behind the data.
    """
    signature, flags, method, *sizes, name_size, extra_size = struct.unpack("<4s2xHH8xIIHH", _read_at(file, header, 30))
    allowed = (size, 0xFFFFFFFF, 0) if flags & 8 else (size, 0xFFFFFFFF)
    if (
        signature != b"PK\3\4"
        or flags & 1
        or method != 0
        or any(said not in allowed for said in sizes)
        or name_size != len(name)
        or _read_at(file, header + 30, name_size) != name
    ):
        return None
    return header + 30 + name_size + extra_size


def _zip_end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of records, start and size in bytes of the central directory."""
    truncated = Refused("it is truncated (the zip's end is missing); download or save it again")
    # The last record, a comment of up to 65535 bytes included.
    tail_start = max(0, size - 22 - 0xFFFF)
    tail = _read_at(file, tail_start, size - tail_start)
    found = tail.rfind(b"PK\5\6")
    while found >= 0 and int.from_bytes(tail[found + 20 : found + 22], "little") != len(tail) - found - 22:
        found = tail.rfind(b"PK\5\6", 0, found)
    if found < 0:
        raise truncated
    end = tail_start + found
    fields = struct.unpack_from("<4HII", tail, found + 4)
    if end >= 20 + 56:
        locator = _read_at(file, end - 20, 20)
        if locator.startswith(b"PK\6\7"):
            disk, end64, _ = struct.unpack_from("<IQI", locator, 4)
            if disk != 0 or end64 + 56 > end - 20:
                raise truncated
            record = _read_at(file, end64, 56)
            if not record.startswith(b"PK\6\6"):
                raise truncated
            fields, end = struct.unpack_from("<IIQQQQ", record, 16), end64
    disk, directory_disk, count_here, count, directory_size, directory_start = fields
    if disk or directory_disk or count_here != count or directory_start + directory_size != end:
        raise truncated
    return count, directory_start, directory_size


def _zip64_fields(extra: bytes, *fields: int) -> list[int]:
    """The 32-bit fields, those of all ones replaced, in this order, by the 64-bit ones in the extra block 1."""
    at = 0
    while at < len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            wanted = sum(field == 0xFFFFFFFF for field in fields)
            large = iter(struct.unpack_from(f"<{wanted}Q", extra[at + 4 : at + 4 + length]))
            return [next(large) if field == 0xFFFFFFFF else field for field in fields]
        at += 4 + length
    return list(fields)


def _what_it_is(head: bytes) -> str:
    """What a file is that does not begin as a zip does."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` or download the file"
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "it has the format of torch before 1.6; open it with torch.load and torch.save it again"
    if head[8:9] == b"{":
        return "it is a safetensors file, not a checkpoint of torch.save"
    return "it is not a checkpoint of torch.save (no zip file)"
