"""What an EAGLE3 draft head must be to go with a model: its configuration, the names and shapes of its tensors.

Light: no torch, so that a launcher can refuse a head before anything is loaded. See `ascend.eagle3`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend.checkpoint import SINGLE, TensorEntry, read_header
from ascend.errors import UserError, suggest

if TYPE_CHECKING:
    from ascend.cost import Model

TAPS = 3
FLOATS = ("BF16", "F16", "F32")
EMBEDDING = "embed_tokens.weight"
# Keys of config.json that would make it another head, and the only values that this one has.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",), "num_hidden_layers": (1,), "hidden_act": ("silu",), "rope_scaling": (None,),
    "attention_bias": (False, None), "mlp_bias": (False, None), "bias": (False, None),
    "tie_word_embeddings": (False, None), "norm_before_residual": (False, None), "norm_before_fc": (False, None),
    "fc_norm": (False, None), "norm_output": (False, None), "logit_scale": (1, None),
    "num_aux_hidden_states": (TAPS, None),
}  # fmt: skip


@dataclass(frozen=True)
class Eagle3Config:
    """Shapes of a head. tapped: the model's layers before which its stream is taken, in this order."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    tapped: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # transformers' default for a Llama that says nothing

    @classmethod
    def published(cls, model: Model) -> Eagle3Config:
        """The shape that SpecForge gives Ling-flash-2.0's head (0.425 B parameters), or its like for another model."""
        H, heads, layers = model.hidden_size, model.num_attention_heads, model.num_hidden_layers
        tapped = default_taps(layers)
        if len(set(tapped)) < TAPS:  # fewer than seven layers
            tapped = (1, 2, layers - 1) if layers > TAPS else (0, 1, 2)
        return cls(
            hidden_size=H,
            intermediate_size=H * 7 // 2,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            draft_vocab_size=min(32000, model.vocab_size),
            tapped=tapped,
        )


def default_taps(layers: int) -> tuple[int, ...]:
    """The layers that SGLang and vLLM tap where a head's configuration names none (`set_eagle3_layers_to_capture`)."""
    return tuple(sorted((2, layers // 2, layers - 3)))


def tapped_layers(named: Sequence[int]) -> tuple[int, ...]:
    """The layers before which a head is fed, of ``eagle_aux_hidden_state_layer_ids`` in its ``eagle_config``.

    Published heads use either of two meanings: SpecForge names the layers whose output it takes, others those whose
    input it is. No head is fed the embedding, so one that names layer 1 means outputs; that is SGLang's rule too
    (pull request 25454). vLLM takes all for inputs (its pull request 43671).
    """
    return tuple(i + 1 for i in named) if 1 in named else tuple(named)


def tensor_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Shapes of a head's weights by their names in a checkpoint, without d2t, t2d and an embedding of its own."""
    H, width, D = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * D, config.num_key_value_heads * D
    attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
    return {
        "fc.weight": (H, TAPS * H),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.hidden_norm.weight": (H,),
        f"{attention}q_proj.weight": (query, 2 * H),
        f"{attention}k_proj.weight": (key, 2 * H),
        f"{attention}v_proj.weight": (key, 2 * H),
        f"{attention}o_proj.weight": (H, query),
        "midlayer.post_attention_layernorm.weight": (H,),
        f"{mlp}gate_proj.weight": (width, H),
        f"{mlp}up_proj.weight": (width, H),
        f"{mlp}down_proj.weight": (H, width),
        "norm.weight": (H,),
        "lm_head.weight": (config.draft_vocab_size, H),
    }


def open_head(path: Path, model: Model) -> tuple[Eagle3Config, dict[str, str]]:
    """Return a head's configuration and the names of its tensors as stored, by SpecForge's, checked against ``model``.

    Raises `UserError` for a pickle, a head of another form or for another model, and tensors missing, extra or wrong.
    """
    config = _read_config(path, model)
    file = path / SINGLE
    pickles = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
    if not file.is_file() and pickles:
        raise UserError(f"{pickles[0]}: a pickle can run code when it is opened; convert it to {SINGLE} first")
    header = read_header(file)
    names = {name.replace("layers.0.", "midlayer."): name for name in header}  # "layers.0": vLLM's own checkpoints
    check_fits(config, model)
    _check_tensors(file, {name: header[stored] for name, stored in names.items()}, config)
    return config, names


def check_fits(config: Eagle3Config, model: Model) -> None:
    """Raise `UserError` if a head of this shape does not go with the model."""
    for key in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(model, key), getattr(config, key)
        if ours != theirs:
            raise UserError(f"the draft head has {key} {theirs}, the model {ours}: it was made for another model")
    layers = model.num_hidden_layers
    if len(config.tapped) != TAPS or not all(0 <= layer < layers for layer in config.tapped):
        raise UserError(f"the draft head taps layers {list(config.tapped)}, expected {TAPS} of the model's {layers}")
    if list(config.tapped) != sorted(set(config.tapped)):
        raise UserError(f"the draft head taps layers {list(config.tapped)}, expected them in rising order")


def _check_tensors(file: Path, entries: Mapping[str, TensorEntry], config: Eagle3Config) -> None:
    shapes = tensor_shapes(config)
    if EMBEDDING in entries:  # trained along: then not shared
        shapes[EMBEDDING] = (config.vocab_size, config.hidden_size)
    tables: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "d2t": ((config.draft_vocab_size,), ("I64", "I32")),
        "t2d": ((config.vocab_size,), ("BOOL",)),
    }
    needed = set(shapes) | ({"d2t"} if config.draft_vocab_size < config.vocab_size else set())
    for name in sorted(needed - entries.keys()):
        raise UserError(f"{file}: tensor {name} is missing")
    places = {name: (shape, FLOATS) for name, shape in shapes.items()} | tables
    for name, entry in entries.items():
        if name not in places:
            raise UserError(f"{file}: tensor {name} has no place in the draft head{suggest(name, places)}")
        shape, dtypes = places[name]
        if entry.shape != shape or entry.dtype not in dtypes:
            expected = f"{' or '.join(dtypes)} {list(shape)}"
            raise UserError(f"{file}: tensor {name} is {entry.dtype} {list(entry.shape)}, expected {expected}")


def _read_config(path: Path, model: Model) -> Eagle3Config:
    file = path / "config.json"
    try:
        keys = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; a draft head is a directory that has it") from None
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error}); the file is damaged") from None
    if not isinstance(keys, dict):
        raise UserError(f"{file}: holds a {type(keys).__name__}, expected an object with the head's shapes")
    for key, values in FIXED.items():
        if keys.get(key, values[-1]) not in values:
            raise UserError(f"{file}: {key} is {keys[key]!r}, this toolkit knows draft heads with {values[0]!r} alone")
    # transformers 5 writes what was rope_scaling and rope_theta here.
    rope = keys.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{file}: rope_type is {rope['rope_type']!r}, this toolkit knows draft heads with 'default' alone"
        )
    eagle = keys.get("eagle_config") or {}
    if not eagle.get("use_aux_hidden_state", True):
        raise UserError(f"{file}: use_aux_hidden_state is off, so this is no EAGLE3 head")
    named = eagle.get("eagle_aux_hidden_state_layer_ids")
    try:
        heads = keys["num_attention_heads"]
        return Eagle3Config(
            hidden_size=keys["hidden_size"],
            intermediate_size=keys["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=keys.get("num_key_value_heads") or heads,
            head_dim=keys.get("head_dim") or keys["hidden_size"] // heads,
            vocab_size=keys["vocab_size"],
            draft_vocab_size=keys.get("draft_vocab_size") or keys["vocab_size"],
            tapped=tapped_layers(named) if named else default_taps(model.num_hidden_layers),
            rms_norm_eps=keys.get("rms_norm_eps", 1e-6),
            rope_theta=keys.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        )
    except KeyError as error:
        raise UserError(f"{file}: {error.args[0]} is missing") from None
