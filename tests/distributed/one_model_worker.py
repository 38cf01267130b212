"""A rank on a GPU of a given name, or on none: do the ranks fit together?"""

import datetime
import os

import torch

from vltrain.distributed.machine import require_one_model
from vltrain.distributed.ranks import join_process_group
from vltrain.errors import exits_cleanly


@exits_cleanly
def main(*names: str) -> None:
    name = names[int(os.environ["RANK"])]
    torch.cuda.is_available = lambda: name != "none"
    torch.cuda.get_device_name = lambda: name
    join_process_group("gloo", datetime.timedelta(seconds=60))
    require_one_model()
    print("they fit", flush=True)
