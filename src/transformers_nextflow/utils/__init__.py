"""Files, checkpoints and the console: what is around the model."""
