"""Noise-level loss weights: how much the loss at each timestep counts.

Each rule is a function of the signal-to-noise ratio, stated for the loss on x_0 and converted to
the loss on what the network predicts: |ε - ε'|² = SNR |x_0 - x_0'|² and |v - v'|² = (SNR + 1)
|x_0 - x_0'|².
"""

import numpy as np

from cfjax.diffusion.process import PREDICTION_TYPES
from cfjax.diffusion.schedule import NoiseSchedule
from cfjax.errors import check_choice

LOSS_WEIGHTINGS = ("none", "min_snr", "p2", "truncated_snr")


def loss_weight_table(
    schedule: NoiseSchedule, weighting: str, prediction_type: str, gamma: float
) -> np.ndarray:
    """Weight of the squared error of the prediction at every timestep.

    Args:
      schedule: gives the SNR.
      weighting: "none": 1; "min_snr": min(SNR, γ) on x_0 (Min-SNR-γ eq. 3, γ = 5 there); "p2":
        SNR / (1 + SNR)^γ on x_0 (P2 eq. 8 with k = 1); "truncated_snr": max(SNR, 1) on x_0
        (progressive distillation section 4).
      prediction_type: "noise", "x_start" or "velocity".
      gamma: γ; "none" and "truncated_snr" have none.

    Returns:
      float64 `[N]`.
    """
    check_choice("loss weighting", weighting, LOSS_WEIGHTINGS)
    check_choice("prediction type", prediction_type, PREDICTION_TYPES)
    snr = schedule.snr
    if weighting == "none":
        return np.ones_like(snr)
    weight_on_x_start = {
        "min_snr": np.minimum(snr, gamma),
        "p2": snr / (1.0 + snr) ** gamma,
        "truncated_snr": np.maximum(snr, 1.0),
    }[weighting]
    return (
        weight_on_x_start / {"x_start": 1.0, "noise": snr, "velocity": snr + 1.0}[prediction_type]
    )
