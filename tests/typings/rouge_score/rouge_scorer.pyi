from rouge_score.tokenizers import DefaultTokenizer

class Score:
    precision: float
    recall: float
    fmeasure: float

class RougeScorer:
    def __init__(self, rouge_types: list[str], *, tokenizer: DefaultTokenizer | None = None) -> None: ...
    def score(self, target: str, prediction: str) -> dict[str, Score]: ...
