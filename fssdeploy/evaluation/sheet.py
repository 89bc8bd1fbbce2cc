"""A contact sheet of the best, the median and the worst episodes: what the numbers look like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fssdeploy.data.dataset import Dataset
from fssdeploy.data.episodes import Episode
from fssdeploy.evaluation.evaluate import Canvas, Record, load_together, predict_together
from fssdeploy.evaluation.predictors import Predictor
from fssdeploy.images.overlay import contact_sheet, overlay

EACH = 2


def chosen_episodes(records: Sequence[Record], predictor: str, each: int = EACH) -> list[tuple[str, Record]]:
    """Up to `each` best, median and worst records by IoU, best first, none twice; with what they are."""
    ranked = sorted(records, key=lambda record: (-record.outcomes[predictor].areas.iou, record.index))
    middle = max(0, (len(ranked) - each) // 2)
    groups = {
        "best": range(each),
        "worst": range(len(ranked) - each, len(ranked)),
        "median": range(middle, middle + each),
    }
    labels: dict[int, str] = {}
    for label, ranks in groups.items():
        for rank in ranks:
            if 0 <= rank < len(ranked):
                labels.setdefault(rank, label)
    return [(label, ranked[rank]) for rank, label in sorted(labels.items())]


def draw_sheet(
    predictor: Predictor,
    dataset: Dataset,
    episodes: Sequence[Episode],
    records: Sequence[Record],
    canvas: Canvas | None = None,
) -> np.ndarray:
    """A row for each of `chosen_episodes`: first support, query with truth, query with prediction. uint8 (h, w, 3)."""
    rows, captions = [], []
    for label, record in chosen_episodes(records, predictor.name):
        episode = episodes[record.index]
        cases = load_together(dataset, episode, canvas)
        case = cases[episode]
        mask, blind = predict_together(predictor, cases)[episode]
        shown = [case.supports[0], (case.query, case.truth == 1), (case.query, mask)]
        rows.append([overlay(picture, {case.key: marked}) for picture, marked in shown])
        outcome = record.outcomes[predictor.name]
        more = f" (1 of {len(case.supports)})" if len(case.supports) > 1 else ""
        found = "blind to the support" if blind else f"IoU {100 * outcome.areas.iou:.1f}"
        captions.append([f"{case.key}: support{more}", f"truth, episode {record.index + 1}", f"{label}: {found}"])
    return contact_sheet(rows, captions)
