"""``python -m loraformat``."""

from loraformat.cli import main

main()
