"""``python -m attnlens``: the command line, as torchrun starts it."""

from attnlens.cli import main

if __name__ == "__main__":
    main()
