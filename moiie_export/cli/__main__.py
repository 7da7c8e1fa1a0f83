"""`python -m moiie_export.cli` is `moiie`."""

from moiie_export.cli import main

main()
