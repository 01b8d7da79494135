"""Estimators of shares, with their intervals."""

import math


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples, drawn from n without replacement, passes: 1 - C(n - c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv:2107.03374). Raises: ValueError unless 1 <= k <= samples and passed <= samples.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples and cannot be had from {passed} of {samples}")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def wilson_interval(hits: float, trials: int) -> tuple[float, float]:
    """The 95% confidence interval of a share (Wilson 1927), which stays inside 0..1 and works for 0 hits.

    For the mean of `trials` values in 0..1 with the sum `hits`, the interval is at least wide enough.
    """
    z = 1.959963984540054
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # Rounding must not leave the share outside: middle + half of 164 hits in 164 trials is 1 - 1e-16.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
