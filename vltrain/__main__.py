"""`python -m vltrain COMMAND ...`: what the console script `vltrain` does."""

if __name__ == "__main__":  # processes that decode images load this file too, and need none of that
    from vltrain.cli import main

    main()
