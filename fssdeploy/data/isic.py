"""ISIC 2018 task 1 (Codella et al., arXiv 1902.03368): skin lesions, one class per diagnosis, as in PATNet.

Layout: ``ISIC2018_Task1-2_Training_Input/{1,2,3}/ID.jpg`` with the mask ``ID_segmentation.png`` (lesion from 128 up) in
``ISIC2018_Task1_Training_GroundTruth``. The download has all pictures in one folder; PATNet's table
(``data/isic/class_id.csv``) gives the diagnosis of each. It does not say which number stands for which; here it is
1 nevus, 2 melanoma, 3 seborrheic keratosis, and means over classes do not depend on it. One fold, all three classes
tested, 600 episodes.
"""

from __future__ import annotations

from pathlib import Path

from fssdeploy.data.class_folders import ClassFolders
from fssdeploy.data.dataset import Dataset, Finding
from fssdeploy.data.layout import counted, files_finding

PICTURES = {"nevus": 1867, "melanoma": 519, "seborrheic keratosis": 208}
_INPUT, _TRUTH = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"


class Isic(ClassFolders):
    """ISIC 2018 in a directory. An item is ``NUMBER/ISIC_...``. InputError as `open_dataset`."""

    name = "isic"
    class_names = tuple(PICTURES)
    source = (
        "challenge.isic-archive.com/data, 2018 task 1 training input and ground truth; sort the pictures into folders "
        "1, 2, 3 by data/isic/class_id.csv of github.com/slei109/PATNet."
    )

    def __init__(self, root: Path) -> None:
        super().__init__(root, [f"{_INPUT}/{number}" for number in (1, 2, 3)] + [_TRUTH])

    def folder(self, number: int) -> Path:
        return self.root / _INPUT / str(number)

    def mask_path(self, item: str) -> Path:
        return self.root / _TRUTH / f"{item.rpartition('/')[2]}_segmentation.png"

    def check(self) -> list[Finding]:
        items = self.listing(0, "test")
        all_items = [item for each in items.values() for item in each]
        return [
            *(
                counted(f"pictures of {number} ({name})", len(items[number - 1]), published, self.source)
                for number, (name, published) in enumerate(PICTURES.items(), 1)
            ),
            files_finding("masks", self.root / _TRUTH, [self.mask_path(item).name for item in all_items], self.source),
        ]


def open_dataset(root: Path) -> Dataset:
    """ISIC 2018 under `root`. InputError ``data_missing`` if nothing of it is there."""
    return Isic(root)
