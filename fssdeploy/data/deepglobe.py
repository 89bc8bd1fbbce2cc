"""DeepGlobe land cover (Demir et al., CVPRW 2018): satellite pictures in tiles, as in PATNet (Lei et al., ECCV 2022).

Layout: ``{1..6}/test/origin/TILE.jpg`` with the mask ``{1..6}/test/groundtruth/TILE.png`` (class from 128 up); a tile
stands in the folder of every class it shows. One fold, all six classes tested, 600 episodes. PATNet's published steps
name the colours in OpenCV's order (blue, green, red), which makes folder 1 agriculture and folder 2 urban.

`cut_tiles` makes this layout from the original download.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fssdeploy.data.class_folders import ClassFolders
from fssdeploy.data.dataset import Dataset, Finding
from fssdeploy.data.layout import files_finding, stems_in
from fssdeploy.errors import InputError
from fssdeploy.files import staged_folder, storage_error
from fssdeploy.images.masks import save_mask
from fssdeploy.images.pictures import load_picture

# Colour (red, green, blue) of each class in the original masks, in the order of the folders 1 .. 6; black is unknown.
COLOURS = {
    "agriculture": (255, 255, 0),
    "urban": (0, 255, 255),
    "rangeland": (255, 0, 255),
    "forest": (0, 255, 0),
    "water": (0, 0, 255),
    "barren": (255, 255, 255),
}
TILES = 6  # per side: 2448 pixels make 6 x 408
LEAST_SHARE = 0.048  # of a tile, for every colour in it
_ORIGIN, _TRUTH = "origin", "groundtruth"


class DeepGlobe(ClassFolders):
    """The tiles in a directory. An item is ``NUMBER/TILE``. InputError as `open_dataset`."""

    name = "deepglobe"
    class_names = tuple(COLOURS)
    source = (
        "kaggle.com/datasets/balraj98/deepglobe-land-cover-classification-dataset; cut its train folder with "
        "fssdeploy data prepare deepglobe SRC DST."
    )

    def __init__(self, root: Path) -> None:
        super().__init__(root, [f"{number}/test/{_ORIGIN}" for number in range(1, len(COLOURS) + 1)])

    def folder(self, number: int) -> Path:
        return self.root / str(number) / "test" / _ORIGIN

    def mask_path(self, item: str) -> Path:
        number, _, stem = item.partition("/")
        return self.root / number / "test" / _TRUTH / f"{stem}.png"

    def check(self) -> list[Finding]:
        findings = []
        for index, items in self.listing(0, "test").items():
            what = f"{index + 1} ({self.class_names[index]})"
            state = Finding(f"tiles of {what}", "ok" if items else "missing", f"{len(items):,}", self.source)
            masks = [self.mask_path(item).name for item in items]
            truth = self.root / str(index + 1) / "test" / _TRUTH
            findings += [state, files_finding(f"masks of {what}", truth, masks, self.source)]
        return findings


def cut_tiles(source: Path, target: Path, progress: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """Cut the originals ``ID_sat.jpg`` and ``ID_mask.png`` in `source` into the tiles that this data set reads.

    Each picture gives 6 x 6 tiles ``ID_RC`` (row, column). Dropped are tiles whose mask has a single colour, and those
    in which any colour, unknown included, covers 4.8 % or less (PATNet, data/preprocess.py). Masks are rounded to pure
    colours first, as the data set's own notes ask for. `target` must not exist; it appears complete or not at all.

    Returns the number of tiles of each class. InputError if there are no originals, a mask is missing or of another
    size, or `target` exists; MachineError if it cannot be written.
    """
    stems = stems_in(source, "_sat.jpg")
    if not stems:
        raise InputError("data_missing", f"'{source}' holds no originals", "there is no *_sat.jpg", DeepGlobe.source)
    if target.exists():
        raise InputError("target_exists", f"'{target}' exists", fix="Name a directory that does not exist.")
    counts: Counter[str] = Counter(dict.fromkeys(COLOURS, 0))
    with staged_folder(target) as staged:
        try:
            for number in range(1, len(COLOURS) + 1):
                for kind in (_ORIGIN, _TRUTH):
                    (staged / str(number) / "test" / kind).mkdir(parents=True)
            for done, stem in enumerate(stems):
                progress(f"cutting {stem} ({done + 1} of {len(stems)})")
                for name, tile, colours in _tiles(source, stem):
                    for number, (class_name, colour) in enumerate(COLOURS.items(), 1):
                        mask = (colours == colour).all(-1)
                        if mask.any():
                            folder = staged / str(number) / "test"
                            Image.fromarray(tile).save(folder / _ORIGIN / f"{name}.jpg", quality=95)
                            save_mask(folder / _TRUTH / f"{name}.png", mask)
                            counts[class_name] += 1
            staged.rename(target)
        except OSError as error:
            raise storage_error(error, target) from error
    return dict(counts)


def _tiles(source: Path, stem: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, picture and colours, uint8 (h, w, 3) each, of the tiles of one original that are kept."""
    picture = load_picture(source / f"{stem}_sat.jpg")
    colours = np.where(load_picture(source / f"{stem}_mask.png") < 128, 0, 255).astype(np.uint8)
    if picture.shape != colours.shape:
        sizes = f"{colours.shape[:2]} and {picture.shape[:2]} (height, width)"
        raise InputError("mask_size", f"mask and picture of '{stem}' differ in size", sizes)
    height, width = picture.shape[:2]
    for row in range(TILES):
        for column in range(TILES):
            rows = slice(row * height // TILES, (row + 1) * height // TILES)
            columns = slice(column * width // TILES, (column + 1) * width // TILES)
            tile = colours[rows, columns]
            areas = np.bincount((tile.reshape(-1, 3) > 0) @ (4, 2, 1))  # each of the eight pure colours
            areas = areas[areas > 0]
            if len(areas) > 1 and areas.min() > LEAST_SHARE * areas.sum():
                yield f"{stem}_{row}{column}", picture[rows, columns], tile


def open_dataset(root: Path) -> Dataset:
    """The tiles under `root`. InputError ``data_missing`` if nothing of them is there."""
    return DeepGlobe(root)
