"""The installed package: what it exports, how it finds MLX, and what it says to another MLX."""

import ast
import importlib
import importlib.metadata
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import pytest
from packaging.specifiers import SpecifierSet

import mlx_deform
import mlx_deform._ext
from mlx_deform import _compiled
from mlx_deform._compiled import module_folder

ROOT = Path(__file__).parents[1]
EXTENSION = Path(mlx_deform._ext.__file__)


def test_version():
    assert mlx_deform.__version__ == importlib.metadata.version("mlx-deform")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", mlx_deform.__version__)


def test_exports():
    exported = set(mlx_deform.__all__)
    assert {"deform_conv2d", "deform_im2col"} <= exported
    assert len(mlx_deform.__all__) == len(exported)
    for name in exported:
        assert getattr(mlx_deform, name, None) is not None, name
    star = {}
    exec("from mlx_deform import *", star)
    assert exported <= star.keys()


def test_importing_does_not_import_torch():
    script = (
        "import sys, mlx_deform; print([m for m in ('torch', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_docstrings():
    for name in ("deform_conv2d", "deform_im2col"):
        text = getattr(mlx_deform, name).__doc__
        for word in ("input", "offset", "mask", "stride", "padding", "dilation", "ValueError"):
            assert word in text, f"{word} in the docstring of {name}"


# ---------------------------------------------------------------------------
# Types


def source_folders():
    """Where the package's Python files are: an editable install has two places."""
    return {Path(mlx_deform.__file__).parent, EXTENSION.parent}


def test_typed():
    assert any((folder / "py.typed").is_file() for folder in source_folders())


def stubs():
    return {path.name: path for folder in source_folders() for path in folder.glob("*.pyi")}


def stub_functions(path):
    tree = ast.parse(path.read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def parameters(function):
    """Names of the parameters in order, `*` where keywords begin, and those with defaults."""
    arguments = function.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args]]
    if arguments.kwonlyargs:
        names += ["*", *(a.arg for a in arguments.kwonlyargs)]
    return names


def runtime_parameters(function):
    """From nanobind's signature: that of the call itself, not of its documentation."""
    signatures = function.__nb_signature__
    assert len(signatures) == 1, "overloaded"
    text = re.sub(r"\\\d+", "...", signatures[0][0])  # defaults are given by number
    node = ast.parse(text + ": ...").body[0]
    return parameters(node)


def test_the_stub_matches_the_module():
    assert "_ext.pyi" in stubs(), "no stub for mlx_deform._ext"
    functions = stub_functions(stubs()["_ext.pyi"])
    public = {
        name
        for name in dir(mlx_deform._ext)
        if not name.startswith("_") and callable(getattr(mlx_deform._ext, name))
    }
    assert public == {name for name in functions if not name.startswith("_")}
    for name in public:
        function = getattr(mlx_deform._ext, name)
        assert parameters(functions[name]) == runtime_parameters(function), name


def test_signatures_are_the_documented_ones():
    functions = stub_functions(stubs()["_ext.pyi"])
    assert parameters(functions["deform_conv2d"]) == [
        "input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask", "*", "stream"
    ]  # fmt: skip
    assert parameters(functions["deform_im2col"]) == [
        "input", "offset", "kernel_size", "stride", "padding", "dilation", "mask", "*", "stream"
    ]  # fmt: skip


# ---------------------------------------------------------------------------
# The shared library


def elf_run_paths(path):
    """DT_RPATH and DT_RUNPATH entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    section_offset = struct.unpack_from("<Q", data, 40)[0]
    section_size, section_count = struct.unpack_from("<HH", data, 58)
    sections = [
        # type, offset, size, link
        (header[1], header[4], header[5], header[6])
        for header in (
            struct.unpack_from("<IIQQQQIIQQ", data, section_offset + i * section_size)
            for i in range(section_count)
        )
    ]
    paths = []
    for kind, offset, size, link in sections:
        if kind != 6:  # SHT_DYNAMIC
            continue
        strings = sections[link][1]
        for tag, value in struct.iter_unpack("<qQ", data[offset : offset + size]):
            if tag in (15, 29):  # DT_RPATH, DT_RUNPATH
                start = strings + value
                paths += data[start : data.index(b"\0", start)].decode().split(":")
    return paths


def macho_run_paths(path):
    text = subprocess.run(["otool", "-l", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"cmd LC_RPATH\n.*\n\s+path (\S+)", text)


def test_no_folder_of_the_build_machine_in_the_library():
    if sys.platform == "darwin":
        paths, origin = macho_run_paths(EXTENSION), "@loader_path"
    else:
        paths, origin = elf_run_paths(EXTENSION), "$ORIGIN"
    assert f"{origin}/../../mlx/lib" in [path.rstrip("/") for path in paths]
    for path in paths:
        assert path.startswith(origin), f"{path} in {paths}"


# ---------------------------------------------------------------------------
# Versions of MLX


def package_with_modules_for(folder, *names):
    for name in names:
        (folder / name).mkdir()
    return [str(folder / "not_here"), str(folder)]


def test_the_module_of_the_installed_mlx_is_loaded():
    assert EXTENSION.parent.name == "_mlx_" + re.sub(r"\W", "_", mx.__version__)
    # Its name is that of no folder, so that pickles and tracebacks name one module.
    assert mlx_deform._ext.__name__ == "mlx_deform._ext"


def test_each_mlx_has_its_module(tmp_path):
    names = ("_mlx_0_9_10", "_mlx_0_9_2", "_mlx_0_10_0_dev7_abc")
    package = package_with_modules_for(tmp_path, *names)
    versions = ("0.9.10", "0.9.2", "0.10.0.dev7+abc")
    for name, version in zip(names, versions, strict=True):
        assert module_folder(package, "1.2.3", version) == str(tmp_path / name)


def test_what_to_install_is_named(tmp_path):
    package = package_with_modules_for(tmp_path, "_mlx_1_9_2")
    with pytest.raises(ImportError) as one:
        module_folder(package, "1.2.3", "1.9.1")
    assert "mlx_deform 1.2.3 was built for mlx 1.9.2 but found mlx 1.9.1" in str(one.value)
    assert 'pip install "mlx==1.9.2"' in str(one.value)
    assert "build it for mlx 1.9.1 with pip install --no-binary mlx-deform" in str(one.value)
    package_with_modules_for(tmp_path, "_mlx_1_9_10", "_mlx_1_9_3")
    with pytest.raises(ImportError) as many:
        module_folder(package, "1.2.3", "1.9.1")
    assert "for mlx 1.9.2, 1.9.3 and 1.9.10 but" in str(many.value)
    assert 'pip install "mlx==1.9.10"' in str(many.value)


def test_no_build_is_advised_for_an_mlx_that_the_sources_do_not_know(tmp_path, releases):
    assert _compiled.OLDEST == releases.OLDEST
    package = package_with_modules_for(tmp_path, "_mlx_1_9_2")
    with pytest.raises(ImportError, match=r'run pip install "mlx==1\.9\.2"\.$'):
        module_folder(package, "1.2.3", "0.30.3")
    with pytest.raises(ImportError, match=r"build it for mlx 0\.30\.4"):
        module_folder(package, "1.2.3", "0.30.4")


def test_the_metadata_admit_the_installed_mlx_and_no_newer_one():
    (wanted,) = (r for r in importlib.metadata.requires("mlx-deform") if re.match("mlx[=<>]", r))
    admitted = SpecifierSet(wanted.removeprefix("mlx"))
    assert mx.__version__ in admitted
    assert "99.0" not in admitted


@pytest.mark.skipif(not (ROOT / "mlx_ops").is_dir(), reason="not run from the sources")
def test_one_source_file_knows_versions():
    files = [*ROOT.glob("mlx_ops/**/*"), *ROOT.glob("python/src/*")]
    knowing = [file.name for file in files if file.is_file() and "MLX_VERSION_" in file.read_text()]
    assert knowing == ["mlx_version.h"]


@pytest.fixture
def releases(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.delenv("MLX_DEFORM_MLX_VERSION", raising=False)
    return importlib.import_module("mlx_releases")


def test_a_build_fits_the_mlx_that_is_there(releases, tmp_path, monkeypatch):
    def install(version, tag):
        for name in ("mlx", f"mlx-{version}.dist-info"):
            (tmp_path / name).mkdir(exist_ok=True)
        metadata = f"Metadata-Version: 2.1\nName: mlx\nVersion: {version}\n"
        (tmp_path / f"mlx-{version}.dist-info" / "METADATA").write_text(metadata)
        (tmp_path / "mlx" / "core.cpython.so").write_bytes(b"\0" + tag + b"\0")

    monkeypatch.setattr(releases.sys, "path", [str(tmp_path)])
    monkeypatch.setattr(releases.site, "getsitepackages", list)
    monkeypatch.setattr(releases.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    backend = "[cpu]" if sys.platform == "linux" else ""
    assert releases.build_requirements() == [
        f"mlx{backend}=={releases.NEWEST}",
        f"nanobind=={releases.NANOBIND[max(releases.NANOBIND)]}",
    ]
    install("0.31.2", b"v19_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1")
    assert releases.build_requirements() == [f"mlx{backend}==0.31.2", "nanobind==2.12.0"]


def test_the_environment_names_releases(releases, monkeypatch):
    assert releases.named() == ()
    monkeypatch.setenv("MLX_DEFORM_MLX_VERSION", "0.31.2, 0.32.4")
    assert releases.named() == ("0.31.2", "0.32.4")
    monkeypatch.setenv("MLX_DEFORM_MLX_VERSION", "all")
    assert releases.named() == releases.SUPPORTED


def test_the_internals_of_the_installed_mlx_are_known(releases):
    assert releases.nanobind_for(Path(mx.__file__).parent) in releases.NANOBIND.values()


def test_another_mlx_is_refused_in_one_sentence():
    """Instead of nanobind's "incompatible function arguments" later on."""
    script = textwrap.dedent(
        """
        import importlib.metadata
        import mlx.core

        found = importlib.metadata.version

        def version(name):
            return "0.31.7" if name.startswith("mlx") and "deform" not in name else found(name)

        importlib.metadata.version = version
        mlx.core.__version__ = "0.31.7"
        try:
            import mlx_deform
        except ImportError as error:
            print(error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    message = done.stdout.strip()
    assert message, "imported without complaint"
    assert "\n" not in message
    assert "0.31.7" in message
    assert mx.__version__ in message
    assert "pip install" in message
