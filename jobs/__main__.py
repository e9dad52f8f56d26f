"""`python -m jobs` is `csc`, also where it is not installed."""

from jobs.cli import main

if __name__ == "__main__":
    main()
