"""`vltrain train`, which signals itself behind a save: python -m tests.programs.stage_worker FOLDER STEP SIGNAL
WORDS..."""

import os
import signal
import sys

from vltrain.programs.train import main
from vltrain.train.trainer import Trainer

folder, step, name, *words = sys.argv[1:]
save = Trainer.save


def save_and_signal(self: Trainer, steps_done: int) -> None:
    save(self, steps_done)
    if self.folder.name == folder and steps_done == int(step):
        os.kill(os.getpid(), getattr(signal, name))


Trainer.save = save_and_signal
sys.exit(main(words))
