"""The extension compiles for macOS on arm64 and finds every symbol in the real libmlx.

Apple hardware is not needed: zig compiles, with the project's own CMake files, MLX's
macOS headers and stand-ins for a few of Apple's (tests/macos).
"""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "macos"))
import apple_clang
import cross_build
from macho import MachO

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a Mac builds natively")

ROOT = Path(__file__).parents[1]
LIBMLX = "@rpath/libmlx.dylib"
ACCELERATE = "/System/Library/Frameworks/Accelerate.framework/Versions/A/Accelerate"
LIBRARIES = {
    LIBMLX,
    ACCELERATE,
    "/usr/lib/libSystem.B.dylib",
    "/usr/lib/libc++.1.dylib",
    "/usr/lib/libobjc.A.dylib",
    apple_clang.NAMED_BY_U,
}
# What a build without Metal has in its place; cuda/launch.cpp is arithmetic, in every build.
NOT_ON_MACOS = {"mlx_ops/cuda/run.cpp", "mlx_ops/stand_in/registry.cpp"}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    try:
        build = cross_build.CrossBuild(tmp_path_factory.mktemp("macos"))
    except cross_build.Unavailable as reason:
        pytest.skip(str(reason))
    build.configure()
    build.extension = MachO(build.build())
    return build


def test_every_symbol_is_found(build):
    imports = build.extension.imports
    assert set(imports) <= LIBRARIES
    assert all(re.match("__?Py", symbol) for symbol in imports[apple_clang.NAMED_BY_U])
    assert any("allocator" in symbol for symbol in imports[LIBMLX])
    assert imports[ACCELERATE] == {"_cblas_sgemm$NEWLAPACK", "_cblas_dgemm$NEWLAPACK"}


def test_finds_libmlx_beside_it_and_in_no_build_folder(build):
    assert "@loader_path/../../mlx/lib" in build.extension.rpaths
    assert all(path.startswith("@loader_path/../../") for path in build.extension.rpaths)


def test_every_macos_source_is_compiled(build):
    files = [*ROOT.glob("mlx_ops/**/*.cpp"), *ROOT.glob("python/src/*.cpp")]
    wanted = {
        str(file.relative_to(ROOT))
        for file in files
        if file.name != "stand_in.cpp" and not file.name.endswith(("_avx2.cpp", "_avx512.cpp"))
    }
    assert build.sources() == wanted - NOT_ON_MACOS


def test_an_undefined_symbol_fails_the_link(build, tmp_path):
    # MLX declares copy_gpu in a header that it ships, yet does not export it.
    source, result = tmp_path / "calls_hidden.cpp", tmp_path / "calls_hidden.o"
    source.write_text(
        '#include "mlx/backend/gpu/copy.h"\n'
        "void calls_hidden(const mlx::core::array& a, mlx::core::array& b) {\n"
        "  mlx::core::copy_gpu(a, b, mlx::core::CopyType::General);\n"
        "}\n"
    )
    include = build.mlx / "include"
    compiler = build.folder / "tools" / "clang++"
    cross_build.run([compiler, "-std=c++20", "-isystem", include, "-c", source, "-o", result])
    build.configure(CMAKE_MODULE_LINKER_FLAGS=result, CMAKE_SHARED_LINKER_FLAGS=result)
    with pytest.raises(RuntimeError, match=r"undefined symbol: .*copy_gpu"):
        build.build()
