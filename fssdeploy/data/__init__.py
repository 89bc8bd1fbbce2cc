"""Few-shot data sets, by name: how they lie on disk, their folds, their episodes. Never imports torch."""

from __future__ import annotations

import importlib
from pathlib import Path

from fssdeploy.data.dataset import Dataset
from fssdeploy.errors import InputError

# Name on the command line -> module of this package; each defines `open_dataset(root) -> Dataset`.
DATASETS = {
    "pascal-5i": "pascal",
    "coco-20i": "coco",
    "lvis-92i": "lvis",
    "fss-1000": "fss1000",
    "davis-17": "davis",
    "deepglobe": "deepglobe",
    "isic": "isic",
    "isaid-5i": "isaid",
    "pascal-part": "pascal_part",
    "folder": "folder",
    "shapes-5i": "shapes",
}


def open_dataset(name: str, root: str | Path | None) -> Dataset:
    """Open a data set. `root` is its directory; shapes-5i needs none. InputError if the name or the place is wrong."""
    if name not in DATASETS:
        raise InputError(
            "dataset_unknown", f"there is no data set '{name}'", "", f"Choose from: {', '.join(DATASETS)}."
        )
    if root is None and name != "shapes-5i":
        raise InputError("data_missing", f"{name} needs a directory", "", "Pass --data-dir DIR.")
    module = importlib.import_module(f"fssdeploy.data.{DATASETS[name]}")
    dataset: Dataset = module.open_dataset(None if root is None else Path(root))
    return dataset
