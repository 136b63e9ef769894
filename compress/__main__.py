"""``python -m compress``, also under ``accelerate launch -m``."""

from compress.cli.app import main

main()
