"""Text for the tiny LLaMA: small scenes in words, questions about them, short answers.

A scene holds one or two things, each with a kind (dog, circle, cup), a colour and at times a size and a side. A sample
is what is said of the scene, a question in one of many phrasings, and its answer, in the words
`Image: ... Question: ...
Answer:
...` that the model is later tuned with. One sample in ten has no scene and asks what things are. Trade-off:
no language beyond such questions. Nothing is read from any data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

KINDS = {
    "shape": ("circle", "rectangle", "triangle", "square", "ellipse", "star", "cross", "ring", "diamond", "heart"),
    "animal": ("dog", "cat", "bird", "horse", "cow", "fish", "mouse", "bear"),
    "fruit": ("apple", "pear", "plum", "lemon", "cherry", "banana"),
    "vehicle": ("car", "bus", "bike", "truck", "train", "boat"),
    "toy": ("ball", "doll", "kite", "puzzle", "robot"),
    "tool": ("hammer", "saw", "knife", "brush", "shovel"),
}
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "white", "brown", "teal", "orange", "purple", "pink")
SIZES = ("small", "large", "tiny", "huge")
SIDES = ("left", "right", "top", "bottom", "middle")
PICTURES = ("image", "picture", "photo", "scene", "drawing")
Option = TypeVar("Option")
CHECKLISTS = 0.4  # share of the lessons with a scene that are checklists
CATEGORY = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}


Option = TypeVar("Option")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing of a scene; `size` and `side` may be empty."""

    noun: str
    colour: str
    size: str
    side: str

    @property
    def kind(self) -> str:
        return CATEGORY[self.noun]

    @property
    def words(self) -> list[str]:
        return [word for word in (self.size, self.colour, self.noun, self.side) if word]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One sample: `scene` is what stands in the image's place; None: no image."""

    scene: str | None
    question: str
    answer: str


class Writer:
    """Writes lessons from a random stream; the same seed writes the same text.

    `variety` in [0, 1]: at 0 there are few words, a scene is one thing with a colour, and questions are short.
    Comparing a question's word with a scene's is learned much sooner from few words.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.variety = 1.0

    def lesson(self) -> Lesson:
        if self._chance(0.1):
            return self._knowledge()
        things = self._things()
        if self._rng.random() < CHECKLISTS:
            return self._checklist(things)
        ask = self._pick(self._askers())
        question, answer = ask(things)
        if self._chance(0.25):
            question = question[0].upper() + question[1:]
        return Lesson(scene=self._describe(things), question=question, answer=answer)

    def _askers(self) -> list[Callable[[list[Thing]], tuple[str, str]]]:
        """Yes-or-no questions, the hardest, come more often than all others together."""
        return [self._colour, self._colour, self._name, self._name, self._attribute, *[self._presence] * 6]

    def _chance(self, share: float) -> bool:
        """True so often at full variety, less often before."""
        return self._rng.random() < share * self.variety

    def _pick(self, options: Sequence[Option]) -> Option:
        return options[int(self._rng.integers(len(options)))]

    def _known(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """The first few of `words`, all of them at full variety."""
        return words[: max(3, round(len(words) * self.variety))]

    def _thing(self) -> Thing:
        noun = self._pick(self._known(KINDS[self._pick((*self._known(tuple(KINDS)), "shape", "shape"))]))
        size = self._pick(SIZES) if self._chance(0.4) else ""
        side = self._pick(SIDES) if self._chance(0.4) else ""
        return Thing(noun=noun, colour=self._pick(self._known(COLOURS)), size=size, side=side)

    def _things(self) -> list[Thing]:
        """One thing, or two that differ in kind and colour, so that each question has one answer."""
        first = self._thing()
        while self._chance(0.2):
            second = self._thing()
            if second.kind != first.kind and second.colour != first.colour:
                return [first, second]
        return [first]

    def _describe(self, things: list[Thing]) -> str:
        """Words in no order, or a phrase; the colour, noun and kind are always told."""
        parts: list[str] = []
        for thing in things:
            words = thing.words
            style = self._rng.random()
            if style < 0.5:
                order: list[int] = self._rng.permutation(len(words)).tolist()
                words = [words[place] for place in order]
                words += [words[int(self._rng.integers(len(words)))] for _ in range(int(self._rng.integers(3)))]
                parts.append(" ".join(words))
            elif style < 0.75:
                side = f" on the {thing.side}" if thing.side else ""
                parts.append(f"a {' '.join(w for w in words if w != thing.side)}{side}")
            else:
                parts.append(", ".join(words))
        return " and ".join(parts)

    def _reference(self, thing: Thing, *, colour: bool, noun: bool) -> str:
        """A way to name `thing` without giving its colour or noun away."""
        size = f"{thing.size} " if thing.size and self._chance(0.3) else ""
        name = thing.noun if noun and self._rng.random() < 0.5 else thing.kind
        return f"{size}{f'{thing.colour} ' if colour else ''}{name}"

    def _where(self, share: float = 0.4) -> str:
        """` in the picture` or nothing."""
        return f" in the {self._pick(PICTURES)}" if self._chance(share) else ""

    def _colour(self, things: list[Thing]) -> tuple[str, str]:
        thing = self._pick(things)
        name, where = self._reference(thing, colour=False, noun=True), self._where(0.2)
        forms = (
            f"what color is the {name}{where}?",
            f"what is the color of the {name}{where}?",
            f"which color does the {name} have{where}?",
            f"name the color of the {name}{where}.",
            f"the {name}{where} is of what color?",
            f"the color of the {name}{where} is",
        )
        return self._pick(forms), thing.colour

    def _name(self, things: list[Thing]) -> tuple[str, str]:
        thing = self._pick(things)
        show, seen = self._pick(("contain", "show", "have")), self._pick(("present", "visible", "shown", "there"))
        picture, which = self._pick(PICTURES), self._pick(("what", "which"))
        forms = (
            f"{which} {thing.kind} is in the {picture}?",
            f"{which} {thing.kind} does the {picture} {show}?",
            f"{which} {thing.kind} is {seen}?",
            f"{which} {thing.kind} can you see{self._where()}?",
            f"what is the {thing.colour} {thing.kind}{self._where(0.2)}?",
            f"what is the {thing.colour} {self._pick(('thing', 'object'))}{self._where(0.2)}?",
            f"name the {thing.colour} {thing.kind}{self._where(0.2)}.",
            f"what kind of {thing.kind} is {self._pick(('this', 'it', thing.colour))}?",
        )
        return self._pick(forms), thing.noun

    def _attribute(self, things: list[Thing]) -> tuple[str, str]:
        """Size and side, where they are told; else the category."""
        thing = self._pick(things)
        name = self._reference(thing, colour=self._rng.random() < 0.5, noun=True)
        if thing.size and self._rng.random() < 0.5:
            return self._pick((f"how big is the {name}?", f"what size is the {name}?")), thing.size
        if thing.side:
            return self._pick((f"where is the {name}?", f"on which side is the {name}?")), thing.side
        return f"what is the {thing.noun}, {' or '.join(self._options(thing.kind, tuple(KINDS)))}?", thing.kind

    def _options(self, right: str, choices: tuple[str, ...]) -> list[str]:
        """The right one and another, in random order."""
        other = self._pick([choice for choice in choices if choice != right])
        return [right, other] if self._rng.random() < 0.5 else [other, right]

    def _claim(self, things: list[Thing], true: bool) -> str:
        """A noun phrase that fits one of `things`, or none of them."""
        thing = self._pick(things)
        form = int(self._rng.integers(5)) if self._chance(1) else self._pick((1, 3))
        if not true:
            nouns = [t.noun for t in things]
            colours, kinds = [t.colour for t in things], [t.kind for t in things]
            colour = self._pick([c for c in self._known(COLOURS) if c not in colours])
            kind = thing.kind if self._rng.random() < 0.7 else self._pick(self._known(tuple(KINDS)))
            noun = self._pick([n for n in self._known(KINDS[kind]) if n not in nouns])
            kind = self._pick([k for k in self._known(tuple(KINDS)) if k not in kinds])
            if form == 0:  # one half of the claim may be true
                colour, noun = self._pick(((thing.colour, noun), (colour, thing.noun)))
            return (
                f"{colour} {noun}",
                noun,
                f"{colour} {thing.kind}",
                f"{colour} {self._pick(('thing', 'object'))}",
                kind,
            )[form]
        generic = self._pick(("thing", "object"))
        return (
            f"{thing.colour} {thing.noun}",
            thing.noun,
            f"{thing.colour} {thing.kind}",
            f"{thing.colour} {generic}",
            thing.kind,
        )[form]

    def _presence(self, things: list[Thing]) -> tuple[str, str]:
        true, negated = self._rng.random() < 0.5, self._chance(0.45)
        name = self._claim(things, true)
        article = "an" if name[0] in "aeo" else "a"
        seen, picture = self._pick(("present", "visible", "shown", "there")), self._pick(PICTURES)
        show, where = self._pick(("contain", "show", "have")), self._where()
        if negated:
            forms = (
                f"is there not {article} {name}{where}?",
                f"is there no {name}{where}?",
                f"is no {name} {seen}{where}?",
                f"is {article} {name} not {seen}{where}?",
                f"does the {picture} not {show} {article} {name}?",
                f"is the {picture} without {article} {name}?",
            )
        else:
            forms = (
                f"is there {article} {name}{where}?",
                f"is {article} {name} {seen}{where}?",
                f"does the {picture} {show} {article} {name}?",
                f"can you see {article} {name}{where}?",
                f"do you see {article} {name}{where}?",
                f"is this {article} {name}?",
            )
        return self._pick(forms), "yes" if true != negated else "no"

    def _checklist(self, things: list[Thing]) -> Lesson:
        """Many short comparisons of a word with the scene: what teaches yes and no several times sooner than whole
        questions do."""
        there = [word for thing in things for word in (thing.noun, thing.colour)]
        kinds = self._known(tuple(KINDS))
        others = [word for kind in kinds for word in self._known(KINDS[kind]) if word not in there]
        others += [word for word in self._known(COLOURS) if word not in there]
        items: list[str] = []
        for _ in range(int(self._rng.integers(3, 9))):
            true = self._rng.random() < 0.5
            items.append(f"{self._pick(there if true else others)} {'yes' if true else 'no'}")
        question = self._pick(("which of these are there?", "what is present?", "check the list."))
        return Lesson(scene=self._describe(things), question=question, answer=" ".join(items))

    def _knowledge(self) -> Lesson:
        """A question that needs no image."""
        noun = self._pick(tuple(CATEGORY))
        kind = CATEGORY[noun]
        other = self._pick([k for k in KINDS if k != kind])
        article, artother = ("an" if word[0] in "aeo" else "a" for word in (noun, other))
        truth = "an" if kind[0] in "aeo" else "a"
        question, answer = self._pick(
            (
                (f"what is {article} {noun}?", kind),
                (f"is {article} {noun} {truth} {kind}?", "yes"),
                (f"is {article} {noun} {artother} {other}?", "no"),
                (f"what is {article} {noun}, {' or '.join(self._options(kind, tuple(KINDS)))}?", kind),
                (f"is {self._pick(COLOURS)} a color?", "yes"),
                (f"is {noun} a color?", "no" if noun not in COLOURS else "yes"),
            )
        )
        return Lesson(scene=None, question=question, answer=answer)
