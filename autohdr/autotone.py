"""The baseline to beat: what the "auto" button of an editor does with two fixed, global numbers."""

import numpy as np

from autohdr.errors import UserError

_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


def auto_tone(image: np.ndarray, *, clip: float = 0.005, gamma: float = 0.6) -> np.ndarray:
    """Exposure, then a lift of the mid-tones: min(1, image / white) ** gamma, white being the luma that `clip` exceeds.

    image: float32 (H, W, 3), sRGB-encoded in [0, 1]; the result has the same shape, dtype and range.
    clip: share of the pixels that turn white, in [0, 1): 0.5% is what auto-levels usually takes.
    gamma: exponent after the gain, above 0; below 1 brightens. A grey of 0.5 becomes 0.66.
    Raises UserError for another shape or dtype, or a parameter out of range.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype != np.float32:
        raise UserError(f"auto_tone: image must be float32 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if not (0 <= clip < 1 and gamma > 0):
        raise UserError(f"auto_tone: expected 0 <= clip < 1 and gamma > 0, got clip={clip} and gamma={gamma}")
    white = max(float(np.quantile(image @ _LUMA, 1 - clip)), 1 / 255)  # a black photo stays black
    toned = image * np.float32(1 / white)
    np.clip(toned, 0, 1, out=toned)
    return np.power(toned, np.float32(gamma), out=toned)
