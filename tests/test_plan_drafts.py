"""Drafts in a plan: what they take of a card, how many there are, and where they are left off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ascend.eagle3_config import EMBEDDING
from ascend.errors import UserError
from convert.demo import write_demo
from convert.demo_config import demo_config
from convert.eagle3_init import write_head
from convert.shapes import count, tensor_shapes
from serve.planning import Plan, Wanted, make_plan, parse_cards
from serve.planning.model import model_in, model_of
from serve.planning.page import config_file
from tests.tiny import read_tensors, write_tensors

MTP_CONFIG, _ = demo_config("ling-flash", 0, "bf16", 4.0, {"num_nextn_predict_layers": 1})
MTP = model_of(MTP_CONFIG, "with-mtp")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of the published shape for the full model."""
    path = tmp_path_factory.mktemp("heads")
    write_demo(path / "flash", "ling-flash")
    write_head(path / "head", path / "flash")
    return path / "head"


def plan(cards: str = "8x910B3", **wanted: Any) -> Plan:
    return make_plan(MTP, parse_cards(cards, wanted.get("nodes", 1)), Wanted(**wanted))


def drafting(one: Plan) -> dict[str, Any]:
    setting: dict[str, Any] = one.settings["speculative-config"]
    return setting


def test_an_mtp_layer_takes_its_share_of_a_card() -> None:
    """Weights divided as the model's layers are, what only it has on each card; one more layer of keys and values."""
    fixed: dict[str, Any] = {"max_model_len": 32768, "max_num_seqs": 32, "gpu_memory_utilization": 0.85}
    off, on = plan(**fixed), plan(**fixed, speculative="mtp")
    assert off.memory is not None
    assert on.memory is not None
    shapes = tensor_shapes(MTP_CONFIG)
    layer = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.32.")}
    alone = {name: shape for name, shape in layer.items() if "eh_proj" in name or "norm" in name}
    router = {name: shape for name, shape in layer.items() if ".gate." in name}
    weights, alone_weights, router_weights = (count(one)[0] for one in (layer, alone, router))
    divided = weights - alone_weights - router_weights
    # A little more: of four heads of keys and values each card of eight has one, not half of one.
    expected = divided * 2 / 8 + alone_weights * 2 + router_weights * 4
    assert on.memory.weights - off.memory.weights == pytest.approx(expected, rel=0.01)
    assert on.memory.kv / on.memory.kv_blocks == pytest.approx(off.memory.kv / off.memory.kv_blocks * 33 / 32)
    assert drafting(on) == {"method": "mtp", "num_speculative_tokens": 1}


def test_a_head_takes_its_share_of_a_card(head: Path) -> None:
    fixed: dict[str, Any] = {"max_model_len": 32768, "max_num_seqs": 32, "gpu_memory_utilization": 0.85}
    off, on = plan(**fixed), plan(**fixed, speculative=f"eagle3:{head}", speculative_tokens=3)
    assert off.memory is not None
    assert on.memory is not None
    fc, all_of_it = 3 * 4096 * 4096, 424_689_664
    expected = 2 * ((all_of_it - fc) / 8 + fc)
    assert on.memory.weights - off.memory.weights == pytest.approx(expected, rel=1e-3)
    per_block = 2 * 1 * 128 * 128 * 2  # one of its eight heads a card
    assert on.memory.kv / on.memory.kv_blocks - off.memory.kv / off.memory.kv_blocks == per_block
    assert drafting(on) == {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}


def test_real_files_count_as_they_are(tmp_path: Path) -> None:
    write_demo(tmp_path / "tiny")
    stored = model_in(tmp_path / "tiny")
    tensors = read_tensors(tmp_path / "tiny")
    own = {name: one for name, one in tensors.items() if name.startswith("model.layers.4.")}
    wide = {name: 4 if ".gate." in name else 2 for name in own}
    assert sum(stored.mtp_nbytes("bf16").values()) == sum(one.numel() * wide[name] for name, one in own.items())
    assert sum(model_of(stored.config, "config alone").mtp_nbytes("bf16").values()) == pytest.approx(
        sum(stored.mtp_nbytes("bf16").values()), rel=1e-3
    )
    write_tensors(tmp_path / "tiny", {name: one for name, one in tensors.items() if name not in own})
    (tmp_path / "tiny" / "model.safetensors.index.json").unlink(missing_ok=True)
    without = model_in(tmp_path / "tiny")
    with pytest.raises(UserError, match="has no MTP layer"):
        make_plan(without, parse_cards("cpu"), Wanted(speculative="mtp"))


def test_as_many_drafts_as_pay(head: Path) -> None:
    """With many sequences more than with one; a lone one loses a tenth at most, unless a number was asked for."""
    speculative = f"eagle3:{head}"
    few = drafting(plan(max_num_seqs=1, speculative=speculative))["num_speculative_tokens"]
    many = drafting(plan(max_num_seqs=64, speculative=speculative))["num_speculative_tokens"]
    assert few < many <= 5
    asked = plan(max_num_seqs=64, speculative=speculative, speculative_tokens=7)
    assert drafting(asked)["num_speculative_tokens"] == 7
    assert any("a single sequence is 0." in note for note in asked.warnings)


def test_they_are_left_off_where_they_do_not_pay() -> None:
    """A card that computes slowly for what it reads: nothing is to be had from waiting, so drafts only cost."""
    cards = parse_cards("8x910B3")
    slow = {name: replace(figure, value=figure.value / 50) for name, figure in cards.facts.peak.items()}
    slow_cards = replace(cards, facts=replace(cards.facts, peak=slow))
    wanted = Wanted(speculative="mtp", max_num_seqs=128)
    declined = make_plan(MTP, slow_cards, wanted)
    assert "speculative-config" not in declined.settings
    (note,) = (one for one in declined.warnings if "left off" in one)
    assert "--speculative mtp is left off: with 128 sequences" in note
    assert declined.settings == make_plan(MTP, slow_cards, Wanted(max_num_seqs=128)).settings
    insisted = make_plan(MTP, slow_cards, replace(wanted, speculative_tokens=1))
    assert drafting(insisted)["num_speculative_tokens"] == 1
    assert any("cost more than they gain" in one for one in insisted.warnings)


def test_where_no_figure_is_known_the_plan_says_so() -> None:
    unknown = plan("8xH20-3e", speculative="mtp")
    assert drafting(unknown)["num_speculative_tokens"] == 1
    assert any("whether drafts pay on a H20-3e-141G is unknown" in one for one in unknown.warnings)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"pipeline_parallel_size": 2}, "draft's layers are in the last stage"),
        ({"speculative_tokens": 16}, "16 tokens of a sequence"),
    ],
)
def test_what_no_engine_takes_is_refused(wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(speculative="mtp", **wanted)


def test_layers_take_turns() -> None:
    two = model_of({**MTP_CONFIG, "num_nextn_predict_layers": 2}, "two")
    with pytest.raises(UserError, match="--speculative-tokens 3 with 2 MTP layers"):
        make_plan(two, parse_cards("8x910B3"), Wanted(speculative="mtp", speculative_tokens=3))
    for cards, is_warned in (("8x910B3", True), ("8xH20-96G", False)):
        notes = make_plan(two, parse_cards(cards), Wanted(speculative="mtp", speculative_tokens=2)).warnings
        assert any("the first of 2 MTP layers alone" in note for note in notes) == is_warned


def test_a_head_of_another_model_is_refused(tmp_path: Path, head: Path) -> None:
    write_demo(tmp_path / "tiny")
    with pytest.raises(UserError, match="it was made for another model"):
        make_plan(model_in(tmp_path / "tiny"), parse_cards("cpu"), Wanted(speculative=f"eagle3:{head}"))


def test_a_plan_that_is_written_down_is_the_same_again(head: Path) -> None:
    for speculative in ("mtp", f"eagle3:{head}", "ngram"):
        first = plan(speculative=speculative, max_num_seqs=32)
        content = yaml.safe_load(config_file(first))
        again = plan(
            max_num_seqs=32, speculative=content["speculative"], speculative_tokens=content["speculative-tokens"]
        )
        assert again.settings == first.settings


def test_a_head_that_no_ascend_card_takes_is_refused(tmp_path: Path) -> None:
    write_demo(tmp_path / "tiny")
    write_head(tmp_path / "head", tmp_path / "tiny")
    model, wanted = model_in(tmp_path / "tiny"), Wanted(speculative=f"eagle3:{tmp_path / 'head'}")
    with pytest.raises(UserError, match="with a head_dim of 32: the attention of an Ascend card takes 128 or 192"):
        make_plan(model, parse_cards("1x910B3"), wanted)
    assert drafting(make_plan(model, parse_cards("1xH20-96G"), wanted))["method"] == "eagle3"


def test_an_embedding_of_its_own_is_counted(tmp_path: Path) -> None:
    import torch

    write_demo(tmp_path / "tiny")
    write_head(tmp_path / "head", tmp_path / "tiny")
    from serve.planning.drafter import drafters

    model = model_in(tmp_path / "tiny")
    wanted = Wanted(speculative=f"eagle3:{tmp_path / 'head'}")
    shared = drafters(wanted, model, "bf16")[0]
    tensors = read_tensors(tmp_path / "head")
    write_tensors(tmp_path / "head", tensors | {EMBEDDING: torch.zeros(2048, 128)})
    assert drafters(wanted, model, "bf16")[0].divided - shared.divided == 2048 * 128 * 2
