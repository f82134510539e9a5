"""The zip archives that `torch.save` writes: which records there are, and where their bytes lie."""

from __future__ import annotations

import encodings.cp437  # noqa: F401  with which zipfile reads names: reading a file imports nothing
import mmap
import struct
import zipfile
import zlib
from itertools import pairwise
from typing import NamedTuple

_MAX_DIRECTORY = 1 << 23  # bytes of the zip's central directory; a storage needs about 60


class Refused(Exception):
    """Why a file is not read; `read_checkpoint` adds the file's name."""


class Record(NamedTuple):
    """One uncompressed file of the zip: `size` bytes from `start`, and their checksum."""

    start: int
    size: int
    crc: int


class MappedFile(mmap.mmap):
    """A checkpoint's memory map, in which `zipfile` looks for the archive's directory."""

    def read(self, size: int | None = None) -> bytes:
        """As of a file. Raises Refused for more than a directory needs: it would be copied into memory."""
        if size is not None and size > _MAX_DIRECTORY:
            raise Refused(f"its zip directory takes {size} bytes, more than {_MAX_DIRECTORY}")
        return super().read(size)

    def contents(self, record: Record, limit: int) -> bytes:
        """The bytes of a record. Raises Refused if they are more than `limit` or do not have their checksum."""
        if record.size > limit:
            raise Refused(f"its description of the tensors takes {record.size} bytes, more than {limit}")
        data = self[record.start : record.start + record.size]
        # PyTorch writes 0 where checksums are switched off.
        if record.crc and zlib.crc32(data) != record.crc:
            raise Refused("its description of the tensors is damaged (wrong checksum); download or save it again")
        return data


def quote(text: str) -> str:
    """Text that came from the file, fit for a message: short, one line, nothing a terminal obeys."""
    return ascii(text if len(text) <= 100 else text[:100] + "...")


def zip_records(file: MappedFile) -> dict[str, Record]:
    """The records by name, each one found to be uncompressed, inside the file, and apart from every other."""
    head = file[:512]
    if not head.startswith(b"PK\3\4"):
        raise Refused(_what_it_is(head))
    truncated = Refused("it is truncated or damaged (no whole zip archive); download or save it again")
    try:
        archive = zipfile.ZipFile(file)  # type: ignore[call-overload]  # its seek returns None before Python 3.13
    except Refused:
        raise
    except Exception:  # directories that are none raise whatever they like
        raise truncated from None
    records: dict[str, Record] = {}
    spans: list[tuple[int, int]] = []
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
        raise Refused("it is a TorchScript program; save the model's state_dict() with torch.save instead")
    for info in archive.infolist():
        if info.filename in records:
            raise Refused("its zip directory is damaged; download or save it again")
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Refused(f"its record {quote(info.filename)} is compressed or encrypted, which torch.save never does")
        # The name and what PyTorch pads with, so that storages start at multiples of 64 bytes, stand before the bytes.
        header = file[info.header_offset : info.header_offset + 30]
        start = info.header_offset + len(header) + sum(struct.unpack("<HH", header[26:30].ljust(4, b"\0")))
        if not header.startswith(b"PK\3\4") or len(header) < 30 or start + info.file_size > archive.start_dir:
            raise Refused(f"its record {quote(info.filename)} is not where the zip directory says; download it again")
        records[info.filename] = Record(start, info.file_size, info.CRC)
        spans.append((info.header_offset, start + info.file_size))
    spans.sort()
    if spans and spans[0][0] != 0:  # something stands before the archive
        raise truncated
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise Refused("its zip records overlap; download or save it again")
    return records


def _what_it_is(head: bytes) -> str:
    """What a file is that does not begin as a zip does."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` or download the file"
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "it has the format of torch before 1.6; open it with torch.load and torch.save it again"
    if head[8:9] == b"{":
        return "it is a safetensors file, not a checkpoint of torch.save"
    return "it is not a checkpoint of torch.save (no zip file)"
