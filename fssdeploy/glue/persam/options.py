"""What PerSAM leaves to choose: its variant, how masks are read, how PerSAM-F is trained."""

from __future__ import annotations

from dataclasses import dataclass

from fssdeploy.errors import InputError
from fssdeploy.glue.persam.fit import LEARNING_RATE, STEPS

ALLOWED = {"variant": ("persam", "persam_f"), "compat": ("original", "corrected")}


@dataclass(frozen=True)
class PerSamOptions:
    """`variant` is "persam" (training-free) or "persam_f" (two mixing weights fitted at enrolment, `steps` of AdamW).

    ``compat="original"`` is what the released code computes, and published numbers with it; "corrected" differs here:

    ==========================  ==============================================  ======================================
    where                       original                                        corrected
    ==========================  ==============================================  ======================================
    a cell is the object's if   the mask, drawn in grey value `mask_value` and  the object covers half of it
                                resized like a picture, exceeds 123.675 in the
                                mean of the four pixels in the cell's middle
    attention bias              the picture's map squeezed into the whole grid  every cell has its own similarity,
                                also where the picture fills a part of it       cells beyond the picture have 0
    video: first mask           largest area modulo 256                         largest area
    video: an object vanishes   later objects move up and go on with each       it keeps its place and its last box
                                other's boxes
    ==========================  ==============================================  ======================================

    `mask_value` is 128 in the files of the paper's benchmark. Both read alike what is undefined in the release: where
    no cell is the object's, the one that it covers most is; the first of equal extrema, row by row, is the point; a
    constant map gives a bias of one half; an empty mask gives no box to the next call. The second softmax of the
    guided attention and the target embedding in the codes of the tokens are the method itself and belong to both.
    """

    variant: str = "persam"
    compat: str = "corrected"
    mask_value: int = 128
    steps: int = STEPS
    learning_rate: float = LEARNING_RATE

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError("option_unknown", f"{name} cannot be '{value}'", "", f"Choose {' or '.join(allowed)}.")
        if not 124 <= self.mask_value <= 255:
            raise InputError(
                "option_unknown",
                f"mask_value cannot be {self.mask_value}",
                "a cell counts where the mask is above 123.675",
                "Choose 124 to 255.",
            )
        if self.steps < 1 or not self.learning_rate > 0:
            raise InputError(
                "option_unknown",
                f"{self.steps} steps with learning rate {self.learning_rate} train nothing",
                "",
                "Use at least 1 step and a learning rate above 0.",
            )
