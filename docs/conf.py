"""Sphinx: `pip install ".[docs]" && sphinx-build docs docs/_build`."""

import importlib.metadata

project = "mlx_deform"
author = "The mlx_deform authors"
release = version = importlib.metadata.version("mlx-deform")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Deformable sampling for MLX", "fixed_sidebar": True}
templates_path: list[str] = []

autodoc_typehints = "none"  # the docstrings tell, with shapes
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Sections of ours that are prose.
napoleon_custom_sections = ["Parameters", "Call"]
