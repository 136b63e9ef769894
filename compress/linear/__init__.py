"""Linear layers: what may stand in their place, and the mathematics of one weight matrix."""
