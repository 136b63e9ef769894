"""Name and version of the package: read here by the build, by reports and by ``--version``."""

# The distribution's name; the one that is imported is `compress`, which in the package index is
# somebody else's.
DISTRIBUTION = "compress-transformers"
VERSION = "0.1.0"
