"""`python -m moelm` is the command line, for torchrun."""

from moelm.cli import main

if __name__ == "__main__":
    main()
