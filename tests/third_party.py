"""Importing packages that need torchvision, also where its compiled half does not load (beside a CPU torch)."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

_library: torch.library.Library | None = None


def _make_torchvision_importable() -> None:
    """torchvision stops at two operators whose schemas its compiled half would have declared."""
    global _library  # noqa: PLW0603 - the declarations live as long as this object
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def import_timm() -> ModuleType:
    _make_torchvision_importable()
    return pytest.importorskip("timm")


def import_segment_anything() -> ModuleType:
    _make_torchvision_importable()
    return pytest.importorskip("segment_anything.modeling")
