"""Blocks over calibration batches: activations on disk, staged replays, input statistics."""
