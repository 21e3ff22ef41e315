"""The EAGLE3 head: its numbers against a plain implementation of its own, its checkpoints, its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ascend
from ascend import BailingMoeV2ForCausalLM
from ascend.config import BailingMoeV2Config
from ascend.eagle3 import Eagle3Head, load_eagle3, random_head
from ascend.eagle3_config import Eagle3Config, default_taps, open_head, tapped_layers
from ascend.roofline import EAGLE3_PARAMETERS
from ascend.speculation import SpeculativeDecoder
from convert import eagle3_init
from convert.eagle3_init import write_head
from tests.drafts import plain_head
from tests.tiny import checkpoint, edit_config, read_tensors, user_error

H, HEADS, KV, D, WIDTH, V, DRAFTED = 64, 4, 2, 16, 40, 300, 50
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu", "hidden_size": H,
    "intermediate_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV, "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5, "vocab_size": V, "draft_vocab_size": DRAFTED, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """A checkpoint's tensors under the names that SpecForge writes."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        return drawn / shape[-1] ** 0.5 if len(shape) > 1 else 1 + drawn.abs()

    target = torch.randperm(V, generator=generator)[:DRAFTED].sort().values
    mid, attention, mlp = "midlayer.", "midlayer.self_attn.", "midlayer.mlp."
    return {
        "d2t": target - torch.arange(DRAFTED),
        "t2d": torch.zeros(V, dtype=torch.bool).index_fill(0, target, True),
        "fc.weight": weight(H, 3 * H),
        mid + "input_layernorm.weight": weight(H),
        mid + "hidden_norm.weight": weight(H),
        mid + "post_attention_layernorm.weight": weight(H),
        attention + "q_proj.weight": weight(HEADS * D, 2 * H),
        attention + "k_proj.weight": weight(KV * D, 2 * H),
        attention + "v_proj.weight": weight(KV * D, 2 * H),
        attention + "o_proj.weight": weight(H, HEADS * D),
        mlp + "gate_proj.weight": weight(WIDTH, H),
        mlp + "up_proj.weight": weight(WIDTH, H),
        mlp + "down_proj.weight": weight(H, WIDTH),
        "norm.weight": weight(H),
        "lm_head.weight": weight(DRAFTED, H),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BailingMoeV2ForCausalLM:
    return ascend.load_model(checkpoint(tmp_path_factory.mktemp("eagle3") / "demo", num_nextn_predict_layers=0))


@pytest.fixture
def head_path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@torch.inference_mode()
@pytest.mark.parametrize("padding", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_drafts_are_those_of_a_plain_implementation(
    padding: int, model: BailingMoeV2ForCausalLM, head_path: Path
) -> None:
    """From the model's own hidden states of the whole sequence so far, after any number of steps."""
    head, w, drafts = load_eagle3(head_path, model), tensors(), 4
    assert head.tapped == (0, 1, 2)
    ids = torch.randint(0, 280, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    true = ascend.generate(model, ids, 8, attention_mask=mask)
    decoder = SpeculativeDecoder(model, ids, mask, 8, drafts=drafts, drafter=head)
    decoder.prefill()
    while decoder.answer.left():
        for row in range(2):
            have = 7 + int(decoder.answer.count_B[row])
            if have == 15:
                continue
            begin = padding if row else 0
            sequence_T = true[row, begin:have]
            streams = model(sequence_T[None, :-1], output_hidden_states=True, return_dict=True).hidden_states
            hidden_TH = torch.cat(streams[:3], -1)[0] @ w["fc.weight"].T
            for n in range(drafts):
                embedding_TH = model.model.word_embeddings(sequence_T[1:])
                stream_TH, logits_TV = plain_head(w, embedding_TH, hidden_TH, D)
                drafted = int(logits_TV[-1].argmax())
                drafted += int(w["d2t"][drafted])
                assert decoder.draft_BK[row, n] == drafted
                sequence_T = torch.cat([sequence_T, torch.tensor([drafted])])
                # Behind the true states it goes on with its own stream.
                hidden_TH = torch.cat([hidden_TH, stream_TH[-1:]])
        decoder.run(1)
    assert torch.equal(decoder.answer.tokens(8), true[:, 7:])


@torch.inference_mode()
def test_logits_are_those_of_a_plain_implementation(model: BailingMoeV2ForCausalLM, head_path: Path) -> None:
    head, w = load_eagle3(head_path, model), tensors()
    ids = torch.randint(0, 280, (1, 12), generator=torch.Generator().manual_seed(5))
    hidden = torch.randn(1, 12, H, generator=torch.Generator().manual_seed(6))
    (cache,) = head.caches(1, 12, torch.float32, torch.device("cpu"))
    cache.written_B += 12
    stream = head.run(0, ids, hidden, torch.zeros(1, dtype=torch.int64), cache)
    expected, logits = plain_head(w, model.model.word_embeddings(ids[0]), hidden[0], D)
    assert expected.std() > 0.5
    torch.testing.assert_close(stream[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.logits(stream)[0], logits, atol=1e-5, rtol=1e-5)


def test_the_published_shape_has_the_parameters_that_the_roofline_counts() -> None:
    shape: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = Eagle3Config.published(BailingMoeV2Config(**shape))
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (14336, 8, 128)
    assert (config.draft_vocab_size, config.tapped) == (32000, (2, 16, 29))
    with torch.device("meta"):
        head = Eagle3Head(config)
    count = sum(one.numel() for one in head.parameters() if one.is_floating_point())
    assert abs(count - EAGLE3_PARAMETERS) < 0.001e9


def test_a_random_head_is_in_the_models_dtype_and_shares_its_embedding(tmp_path: Path) -> None:
    model = ascend.load_model(checkpoint(tmp_path, "bf16"))
    head = random_head(model, seed=1)
    assert head.embed_tokens is model.model.word_embeddings
    assert {one.dtype for one in head.parameters()} == {torch.bfloat16, torch.int64}
    assert torch.equal(random_head(model, seed=1).fc.weight, head.fc.weight)
    assert not torch.equal(random_head(model, seed=2).fc.weight, head.fc.weight)
    ids = torch.ones(2, 3, dtype=torch.int64)
    assert ascend.generate(model, ids, 5, drafts=2, draft_head=head).shape == (2, 8)


def test_an_embedding_of_its_own_and_layers_0_are_taken(model: BailingMoeV2ForCausalLM, head_path: Path) -> None:
    own = torch.randn(V, H)
    renamed = {name.replace("midlayer.", "layers.0."): one for name, one in tensors().items()}
    save_file(renamed | {"embed_tokens.weight": own}, head_path / "model.safetensors")
    edit_config(head_path, eagle_config={"eagle_aux_hidden_state_layer_ids": [-1, 0, 1]})
    head = load_eagle3(head_path, model)
    assert head.embed_tokens is not None
    assert torch.equal(head.embed_tokens.weight, own)
    assert head.tapped == (0, 1, 2)
    assert torch.equal(head.query_key_value.weight[-1], tensors()["midlayer.self_attn.v_proj.weight"][-1])


def test_a_whole_vocabulary_needs_no_tables(model: BailingMoeV2ForCausalLM, head_path: Path) -> None:
    stored = {name: one for name, one in tensors().items() if name not in ("d2t", "t2d")}
    save_file(stored | {"lm_head.weight": torch.randn(V, H)}, head_path / "model.safetensors")
    edit_config(head_path, draft_vocab_size=None)
    assert load_eagle3(head_path, model).target.tolist() == list(range(V))


def changed(**changes: Tensor | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        stored = load_file(path / "model.safetensors") | changes
        save_file({name: one for name, one in stored.items() if one is not None}, path / "model.safetensors")

    return change


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda path: void(edit_config(path, **changes))


def void(_: object) -> None:
    return None


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (pickled, "{}/pytorch_model.bin: a pickle can run code when it is opened; convert it to model.safet"),
    "no config": (lambda path: (path / "config.json").unlink(), "{}/config.json: cannot be read: No such file"),
    "damaged config": (lambda path: void((path / "config.json").write_text("{")), "{}/config.json: not readable as"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "{}/model.safetensors: missing"),
    "two layers": (configured(num_hidden_layers=2), "{}/config.json: num_hidden_layers is 2, this toolkit knows draft"),
    "another norm": (configured(norm_before_residual=True), "{}/config.json: norm_before_residual is True, this"),
    "no taps": (configured(eagle_config={"use_aux_hidden_state": False}), "{}/config.json: use_aux_hidden_state is"),
    "taps beyond the model": (
        configured(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}),
        "the draft head taps layers [1, 2, 3], expected 3 of the model's 3",
    ),
    "taps twice": (
        configured(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 0, 1]}),
        "the draft head taps layers [1, 1, 2], expected them in rising order",
    ),
    "another model": (configured(vocab_size=301), "the draft head has vocab_size 301, the model 300: it was made for"),
    "missing tensor": (changed(**{"norm.weight": None}), "{}/model.safetensors: tensor norm.weight is missing"),
    "missing d2t": (changed(d2t=None), "{}/model.safetensors: tensor d2t is missing"),
    "extra tensor": (
        changed(**{"norm.weigth": torch.ones(H)}),
        "{}/model.safetensors: tensor norm.weigth has no place in the draft head (did you mean 'norm.weight'?)",
    ),
    "wrong shape": (
        changed(**{"fc.weight": torch.ones(H, H)}),
        "{}/model.safetensors: tensor fc.weight is F32 [64, 64], expected BF16 or F16 or F32 [64, 192]",
    ),
    "d2t outside": (changed(d2t=torch.full((DRAFTED,), V)), "{}/model.safetensors: d2t leads outside the vocabulary"),
    "t2d another": (changed(t2d=torch.ones(V, dtype=torch.bool)), "{}/model.safetensors: t2d and d2t name different"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_head_that_cannot_be_used_is_refused(what: str, model: BailingMoeV2ForCausalLM, head_path: Path) -> None:
    damage, line = BAD[what]
    damage(head_path)
    assert user_error(load_eagle3, head_path, model).startswith(line.format(head_path))


def test_default_taps_are_the_peers() -> None:
    assert default_taps(32) == (2, 16, 29)
    assert default_taps(20) == (2, 10, 17)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds a list, expected an object"),
        (json.dumps(CONFIG | {"rope_parameters": {"rope_type": "yarn"}}), "rope_type is 'yarn'"),
    ],
)
def test_a_configuration_of_another_form_is_refused(
    text: str, words: str, head_path: Path, model: BailingMoeV2ForCausalLM
) -> None:
    (head_path / "config.json").write_text(text)
    assert words in user_error(load_eagle3, head_path, model)


# --- heads made by `convert eagle3-init` ---


@pytest.mark.parametrize(("layers", "tapped"), [(3, (0, 1, 2)), (4, (1, 2, 3)), (6, (1, 2, 5)), (32, (2, 16, 29))])
def test_a_head_that_was_made_taps_what_it_says_whatever_the_depth(
    layers: int, tapped: tuple[int, ...], tmp_path: Path
) -> None:
    """Its ids are outputs, as SpecForge counts, and are read as such by `tapped_layers`."""
    model_path = checkpoint(tmp_path / "model", num_hidden_layers=layers, num_nextn_predict_layers=0)
    write_head(tmp_path / "head", model_path, dtype="fp32", draft_vocab_size=50)
    config, names = open_head(tmp_path / "head", ascend.load_model(model_path).config)
    assert config.tapped == tapped
    assert {"d2t", "t2d", "fc.weight"} <= names.keys()
    head = load_eagle3(tmp_path / "head", ascend.load_model(model_path))
    assert sorted(head.target.tolist()) == [i * V // 50 for i in range(50)]
    assert (
        eagle3_init.main(["eagle3-init", str(tmp_path / "again"), "--model", str(model_path), "--dtype", "fp32"]) == 0
    )
    assert read_tensors(tmp_path / "again")["lm_head.weight"].shape == (V, H)


def test_two_meanings_of_the_ids_are_told_apart() -> None:
    assert tapped_layers([1, 15, 28]) == (2, 16, 29)
    assert tapped_layers([2, 16, 29]) == (2, 16, 29)


def test_what_no_head_can_be_made_for_is_refused(tmp_path: Path) -> None:
    model_path = checkpoint(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not empty" in user_error(write_head, tmp_path / "full", model_path)
    assert "is no directory" in user_error(write_head, tmp_path / "absent" / "head", model_path)
    assert "between 1 and the model's 300" in user_error(
        write_head, tmp_path / "head", model_path, draft_vocab_size=301
    )
    assert not (tmp_path / "head").exists()
