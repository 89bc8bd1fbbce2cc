"""The server's model `<system>_segment`: one picture and names of enrolled classes in, one mask per class out."""

from __future__ import annotations

from typing import Any

import numpy as np

from fssdeploy.deployment import REHEARSAL
from fssdeploy.errors import InputError
from fssdeploy.serving.models.answers import answer_each, files_of, input_array, required
from fssdeploy.serving.models.enrolled import EnrolledModel, one_of, texts_of

# (name, Triton's type, dims, optional)
INPUTS = (
    ("picture", "TYPE_STRING", (1,), True),
    ("pixels", "TYPE_UINT8", (-1, -1, 3), True),
    ("names", "TYPE_STRING", (-1,), True),
)
OUTPUTS = (
    ("names_found", "TYPE_STRING", (-1,), False),
    ("masks", "TYPE_UINT8", (-1, -1, -1), False),
    ("scores", "TYPE_FP32", (-1,), False),
    ("versions", "TYPE_INT64", (-1,), False),
)


class TritonPythonModel(EnrolledModel):
    """Finds the classes of the bank; it is read anew for every request, and class states are kept in memory.

    The server's warm-up and health checks send the one name `REHEARSAL`, for which no bank is needed.
    """

    suffix = "_segment"

    @answer_each
    def answers(self, request: Any) -> dict[str, np.ndarray]:
        names = None if input_array(request, "names") is None else texts_of(request, "names")
        picture = self._picture(request)
        found = self.deployment.rehearse(picture) if names == [REHEARSAL] else self.deployment.segment(picture, names)
        return {
            "names_found": np.array([name.encode() for name in found], object),
            "masks": np.stack([item.mask for item in found.values()]).view(np.uint8),
            "scores": np.array([item.score for item in found.values()], np.float32),
            "versions": np.array([item.version for item in found.values()], np.int64),
        }

    def _picture(self, request: Any) -> bytes | np.ndarray:
        if one_of(request, "picture", "pixels") == "pixels":
            return required(request, "pixels")
        files = files_of(request, "picture", self.max_picture_bytes)
        if len(files) != 1:
            raise InputError("picture_count", f"{len(files)} pictures were sent", "one is searched at a time", "")
        return files[0]
