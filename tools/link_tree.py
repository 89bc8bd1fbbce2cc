"""Link the package as it is imported into `build/tree/fssdeploy`, for tools that read files instead of importing.

pyproject.toml maps the top-level folders kernels/, export/, serving/ and benchmarks/ into `fssdeploy.*`. Python follows
that mapping in an editable install; mypy and import-linter look for folders, so they get a tree of links.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_tree(root: Path = ROOT) -> Path:
    """Make the tree anew and return the folder to run the tools in."""
    package = root / "build" / "tree" / "fssdeploy"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (root / "fssdeploy").iterdir():
        (package / source.name).symlink_to(source)
    # The lines of [tool.setuptools.package-dir], read by pattern: Python 3.10 has no TOML reader.
    for name, folder in re.findall(r'^"fssdeploy\.(\w+)" = "(\w+)"$', (root / "pyproject.toml").read_text(), re.M):
        (package / name).symlink_to(root / folder)
    return package.parent


if __name__ == "__main__":
    print(link_tree())
