"""Matcher: SAM segments what the patches of a picture say about the object of other pictures, without training.

Source: Liu et al., "Matcher: Segment Anything with One Shot Using All-Purpose Feature Matching" (2023), and the
released code. Runs on PyTorch stages and on exported graphs alike; never imports torch.

    enroll   features of all patches of the shots, and which are the object's
    segment  assignment there and back -> points -> prompts -> masks -> scores -> union of the best
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL import Image

from fssdeploy.errors import InputError
from fssdeploy.glue.affinity import cosines
from fssdeploy.glue.matcher.assign import Matches, box_around, match, patch_centres
from fssdeploy.glue.matcher.candidates import (
    Candidates,
    Prompts,
    Tried,
    any_pixel,
    find_candidates,
    join_tried,
    thin_by_boxes,
)
from fssdeploy.glue.matcher.merge import best_masks
from fssdeploy.glue.matcher.options import MatcherOptions
from fssdeploy.glue.matcher.prompts import Draws, cluster_centres, prompt_sets
from fssdeploy.glue.matcher.scores import combined, passing, purity_and_coverage, transport_scores
from fssdeploy.glue.resample import nearest
from fssdeploy.glue.sam import BOTTOM_RIGHT, EMPTY_LOGIT, FOREGROUND, TOP_LEFT, with_padding_point
from fssdeploy.glue.sam_frame import to_canvas, to_picture
from fssdeploy.images.geometry import Placement, place, unfit
from fssdeploy.images.masks import Mask
from fssdeploy.pipeline import Preprocessing, check_origin, check_query, objects_of, run_in_chunks
from fssdeploy.protocol import CONCATENATE, MERGE, ClassState, Engine, Features, Masks, StageSpec

ENCODER, SAM_ENCODER, SINGLE, MULTIPLE = "encoder", "sam_encoder", "decoder_single", "decoder_multiple"
ENLARGED = "enlarged"
# Half the side, in pixels of the canvas, of the square that the release puts in place of an object nobody marked.
CENTRE = 7

Trace = dict[str, Any]


class Matcher:
    """The three verbs over the stages of `fssdeploy.systems.matcher`.

    `preprocessing` has the canvas, and `options`, `compat`, `kshot` and `seed` of the system's configuration. The
    attribute `options` may be exchanged at any time: neither stages nor states depend on it.

    The state of a class is `features` float32 (m, C), rows of unit length, and `foreground` bool (m,). How many rows
    there are is the k-shot rule. "official" keeps every patch of every shot, as the release does, so a query costs more
    with each shot. "flat", which is this project's, keeps as many as one picture has patches, taken evenly from all
    shots, foreground in its mean share: a query costs what it costs with one shot, and with one shot both are equal.
    States merge by joining their rows, so a merged state is larger than a flat one enrolled at once.

    `compat` says what happens where the release does something that nobody can want:

    | case                         | "corrected" (default)    | "original"                                           |
    |------------------------------|--------------------------|------------------------------------------------------|
    | a support mask is empty      | InputError               | gives no rows; all: a square of 14 pixels is assumed |
    | an object vanishes on canvas | InputError               | as if its mask were empty                            |
    | no mask survives the filters | empty mask               | empty mask (the release ends with an exception)      |

    Chance decides nothing but which subsets of points become prompts and where k-means starts. The generator is seeded
    with `seed` anew for every picture and class, so that an answer depends on nothing that was asked before. Points are
    in ascending order of patches, masks by descending predicted IoU and then in the order of their prompts; equal
    similarities and scores stay in these orders.
    """

    def __init__(
        self,
        name: str,
        specs: Mapping[str, StageSpec],
        engine: Engine,
        preprocessing: Mapping[str, Any],
        fingerprint: str,
        draws: Callable[[int], Draws] = Draws,
    ) -> None:
        self.name = name
        self.specs = dict(specs)
        self.engine = engine
        self.fingerprint = fingerprint
        self.preprocessing = Preprocessing(*(preprocessing[key] for key in ("canvas", "patch", "geometry")))
        self.options = MatcherOptions.from_dict(preprocessing["options"])
        self.original = preprocessing["compat"] == "original"
        self.flat = preprocessing["kshot"] == "flat"
        self.seed = int(preprocessing["seed"])
        self.side = self.preprocessing.canvas // self.preprocessing.patch
        self._draws = draws

    @cached_property
    def frame(self) -> Placement:
        """Where the canvas lies on SAM's square: SAM gets the squeezed canvas, enlarged, not the picture itself."""
        canvas = self.preprocessing.canvas
        return place(canvas, canvas, int(self.specs[SAM_ENCODER].inputs[0].shape[-1]), "squash")

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        """Features of pictures, each uint8 RGB (height, width, 3) of any size.

        `features` float32 (n, N, C) of patches, unit length, and `canvas` uint8 (n, 3, S, S), from which `segment`
        makes SAM's `embedding` once. InputError for anything else.
        """
        canvas, placements = self.preprocessing.fit_pictures(pictures)
        found = run_in_chunks(self.engine, self.specs[ENCODER], {"picture": canvas})
        return Features({"features": found["features"], "canvas": canvas}, placements, self.fingerprint)

    def enroll(self, features: Features, masks: Sequence[Mask | np.ndarray], trace: Trace | None = None) -> ClassState:
        """The state of one class from the features of its k pictures and one mask for each, at the picture's size.

        A patch is the object's if one pixel of it is, on the canvas. InputError for no shot, another number or size of
        masks, and (unless `compat` is "original") for an object that is absent or vanishes. `trace` receives
        `support_mask_resized` (k, S, S), `ref_patch_masks` (k, g, g) and `ref_features` (k * N, C).
        """
        check_origin(features.fingerprint, self.fingerprint, "features")
        if not len(features):
            raise InputError("no_pictures", "a class needs at least one picture", "", "Give one with its mask.")
        on_canvas = self._masks_on_canvas(masks, features.placements)
        patches = any_pixel(on_canvas, self.preprocessing.patch)
        rows, foreground = np.concatenate(list(features.tensors["features"])), patches.ravel()
        if trace is not None:
            trace |= {
                "support_mask_resized": on_canvas,
                "ref_patch_masks": patches.reshape(-1, self.side, self.side),
                "ref_features": rows,
            }
        if self.flat:
            kept = evenly_from_shots(patches)
            rows, foreground = rows[kept], foreground[kept]
        tensors = {"features": rows, "foreground": foreground}
        return ClassState(tensors, len(features), self.fingerprint, {MERGE: CONCATENATE})

    def segment(self, features: Features, states: Mapping[str, ClassState], trace: Trace | None = None) -> Masks:
        """Masks of every class in every picture: the largest logit of the merged masks, at the picture's size.

        The prior is the largest cosine of each patch with one of the object, (g, g).
        A mask is returned for an absent object too; where no mask survives the filters it is empty. The grid of prompts
        depends on the picture alone and is decoded once for all classes of the call. `trace`, only with one picture and
        one class, receives what is computed on the way by the names of the recorded stages, and `seed`; it also has
        every mask measured and scored that would not have to be.
        """
        check_query(features, states, self.fingerprint)
        if trace is not None and (len(features), len(states)) != (1, 1):
            raise ValueError("a trace is of one picture and one class")
        self.prepare(features)
        masks = Masks(list(states), [], [])
        for index in range(len(features)):
            picture = features[index]
            grid = self._grid(picture, trace)
            logits, priors = {}, {}
            for name, state in states.items():
                matches = self.match(state, picture)
                logits[name] = unfit(self.finish(picture, grid, matches, trace), picture.placements[0])
                priors[name] = matches.similarity.max(0).reshape(self.side, self.side)
            masks.logits.append(logits)
            masks.prior.append(priors)
        return masks

    def prepare(self, features: Features) -> None:
        """What `finish` needs of pictures: their embeddings. InputError if the options do not fit the decoder."""
        self._check_capacity()
        self._embed(features)

    def match(self, state: ClassState, picture: Features, weights: np.ndarray | None = None) -> Matches:
        """The assignments of one class in one picture; `weights` float32 (m,) scale the cosines of a state's rows."""
        tensors, target = state.tensors, picture.tensors["features"][0]
        return match(tensors["features"], tensors["foreground"], target, partial(cosines, self.engine), weights)

    def finish(self, picture: Features, grid: list[Tried], matches: Matches, trace: Trace | None) -> np.ndarray:
        """From matched patches to logits float32 (S, S) on the canvas; `grid` are the masks of the dense grid."""
        prompts = self._prompts(matches, trace)
        tried = [self._find(picture, each, trace) for each in prompts]
        found = join_tried([*grid, *tried])
        kept = found.take(thin_by_boxes(found.boxes, found.iou, self.options.box_nms_thresh))
        chosen = self._choose(kept, matches, trace)
        size = self.preprocessing.canvas
        enlarged = to_picture(kept.logits[chosen], self.frame)
        answer = enlarged.max(0) if len(chosen) else np.full((size, size), EMPTY_LOGIT, np.float32)
        if trace is not None:
            trace |= {
                "seed": self.seed,
                "target_features": picture.tensors["features"][0],
                "sam_embedding": picture.tensors["embedding"][0],
                "sim_foreground": matches.similarity,
                "forward_rows": matches.rows,
                "forward_cols": matches.columns,
                "forward_total": matches.similarity[matches.rows, matches.columns].sum(dtype=np.float64)[None],
                "reverse_cols": matches.back,
                "reverse_total": matches.back_similarity.sum(dtype=np.float64)[None],
                "returned": matches.returned,
                "pairs_used": np.array([matches.kept, len(matches.patches)]),
                "selected_masks": enlarged > 0,
                "final_mask": answer > 0,
            }
            for each, part in zip(prompts, tried, strict=True):
                count = np.count_nonzero(each.labels[0] == FOREGROUND)
                trace |= {f"prompt_iou_n{count}": part.iou, f"prompt_stability_n{count}": part.stability}
        return answer

    def _prompts(self, matches: Matches, trace: Trace | None) -> list[Prompts]:
        """The prompts of matched points, one kind for each number of points."""
        options, draws = self.options, self._draws(self.seed)
        points = patch_centres(matches.patches, self.side, self.preprocessing.patch)
        candidates = points
        if not options.use_points_or_centers:
            candidates, clusters = cluster_centres(points, options.num_centers, draws)
            if trace is not None:
                trace |= {"kmeans_centers": candidates, "kmeans_assignment": clusters}
        sets = prompt_sets(candidates, options.sample_range, options.max_sample_iterations, draws)
        box = box_around(points)
        if trace is not None:
            trace |= {"points": points, "box": box}
            trace |= {f"prompt_points_n{each.shape[1]}": each for each in sets}
        stage = MULTIPLE if options.multimask_output else SINGLE
        layers = layers_of(options.output_layer) if options.multimask_output else slice(None)
        prompts = []
        for each in sets:
            labels = np.full(each.shape[:2], FOREGROUND)
            if options.use_box:
                corners = np.broadcast_to(box.reshape(2, 2), (len(each), 2, 2))
                inside = to_canvas(np.concatenate([each, corners], 1), self.frame)
                labels = np.pad(labels, ((0, 0), (0, 2)), constant_values=TOP_LEFT)
                labels[:, -1] = BOTTOM_RIGHT
            else:
                inside, labels = with_padding_point(to_canvas(each, self.frame), labels)
            prompts.append(
                Prompts(inside, labels, stage, layers, options.iou_filter, options.sel_stability_score_thresh)
            )
        return prompts

    def _grid(self, picture: Features, trace: Trace | None) -> list[Tried]:
        """The masks of a dense grid of single points, or nothing where the options have none."""
        options = self.options
        if not options.use_dense_mask:
            return []
        steps = (np.arange(options.points_per_side) + 0.5) / options.points_per_side * self.preprocessing.canvas
        points = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 1, 2)
        points, labels = with_padding_point(to_canvas(points, self.frame), np.full(points.shape[:2], FOREGROUND))
        layer = options.dense_multimask_output
        # Which of three masks the grid gives is decided only if the other prompts give three as well.
        layers = layers_of(layer) if layer and options.multimask_output else slice(None)
        found = self._find(
            picture,
            Prompts(
                points,
                labels,
                MULTIPLE if layer else SINGLE,
                layers,
                options.pred_iou_thresh,
                options.stability_score_thresh,
            ),
            trace,
        )
        if trace is not None:
            trace |= {"dense_iou": found.iou, "dense_stability": found.stability}
        return [found]

    def _find(self, picture: Features, prompts: Prompts, trace: Trace | None) -> Tried:
        return find_candidates(
            self.engine,
            picture.tensors["embedding"],
            prompts,
            self.frame,
            self.preprocessing.patch,
            measure_all=trace is not None,
        )

    def _choose(self, masks: Candidates, matches: Matches, trace: Trace | None) -> np.ndarray:
        """Rows of the masks to merge, best first; transport is solved for what purity and coverage leave."""
        options = self.options
        purity, coverage = purity_and_coverage(masks.touched, masks.centred, matches.patches)
        emd = np.full(len(masks), np.nan, np.float32)

        def solve(rows: np.ndarray) -> None:
            emd[rows] = transport_scores(matches.similarity, masks.touched[rows])

        rows = passing(coverage, options.coverage_filter, np.arange(len(masks)))
        if options.emd_filter > 0:
            solve(rows)
            rows = passing(emd, options.emd_filter, rows)
        rows = passing(purity, options.purity_filter, rows)
        solve(np.arange(len(masks)) if trace is not None else rows)
        scores = combined(emd, purity, coverage, options)
        chosen = rows[best_masks(scores[rows], options)] if len(rows) else rows
        if trace is not None:
            ascending = np.argsort(masks.number)
            x0, y0, x1, y1 = masks.boxes[ascending].T
            trace |= {
                "kept_candidates": masks.number[ascending],
                "kept_iou": masks.iou[ascending],
                "kept_boxes": np.stack([x0, y0, x1 - x0, y1 - y0], -1),
                "kept_patch_masks": masks.touched[ascending],
                "purity": purity[ascending],
                "coverage": coverage[ascending],
                "emd": emd[ascending],
                "scores": scores[ascending],
                "survivors": np.sort(masks.number[rows]),
                "selected": masks.number[chosen],
            }
        return chosen

    def _embed(self, features: Features) -> None:
        """SAM's embedding of all pictures, once; it stays with the features."""
        if "embedding" in features.tensors:
            return
        size = (self.frame.canvas, self.frame.canvas)
        pictures = map(Image.fromarray, features.tensors["canvas"].transpose(0, 2, 3, 1))
        enlarged = np.stack([np.asarray(each.resize(size, Image.Resampling.BILINEAR)) for each in pictures])
        inputs = {ENLARGED: enlarged.transpose(0, 3, 1, 2)}
        features.tensors |= run_in_chunks(self.engine, self.specs[SAM_ENCODER], inputs)

    def _masks_on_canvas(self, masks: Sequence[Mask | np.ndarray], placements: Sequence[Placement]) -> np.ndarray:
        """Masks at their pictures' sizes to bool (k, S, S), each canvas pixel reading the nearest one of the mask."""
        size = self.preprocessing.canvas
        objects = objects_of(masks, placements, allow_empty=self.original)
        fitted = np.stack([nearest(found, size, size) for found in objects])
        if not self.original and not (seen := fitted.any((1, 2))).all():
            raise InputError(
                "object_vanishes",
                f"the object in mask {seen.argmin() + 1} is too small to be seen",
                f"no pixel of it is left on the canvas of {size} x {size} pixels",
                "Crop the picture around the object.",
            )
        if not fitted.any():
            middle = slice(size // 2 - CENTRE, size // 2 + CENTRE)
            fitted[:, middle, middle] = True
        return fitted

    def _check_capacity(self) -> None:
        """InputError if a prompt of these options has more points than the decoder has room for."""
        most, options = self.options.sample_range[1], self.options
        capacity = int(self.specs[MULTIPLE if options.multimask_output else SINGLE].inputs[0].shape[1])
        needed = most + (2 if options.use_box else 1)
        if needed > capacity:
            raise InputError(
                "option_unknown",
                f"sample_range cannot reach {most}",
                f"with its box or padding a prompt then has {needed} points, and the decoder has room for {capacity}",
                "Ask for fewer points, or export with a larger capacity.",
            )


def layers_of(layer: int) -> slice:
    """Of a prompt's three masks: that of index 0, 1 or 2, or for 3, 4, 5 those from index 0, 1, 2 on."""
    return slice(layer, layer + 1) if layer < 3 else slice(layer - 3, None)


def evenly_from_shots(foreground: np.ndarray) -> np.ndarray:
    """Which rows of k * N a flat state keeps: N of them, ascending, as large a share of each kind as in the shots.

    foreground bool (k, N), at least one true. Foreground rows are taken at even steps through all shots, and so are
    background rows; at least one of the foreground stays.
    """
    shots, patches = foreground.shape
    inside, outside = np.flatnonzero(foreground), np.flatnonzero(~foreground)
    count = max(1, round(len(inside) / shots))
    return np.sort(np.concatenate([_at_even_steps(inside, count), _at_even_steps(outside, patches - count)]))


def _at_even_steps(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[(np.arange(count) * 2 + 1) * len(rows) // (2 * max(count, 1))]
