"""Which of the scored masks become the answer.

Source: Liu et al., "Matcher" (2023), section 3.3 (controllable masks generation), and its release.
"""

from __future__ import annotations

import numpy as np

from fssdeploy.glue.matcher.options import MatcherOptions


def best_masks(scores: np.ndarray, options: MatcherOptions) -> np.ndarray:
    """Rows of the masks to merge, best first, at most `options.num_merging_mask`; scores float32 (n,), n at least 1.

    Equal scores stay in their order. With the score filter a mask must lie within `deep_score_filter` of a perfect
    score, the best one excepted, and within `deep_score_norm_filter` of the best, measured in distances of the worst.
    Without it the best few stay as far as they exceed `topk_scores_threshold` of the best.
    """
    ranked = np.argsort(-scores, kind="stable")
    if options.use_score_filter:
        distance = 1 - scores[ranked]
        near = distance < options.deep_score_filter
        near[0] = True
        near &= (distance - distance[0]) / (distance[-1] + np.float32(1e-6)) < options.deep_score_norm_filter
        return ranked[near][: options.num_merging_mask]
    ranked = ranked[: options.num_merging_mask]
    relative = scores[ranked]
    if options.topk_scores_threshold > 0:
        relative = relative / relative[0]
    return ranked[relative > options.topk_scores_threshold]
