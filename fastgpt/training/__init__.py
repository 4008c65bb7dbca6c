"""Training runs: configuration, data, optimizers, the training loop, the run directory."""
