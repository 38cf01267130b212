"""A rank of `vltrain doctor` whose children find the packages of a folder first."""

import os

from vltrain.programs import doctor


def main(packages: str, *words: str) -> int:
    os.environ["PYTHONPATH"] = packages
    return doctor.main(list(words))
