"""`python -m farcast_cli` is the `farcast` command."""

from farcast_cli.cli import main

if __name__ == "__main__":
    main()
