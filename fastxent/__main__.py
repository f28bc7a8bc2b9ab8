"""``python -m fastxent``: the command line without its script."""

from fastxent.cli import main

main(prog_name="fastxent")
