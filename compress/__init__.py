"""Compress trained transformers: prune, factorise and quantise, then tell the truth about it."""
