"""Few-shot segmentation in production.

Three verbs for every system: ``encode(pictures)``, ``enroll(features, masks)``, ``segment(features, states)``.

    import fssdeploy
    system = fssdeploy.load("artifacts/fsdino-tiny")
    state = system.enroll(system.encode([picture]), [mask])
    masks = system.segment(system.encode([query]), {"cup": state})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fssdeploy.artifact import load as load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import fssdeploy` costs milliseconds and never imports an inference runtime by itself.
    if name == "load":
        from fssdeploy.artifact import load

        return load
    raise AttributeError(f"module 'fssdeploy' has no attribute {name!r}")
