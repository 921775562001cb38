"""Images as arrays: ranges and the centre-crop."""

import numpy as np
from PIL import Image


def to_model_range(images: np.ndarray) -> np.ndarray:
    """uint8 0...255 to float32 -1...1."""
    scaled = images.astype(np.float32)
    scaled /= np.float32(127.5)  # in place: a batch takes its memory once
    scaled -= np.float32(1.0)
    return scaled


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats -1...1 to uint8 0...255, clipped, and truncated as the published code does."""
    scaled = np.asarray(images, np.float32) * np.float32(127.5) + np.float32(128.0)
    return np.clip(scaled, 0.0, 255.0).astype(np.uint8)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of an image at `size` pixels, as the ADM suite crops.

    The image is halved with a box filter while its shorter side is at least twice `size`, then
    scaled bicubically until the shorter side is `size`.

    Args:
      image: of any size and mode.
      size: height and width of the result.

    Returns:
      uint8 `[size, size]`, or `[size, size, C]` for a mode with C channels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.resize(scaled, resample=Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
