"""Methods: one file or folder each, named in the catalogue."""
