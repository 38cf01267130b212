from collections.abc import Sequence

def corpus_bleu(
    list_of_references: Sequence[Sequence[Sequence[str]]],
    hypotheses: Sequence[Sequence[str]],
    weights: Sequence[Sequence[float]],  # several, so that several scores come out
) -> list[float]: ...
