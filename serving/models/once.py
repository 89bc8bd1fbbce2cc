"""The server's model `<system>` of a system with steps of its own: pictures and shots in, masks out, nothing stored.

Of a system whose stages form a chain the model of that name is an ensemble.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fssdeploy.serving.models.answers import answer_each, files_of
from fssdeploy.serving.models.enrolled import EnrolledModel
from fssdeploy.serving.models.finish import check_sizes

# (name, Triton's type, dims, optional)
INPUTS = (
    ("pictures", "TYPE_STRING", (-1,), False),
    ("support_pictures", "TYPE_STRING", (-1,), False),
    ("support_masks", "TYPE_STRING", (-1,), False),
)
OUTPUTS = (
    ("masks", "TYPE_UINT8", (-1, -1, -1), False),
    ("scores", "TYPE_FP32", (-1,), False),
)


class TritonPythonModel(EnrolledModel):
    """Enrols the shots of a request for this request alone."""

    suffix = ""

    @answer_each
    def answers(self, request: Any) -> dict[str, np.ndarray]:
        files = [files_of(request, name, self.max_picture_bytes) for name, *_ in INPUTS]
        found = self.deployment.segment_once(*files)
        check_sizes([each.mask.shape for each in found])
        return {
            "masks": np.stack([each.mask for each in found]).view(np.uint8),
            "scores": np.array([each.score for each in found], np.float32),
        }
