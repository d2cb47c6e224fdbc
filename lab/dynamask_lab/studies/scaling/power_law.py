"""Power laws of loss against compute, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynamask.errors import InvalidInputError


@dataclass(frozen=True)
class PowerLaw:
    """loss = scale · (compute / unit)**-exponent + floor, with 90% intervals of scale and exponent.

    The unit is the geometric mean of the fitted computes, where the scale is best known. Intervals are NaN where there
    are no more points than parameters: nothing tells then how far off the fit is.
    """

    scale: float
    exponent: float
    floor: float
    unit: float
    scale_interval: tuple[float, float]
    exponent_interval: tuple[float, float]

    def __call__(self, compute: np.ndarray) -> np.ndarray:
        """Losses at these computes."""
        return self.scale * (np.asarray(compute) / self.unit) ** -self.exponent + self.floor


def fit_power_law(
    compute: np.ndarray, loss: np.ndarray, *, floor: bool = False, samples: int = 1000, seed: int = 0
) -> PowerLaw:
    """Least squares of log loss.

    Args:
        compute, loss: (runs,) positive.
        floor: fit an irreducible loss too; needs at least four different computes. Without it the floor is zero.
        samples: of the residual bootstrap: the fit repeated on its predictions times resampled residuals.
        seed: of the resampling.

    Raises:
        InvalidInputError: fewer than two different computes (four with `floor`), or values not positive and finite.
    """
    compute, loss = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    needed = 4 if floor else 2
    if compute.shape != loss.shape or len(np.unique(compute)) < needed:
        raise InvalidInputError(
            f"a power law needs losses at {needed} different computes or more; got {compute}, {loss}"
        )
    if not (np.isfinite(compute).all() and np.isfinite(loss).all() and (compute > 0).all() and (loss > 0).all()):
        raise InvalidInputError(f"compute and loss must be positive and finite; got {compute}, {loss}")
    unit = float(np.exp(np.log(compute).mean()))
    relative = compute / unit
    scale, exponent, bottom = _fit(relative, loss, floor)
    predicted = scale * relative**-exponent + bottom
    residuals = np.log(loss) - np.log(predicted)
    # Residuals of a fit of p parameters to n points are too small by this factor.
    spare = len(loss) - (3 if floor else 2)
    if spare <= 0:
        unknown = (float("nan"), float("nan"))
        return PowerLaw(scale, exponent, bottom, unit, unknown, unknown)
    residuals = residuals * np.sqrt(len(loss) / spare)
    random = np.random.default_rng(seed)
    fits = np.array(
        [_fit(relative, predicted * np.exp(random.choice(residuals, len(loss))), floor)[:2] for _ in range(samples)]
    )
    low, high = np.quantile(fits, [0.05, 0.95], axis=0)
    intervals = [(float(low[i]), float(high[i])) for i in range(2)]
    return PowerLaw(scale, exponent, bottom, unit, intervals[0], intervals[1])


def _fit(compute: np.ndarray, loss: np.ndarray, floor: bool) -> tuple[float, float, float]:
    """Scale, exponent, floor: linear in the logarithms for a given floor, which is searched on a grid."""
    floors = np.linspace(0.0, 0.98 * loss.min(), 99) if floor else np.zeros(1)
    design = np.stack([np.ones_like(compute), -np.log(compute)], axis=1)
    best, least = (0.0, 0.0, 0.0), np.inf
    for bottom in floors:
        (log_scale, exponent), *_ = np.linalg.lstsq(design, np.log(loss - bottom), rcond=None)
        error = float(((np.log(np.exp(design @ [log_scale, exponent]) + bottom) - np.log(loss)) ** 2).sum())
        if error < least:
            best, least = (float(np.exp(log_scale)), float(exponent), float(bottom)), error
    return best
