"""Wrong answers stand out in the history of a real run."""

import pytest

from tests.blame.mislabelled import found_within, mislabelled_run

pytest.importorskip("easy_vqa", reason="the easy-vqa package has the images; install the extra `test`")


@pytest.mark.slow
@pytest.mark.parametrize("epochs", ["1", "3"])
def test_a_mislabelled_thousandth_of_easy_vqa_stands_among_the_worst(epochs, tmp_path, monkeypatch):
    """37 of 36,630 samples, of answers to the same kind of question. One pass is the hardest: what the first steps saw
    has no other loss than that of a model that knows nothing yet."""
    wrong = mislabelled_run(tmp_path, "--train.epochs", epochs)
    monkeypatch.chdir(tmp_path)
    assert len(wrong) == 37
    assert found_within(tmp_path / "runs" / "quickstart", wrong, 0.02) >= 0.8
