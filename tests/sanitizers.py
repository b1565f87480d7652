"""Clang's sanitizers: where their libraries lie, and who names the places in what they say."""

import os
import shutil
import subprocess
import sys
from functools import cache

COMPILER = "clang++-22"
RUNTIMES = {"address": "asan", "thread": "tsan"}
# Named, because an older llvm-symbolizer that lies in the PATH can't read clang-22's tables.
SYMBOLIZER = shutil.which("llvm-symbolizer-22") or shutil.which("addr2line")
SYMBOLS = f":external_symbolizer_path={SYMBOLIZER}" if SYMBOLIZER else ""


@cache
def runtime(sanitizer: str) -> str | None:
    """Path of the sanitizer's runtime library, None where there is none."""
    if shutil.which(COMPILER) is None or sys.platform != "linux":
        return None
    name = f"libclang_rt.{RUNTIMES[sanitizer]}-{os.uname().machine}.so"
    found = subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None
