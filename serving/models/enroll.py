"""The server's model `<system>_enroll`: annotated pictures in, a class in the bank and its version out."""

from __future__ import annotations

from typing import Any

import numpy as np

from fssdeploy.errors import InputError
from fssdeploy.serving.models.answers import answer_each, files_of, input_array, required
from fssdeploy.serving.models.enrolled import EnrolledModel, one_of, texts_of

# (name, Triton's type, dims, optional)
INPUTS = (
    ("name", "TYPE_STRING", (1,), False),
    ("pictures", "TYPE_STRING", (-1,), True),
    ("pixels", "TYPE_UINT8", (-1, -1, -1, 3), True),
    ("masks", "TYPE_STRING", (-1,), True),
    ("mask_pixels", "TYPE_UINT8", (-1, -1, -1), True),
    ("add", "TYPE_BOOL", (1,), True),
)
OUTPUTS = (
    ("version", "TYPE_INT64", (1,), False),
    ("shots", "TYPE_INT64", (1,), False),
)


class TritonPythonModel(EnrolledModel):
    """Stores classes in the bank; an answer means that the version is on disk."""

    suffix = "_enroll"

    @answer_each
    def answers(self, request: Any) -> dict[str, np.ndarray]:
        names = texts_of(request, "name")
        if len(names) != 1:
            raise InputError("class_name", f"{len(names)} names were sent", "one class is enrolled at a time", "")
        add = input_array(request, "add")
        enrolled = self.deployment.enroll(
            names[0],
            self._sources(request, "pictures", "pixels"),
            self._sources(request, "masks", "mask_pixels"),
            add=add is not None and bool(add.any()),
        )
        return {
            "version": np.array([enrolled.version], np.int64),
            "shots": np.array([enrolled.shots], np.int64),
        }

    def _sources(self, request: Any, files: str, arrays: str) -> list[bytes] | list[np.ndarray]:
        if one_of(request, files, arrays) == files:
            return files_of(request, files, self.max_picture_bytes)
        return list(required(request, arrays))
