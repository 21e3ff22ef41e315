"""The lean engine: its cache against the full forward pass, padded batches, stopping, sampling, bad arguments."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ascend
from ascend import BailingMoeV2ForCausalLM
from ascend.generation import Decoder, bucket
from ascend.sampling import Sampling, new_state
from tests.tiny import checkpoint, user_error

TOLERANCE = 5e-5  # on fp32 logits of standard deviation 4
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
VARIANTS: dict[str, dict[str, Any]] = {
    "as the family has it": {},
    "yarn beyond the original length": YARN,
    "no groups, two shared experts": {"n_group": 1, "topk_group": 1, "num_shared_experts": 2},
    "tied, no norm on queries and keys": {"tie_word_embeddings": True, "use_qk_norm": False},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BailingMoeV2ForCausalLM:
    return ascend.load_model(checkpoint(tmp_path_factory.mktemp("generation") / "demo"))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 280, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_by_step_gives_the_logits_of_the_full_pass(variant: str, tmp_path: Path) -> None:
    model = ascend.load_model(checkpoint(tmp_path / "demo", **VARIANTS[variant]))
    ids = tokens(3, 48)
    full = model(ids)
    assert full.std() > 1
    for prompt in (1, 7, 30):
        decoder = Decoder(model, ids[:, :prompt], None, 48 - prompt)
        assert (decoder.prefill() - full[:, prompt - 1]).abs().max() < TOLERANCE
        for position in range(prompt, 48):
            assert (decoder.step(ids[:, position]) - full[:, position]).abs().max() < TOLERANCE
        assert decoder.cache.written_B.tolist() == [48] * 3


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Left-pad prompts to one length; the padding holds a real token, which nothing may see."""
    length = max(len(prompt) for prompt in prompts)
    ids, mask = torch.full((len(prompts), length), 9), torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    return ids, mask


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=25)
def test_a_row_of_a_padded_batch_is_what_it_is_alone(
    model: BailingMoeV2ForCausalLM, lengths: list[int], seed: int
) -> None:
    prompts = [tokens(1, length, seed + i)[0] for i, length in enumerate(lengths)]
    ids, mask = padded(prompts)
    together = ascend.generate(model, ids, 8, attention_mask=mask)
    batch = Decoder(model, ids, mask, 0)
    logits = batch.prefill()
    for row, prompt in enumerate(prompts):
        alone = Decoder(model, prompt[None], None, 0)
        assert (logits[row] - alone.prefill()[0]).abs().max() < TOLERANCE
        # Scores depend on distances alone; that positions count from the row's first token shows in its keys.
        for keys, its_keys in zip(batch.cache.keys, alone.cache.keys, strict=True):
            torch.testing.assert_close(keys[row, :, -len(prompt) :], its_keys[0], atol=1e-5, rtol=0)
        assert torch.equal(together[row, ids.shape[1] :], ascend.generate(model, prompt[None], 8)[0, len(prompt) :])


def test_greedy_takes_the_best_token_of_every_step(model: BailingMoeV2ForCausalLM) -> None:
    out = ascend.generate(model, tokens(2, 5), 10)
    assert out.shape == (2, 15)
    assert out.dtype == torch.int64
    assert torch.equal(out[:, :5], tokens(2, 5))
    assert torch.equal(model(out[:, :-1]).argmax(-1)[:, 4:], out[:, 5:])


def test_bf16_generates_too(tmp_path: Path) -> None:
    model = ascend.load_model(checkpoint(tmp_path / "demo", "bf16"))
    decoder = Decoder(model, tokens(2, 5), None, 4)
    logits = decoder.prefill()
    assert (decoder.cache.keys[0].dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(ascend.generate(model, tokens(2, 5), 1)[:, 5], logits.argmax(-1))


def test_a_row_that_stops_is_filled_with_its_stop_token(model: BailingMoeV2ForCausalLM) -> None:
    ids = tokens(3, 6)
    free = ascend.generate(model, ids, 12)[:, 6:]
    stops = (int(free[0, 3]), int(free[2, 5]))
    ends = [next((i for i, token in enumerate(row) if token in stops), 12) for row in free.tolist()]
    assert len(set(ends)) > 1, "rows that all stop at once would show nothing"
    out = ascend.generate(model, ids, 12, stop_token_ids=stops)[:, 6:]
    assert out.shape[1] == min(12, max(ends) + 1)
    for row, end in enumerate(ends):
        assert torch.equal(out[row, : end + 1], free[row, : end + 1])
        assert set(out[row, end:].tolist()) <= {int(free[row, end])} if end < 12 else True


def test_generation_ends_once_all_rows_have_stopped(model: BailingMoeV2ForCausalLM) -> None:
    ids = tokens(1, 6).expand(2, -1)
    stop = int(ascend.generate(model, ids, 5)[0, 8])
    free = ascend.generate(model, ids, 50)[:, 6:]
    out = ascend.generate(model, ids, 50, stop_token_ids=[stop])
    assert out.shape[1] == 6 + free[0].tolist().index(stop) + 1
    # A stop token in the prompt stops nothing.
    with_stop = torch.cat([ids, torch.full((2, 1), stop)], dim=1)
    assert ascend.generate(model, with_stop, 3, stop_token_ids=[299]).shape[1] == 10
    assert ascend.generate(model, with_stop, 1, stop_token_ids=[stop]).shape[1] == 8


def test_no_new_tokens_is_the_prompt(model: BailingMoeV2ForCausalLM) -> None:
    assert torch.equal(ascend.generate(model, tokens(2, 5), 0), tokens(2, 5))


def test_on_token_sees_every_step(model: BailingMoeV2ForCausalLM) -> None:
    seen: list[Tensor] = []
    out = ascend.generate(model, tokens(2, 5), 7, on_token=seen.append, temperature=1.0, seed=3)
    assert torch.equal(torch.stack(seen, dim=1), out[:, 5:])


@pytest.mark.parametrize("cut", [{}, {"top_k": 50}, {"top_p": 0.99}], ids=str)
def test_a_seed_gives_the_same_draws_and_the_global_generator_is_left_alone(
    model: BailingMoeV2ForCausalLM, cut: dict[str, Any]
) -> None:
    state = torch.get_rng_state()
    arguments = {"temperature": 2.0, **cut}
    draws = [ascend.generate(model, tokens(2, 5), 20, seed=seed, **arguments) for seed in (1, 1, 2, None, None)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4


@pytest.mark.parametrize("arguments", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}, {"temperature": 1e-3}])
def test_the_limits_of_sampling_are_greedy(model: BailingMoeV2ForCausalLM, arguments: dict[str, Any]) -> None:
    sampled = ascend.generate(model, tokens(2, 5), 10, **{"temperature": 1.0, "seed": 0} | arguments)
    assert torch.equal(sampled, ascend.generate(model, tokens(2, 5), 10))


LOGITS = [2.0, 1.5, 1.4, 0.9, 0.3, 0.0, -0.2, -1.0, -1.1, -2.0, -3.0, 1.45]


def analytic(temperature: float, top_k: int, top_p: float) -> list[float]:
    """The distribution that `Sampling` documents, step by step in fp64."""
    weights = [math.exp(logit / temperature) for logit in LOGITS]
    order = sorted(range(len(LOGITS)), key=lambda token: -weights[token])[: top_k or None]
    kept: list[int] = []
    for token in order:
        if sum(weights[t] for t in kept) < top_p * sum(weights[t] for t in order):
            kept.append(token)
    total = sum(weights[t] for t in kept)
    return [weights[t] / total if t in kept else 0.0 for t in range(len(LOGITS))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.8, 6, 0.7), (1.0, 99, 0.95)],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature, top_k, top_p, seed=5)
    draws = 100_000
    logits_BV = torch.tensor(LOGITS).expand(draws, -1)
    counts = sampling.pick(logits_BV, new_state(5, torch.device("cpu"))).bincount(minlength=len(LOGITS)).tolist()
    expected = analytic(temperature, top_k, top_p)
    assert [count > 0 for count in counts] == [p > 0 for p in expected]
    chi_square = sum((count - draws * p) ** 2 / (draws * p) for count, p in zip(counts, expected, strict=True) if p)
    freedom = sum(p > 0 for p in expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # beyond that: one seed in some thousands


WRONG_IDS = "input_ids is torch.{}, expected int64 [batch, prompt length]"
OUTSIDE = "{} a token outside the vocabulary of 300"
BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "one dimension": (lambda: {"input_ids": tokens(1, 5)[0]}, WRONG_IDS.format("int64 [5]")),
    "int32": (lambda: {"input_ids": tokens(1, 5).int()}, WRONG_IDS.format("int32 [1, 5]")),
    "empty prompt": (lambda: {"input_ids": tokens(1, 0)}, WRONG_IDS.format("int64 [1, 0]")),
    "no rows": (lambda: {"input_ids": tokens(0, 5)}, WRONG_IDS.format("int64 [0, 5]")),
    "no such token": (lambda: {"input_ids": tokens(1, 5) + 300}, OUTSIDE.format("input_ids holds")),
    "negative token": (lambda: {"input_ids": tokens(1, 5) - 300}, OUTSIDE.format("input_ids holds")),
    "stop token": (lambda: {"stop_token_ids": [1, 300]}, OUTSIDE.format("stop_token_ids [1, 300] holds")),
    "negative length": (lambda: {"max_new_tokens": -1}, "max_new_tokens is -1, it cannot be negative"),
    "temperature": (lambda: {"temperature": -0.5}, "temperature is -0.5, it must be 0 (greedy) or above"),
    "temperature nan": (lambda: {"temperature": math.nan}, "temperature is nan, it must be 0 (greedy) or above"),
    "temperature inf": (lambda: {"temperature": math.inf}, "temperature is inf, it must be 0 (greedy) or above"),
    "top_k": (lambda: {"top_k": -1}, "top_k is -1, it must be 0 (off) or above"),
    "top_p 0": (lambda: {"top_p": 0}, "top_p is 0, it must be above 0 and at most 1"),
    "top_p 1.1": (lambda: {"top_p": 1.1}, "top_p is 1.1, it must be above 0 and at most 1"),
    "seed": (lambda: {"seed": -1}, "seed is -1, it must be at least 0 and below 2**64"),
    "seed too large": (lambda: {"seed": 2**64}, f"seed is {2**64}, it must be at least 0 and below 2**64"),
    "mask shape": (
        lambda: {"attention_mask": torch.ones(2, 4)},
        "attention_mask has shape [2, 4], expected [2, 5]: a zero per padded slot",
    ),
    "mask with a hole": (
        lambda: {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]])},
        "attention_mask has padding between tokens; pad on the left only",
    ),
    "mask on the right": (
        lambda: {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])},
        "attention_mask pads on the right; pad prompts on the left (tokenizer.padding_side = 'left')",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_get_one_line(what: str, model: BailingMoeV2ForCausalLM) -> None:
    arguments, line = BAD[what]
    assert user_error(ascend.generate, **{"model": model, "input_ids": tokens(2, 5)} | arguments()) == line


@pytest.mark.parametrize("variant", [{}, YARN | {"max_position_embeddings": 16}], ids=["plain", "yarn"])
def test_a_warning_beyond_the_positions_that_the_model_knows(variant: dict[str, Any], tmp_path: Path) -> None:
    model = ascend.load_model(checkpoint(tmp_path / "demo", **{"max_position_embeddings": 64} | variant))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ascend.generate(model, tokens(1, 60), 4)
    expected = "65 tokens, prompt and answer, go beyond the 64 positions that this model knows; a YaRN rope_scaling in "
    with pytest.warns(UserWarning, match=expected) as caught:
        ascend.generate(model, tokens(1, 60), 5)
    assert caught[0].filename == __file__


def continued(decoder: Decoder, count: int) -> list[list[int]]:
    """Greedy tokens of a batch, ``count`` a row."""
    token_B = decoder.prefill().argmax(-1)
    made = [token_B]
    for _ in range(count - 1):
        made.append(decoder.step(made[-1]).argmax(-1))
    return torch.stack(made, dim=1).tolist()


@torch.inference_mode()
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_batch_that_begins_again_gives_what_a_new_one_gives(
    capture: bool, padding: int, model: BailingMoeV2ForCausalLM
) -> None:
    mask = None
    if padding:
        mask = torch.ones(2, 6, dtype=torch.int64)
        mask[1, :padding] = 0
    decoder = Decoder(model, tokens(2, 6, 0), mask, 9, capture)
    continued(decoder, 9)
    keys = decoder.cache.keys[0].data_ptr()
    for seed, count in ((1, 9), (2, 4), (2, 9), (0, 1)):
        decoder.restart(tokens(2, 6, seed))
        assert (decoder.cache.written_B.tolist(), decoder.length) == ([0, 0], 0)
        expected = ascend.generate(model, tokens(2, 6, seed), count)[:, 6:].tolist()
        assert continued(decoder, count) == expected
        assert decoder.cache.written_B.tolist() == [6 + count - 1] * 2
    assert decoder.cache.keys[0].data_ptr() == keys, "the cache stays where a graph reads it"


@torch.inference_mode()
@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "seed": 4}, {"temperature": 1.3, "top_k": 9, "top_p": 0.9}])
def test_steps_that_choose_their_own_tokens_give_what_generate_gives(
    how: dict[str, Any], model: BailingMoeV2ForCausalLM
) -> None:
    """Captured or not; a batch that is filled up to a bucket draws for its rows as one that is not."""
    how = how | ({"seed": 4} if how else {})
    expected = ascend.generate(model, tokens(3, 6), 9, **how)
    for capture in (False, True):
        assert torch.equal(ascend.generate(model, tokens(3, 6), 9, capture=capture, **how), expected)
        decoder = Decoder(model, tokens(3, 6), None, 9, capture, sampling=Sampling(**how))
        assert len(decoder.token_B) == (4 if capture else 3)
        assert decoder.prefill().shape == (3, 300)
        decoder.run(3)
        decoder.run(5)
        assert torch.equal(decoder.answer.tokens(9)[:3], expected[:, 6:])
        assert torch.equal(decoder.answer.token_BN[-1], decoder.answer.token_BN[2])
        assert decoder.cache.written_B.tolist() == [14] * len(decoder.token_B)


def test_a_batch_has_the_rows_of_its_bucket() -> None:
    sizes = {1: 1, 2: 2, 3: 4, 5: 8, 8: 8, 9: 16, 33: 64, 65: 128, 128: 128, 129: 256, 300: 384}
    assert {size: bucket(size) for size in sizes} == sizes


@torch.inference_mode()
def test_a_captured_decoder_takes_fewer_rows_and_other_lengths(model: BailingMoeV2ForCausalLM) -> None:
    decoder = Decoder(model, tokens(3, 8), None, 7, capture=True)
    for rows, length, padding in ((4, 8, 0), (2, 5, 3), (1, 1, 0)):
        ids, mask = tokens(rows, length, rows), torch.ones(rows, length, dtype=torch.int64)
        mask[-1, :padding] = 0
        decoder.restart(ids, mask)
        expected = ascend.generate(model, ids, 7, attention_mask=mask)[:, length:]
        assert torch.equal(decoder.generate(), expected)
        decoder.restart(ids, mask)
        assert continued(decoder, 7) == expected.tolist()
    for shape in ((5, 8), (2, 9)):
        said = f"prompts of shape {list(shape)} do not fit a decoder made for [4, 8]"
        assert user_error(decoder.restart, tokens(*shape)) == said


@torch.inference_mode()
def test_a_key_value_cache_in_fp8_changes_the_logits_a_little(model: BailingMoeV2ForCausalLM) -> None:
    whole, small = Decoder(model, tokens(2, 20), None, 4), Decoder(model, tokens(2, 20), None, 4, kv_dtype="fp8")
    assert small.cache.keys[0].dtype is torch.float8_e4m3fn
    expected, logits = whole.prefill(), small.prefill()
    # Values of 4 significant bits, and a token that turns to another expert here and there.
    assert 0.001 < (logits - expected).norm() / expected.norm() < 0.4
    rounded = ascend.generate(model, tokens(2, 5), 9, kv_dtype="fp8")
    assert not torch.equal(rounded, ascend.generate(model, tokens(2, 5), 9))
    assert torch.equal(rounded, ascend.generate(model, tokens(2, 5), 9, kv_dtype="fp8", drafts=3, capture=True))


def test_draws_do_not_depend_on_the_default_dtype() -> None:
    logits_BV = torch.tensor(LOGITS).expand(1000, -1)
    expected = Sampling(1.0).pick(logits_BV, new_state(5, torch.device("cpu")))
    torch.set_default_dtype(torch.float16)
    try:
        drawn = Sampling(1.0).pick(logits_BV, new_state(5, torch.device("cpu")))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)
