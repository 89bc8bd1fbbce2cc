"""The option tables of Matcher under the names of the released code, so that its scripts can be read beside them.

Source: Liu et al., "Matcher: Segment Anything with One Shot Using All-Purpose Feature Matching" (2023), appendix, and
the scripts of its release. The tables differ between one and five shots only in how many masks are merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fssdeploy.errors import InputError


@dataclasses.dataclass(frozen=True)
class MatcherOptions:
    """How points become prompts, which masks stay, what a mask is worth and how many are merged.

    Prompts: all matched points (`use_points_or_centers`) or their `num_centers` k-means centres are the candidates;
    subsets of every size in `sample_range` are prompts, drawn `max_sample_iterations` times a size, or all of them
    where there are at most eight candidates. `use_box` adds the box around the points. `use_dense_mask` adds a grid of
    `points_per_side` squared single points.

    Masks: `multimask_output` asks the decoder for three masks a prompt, of which `output_layer` 0, 1, 2 keeps one and
    3, 4, 5 those from index 0, 1, 2 on; `dense_multimask_output` above 0 does so for the grid and is the layer as well.
    Predicted IoU must exceed `iou_filter` (grid: `pred_iou_thresh`), stability must reach `sel_stability_score_thresh`
    (grid: `stability_score_thresh`); 0 switches a filter off. Boxes that overlap by more than `box_nms_thresh` fall.

    Scores: alpha * emd + beta * purity * coverage ** exp, after the filters on each of the three (0: off). Then either
    the score filter with `deep_score_filter` and `deep_score_norm_filter`, or the share of the best score that
    `topk_scores_threshold` asks for; at most `num_merging_mask` masks are merged.
    """

    points_per_side: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    sel_stability_score_thresh: float = 0.0
    iou_filter: float = 0.0
    box_nms_thresh: float = 1.0
    output_layer: int = 3
    dense_multimask_output: int = 0
    use_dense_mask: bool = False
    multimask_output: bool = False
    num_centers: int = 8
    use_box: bool = False
    use_points_or_centers: bool = False
    sample_range: tuple[int, int] = (4, 6)
    max_sample_iterations: int = 30
    alpha: float = 1.0
    beta: float = 0.0
    exp: float = 0.0
    emd_filter: float = 0.0
    purity_filter: float = 0.0
    coverage_filter: float = 0.0
    use_score_filter: bool = False
    deep_score_norm_filter: float = 0.1
    deep_score_filter: float = 0.33
    topk_scores_threshold: float = 0.7
    num_merging_mask: int = 10

    def __post_init__(self) -> None:
        for name in ("points_per_side", "num_centers", "max_sample_iterations", "num_merging_mask"):
            if getattr(self, name) < 1:
                raise InputError("option_unknown", f"{name} cannot be {getattr(self, name)}", "", "It is at least 1.")
        for name in ("output_layer", "dense_multimask_output"):
            if not 0 <= getattr(self, name) <= 5:
                raise InputError("option_unknown", f"{name} cannot be {getattr(self, name)}", "", "Choose 0 to 5.")
        low, high = self.sample_range
        if not 1 <= low <= high:
            raise InputError(
                "option_unknown", f"sample_range cannot be {low} to {high}", "", "It rises, from 1 or more points."
            )

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> MatcherOptions:
        """Options from JSON, where the range is a list and switches may be numbers. InputError for unknown names."""
        kinds = {item.name: str(item.type) for item in dataclasses.fields(MatcherOptions)}
        unknown = sorted(set(data) - set(kinds))
        if unknown:
            raise InputError("option_unknown", f"matcher has no option '{unknown[0]}'", "", "Check its name.")
        values: dict[str, Any] = {name: bool(value) if kinds[name] == "bool" else value for name, value in data.items()}
        if "sample_range" in values:
            values["sample_range"] = tuple(values["sample_range"])
        return MatcherOptions(**values)


_COCO = MatcherOptions(
    use_points_or_centers=True,
    sample_range=(1, 6),
    max_sample_iterations=64,
    multimask_output=True,
    use_dense_mask=True,
    box_nms_thresh=0.65,
    iou_filter=0.85,
    sel_stability_score_thresh=0.90,
    purity_filter=0.02,
    use_score_filter=True,
    topk_scores_threshold=0.0,
    num_merging_mask=9,
)
_FSS = MatcherOptions(alpha=0.8, beta=0.2, exp=1.0)
_PART = MatcherOptions(
    use_points_or_centers=True,
    sample_range=(3, 6),
    max_sample_iterations=128,
    use_box=True,
    coverage_filter=0.3,
    alpha=0.5,
    beta=0.5,
    num_merging_mask=5,
)
OPTIONS = {
    "coco": _COCO,  # COCO-20i and LVIS-92i: several objects and any surroundings
    "coco_5shot": dataclasses.replace(_COCO, num_merging_mask=5),
    "fss": _FSS,  # FSS-1000: one object
    "fss_5shot": dataclasses.replace(_FSS, num_merging_mask=5),
    "part": _PART,  # PASCAL-Part and PACO-Part: a part in the box of its object
}
