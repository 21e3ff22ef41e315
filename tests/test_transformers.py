"""The model as a transformers model: Auto classes without remote code, generate() in its modes, save and load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.modeling_outputs import CausalLMOutputWithPast

import ascend
from tests.tiny import checkpoint, edit_config, read_tensors, user_error

pytestmark = pytest.mark.beside

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOLERANCE = 5e-5  # on fp32 logits of standard deviation 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("transformers") / "demo")


@pytest.fixture(scope="module")
def model(demo: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo, trust_remote_code=False)


@pytest.fixture(scope="module")
def ours(demo: Path) -> Any:
    return ascend.load_model(demo)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 280, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mask() -> Tensor:
    return torch.tensor([[0] * 4 + [1] * 8, [0] + [1] * 11, [1] * 12])


def test_the_two_loaders_differ_in_what_a_call_returns(model: Any, ours: Any, ids: Tensor) -> None:
    logits, output = ours(ids), model(ids)
    assert isinstance(logits, Tensor)
    assert isinstance(output, CausalLMOutputWithPast)
    assert (logits.shape, logits.dtype) == ((3, 12, 300), torch.float32)
    assert torch.equal(output.logits, logits)
    assert torch.equal(ours(ids, return_dict=True).logits, logits)
    assert torch.equal(model(ids, return_dict=False), logits)


def test_greedy_generation_is_ascends(model: Any, ours: Any, ids: Tensor, mask: Tensor) -> None:
    assert torch.equal(model.generate(ids, max_new_tokens=20, **GREEDY), ascend.generate(ours, ids, 20))
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY),
        ascend.generate(ours, ids, 20, attention_mask=mask),
    )


def test_the_generation_config_beside_the_weights_is_in_force(model: Any, ours: Any, ids: Tensor) -> None:
    assert model.generation_config.eos_token_id == [286, 289]
    free = ascend.generate(ours, ids[:1], 30)[0].tolist()
    model.generation_config.eos_token_id, kept = free[20], model.generation_config.eos_token_id
    try:
        out = model.generate(ids[:1], max_new_tokens=30, do_sample=False)[0].tolist()
    finally:
        model.generation_config.eos_token_id = kept
    assert out == free[: 12 + free[12:].index(free[20]) + 1]


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_cache_implementations(model: Any, ids: Tensor, mask: Tensor, implementation: str) -> None:
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=10, use_cache=False, **GREEDY)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=10, cache_implementation=implementation, **GREEDY)
    assert torch.equal(out, expected)


def test_beam_search_finds_likelier_text(model: Any, ids: Tensor, mask: Tensor) -> None:
    def total(out: Tensor) -> Tensor:
        whole = torch.cat([mask, torch.ones(3, 8, dtype=torch.int64)], dim=1)
        logprobs = model(out, attention_mask=whole).logits.log_softmax(-1)[:, 11:-1]
        return logprobs.gather(-1, out[:, 12:, None]).sum((1, 2))

    arguments = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, **GREEDY}
    one, four = model.generate(ids, **arguments), model.generate(ids, num_beams=4, **arguments)
    assert four.shape == (3, 20)
    assert (total(four) >= total(one) - 1e-3).all()
    assert not torch.equal(one, four)
    # What the beams' shuffled caches made of it is what a pass without a cache makes of it.
    assert torch.equal(four, model.generate(ids, num_beams=4, use_cache=False, **arguments))


def test_sampling_follows_the_seed(model: Any, ids: Tensor) -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=10, **GREEDY | {"do_sample": True, "top_p": 0.9})

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_hidden_states(model: Any, ids: Tensor) -> None:
    output = model(ids, output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 12, 64)] * 4
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(output.hidden_states[-1] @ model.get_output_embeddings().weight.T, output.logits)
    steps = model.generate(
        ids, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True, **GREEDY
    ).hidden_states
    assert [step[-1].shape[1] for step in steps] == [12, 1, 1]
    assert model(ids).hidden_states is None


@pytest.mark.parametrize("padded", [False, True])
def test_two_chunks_with_a_cache_are_one_pass(model: Any, ids: Tensor, mask: Tensor, padded: bool) -> None:
    masks = (mask, mask[:, :7]) if padded else (None, None)
    whole = model(ids, attention_mask=masks[0]).logits
    first = model(ids[:, :7], attention_mask=masks[1], use_cache=True)
    second = model(ids[:, 7:], attention_mask=masks[0], past_key_values=first.past_key_values)
    assert second.past_key_values.get_seq_length() == 12
    both = torch.cat([first.logits, second.logits], dim=1)
    seen = mask.bool() if padded else torch.ones_like(mask).bool()
    assert (both - whole)[seen].abs().max() < TOLERANCE
    if padded:  # positions count from a row's first token: scores would not show it, keys do
        alone = model(ids[:1, 4:7]).past_key_values.layers[0].keys
        torch.testing.assert_close(first.past_key_values.layers[0].keys[:1, :, 4:7], alone, atol=1e-5, rtol=0)
    assert model(ids, use_cache=False).past_key_values is None


def test_right_padding_is_fine_where_nothing_is_generated(model: Any, ids: Tensor, mask: Tensor) -> None:
    right = mask.flip(1)
    logits = model(ids, attention_mask=right, use_cache=False).logits
    assert (logits - model(ids).logits)[right.bool()].abs().max() < TOLERANCE
    line = user_error(model.generate, ids, attention_mask=right, max_new_tokens=2, **GREEDY)
    assert line == "attention_mask pads on the right; pad prompts on the left (tokenizer.padding_side = 'left')"


def test_embeddings_instead_of_tokens_and_logits_of_the_last_positions(model: Any, ids: Tensor) -> None:
    logits = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    assert (model(ids, logits_to_keep=2).logits - logits[:, -2:]).abs().max() < TOLERANCE
    assert (model(ids, logits_to_keep=torch.tensor([0, 5])).logits - logits[:, [0, 5]]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": {"": "cpu"}, "dtype": "bfloat16"}, torch.bfloat16),
        ({"device_map": torch.device("cpu"), "low_cpu_mem_usage": True}, torch.float32),
        ({"attn_implementation": "sdpa"}, torch.float32),
        ({"attn_implementation": "eager"}, torch.float32),
    ],
    ids=str,
)
def test_arguments_of_from_pretrained(arguments: dict[str, Any], dtype: torch.dtype, demo: Path, ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo, **arguments)
    assert (model.dtype, model.device.type, model.training) == (dtype, "cpu", False)
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.float32
    assert model(ids).logits.dtype == torch.float32
    assert model.generate(ids, max_new_tokens=2, **GREEDY).shape == (3, 14)


def test_a_model_spread_over_devices_is_refused(demo: Path) -> None:
    line = "device_map spreads the model over several devices; this version loads it on one"
    load = AutoModelForCausalLM.from_pretrained
    assert user_error(load, demo, device_map={"model": "cpu", "lm_head": "cpu"}) == line


@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_v2"])
def test_no_remote_code(model_type: str, tmp_path: Path, ids: Tensor) -> None:
    path = checkpoint(tmp_path / "demo")
    logits = ascend.load_model(path)(ids)
    ran = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    remote = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
    edit_config(path, model_type=model_type, auto_map=remote)
    for trust in ({}, {"trust_remote_code": False}):
        model = AutoModelForCausalLM.from_pretrained(path, **trust)
        assert isinstance(model, ascend.BailingMoeV2ForCausalLM)
        assert model.config.model_type == AutoConfig.from_pretrained(path, **trust).model_type == model_type
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(ascend.load_model(path)(ids), logits)
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    assert not ran.exists()


def test_save_and_load_gives_the_same_logits(model: Any, demo: Path, tmp_path: Path, ids: Tensor) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert read_tensors(tmp_path).keys() == read_tensors(demo).keys()


def test_a_model_from_a_config_alone(tmp_path: Path, demo: Path, ids: Tensor) -> None:
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo))
    assert torch.isfinite(fresh(ids).logits).all()
    fresh.save_pretrained(tmp_path)
    assert torch.equal(ascend.load_model(tmp_path)(ids), fresh(ids).logits)


def test_a_loss_is_refused(model: Any, ids: Tensor) -> None:
    line = "this model computes no loss: its ops are for inference and define no gradient"
    assert user_error(model, ids, labels=ids) == line


def test_pipeline(model: Any, demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo, padding_side="left")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    prompts = ["The patient has", "A fever"]
    texts = [out[0]["generated_text"] for out in generator(prompts, max_new_tokens=5, do_sample=False)]
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.startswith(prompt)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert text == tokenizer.decode(alone[0], skip_special_tokens=True)


REGISTERED = """
import sys
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
config = AutoConfig.from_pretrained(sys.argv[1])
print(type(config).__module__, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__)
"""
ORDERS = [
    "import ascend",
    pytest.param("import transformers, ascend", marks=pytest.mark.slow),
    pytest.param("from ascend import BailingMoeV2Config", marks=pytest.mark.slow),
    pytest.param("from ascend import generate", marks=pytest.mark.slow),
    pytest.param("import ascend, importlib.util; importlib.util.find_spec('transformers')", marks=pytest.mark.slow),
]


@pytest.mark.slow  # starts Python afresh, many times
@pytest.mark.parametrize("first", ORDERS)
def test_any_order_of_imports_registers_the_architecture(first: str, demo: Path) -> None:
    command = [sys.executable, "-c", first + REGISTERED, str(demo)]
    assert subprocess.check_output(command, text=True).split() == ["ascend.config", "ascend.model"]


def test_importing_ascend_costs_nothing() -> None:
    code = "import sys, ascend, ascend.errors; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_version_under_test_is_one_that_we_promise() -> None:
    assert (4, 57) <= tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (6, 0)


def test_what_would_change_the_model_is_refused_not_ignored(demo: Path) -> None:
    line = user_error(AutoModelForCausalLM.from_pretrained, demo, load_in_8bit=True)
    assert line == "from_pretrained: load_in_8bit is not supported by this model"


def test_a_row_of_padding_alone_is_refused(ours: Any, ids: Tensor) -> None:
    alone = torch.tensor([[1] * 12, [0] * 12, [1] * 12])
    line = user_error(ours, ids, attention_mask=alone)
    assert line == "attention_mask has a row of padding alone; every prompt needs a token"
