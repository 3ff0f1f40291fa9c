"""What a minibatch costs against the gradient noise scale B (McCandlish et al. 2018, §2.2 and appendix D)."""

from __future__ import annotations


def images_factor(global_batch: float, noise_scale: float) -> float:
    """Images needed for some progress, relative to those of the smallest minibatches: 1 + kn/B."""
    return 1.0 + global_batch / noise_scale


def steps_factor(global_batch: float, noise_scale: float) -> float:
    """Steps needed for some progress, relative to those of unlimited minibatches: 1 + B/kn."""
    return 1.0 + noise_scale / global_batch
