"""Reads what a 64-bit Mach-O library (macOS, arm64) takes from other libraries."""

import struct
from pathlib import Path

MH_MAGIC_64 = 0xFEEDFACF
LC_SYMTAB = 0x2
# The commands that name a library; their order gives the libraries' ordinals.
LC_LOADS = {0xC, 0x80000018, 0x8000001F, 0x20, 0x80000023}
LC_RPATH = 0x8000001C
N_STAB, N_TYPE, N_EXT = 0xE0, 0x0E, 0x01
# An ordinal that means "whoever has it at run time" (-undefined dynamic_lookup, -U).
DYNAMIC_LOOKUP = 254


class MachO:
    """`libraries`: install names in order. `rpaths`: as recorded.
    `imports`: {install name, or None for a symbol looked up at run time: symbols}.
    """

    def __init__(self, path):
        data = Path(path).read_bytes()
        magic, _, _, _, count, _, _, _ = struct.unpack_from("<8I", data)
        if magic != MH_MAGIC_64:
            raise ValueError(f"{path} is not a 64-bit Mach-O file")
        self.libraries, self.rpaths, self.imports = [], [], {}
        at, symtab = 32, None
        for _ in range(count):
            command, size, field = struct.unpack_from("<3I", data, at)
            text = data[at + field : at + size].split(b"\0")[0] if field < size else b""
            if command in LC_LOADS:
                self.libraries.append(text.decode())
            elif command == LC_RPATH:
                self.rpaths.append(text.decode())
            elif command == LC_SYMTAB:
                symtab = struct.unpack_from("<4I", data, at + 8)
            at += size
        symbols, count, strings, _ = symtab
        for i in range(count):
            name, kind, _, desc, value = struct.unpack_from("<IBBHQ", data, symbols + 16 * i)
            if kind & N_STAB or kind & N_TYPE or not kind & N_EXT or value:
                continue  # not an undefined external symbol
            start = strings + name
            symbol = data[start : data.index(b"\0", start)].decode()
            ordinal = desc >> 8
            library = None if ordinal == DYNAMIC_LOOKUP else self.libraries[ordinal - 1]
            self.imports.setdefault(library, set()).add(symbol)
