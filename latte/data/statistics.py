"""Mean and standard deviation of each latent channel, computed as the latents come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChannelStatistics:
    """Count, mean and sum of squared deviations of each channel, C, in float64.

    Parts are merged by the formula of Chan et al. (1979), which loses no digits where the mean is large.
    """

    count: int
    """Number of values of each channel."""
    means: np.ndarray
    """`[C]` float64."""
    deviations: np.ndarray
    """Sums of squared deviations from the mean, `[C]` float64."""

    @classmethod
    def empty(cls, channels: int) -> ChannelStatistics:
        return cls(0, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, latents: np.ndarray) -> ChannelStatistics:
        """Returns the statistics of latents, `[N, C, H, W]`."""
        values = latents.astype(np.float64).swapaxes(0, 1).reshape(latents.shape[1], -1)  # [C, N*H*W]
        means = values.mean(axis=1)
        return cls(values.shape[1], means, np.square(values - means[:, None]).sum(axis=1))

    def merged(self, other: ChannelStatistics) -> ChannelStatistics:
        """Returns the statistics of both parts together."""
        count = self.count + other.count
        if not count:
            return self
        difference = other.means - self.means
        means = self.means + difference * (other.count / count)
        between = np.square(difference) * (self.count * other.count / count)
        return ChannelStatistics(count, means, self.deviations + other.deviations + between)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel."""
        return tuple(self.means.tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel, over all values rather than estimated from a sample."""
        return tuple(np.sqrt(self.deviations / max(self.count, 1)).tolist())
