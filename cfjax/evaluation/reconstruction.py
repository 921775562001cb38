"""How near reconstructed images are to their originals."""

import numpy as np


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of each pair of images in dB, infinite where they are equal.

    Args:
      images, others: uint8 `[N, H, W, C]`.

    Returns:
      float64 `[N]`.
    """
    difference = images.astype(np.float64) - others
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.square(difference).mean(axis=(1, 2, 3)))
