"""What drives an SVI: the fit loop, its stopping rules, checkpoints, and data-parallel steps."""
