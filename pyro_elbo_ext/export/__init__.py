"""A fitted guide as plain arrays: draws, predictions, log-likelihoods, chains of restarts. Knows no ArviZ."""
