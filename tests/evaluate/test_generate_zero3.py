"""Generation between training steps under ZeRO-3, where every forward is a collective, on two real ranks."""

from pathlib import Path

from tests.support.processes import on_ranks


def test_two_ranks_with_unequal_shares_answer_right_and_training_does_not_notice() -> None:
    for done in on_ranks(str(Path(__file__).with_name("zero3_worker.py"))):
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == "fine"
