"""A stock model on packs that its own processor made, against transformers alone: its own processor, forward and loss,
a sample at a time."""

import pytest
import torch
import torch.nn.functional as F

from tests.data.test_stock_reader import LIMIT, SIZES, picture, processors_own, sample_of
from tests.support.processors import KINDS, config_of, make_processor
from vltrain.config.model.mmt import AdapterConfig
from vltrain.config.model.stock import StockConfig, StockSection
from vltrain.data.loader import batch_of, filler
from vltrain.data.stock.encoder import StockEncoder
from vltrain.data.stock.reader import StockReader
from vltrain.models.build import build_model
from vltrain.models.stock.source import network_class, stock_config


def plain_loss(network, source, sample) -> float:
    """The sum of the answer's losses, by transformers."""
    own = processors_own(source, sample)
    encoder = StockEncoder(source)
    whole = encoder.sample(sample, SIZES.__getitem__)
    answer = torch.from_numpy(whole.input_ids[whole.loss_mask]).long()[None]
    length, more = own["input_ids"].shape[1], answer.shape[1]
    given = {
        name: value
        for name, value in own.items()
        if name not in ("input_ids", "attention_mask", "labels", "num_patches")
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in given:
            fill = 1 if name == "token_type_ids" and network.config.model_type == "paligemma" else 0
            given[name] = F.pad(given[name], (0, more), value=fill)
    ids = torch.cat([own["input_ids"], answer], dim=1)
    if network.config.model_type == "paligemma":  # which makes its prefix mask of what stands in front of the labels
        given["labels"] = F.pad(answer, (length, 0), value=-100)
    with torch.no_grad():
        logits = network(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0]
    return float(F.cross_entropy(logits[length - 1 : -1].float(), answer[0], reduction="sum"))


QUICK = ("qwen3_vl", "smolvlm", "gemma3")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_a_packed_row_has_the_losses_of_transformers_alone(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = make_processor(name, tmp_path / "processor")
    section = StockSection(config=config_of(name), processor=source.processor, attention="sdpa", tune="full")
    adapters = AdapterConfig(vision="none", llm="none")
    model = build_model(StockConfig(stock=section, adapter=adapters), dtype=torch.float32).eval()
    plain = network_class(stock_config(section))._from_config(stock_config(section), attn_implementation="eager").eval()
    state = {key: value for key, value in model.network.state_dict().items()}
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not unexpected and all("lm_head" in one or "rotary" in one for one in missing), (missing, unexpected)
    plain.tie_weights()
    groups = [("wide",), ("tall", "square"), (), ("square",)] if name != "paligemma" else [("wide",), ("tall",)]
    samples = [sample_of(*names, asked=f"what is {number}?") for number, names in enumerate(groups)]
    encoder, reader = StockEncoder(source), StockReader(source, LIMIT)
    segments = [encoder.sample(sample, SIZES.__getitem__) for sample in samples]
    batch = batch_of(segments, {name: picture(name) for name in SIZES}, reader)
    with torch.no_grad():
        found = model(batch).segment_losses
        assert float(model(filler(True, reader)).loss_sum) == 0
    expected = torch.tensor([plain_loss(plain, source, sample) for sample in samples])
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)
