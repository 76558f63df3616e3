"""How the instruction reaches the student besides its adapter.

`concat` puts the encoded instruction before the input in the decoder's memory (as HINT and TAGI
do); `none` leaves the adapter alone with the task. A fusion's modules live here, outside the
backbone, whose state-dict keys and site names stay as they are.

Axes: K tasks, I instruction tokens, D features.
"""

from __future__ import annotations

from torch import nn

from tagi_ray.backbone import EncodedInstruction
from tagi_ray.sections import FusionSettings


class Fusion(nn.Module):
    """Turn encoded instructions into what the decoder's memory gets of them."""

    def __init__(self, settings: FusionSettings, width: int, *, projected: bool = False) -> None:
        """projected: train a projection of the encoded instruction, which the method has none of.

        Without an adapter to generate it is all that plain concatenation could learn.
        """
        super().__init__()
        self.kind = settings.kind
        self.projection: nn.Linear | None = None
        if projected:
            self.projection = nn.Linear(width, width)
            # Zero, and added to the states: at step 0 the memory is the plain concatenation.
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def forward(self, encoded: EncodedInstruction) -> EncodedInstruction | None:
        """encoded: states [K, I, D] -> states [K, I, D] for the decoder's memory, or None."""
        if self.kind == "none":
            return None
        if self.projection is None:
            return encoded
        states = encoded.states_KID.to(self.projection.weight.dtype)
        return EncodedInstruction(states + self.projection(states), encoded.mask_KI)
