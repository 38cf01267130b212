"""Cards for the loggers: what they must show, in pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFont

from vltrain.evaluate.gallery import FONT_SIZE, MAX_LINES, WIDTH, draw_card, wrap
from vltrain.evaluate.scorers.scoring import Answer

FONT = ImageFont.load_default(FONT_SIZE)


def answer(correct: bool = True, prompt: str = "<image>\nWhich shape?", prediction: str = "circle") -> Answer:
    return Answer(id="1", prompt=prompt, prediction=prediction, answer="circle", correct=correct, failed=False)


def has_colour(card: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(card) == colour).all(axis=-1).any())


def test_a_card_shows_the_image_enlarged_and_the_prediction_in_the_verdicts_colour():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = (10, 200, 30)
    right, wrong = (draw_card(answer(correct), [Image.fromarray(pixels)]) for correct in (True, False))
    shown = (np.asarray(right) == (10, 200, 30)).all(axis=-1)
    rows, columns = np.nonzero(shown)
    assert shown.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a sharp rectangle, no blur
    assert np.ptp(rows) + 1 >= 200 and np.ptp(columns) + 1 >= 100
    green, red = (24, 128, 56), (197, 34, 31)
    assert has_colour(right, green) and not has_colour(right, red)
    assert has_colour(wrong, red) and not has_colour(wrong, green)


def test_several_images_stand_side_by_side_and_none_leaves_no_room():
    two = draw_card(answer(), [Image.new("RGB", (30, 30), "#ff00ff"), Image.new("RGB", (900, 20), "#00ffff")])
    magenta, cyan = (
        (np.asarray(two) == colour).all(axis=-1).any(axis=0).nonzero()[0] for colour in ((255, 0, 255), (0, 255, 255))
    )
    assert magenta.max() < cyan.min() and cyan.max() < WIDTH
    assert draw_card(answer(), []).height < two.height / 2


def test_lines_fit_and_lose_nothing_up_to_a_bound():
    text = "one two three " * 8 + "\n" + "x" * 200
    lines = wrap(text, FONT, 200)
    assert all(FONT.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert len(wrap("word " * 1000, FONT, 200)) == MAX_LINES


def test_odd_texts_do_not_matter():
    for text in ("", "\n\n", "你好 🙂 é", "a\tb", "\x00"):
        card = draw_card(answer(prompt=text, prediction=text), [])
        assert card.width == WIDTH and card.mode == "RGB"
