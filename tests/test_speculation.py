"""Speculative decoding: the tokens of plain greedy decoding, whatever is drafted; what is drafted; how much is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ascend
from ascend import BailingMoeV2ForCausalLM
from ascend.draft_length import StepCosts, choose_drafts, measure_costs
from ascend.eagle3 import random_head
from ascend.generation import Decoder
from ascend.roofline import tokens_per_step
from ascend.speculation import Acceptance, MTPDrafter, SpeculativeDecoder
from tests.tiny import checkpoint, user_error

NEW = 11


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, BailingMoeV2ForCausalLM]:
    """By number of MTP layers."""
    folder = tmp_path_factory.mktemp("speculation")
    return {n: ascend.load_model(checkpoint(folder / str(n), num_nextn_predict_layers=n)) for n in (0, 1, 2)}


def prompts(rows: int, length: int, seed: int, padding: int = 0) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(0, 280, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return ids, mask if padding else None


class Oracle(MTPDrafter):
    """Drafts what ``answer_BN`` goes on with, wrong where ``wrong`` says so; notes what the MTP layers would draft."""

    def __init__(self, model: BailingMoeV2ForCausalLM, answer_BN: Tensor, wrong: Tensor) -> None:
        super().__init__(model)
        self.answer_BN, self.wrong, self.own = answer_BN, wrong, list[Tensor]()

    def choose(self, hidden_BH: Tensor) -> Tensor:
        decoder = self.decoder
        if len(self.own) == decoder.drafts:
            self.own.clear()
        self.own.append(super().choose(hidden_BH))
        column_B = (decoder.answer.count_B + len(self.own) - 1).clamp(max=self.answer_BN.shape[1] - 1)
        true_B = self.answer_BN[torch.arange(len(column_B)), column_B]
        return torch.where(self.wrong[torch.arange(len(column_B)), column_B], (true_B + 1) % 300, true_B)

    def decoder_of(self, ids: Tensor, mask: Tensor | None, drafts: int, **options: Any) -> SpeculativeDecoder:
        self.decoder = SpeculativeDecoder(self.model, ids, mask, NEW, drafts=drafts, drafter=self, **options)
        return self.decoder


@pytest.mark.parametrize("source", "12eo")
@pytest.mark.parametrize("capture", [False, True])
def test_drafts_change_nothing(capture: bool, source: str, models: dict[int, BailingMoeV2ForCausalLM]) -> None:
    same_as_plain(models, 3, 5, 3, 2, source, capture, 0)


@pytest.mark.slow
@given(
    st.integers(1, 4), st.integers(2, 9), st.integers(1, 6), st.integers(0, 3), st.sampled_from("12eo"), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_the_answer_is_that_of_plain_decoding(
    models: dict[int, BailingMoeV2ForCausalLM],
    rows: int,
    length: int,
    drafts: int,
    padding: int,
    source: str,
    capture: bool,
    seed: int,
) -> None:
    same_as_plain(models, rows, length, drafts, padding, source, capture, seed)


def same_as_plain(
    models: dict[int, BailingMoeV2ForCausalLM],
    rows: int,
    length: int,
    drafts: int,
    padding: int,
    source: str,
    capture: bool,
    seed: int,
) -> None:
    """Hold an answer with drafts of this source against one without: 1 or 2 MTP layers, EAGLE3, or the oracle."""
    ids, mask = prompts(rows, length, seed, min(padding, length - 1))
    model = models[2 if source == "2" else 1]
    plain = ascend.generate(model, ids, NEW, attention_mask=mask)
    if source == "o":
        wrong = torch.rand(rows, NEW, generator=torch.Generator().manual_seed(seed)) < 0.3
        made = Oracle(model, plain[:, length:], wrong).decoder_of(ids, mask, drafts).generate()
        assert torch.equal(made, plain[:, length:])
        return
    head = random_head(model) if source == "e" else None
    how: dict[str, Any] = {"attention_mask": mask, "drafts": drafts, "draft_head": head, "capture": capture}
    assert torch.equal(ascend.generate(model, ids, NEW, **how), plain)


@torch.inference_mode()
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("padding", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_every_length_is_kept_and_the_mtp_layers_see_the_true_past(
    layers: int, padding: int, models: dict[int, BailingMoeV2ForCausalLM]
) -> None:
    """What they draft after any acceptance is what they say of the whole true sequence at once."""
    model, drafts, rows = models[layers], 3, 6
    ids, mask = prompts(rows, 6, 1, padding)
    true = ascend.generate(model, ids, NEW, attention_mask=mask)
    wrong = torch.rand(rows, NEW, generator=torch.Generator().manual_seed(3)) < 0.4
    oracle = Oracle(model, true[:, 6:], wrong)
    decoder = oracle.decoder_of(ids, mask, drafts)
    decoder.prefill()
    kept: set[int] = set()
    while decoder.answer.left():
        before = decoder.answer.count_B.clone()
        for row in range(rows):
            have = 6 + int(before[row])
            if have >= 6 + NEW - 1:
                continue
            sequence = torch.cat([true[row, :have], decoder.draft_BK[row]])[None]
            said = model.mtp_logits(sequence, None if mask is None else mask_of(mask[row], sequence))
            for n in range(layers):
                assert oracle.own[n][row] == said[n][0, have - 2].argmax()
        decoder.run(1)
        expected = [
            min(next((j for j in range(drafts) if wrong[row, min(int(count) + j, NEW - 1)]), drafts) + 1, NEW - count)
            for row, count in enumerate(before.tolist())
        ]
        assert (decoder.answer.count_B - before).tolist() == expected
        kept |= set(expected)
        assert torch.equal(decoder.cache.written_B, 6 + decoder.answer.count_B - 1)
    assert kept == set(range(drafts + 2))  # a row that is over keeps 0
    assert torch.equal(decoder.answer.tokens(NEW), true[:, 6:])


def mask_of(prompt_T: Tensor, sequence: Tensor) -> Tensor:
    mask = torch.ones_like(sequence)
    mask[0, : len(prompt_T)] = prompt_T
    return mask


@pytest.mark.parametrize("capture", [False, True])
def test_stop_tokens_end_rows_within_a_step(capture: bool, models: dict[int, BailingMoeV2ForCausalLM]) -> None:
    model, (ids, _) = models[1], prompts(3, 5, 4)
    free = ascend.generate(model, ids, NEW)[:, 5:]
    never = torch.zeros(3, NEW, dtype=torch.bool)
    for stops in ([int(free[0, 3])], [int(free[0, 2]), int(free[1, 5]), int(free[2, 6])], [int(free[1, 0])]):
        expected = ascend.generate(model, ids, NEW, stop_token_ids=stops)[:, 5:]
        decoder = Oracle(model, free, never).decoder_of(ids, None, 5, stop_token_ids=stops)
        seen: list[Tensor] = []
        assert torch.equal(decoder.generate(seen.append), expected)
        assert torch.equal(torch.stack(seen, 1), expected)
        assert torch.equal(
            ascend.generate(model, ids, NEW, stop_token_ids=stops, drafts=2, capture=capture)[:, 5:], expected
        )


def test_tokens_come_in_order_and_no_more_than_asked_for(models: dict[int, BailingMoeV2ForCausalLM]) -> None:
    model, (ids, _) = models[1], prompts(3, 5, 4)
    for new in (0, 1, 2, 9):
        seen: list[Tensor] = []
        out = ascend.generate(model, ids, new, drafts=4, on_token=seen.append)
        assert torch.equal(out, ascend.generate(model, ids, new))
        assert len(seen) == new
        assert all(torch.equal(token_B, out[:, 5 + i]) for i, token_B in enumerate(seen))


def test_a_decoder_takes_other_prompts(models: dict[int, BailingMoeV2ForCausalLM]) -> None:
    ids, _ = prompts(3, 7, 0)
    decoder = SpeculativeDecoder(models[2], ids, None, NEW, True, drafts=3)
    for rows, length, padding in ((3, 7, 0), (4, 5, 2), (1, 3, 0)):
        ids, mask = prompts(rows, length, length, padding)
        decoder.restart(ids, mask)
        expected = ascend.generate(models[2], ids, NEW, attention_mask=mask)[:, length:]
        with torch.inference_mode():
            assert torch.equal(decoder.generate(), expected)


@torch.inference_mode()
@pytest.mark.parametrize("forced", [1.0, 2.84, 4.0])
def test_a_forced_acceptance_has_the_mean_asked_for(forced: float, models: dict[int, BailingMoeV2ForCausalLM]) -> None:
    state, draws = torch.tensor([7]), 100_000
    acceptance = Acceptance(forced, seed=2)
    kept = acceptance.of(torch.zeros(draws, 3), torch.ones(draws, 4), state)
    part = forced % 1
    assert abs(kept.double().mean() - forced) <= 4 * (part * (1 - part) / draws) ** 0.5
    assert set(kept.tolist()) == {int(forced), -int(-forced // 1)}
    ids, _ = prompts(4, 5, 0)

    def counts(seed: int) -> list[list[int]]:
        how: dict[str, Any] = {"drafts": 3, "acceptance": Acceptance(forced, seed)}
        decoder = SpeculativeDecoder(models[1], ids, None, 30, True, **how)
        decoder.prefill()
        made = []
        for _ in range(4):
            decoder.run(1)
            made.append(decoder.answer.count_B.tolist())
        return made

    once = counts(1)
    assert once == counts(1)
    assert (once != counts(2)) == bool(part)
    assert once[-1] == [17] * 4 if forced == 4 else max(once[-1]) <= 1 + 4 * -int(-forced // 1)


def test_tokens_per_step_of_what_is_accepted() -> None:
    assert tokens_per_step(0, [0.5]) == 1
    assert tokens_per_step(3, [0.5]) == 1.875
    assert tokens_per_step(3, [1.0, 0.5, 0.0]) == 2.5
    assert "probabilities from 0 to 1" in user_error(tokens_per_step, 1, [1.5])
    assert "probabilities from 0 to 1" in user_error(tokens_per_step, 1, [])
    typical = [tokens_per_step(k, (0.773,)) for k in (3, 5, 7)]
    assert typical == pytest.approx([2.84, 3.44, 3.79], rel=0.02)  # SpecBundle's means


@given(
    st.floats(0.1, 10), st.dictionaries(st.integers(1, 9), st.floats(0.1, 20), min_size=1), st.floats(0, 1),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
)  # fmt: skip
@settings(deadline=None)
def test_the_draft_length_chosen_is_the_fastest(
    plain: float, verify: dict[int, float], draft: float, acceptance: list[float]
) -> None:
    costs = StepCosts(plain, verify, draft)
    best = choose_drafts(costs, acceptance)
    speed = {k: tokens_per_step(k, acceptance) / costs.seconds(k) for k in (0, *verify)}
    assert speed[best] == max(speed.values())


def test_no_drafts_where_none_pay() -> None:
    # The limits of an H200 in FP8 at batch 2, and at 64, in plain steps: see `ascend.roofline.speculation`.
    assert choose_drafts(StepCosts(1.0, {3: 3.0, 7: 5.2}, 0.0)) == 0
    assert choose_drafts(StepCosts(1.0, {3: 1.17, 7: 1.25}, 0.0)) == 7
    assert choose_drafts(StepCosts(1.0, {1: 1.0}, 0.01), [0.0]) == 0


@pytest.mark.parametrize("capture", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_costs_are_measured_and_auto_gives_the_same_answer(
    capture: bool, models: dict[int, BailingMoeV2ForCausalLM]
) -> None:
    ids, mask = prompts(3, 5, 0, 2)
    costs = measure_costs(models[1], ids, mask, capture, MTPDrafter(models[1]), candidates=(1, 3))
    assert set(costs.verify) == {1, 3}
    assert min(costs.plain, costs.draft, *costs.verify.values()) > 0
    plain = ascend.generate(models[1], ids, 5, attention_mask=mask)
    assert torch.equal(ascend.generate(models[1], ids, 5, attention_mask=mask, drafts="auto", capture=capture), plain)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"drafts": -1}, "drafts is -1, it must be 0 to 15 or 'auto'"),
    "a word": ({"drafts": "many"}, "drafts is 'many', it must be 0 to 15 or 'auto'"),
    "too many": ({"drafts": 16}, "drafts is 16, a speculative step takes 1 to 15"),
    "sampled": (
        {"drafts": 2, "temperature": 0.5},
        "drafts go with greedy decoding alone, temperature is 0.5; drop one",
    ),
    "auto, sampled": (
        {"drafts": "auto", "temperature": 0.5},
        "drafts go with greedy decoding alone, temperature is 0.5; drop one",
    ),
    "a path": (
        {"drafts": 2, "draft_head": "/models/head"},
        "draft_head is a str, expected what `ascend.eagle3.load_eagle3` returns",
    ),
    "a head for nothing": (
        {"draft_head": "/models/head"},
        "a draft_head drafts nothing with drafts=0; give drafts, a number or 'auto'",
    ),
    "kv_dtype": ({"kv_dtype": "fp9"}, "kv_dtype is 'fp9', it must be fp8 (did you mean 'fp8'?)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_get_one_line(what: str, models: dict[int, BailingMoeV2ForCausalLM]) -> None:
    arguments, line = BAD[what]
    assert user_error(ascend.generate, models[1], prompts(2, 5, 0)[0], 4, **arguments) == line


def test_what_cannot_be_drafted_is_refused(models: dict[int, BailingMoeV2ForCausalLM]) -> None:
    ids, _ = prompts(2, 1, 0)
    line = "this model has no MTP layer to draft with: give a draft_head, or drafts=0"
    assert user_error(ascend.generate, models[0], ids, 4, drafts=1) == line
    assert user_error(ascend.generate, models[0], ids, 4, drafts="auto") == line
    line = "2 draft layers need prompts of 2 tokens or more; pad on the left"
    assert user_error(ascend.generate, models[2], ids, 4, drafts=2) == line
    assert torch.equal(ascend.generate(models[2], ids, 4, drafts=1), ascend.generate(models[2], ids, 4))
    for forced in (0.5, 3.5):
        said = user_error(SpeculativeDecoder, models[1], ids, None, 4, drafts=2, acceptance=Acceptance(forced))
        assert said == f"acceptance is {forced}, with 2 drafts a step keeps 1 to 3 tokens; give that"
    decoder = SpeculativeDecoder(models[1], ids, None, 4, drafts=2)
    assert "a speculative decoder takes no tokens" in user_error(decoder.step, ids[:, 0])
    assert "do not fit a decoder made for [2, 1]" in user_error(decoder.restart, prompts(2, 2, 0)[0])
    assert "do not fit a decoder made for [2, 1]" in user_error(Decoder(models[1], ids, None, 4).restart, ids[:1])
