"""AdaLoRA over several tasks keeps the same directions at every ZeRO stage, on one rank and on two."""

import pytest
import torch

from tests.support.blip import make_tokenizers, segments_of
from tests.support.tiny import write_packs
from tests.train.test_adalora import DEAD, PRUNINGS, alive, run_scenarios
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import mixed

NUM_SEGMENTS = {"red": 24, "blue": 14}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A mixture of two sets of packs, of two segments each."""
    folder = tmp_path_factory.mktemp("tasks")
    places, sets, taken = make_tokenizers(folder / "tokenizers"), {}, 0
    segments = segments_of("llama", places, sum(NUM_SEGMENTS.values()))
    for name, count in NUM_SEGMENTS.items():
        own, taken = segments[taken : taken + count], taken + count
        packs = write_packs(folder / name / "packed" / "train", [own[at : at + 2] for at in range(0, count, 2)])
        sets[name] = PackedDataset(packs)
    found = mixed(folder, sets, "samples", {"red": 1.0, "blue": 1.0}, "repeat")
    found.write()
    return {"both": found.folder}


@pytest.mark.slow
def test_every_stage_and_number_of_ranks_keeps_the_same_directions(both, tmp_path):
    torch.set_num_threads(1)
    found = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        scenarios = {f"{number}-on-{world_size}": (number, "both", {}) for number in (0, 1, 2, 3)}
        found |= run_scenarios(both, scenarios, world_size, folder)
    result, (masks,) = found["0-on-1"]
    assert {int(name[:3]) for name in masks} == set(PRUNINGS)
    last = [mask for name, mask in masks.items() if name.startswith(f"{PRUNINGS[-1]:03d}/") and name[4:] not in DEAD]
    assert len({int(mask.sum()) for mask in last}) > 1, "layers keep other ranks"
    for name, (other, ranks) in found.items():
        torch.testing.assert_close(other["losses"], result["losses"], rtol=1e-5, atol=0)
        for own in ranks:
            assert own.keys() == masks.keys()
            assert [key for key, mask in alive(masks).items() if not torch.equal(own[key], mask)] == [], name
