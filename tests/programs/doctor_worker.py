"""A rank of `vltrain doctor`."""

from vltrain.programs import doctor


def main(*words: str) -> int:
    return doctor.main(list(words))
