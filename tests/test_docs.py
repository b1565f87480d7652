"""The documentation: every public name has its entry, and the examples run."""

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MODULES = (
    "mlx_deform",
    "mlx_deform.nn",
    "mlx_deform.torch",
    "mlx_deform.models.birefnet",
    "mlx_deform.models.detr",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The text of the API page, built without a warning."""
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="sphinx is not installed")
    pytest.importorskip("myst_parser", reason="myst-parser is not installed")
    folder = tmp_path_factory.mktemp("docs")
    assert sphinx.build_main(["-q", "-W", "--keep-going", str(DOCS), str(folder)]) == 0
    return (folder / "api.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_entry(page, module):
    names = set(importlib.import_module(module).__all__) - {"__version__"}
    entries = set(re.findall(r'id="([\w.]+)"', page))
    missing = {name for name in names if f"{module}.{name}" not in entries}
    assert not missing, f"docs/api.rst: {module} without {sorted(missing)}"


def test_the_example_of_the_migration_page():
    text = (DOCS / "migrating.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    *lines, call = code.rstrip().split("\n")
    call, shape = call.split("#")
    namespace = {}
    exec("\n".join(lines), namespace)
    assert eval(call.strip(), namespace).shape == eval(shape)
