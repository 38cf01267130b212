"""Scorer `caption`: CIDEr-D and BLEU of captions against several references each, as image captioning reports them.

CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726: Eq. 1-3, with CIDEr-D's clipping and penalty on length)
is written here, after the paper: the one well-known library for it has seen no release since 2020 and brings 100 MB of
Java programs. BLEU-1 to BLEU-4 are NLTK's corpus BLEU. Words come of NLTK's Penn Treebank tokenizer, lower-cased,
without punctuation; the official evaluation uses Stanford's (in Java), which differs in rare cases (abbreviations,
brackets).

A caption's degree is its CIDEr-D (0 to 10; the mean over all images is the corpus's CIDEr). How rare an n-gram is, is
told by the references of the evaluated images: figures on a part of a split are not comparable with those on the whole
of it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from vltrain.errors import InputError
from vltrain.evaluate.scorers.scoring import Judgement, Question, Scorer, Verdict, fact

LONGEST_NGRAM = 4
SIGMA = 6.0  # of the penalty on differences in length
SCALE = 10.0
PUNCTUATION = {"``", "''", "`", "'", '"', "(", ")", "[", "]", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_LETTER = re.compile(r"\w")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
Words = list[str]
NGram = tuple[str, ...]


@cache
def _split() -> Callable[[str], Words]:
    try:
        from nltk.tokenize import TreebankWordTokenizer  # takes a second that other scorers need not spend
    except ImportError:
        raise InputError("eval.scorer caption needs the package nltk; pip install 'vltrain[caption]'") from None
    return TreebankWordTokenizer().tokenize


def words_of(text: str) -> Words:
    """A caption's words. Raises InputError if NLTK is not installed."""
    split = _split()
    pieces = [word.lower() for sentence in _SENTENCE_END.split(text.strip()) for word in split(sentence)]
    return [word for word in pieces if word not in PUNCTUATION]


def _ngrams(words: Words) -> list[Counter[NGram]]:
    """Counts of the n-grams of each length, 1 to 4."""
    lengths = range(1, LONGEST_NGRAM + 1)
    return [Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1)) for n in lengths]


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10.

    Args:
        captions: words of a caption per image.
        references: per image the words of one or more.

    Raises: InputError for fewer than two images, where every n-gram is as rare as any other and all scores would be 0.
    """
    if len(captions) < 2:
        raise InputError(
            f"CIDEr weighs words by how many images have them: found {len(captions)} image(s), expected 2 or more"
        )
    counted = [[_ngrams(words) for words in of_image] for of_image in references]
    num_images_with: Counter[NGram] = Counter()
    for of_image in counted:
        num_images_with.update({ngram for lengths in of_image for counts in lengths for ngram in counts})

    def weigh(counts: Counter[NGram]) -> tuple[dict[NGram, float], float]:
        """The tf-idf vector of Eq. 1 (up to a factor that the cosine removes) and its norm."""
        vector = {
            ngram: count * math.log(len(captions) / max(1, num_images_with[ngram])) for ngram, count in counts.items()
        }
        return vector, math.sqrt(sum(weight * weight for weight in vector.values()))

    def likeness(caption: list[tuple[dict[NGram, float], float]], reference: list[Counter[NGram]]) -> float:
        """The mean over n of the clipped cosines."""
        total = 0.0
        for (vector, norm), counts in zip(caption, reference, strict=True):
            of_reference, reference_norm = weigh(counts)
            common = vector.keys() & of_reference.keys()
            product = math.fsum(min(vector[ngram], of_reference[ngram]) * of_reference[ngram] for ngram in common)
            total += product / (norm * reference_norm) if norm and reference_norm else 0.0
        return total / LONGEST_NGRAM

    scores: list[float] = []
    for words, of_image, given in zip(captions, counted, references, strict=True):
        caption = [weigh(counts) for counts in _ngrams(words)]
        penalties = [math.exp(-((len(words) - len(reference)) ** 2) / (2 * SIGMA**2)) for reference in given]
        alike = [likeness(caption, reference) for reference in of_image]
        scores.append(SCALE * sum(map(math.prod, zip(penalties, alike))) / len(given))
    return scores


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002), unsmoothed, against the reference nearest in length."""
    from nltk.translate.bleu_score import corpus_bleu

    weights = [(1 / n,) * n for n in range(1, LONGEST_NGRAM + 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no n-gram of some length matches is what the figure says
        return [float(score) for score in corpus_bleu(references, captions, weights=weights)]


def _captions_of(question: Question) -> list[str]:
    captions = fact(question, "captions", list, "the reference captions")
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise InputError(f"{question.where}: captions: found {captions!r:.80}, expected texts that are not empty")
    return captions


def needs(question: Question) -> None:
    """Reference captions with words in them. Raises InputError naming file, id and key."""
    for caption in _captions_of(question):
        if not _LETTER.search(caption):
            raise InputError(f"{question.where}: captions: found {caption!r:.80}, expected a caption with a word in it")


def judge_all(answered: Sequence[tuple[str, Question]]) -> Judgement:
    """An empty caption is one that failed. Raises InputError for metadata without a list of `captions`, and as
    `cider_d` does."""
    references = [[words_of(caption) for caption in _captions_of(question)] for _, question in answered]
    predicted = [words_of(prediction) for prediction, _ in answered]
    degrees = cider_d(predicted, references)
    verdicts = [
        Verdict(degree, not prediction.strip(), question.reference.strip())
        for degree, (prediction, question) in zip(degrees, answered, strict=True)
    ]
    figures = {f"BLEU-{n}": score for n, score in enumerate(bleu(predicted, references), start=1)}
    return Judgement(verdicts=verdicts, figures=figures)


SCORER = Scorer(
    judge_all=judge_all, columns=lambda question: (), measure="CIDEr", needs=needs, require_installed=_split, fewest=2
)
