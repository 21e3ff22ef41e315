"""`convert demo --weights heavy`: tails, row sizes and outlier channels as said, the rest as in a plain demo."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from convert.demo import write_demo
from convert.demo_heavy import outlier_channels, student_t_quantiles
from tests.test_demo import content, load, run, stored


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "tiny"
    write_demo(directory)
    return directory


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "heavy"
    write_demo(directory, weights="heavy")
    return directory


def test_plain_weights_are_what_they_always_were(tiny):
    digest = hashlib.sha256(load(tiny, "model.layers.2.mlp.experts.5.up_proj.weight").tobytes()).hexdigest()
    assert digest == "8115837822eb20dab11d9f7e8e4d86b4734d9792e19c687b05cdb0881d59a5c1"
    assert "weights" not in json.loads((tiny / "config.json").read_text())["random_weights_demo"]


def test_heavy_matrices_have_heavy_tails_and_rows_of_many_sizes(tiny, heavy):
    for name, std in (
        ("model.layers.0.mlp.gate_proj.weight", 128**-0.5),
        ("model.layers.1.attention.query_key_value.weight", 128**-0.5),
        ("model.layers.0.mlp.down_proj.weight", 256**-0.5 / 8**0.5),  # it adds to the stream of 4 layers
    ):
        plain, weight = load(tiny, name), load(heavy, name)
        assert weight.std() == pytest.approx(std, rel=0.1)
        kurtosis = [(matrix**4).mean() / (matrix**2).mean() ** 2 for matrix in (plain, weight)]
        assert kurtosis[0] == pytest.approx(3, abs=0.3)
        assert kurtosis[1] > 7
        assert np.abs(weight).max() / weight.std() > 9
        assert np.log(np.linalg.norm(weight, axis=1)).std() == pytest.approx(0.3, abs=0.06)


def test_heavy_norms_have_the_same_few_outlier_channels_in_every_layer(tmp_path, heavy):
    write_demo(tmp_path / "other", weights="heavy", seed=1)
    found = {
        directory: {
            int(np.argmax(load(directory, f"model.layers.{layer}.{norm}.weight")))
            for layer in range(5)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for directory in (heavy, tmp_path / "other")
    }
    assert [len(channels) for channels in found.values()] == [1, 1]  # of 128; found by each of ten norms
    assert found[heavy] != found[tmp_path / "other"]
    gains = np.sort(load(heavy, "model.layers.2.input_layernorm.weight"))
    assert gains[-1] > 4
    assert gains[-2] < 1.5
    assert list(outlier_channels(np.arange(4096, 0, -1))) == list(range(4095, 4083, -1))


def test_heavy_leaves_alone_what_no_format_quantises(tiny, heavy):
    for name in (
        "model.word_embeddings.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.mlp.gate.expert_bias",
    ):
        assert np.array_equal(load(tiny, name), load(heavy, name))
    assert stored(heavy) == stored(tiny)


def test_student_t_has_its_known_quantiles():
    quantiles = student_t_quantiles(65536)
    # Tables of t with 5 degrees of freedom, at 97.5 % and 99.95 %, over its standard deviation √(5/3).
    for share, value in ((0.975, 2.5706), (0.9995, 6.8688)):
        assert quantiles[round(share * 65536 - 0.5)] * (5 / 3) ** 0.5 == pytest.approx(value, rel=2e-3)
    assert quantiles.std() == pytest.approx(1, abs=2e-3)
    assert np.array_equal(quantiles, -quantiles[::-1])


def test_heavy_is_told_and_repeatable(tmp_path, heavy):
    result = run("demo", tmp_path / "demo", "--weights", "heavy", PYTHONHASHSEED="7", OMP_NUM_THREADS="3")
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "demo") == content(heavy)
    assert json.loads((heavy / "config.json").read_text())["random_weights_demo"]["weights"] == "heavy"
    assert "heavy tails" in (heavy / "README.md").read_text()
    write_demo(tmp_path / "fp32", weights="heavy", dtype="fp32")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert load(tmp_path / "fp32", name) == pytest.approx(load(heavy, name), rel=2**-8)


def test_a_heavy_model_computes_as_sanely_as_a_plain_one(tiny, heavy):
    import torch

    import ascend

    token_BT = torch.randint(0, 2000, (2, 64), generator=torch.Generator().manual_seed(0))
    entropies = []
    for directory in (tiny, heavy):
        logits_BTV = ascend.load_model(directory)(token_BT)
        assert logits_BTV.isfinite().all()
        entropies.append(float(torch.distributions.Categorical(logits=logits_BTV).entropy().mean()))
    assert entropies[1] == pytest.approx(entropies[0], rel=0.15)
    assert 2 < entropies[1] < 4
