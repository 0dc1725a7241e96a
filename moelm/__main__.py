"""`python -m moelm`, which torchrun needs."""

from moelm.cli.app import main

if __name__ == "__main__":
    main()
