"""Blend the scores of search with those of a cross-encoder that read the same products again."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def blend(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating], weight: float) -> Floats:
    """Return scores [..., D] from those of search and of the cross-encoder, each scaled to 0..1 over the D products.

    `weight`, from 0 to 1, is the cross-encoder's.
    """
    return (1 - weight) * scaled(first) + weight * scaled(second)


def scaled(scores: npt.NDArray[np.floating]) -> Floats:
    """Return scores [..., D] scaled to 0..1 over the D products; equal ones are 0."""
    found = scores.astype(np.float64)
    least = found.min(-1, keepdims=True)
    span = found.max(-1, keepdims=True) - least
    return np.divide(found - least, span, out=np.zeros_like(found), where=span > 0)
