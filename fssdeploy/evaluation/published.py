"""What the papers report, to be printed beside our own numbers. mIoU in percent; on DAVIS-17 J&F."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A number from a paper, in percent: of what, of which system on which network, and where it stands."""

    value: float
    measure: str
    system: str
    source: str


@dataclass(frozen=True)
class _Entry:
    """Means over folds of 1 and of 5 shots, by data set; None where the paper has none."""

    system: str
    source: str
    means: dict[str, tuple[float | None, float | None]]


_COLUMNS = {1: 0, 5: 1}
_GSM = "GSM, tables 1 and 2"
_PAPERS = {
    "fsdino": _Entry(
        "FS-DINO (DINOv2-B)",
        "FS-DINO, tables 1 to 3",
        {
            "pascal-5i": (75.4, 77.8),
            "coco-20i": (62.4, 65.4),
            "fss-1000": (87.2, None),
            "davis-17": (76.6, None),
        },
    ),
    "fssam": _Entry(
        "FSSAM (SAM 2-S, DINOv2-B)",
        "FSSAM, tables 1, 2 and 9",
        {
            "pascal-5i": (81.0, 85.4),
            "coco-20i": (62.3, 69.3),
            "lvis-92i": (37.3, None),
            "pascal-part": (46.4, None),
        },
    ),
    "fcp": _Entry("FCP (ResNet-50)", "FCP, table 1", {"pascal-5i": (73.2, 74.0), "coco-20i": (52.5, 58.0)}),
    "vrpsam": _Entry(
        "VRP-SAM (ResNet-50)",
        "FCP, table 1, reproduced there",
        {"pascal-5i": (71.8, 71.4), "coco-20i": (50.2, 55.5)},
    ),
    "persam": _Entry(
        "PerSAM",
        _GSM,
        {
            "pascal-5i": (43.1, None),
            "coco-20i": (23.0, None),
            "lvis-92i": (11.5, None),
            "fss-1000": (71.2, None),
            "deepglobe": (31.4, None),
            "isic": (23.9, None),
            "isaid-5i": (19.2, None),
        },
    ),
    "matcher": _Entry(
        "Matcher",
        _GSM,
        {
            "pascal-5i": (68.1, 74.0),
            "coco-20i": (52.7, 60.7),
            "lvis-92i": (33.0, 40.0),
            "fss-1000": (87.0, 89.6),
            "deepglobe": (48.1, 50.9),
            "isic": (38.6, 35.0),
            "isaid-5i": (33.3, 34.3),
        },
    ),
    "matcher+gsm": _Entry(
        "Matcher + GSM",
        _GSM,
        {
            "pascal-5i": (71.3, 75.7),
            "coco-20i": (55.9, 62.7),
            "lvis-92i": (34.3, 41.9),
            "fss-1000": (87.3, 89.6),
            "deepglobe": (50.6, 54.2),
            "isic": (42.7, 44.5),
            "isaid-5i": (36.8, 39.1),
        },
    ),
    "gfsam": _Entry(
        "GF-SAM",
        _GSM,
        {
            "pascal-5i": (72.1, 82.6),
            "coco-20i": (58.7, 66.8),
            "lvis-92i": (35.2, 44.2),
            "fss-1000": (88.0, 88.9),
            "deepglobe": (49.5, 57.7),
            "isic": (48.7, 55.2),
            "isaid-5i": (47.1, 52.4),
        },
    ),
    "gfsam+gsm": _Entry(
        "GF-SAM + GSM",
        _GSM,
        {
            "pascal-5i": (75.7, 83.3),
            "coco-20i": (61.2, 68.1),
            "lvis-92i": (38.9, 47.0),
            "fss-1000": (88.6, 89.3),
            "deepglobe": (51.4, 58.9),
            "isic": (52.2, 58.6),
            "isaid-5i": (49.8, 53.9),
        },
    ),
    "tbs": _Entry("TBS (Swin-B)", "GSM, table 1", {"pascal-5i": (71.2, 75.2), "coco-20i": (52.3, 58.5)}),
    "tbs+gsm": _Entry("TBS (Swin-B) + GSM", "GSM, table 1", {"pascal-5i": (74.4, 77.6), "coco-20i": (54.2, 61.9)}),
}
_FOLDS = {
    ("fsdino", "pascal-5i", 1): (75.6, 80.3, 72.2, 73.4),
    ("fsdino", "pascal-5i", 5): (78.1, 83.1, 73.6, 76.3),
    ("fsdino", "coco-20i", 1): (58.6, 66.0, 62.3, 62.6),
    ("fsdino", "coco-20i", 5): (62.1, 70.2, 66.1, 63.0),
}


def published(system: str, dataset: str, shot: int, fold: int | None) -> Published | None:
    """The paper's number of a system (``"fsdino"``) for a fold, or its mean over folds (None); None if unknown."""
    paper = _PAPERS.get(system)
    if paper is None or shot not in _COLUMNS:
        return None
    if fold is None:
        value = paper.means.get(dataset, (None, None))[_COLUMNS[shot]]
    else:
        folds = _FOLDS.get((system, dataset, shot), ())
        value = folds[fold] if fold < len(folds) else None
    measure = "J&F" if dataset == "davis-17" else "mIoU"
    return None if value is None else Published(value, measure, paper.system, paper.source)
