"""``python -m compress``, also under ``accelerate launch -m``."""

from compress.cli import main

main()
