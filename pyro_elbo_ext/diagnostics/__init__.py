"""What a fitted guide is worth: weights, bounds, evidence, gradients and calibration."""
