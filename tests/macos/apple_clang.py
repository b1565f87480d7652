"""Stands in for Apple's clang++ on Linux: compiles and links for macOS on arm64 with zig.

CMake runs it as it would run the real one. The link is as strict as Apple's: every
symbol must come from a library that is named, with one exception, the symbols that
`-U` names (nanobind's list of Python's C API). zig's linker is called directly,
because `zig c++` would build a C++ library of its own first. Linker flags that are
not known here are errors, so that none is dropped in silence.

Usage: apple_clang.py SDK ARGUMENT...   (SDK: the folder that cross_build.write_sdk made)
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

TARGET = ("-target", "aarch64-macos.14.0")
STUBS = Path(__file__).parent / "stubs"
ZIG = (sys.executable, "-m", "ziglang")

# The install name under which the symbols of a `-U` list appear in the result.
NAMED_BY_U = "named by -U"
# zig's C++ headers are set up for its own libc++; these defaults are those of Apple's.
APPLE_DEFAULTS = (
    "-fno-sized-deallocation",
    "-fno-sanitize=undefined",
    "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS",
    "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
)
# They change the size or the layout of the result, not which symbols it needs.
HARMLESS = {
    "-Wl,-dead_strip",
    "-Wl,-headerpad_max_install_names",
    "-Wl,-search_paths_first",
    "-Wl,-undefined,error",
    "-Wl,-x",
    "-Wl,-S",
}


def text_stub(install_name, symbols):
    """A .tbd file: the text form of a library that macOS SDKs hold."""
    lines = "".join(f"      - '{symbol}'\n" for symbol in sorted(symbols))
    return (
        "--- !tapi-tbd\n"
        "tbd-version: 4\n"
        "targets: [ arm64-macos ]\n"
        f"install-name: '{install_name}'\n"
        "exports:\n"
        "  - targets: [ arm64-macos ]\n"
        f"    symbols:{' []' if not lines else ''}\n{lines}"
        "...\n"
    )


def take_option(arguments, option):
    """Removes an option and its value from the list; returns the value or None."""
    if option not in arguments:
        return None
    at = arguments.index(option)
    value = arguments[at + 1]
    del arguments[at : at + 2]
    return value


def compile_command(arguments):
    # zig doesn't use its cache where it is asked for dependencies, which a build from
    # scratch can do without.
    target, dependencies = take_option(arguments, "-MT"), take_option(arguments, "-MF")
    if dependencies:
        Path(dependencies).write_text(f"{target}:\n")
    # MLX's CMake files name the SDK of the Mac that built it; clang only warns there.
    arguments = [
        word for word in arguments if word != "-MD" and not word.startswith("-F/Applications/Xcode")
    ]
    return [*ZIG, "c++", *TARGET, *APPLE_DEFAULTS, *arguments, "-isystem", str(STUBS)]


def named_symbols(response_file):
    """The symbols that `-U` names in a linker response file."""
    words = Path(response_file).read_text().split()
    return [symbol for flag, symbol in pairwise(words) if flag == "-U"]


def link_command(sdk, arguments):
    command = [*ZIG, "build-lib", "-dynamic", *TARGET, "-lc", "-O", "ReleaseSmall"]
    command += ["-fno-compiler-rt", "-fno-ubsan-rt"]
    libraries = [sdk / "libc++.tbd", sdk / "libobjc.tbd"]
    arguments = iter(arguments)
    for argument in arguments:
        if argument == "-o":
            command.append(f"-femit-bin={Path(next(arguments)).absolute()}")
        elif argument == "-framework":
            libraries.append(sdk / f"{next(arguments)}.tbd")
        elif argument.startswith("-Wl,-rpath,"):
            command += ["-rpath", argument.removeprefix("-Wl,-rpath,")]
        elif argument.startswith("-Wl,@"):
            symbols = named_symbols(argument.removeprefix("-Wl,@"))
            libraries.append(sdk / "named_by_U.tbd")
            libraries[-1].write_text(text_stub(NAMED_BY_U, symbols))
        elif argument.startswith("-l"):
            libraries.append(sdk / f"lib{argument[2:]}.tbd")
        elif argument.endswith((".o", ".a", ".dylib", ".tbd")):
            command.append(argument)
        elif argument in ("-bundle", "-dynamiclib", "-shared") or argument in HARMLESS:
            continue
        elif argument.startswith(("-D", "-F", "-O", "-f", "-m", "-std=")):
            continue  # for the compiler; CMake repeats it when it links
        else:
            raise SystemExit(f"{argument}: apple_clang.py does not know this linker flag")
    for library in libraries:
        if not library.exists():
            raise SystemExit(f"{library.stem}: nothing is known of this library in {sdk}")
    return command + [str(library) for library in libraries]


def main(sdk, *arguments):
    arguments = list(arguments)
    if take_option(arguments, "-arch") not in (None, "arm64"):
        raise SystemExit("apple_clang.py builds for arm64 only")
    compiles = {"-c", "-E", "-S", "-v", "--version"} & set(arguments)
    command = compile_command(arguments) if compiles else link_command(Path(sdk), arguments)
    if os.environ.get("VERBOSE"):
        print(*command, file=sys.stderr)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
