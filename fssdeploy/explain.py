"""One figure that shows why a mask came out as it did: every step that a system's `trace` holds, with captions.

Rows: support, query and answer; maps and points; candidate masks; what GSM found and its second pass, where it ran.
What a system does not do is left out. Names in traces are explained by the systems in ``fssdeploy/glue``. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fssdeploy.glue.gfsam.gates import SELECTED, WAITING
from fssdeploy.images.colours import class_colour
from fssdeploy.images.geometry import Placement, unfit
from fssdeploy.images.overlay import contact_sheet, overlay

Trace = Mapping[str, Any]
# A picture uint8 (H, W, 3), its mask bool (H, W).
Shot = tuple[np.ndarray, np.ndarray]
# A picture uint8 (h, w, 3), what is said below it.
Panel = tuple[np.ndarray, str]

SIDE = 300  # pixels, of a panel
MOST_SHOTS = 3
MOST_CANDIDATES = 4
SECOND = "second_"  # before the names of GSM's second pass
# From low to high.
_HEAT = np.array([(30, 18, 70), (112, 30, 116), (206, 58, 74), (248, 152, 44), (252, 246, 180)], np.float32)
# As `overlay` draws the first and the second of its masks, and a third.
_KEPT, _DROPPED, _WAITING = (class_colour(index) for index in (1, 2, 3))
_PAPER, _INK = (250, 250, 250), (40, 44, 52)
_HEADING = 19  # pixels, of the letters


def figure(
    title: str,
    picture: np.ndarray,
    where: Placement,
    shots: Sequence[Shot],
    mask: np.ndarray,
    prior: np.ndarray | None,
    trace: Trace,
) -> np.ndarray:
    """What was done for one class in one picture: uint8 (h, w, 3).

    `picture` uint8 (H, W, 3), `mask` bool (H, W) its answer and `prior` (h, w) what `Masks` says of it; `where` it lies
    on the canvas; `shots` may be empty; `trace` is that of a `segment` with this picture and class alone.
    """
    view = _View.of(picture, where)
    answer = _marked("answer", picture, mask)
    first = [*_shots(shots), (view.picture, "query"), (answer, f"answer: {mask.mean():.1%} of the picture")]
    sections = [(title, first)]
    final = (answer, "final mask")
    if "skipped" not in trace:
        sections += _pass(view, trace, "", prior, final)
    else:
        second = {name.removeprefix(SECOND): value for name, value in trace.items() if name.startswith(SECOND)}
        host = overlay(view.picture, {"host": view.mask(trace["host_mask"])})
        sections += _pass(view, trace, "Host: ", None if second else prior, (host, "the host's answer"))
        left_out = "".join(f"\nLeft out - {sentence}" for sentence in trace["skipped"])
        mined = _mined(view, trace)
        if second:
            sections.append(("GSM: the query's own structure" + left_out, mined))
            sections += _pass(view, second, "Second pass: ", prior, final)
        else:
            sections.append(("GSM: no map changed, the host's answer stands" + left_out, [*mined, final]))
    return np.concatenate(_of_equal_width([_section(heading, panels) for heading, panels in sections if panels]))


@dataclass(frozen=True)
class _View:
    """The query at the size of a panel, uint8 (h, w, 3), and how that lies on the canvas; the factor to its size."""

    picture: np.ndarray
    where: Placement
    scale: float

    @staticmethod
    def of(picture: np.ndarray, where: Placement) -> _View:
        shown = _scaled(picture, Image.Resampling.LANCZOS)
        height, width = shown.shape[:2]
        return _View(shown, dataclasses.replace(where, height=height, width=width), SIDE / max(picture.shape[:2]))

    def spread(self, cells: np.ndarray) -> np.ndarray:
        """Values of the canvas's cells, (N,) or (side, side), to (h, w): every pixel has that of its cell."""
        grid = cells.reshape(math.isqrt(cells.size), -1)
        where, side = self.where, len(grid)
        down = (np.arange(where.height) + 0.5) / where.height * where.rows + where.top
        across = (np.arange(where.width) + 0.5) / where.width * where.cols + where.left
        rows, columns = ((places * side / where.canvas).astype(int) for places in (down, across))
        return grid[rows][:, columns]

    def mask(self, array: np.ndarray) -> np.ndarray:
        """A mask bool (h, w) from one of cells or canvas pixels (bool), or from logits over the canvas (float)."""
        return self.spread(array) if array.dtype == bool else unfit(array, self.where) > 0

    def heat(self, cells: np.ndarray, name: str) -> Panel:
        """A map as colours over the picture, with its range."""
        values = self.spread(np.asarray(cells, np.float32))
        return _heated(self.picture, values), f"{name}: {values.min():.3g} to {values.max():.3g}"

    def regions(self, labels: np.ndarray, name: str) -> Panel:
        """Every region of the grid in a colour of its own."""
        palette = np.array([class_colour(1 + index) for index in range(labels.max() + 1)], np.float32)
        return _over(self.picture, palette[self.spread(labels)], 0.55), f"{name}: {labels.max() + 1}"

    def dots(self, groups: Sequence[tuple[np.ndarray, tuple[int, int, int]]]) -> np.ndarray:
        """Points (n, 2), (x, y) in panel pixels, in a colour for each group; the last group lies on top."""
        image = Image.fromarray(self.picture)
        pen = ImageDraw.Draw(image)
        for points, colour in groups:
            for x, y in points.tolist():
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline="white")
        return np.asarray(image)

    def on_panel(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 2) from canvas pixels to panel pixels."""
        where = self.where
        return (points - (where.left, where.top)) * (where.width / where.cols, where.height / where.rows)


def _shots(shots: Sequence[Shot]) -> list[Panel]:
    return [
        (_marked("object", picture, mask), f"support {number} of {len(shots)}")
        for number, (picture, mask) in enumerate(shots[:MOST_SHOTS], 1)
    ]


def _pass(
    view: _View, steps: Trace, name: str, prior: np.ndarray | None, result: Panel
) -> list[tuple[str, list[Panel]]]:
    """The rows of one pass of a host: maps and points, then candidate masks and their result."""
    rows = [(f"{name}where the object may be, dark to bright", _maps(view, steps, prior))]
    if points := _points(view, steps):
        rows = [(f"{rows[0][0]}; {points[0]}", [*rows[0][1], points[1]])]
    if candidates := _candidates(view, steps):
        rows.append((f"{name}masks of the points", [*candidates, result]))
    return [(heading[0].upper() + heading[1:], panels) for heading, panels in rows]


def _maps(view: _View, steps: Trace, prior: np.ndarray | None) -> list[Panel]:
    panels = []
    if "pos_mean" in steps:  # GF-SAM
        panels += [view.heat(steps["pos_mean"], "S+"), view.heat(steps["neg_mean"], "S-")]
        panels.append(view.heat(steps["prompt_map"], "prior"))
    elif "sim_foreground" in steps:  # Matcher
        panels.append(view.heat(steps["sim_foreground"].max(0), "S+, the prior"))
    elif "sim_cells" in steps:  # PerSAM
        panels.append(view.heat(steps["sim_cells"][0], "S+, the prior"))
    elif prior is not None:
        panels.append(view.heat(prior, "prior"))
    return panels


def _points(view: _View, steps: Trace) -> tuple[str, Panel] | None:
    """What the colours of points mean, and their panel."""
    if "points_xy" in steps:  # GF-SAM
        points = view.on_panel(steps["points_xy"])
        labels = steps.get("point_labels", np.full(len(points), SELECTED))
        kept, waiting = labels == SELECTED, labels == WAITING
        dropped = ~(kept | waiting)
        drawn = view.dots([(points[dropped], _DROPPED), (points[waiting], _WAITING), (points[kept], _KEPT)])
        counts = f"{kept.sum()} kept, {waiting.sum()} waiting, {dropped.sum()} dropped"
        return "points: red kept, yellow waiting, blue dropped", (drawn, counts)
    if "sim_picture" in steps:  # PerSAM: pixels of the picture
        points = (steps["points"][0] + 0.5) * view.scale
        drawn = view.dots([(points[1:], _DROPPED), (points[:1], _KEPT)])
        return "points: red likest, blue unlikest pixel", (drawn, f"points: {len(points)}")
    if "points" in steps:  # Matcher
        points = view.on_panel(steps["points"])
        return "points: red", (view.dots([(points, _KEPT)]), f"{len(points)} matched points")
    return None


def _candidates(view: _View, steps: Trace) -> list[Panel]:
    if "low_res_logits" in steps:
        return _components(view, steps)
    if "kept_patch_masks" in steps:
        return _scored(view, steps)
    return _refinements(view, steps)


def _components(view: _View, steps: Trace) -> list[Panel]:
    """GF-SAM: masks of linked points together, those with kept masks first, then by score."""
    masks = np.stack([view.mask(logits) for logits in steps["low_res_logits"]])
    kept = np.zeros(len(masks), bool)
    kept[steps.get("chosen", [])] = True
    groups, score = steps["weak_labels"], steps["cluster_scores"]
    order = sorted(np.unique(groups), key=lambda group: (~kept[groups == group].any(), -score[groups == group][0]))
    panels = [_density(view, masks)]
    for group in order[:MOST_CANDIDATES]:
        own = groups == group
        inside, outside = masks[own & kept].any(0), masks[own & ~kept].any(0)
        shown = overlay(view.picture, {"kept": inside, "dropped": outside & ~inside})
        panels.append((shown, f"{np.sum(own & kept)} of {own.sum()} kept, score {score[own][0]:.3g}"))
    return panels


def _scored(view: _View, steps: Trace) -> list[Panel]:
    """Matcher: masks that passed the filters of SAM, at the resolution of patches, by score."""
    if not len(steps["scores"]):
        return []
    # An empty mask is entered as one that touches every patch, in a box at the origin.
    seen = steps["kept_boxes"].any(1) | ~steps["kept_patch_masks"].all(1)
    masks = np.array([view.mask(each) for each in steps["kept_patch_masks"] & seen[:, None]])
    merged = np.isin(steps["kept_candidates"], steps["selected"])
    panels = [_density(view, masks)]
    for index in np.lexsort((-np.nan_to_num(steps["scores"]), ~merged, ~seen))[:MOST_CANDIDATES]:
        layers = {"kept": masks[index] & merged[index], "dropped": masks[index] & ~merged[index]}
        caption = f"score {steps['scores'][index]:.3g}" + ", empty" * (not seen[index])
        panels.append((overlay(view.picture, layers), caption))
    return panels


def _refinements(view: _View, steps: Trace) -> list[Panel]:
    """PerSAM: the mask of each of its calls."""
    panels = []
    if "step1_low_logits" in steps:
        mixed = steps.get("mixed_low_logits")
        first = steps["step1_low_logits"][0, 0] if mixed is None else mixed[0]
        panels.append((first, "step 1: " + ("guided" if mixed is None else "three scales, mixed")))
    for step in ("step2", "step3"):
        if f"{step}_low_logits" in steps:
            best = int(steps[f"{step}_best"][0])
            score = steps[f"{step}_scores"][0, best]
            panels.append((steps[f"{step}_low_logits"][0, best], f"{step[:4]} {step[4:]}: predicted IoU {score:.2f}"))
    return [(overlay(view.picture, {"mask": view.mask(logits)}), said) for logits, said in panels]


def _density(view: _View, masks: np.ndarray) -> Panel:
    return _heated(view.picture, masks.mean(0)), f"all {len(masks)} masks; the best follow"


def _mined(view: _View, trace: Trace) -> list[Panel]:
    panels = []
    if "region_labels" in trace:
        panels.append(view.regions(trace["region_labels"], "regions of the picture"))
    if "evidence" in trace:
        panels.append(view.heat(trace["evidence"], "S+ less S-"))
    if "labels_1" in trace:
        panels.append(view.regions(trace["labels_1"], "mined regions"))
    if "m_qsm" in trace:
        panels.append((overlay(view.picture, {"object": view.mask(trace["m_qsm"])}), "mined object"))
    if "m_pos" in trace:
        layers = {"object": view.mask(trace["m_pos"]), "surroundings": view.mask(trace["m_neg"])}
        panels.append((overlay(view.picture, layers), "both agree: the proxy"))
    return panels


def _scaled(array: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
    """A picture uint8 (H, W, 3) or a plane (H, W) with the longest side of a panel."""
    scale = SIDE / max(array.shape[:2])
    height, width = (max(1, round(side * scale)) for side in array.shape[:2])
    return np.asarray(Image.fromarray(array).resize((width, height), resampling))


def _marked(name: str, picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Drawn after scaling, so that lines are as wide on small pictures as on large ones."""
    shown = _scaled(mask.astype(np.uint8) * 255, Image.Resampling.BOX) > 127
    return overlay(_scaled(picture, Image.Resampling.LANCZOS), {name: shown})


def _heated(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values float (h, w), stretched over all colours, on the picture."""
    span = float(np.ptp(values))
    share = (values - values.min()) / span if span else np.zeros_like(values)
    stops = np.linspace(0, 1, len(_HEAT))
    return _over(picture, np.stack([np.interp(share, stops, channel) for channel in _HEAT.T], -1), 0.72)


def _over(picture: np.ndarray, colours: np.ndarray, opacity: float) -> np.ndarray:
    """Colours (h, w, 3) over the picture in grey, so that the hues are those of the colours."""
    grey = np.asarray(Image.fromarray(picture).convert("L"), np.float32)[..., None]
    return (grey + opacity * (colours - grey) + 0.5).astype(np.uint8)


def _section(heading: str, panels: Sequence[Panel]) -> np.ndarray:
    """A row of panels under its heading."""
    row = contact_sheet([[picture for picture, _ in panels]], [[caption for _, caption in panels]], SIDE)
    font = ImageFont.load_default(_HEADING)
    lines = heading.splitlines()
    width = max(row.shape[1], *(math.ceil(font.getlength(line)) + 2 * _HEADING for line in lines))
    strip = Image.new("RGB", (width, round(1.4 * _HEADING * len(lines)) + _HEADING), _PAPER)
    pen = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        pen.text((_HEADING, round(0.7 * _HEADING + 1.4 * _HEADING * number)), line, fill=_INK, font=font)
    return np.concatenate(_of_equal_width([np.asarray(strip), row]))


def _of_equal_width(strips: Sequence[np.ndarray]) -> list[np.ndarray]:
    width = max(strip.shape[1] for strip in strips)
    equal = []
    for strip in strips:
        wide = np.full((len(strip), width, 3), _PAPER, np.uint8)
        wide[:, : strip.shape[1]] = strip
        equal.append(wide)
    return equal
