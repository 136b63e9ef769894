"""The model between two steps, and checkpoints: written, loaded, proved."""
