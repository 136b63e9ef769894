"""Variational information bottleneck pruning: gates with noise decide which units go."""
