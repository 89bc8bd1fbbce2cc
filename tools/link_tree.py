"""Link the package as it is imported into `build/tree/fssdeploy`, for tools that read files instead of importing.

pyproject.toml maps the top-level folders kernels/, export/, serving/ and benchmarks/ into `fssdeploy.*`. Python follows
that mapping in an editable install; mypy and import-linter look for folders, so they get a tree of links.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_tree(root: Path = ROOT) -> Path:
    """Make the tree anew and return the folder to run the tools in."""
    tree = root / "build" / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "fssdeploy").mkdir(parents=True)
    for source in (root / "fssdeploy").iterdir():
        (tree / "fssdeploy" / source.name).symlink_to(source)
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, folder in setuptools["package-dir"].items():
        link = tree.joinpath(*package.split("."))
        if not link.exists():
            link.symlink_to(root / folder)
    return tree


if __name__ == "__main__":
    print(link_tree())
