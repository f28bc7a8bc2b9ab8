"""``python -m fastxent``: the command line without its script."""

from fastxent.cli import main

if __name__ == "__main__":  # worker processes import it too
    main(prog_name="fastxent")
