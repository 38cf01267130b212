"""A rank of `vltrain doctor`, whose kernels' process finds the packages of a folder first."""

import os

from vltrain.doctor.kernels import CASES
from vltrain.programs import doctor


def main(packages: str, kernels: str, *words: str) -> int:
    os.environ["PYTHONPATH"] = packages
    doctor.CASES = {name: CASES[name] for name in kernels.split(",")}
    return doctor.main(list(words))
