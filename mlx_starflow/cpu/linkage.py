"""The pointers through which one loaded library calls the functions of another (64-bit Linux).

A call from a shared library into another goes through a pointer that the dynamic linker fills in: an entry of the
global offset table, found by the relocations of the procedure linkage table (ELF specification, "Dynamic Linking").
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Container

_PLTRELSZ, _STRTAB, _SYMTAB, _JMPREL = 2, 5, 6, 23  # tags of the dynamic section
_SYMBOL_SIZE = 24
_RTLD_DI_LINKMAP = 2


class _LinkMap(ctypes.Structure):
    _fields_ = (("base", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t))


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def pointers(library: ctypes.CDLL, names: Container[str]) -> dict[str, int]:
    """Name -> address of the pointer through which `library` calls the function, of those that it calls so."""
    link = ctypes.POINTER(_LinkMap)()
    if _libc().dlinfo(ctypes.c_void_p(library._handle), _RTLD_DI_LINKMAP, ctypes.byref(link)):
        return {}
    base, entry, section = link.contents.base, link.contents.dynamic, {}
    while (pair := struct.unpack("=qQ", ctypes.string_at(entry, 16)))[0]:
        section[pair[0]] = pair[1]
        entry += 16
    if _JMPREL not in section:
        return {}
    # The dynamic linker has turned offsets into addresses, unless the section cannot be written to.
    relocations, strings, symbols = (
        section[tag] + (base if section[tag] < base else 0) for tag in (_JMPREL, _STRTAB, _SYMTAB)
    )
    found = {}
    for offset, info, _ in struct.iter_unpack("=QQq", ctypes.string_at(relocations, section[_PLTRELSZ])):
        symbol = ctypes.c_uint32.from_address(symbols + _SYMBOL_SIZE * (info >> 32))
        name = ctypes.string_at(strings + symbol.value).decode()
        if name in names:
            found[name] = base + offset
    return found


def read(pointer: int) -> int:
    """The address that the pointer at `pointer` holds."""
    return ctypes.c_size_t.from_address(pointer).value


def write(pointer: int, address: int) -> None:
    """Let the pointer at `pointer` hold `address`. Raises OSError if that memory cannot be made writable."""
    page = pointer - pointer % mmap.PAGESIZE
    protection = _protection(pointer)
    if not protection & mmap.PROT_WRITE:
        _protect(page, protection | mmap.PROT_WRITE)
    ctypes.c_size_t.from_address(pointer).value = address
    if not protection & mmap.PROT_WRITE:
        _protect(page, protection)


def address_of(library: ctypes.CDLL, name: str) -> int:
    """Of a function. Raises AttributeError if the library has none of that name."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def file_of(address: int) -> str:
    """Path of the library that a function lies in. Raises OSError if it is in none."""
    info = _SymbolInfo()
    if not _libc().dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        raise OSError(f"no library is at {address:#x}")
    return os.fsdecode(info.file)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _protect(page: int, protection: int) -> None:
    if _libc().mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), protection):
        raise OSError(ctypes.get_errno(), "the linkage table cannot be written to")


def _protection(address: int) -> int:
    with open("/proc/self/maps") as maps:
        for line in maps:
            area, flags = line.split(maxsplit=2)[:2]
            start, end = (int(edge, 16) for edge in area.split("-"))
            if start <= address < end:
                kinds = zip(flags, (mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC), strict=False)
                return sum(kind for flag, kind in kinds if flag != "-")
    raise OSError(f"no memory is at {address:#x}")
