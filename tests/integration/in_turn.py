"""Runs several command lines of ``launch.py`` in one process, one after another; '+' stands between them."""

import itertools
import sys

import launch


def main(arguments: list[str]) -> int:
    """Returns the first exit status that is not 0."""
    for separator, group in itertools.groupby(arguments, lambda argument: argument == "+"):
        if not separator and (code := launch.main(["launch.py", *group])):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
