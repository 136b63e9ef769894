"""What a transformers model is made of: blocks, sites, widths, and how it is streamed."""
