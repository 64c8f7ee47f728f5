"""`python -m whalefall` is the `whalefall` command."""

from whalefall.cli import main

if __name__ == "__main__":
    main()
