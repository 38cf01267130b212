"""The campaign of kills, cut short: see `tests.campaign`."""

import subprocess
import sys

import pytest

from tests.support.processes import ROOT


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path):
    log = tmp_path / "campaign.log"
    command = [sys.executable, "-m", "tests.campaign", "--kills", "25", "--seed", "7", "--log", str(log)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + log.read_text()[-3000:]
    assert log.read_text().splitlines()[-1].startswith("25 kills") and "0 runs lost" in log.read_text().splitlines()[-1]
