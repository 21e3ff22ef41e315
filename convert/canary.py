"""`python -m convert canary DIR`: record what a checkpoint computes, so that each start of a server can be held to it.

The model is run in fp32, layer by layer straight from the files (`calibration_forward`): what is in memory is one
layer's attention and a few experts, however large the model. The same tokens go through it again, as twins whose hidden
states are rounded after each layer: how much that moves them is how much a server in bf16 may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend.arguments import Parser
from ascend.checkpoint import Checkpoint, open_checkpoint
from ascend.errors import UserError
from ascend.loader import CONFIGS, check_tensors
from ascend.model import BailingMoeV2ForCausalLM
from ascend.progress import Progress
from ascend.stored import StoredWeight, stored_weights
from convert.calibration_forward import Observer, Threads, hidden_states, read_weight
from convert.canary_record import CANARY, Canary, canary_prompts, canary_text, differences, noise_of
from convert.manifest import MANIFEST, SIGNATURE, check_quick, read_manifest, summary, write_manifest, write_whole
from convert.rounding import check_finite, decoded, steps
from convert.source import Reader

# Two bits fewer than bf16, once a layer, moves log-probabilities about as far as bf16 in every operation does. How far
# half of them, and a tenth, moved in bf16, over what the twins say: on the `tiny` demo with three seeds 0.80 to 0.97
# and 0.60 to 1.07 (`ascend` on the CPU), 0.76 and 0.72 (vLLM 0.32 on the CPU), on the `small` one 0.77 and 0.91.
MANTISSA_STEPS = 32
TWINS = 4  # each rounded at another place: one alone may happen to keep, or to lose, a choice of experts


def main(argv: Sequence[str]) -> int:
    """Run `python -m convert canary` with ``argv``."""
    parser = Parser(
        "convert canary", f"Write {CANARY}: log-probabilities that `serve` compares before a server is ready."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a checkpoint that is known to be good")
    parser.add_argument("--sign", metavar="KEY", type=Path, help="Ed25519 private key to sign the manifest with")
    parser.add_argument("--force", action="store_true", help="replace the record that is there")
    args = parser.read(argv)
    directory: Path = args.directory
    checkpoint = open_checkpoint(directory)
    if (directory / CANARY).exists() and not args.force:
        raise UserError(f"{directory / CANARY}: is there already; --force replaces it")
    if args.sign:
        from convert.signature import private_key

        private_key(args.sign)  # a wrong one is told before the work
    elif (directory / SIGNATURE).exists():
        raise UserError(f"{directory}: its manifest is signed, and would not be any more: give --sign KEY")
    manifest = read_manifest(directory) if (directory / MANIFEST).exists() else None
    if manifest and (problems := check_quick(directory, manifest)):
        raise UserError(summary(problems))
    canary = compute(checkpoint)
    (directory / SIGNATURE).unlink(missing_ok=True)
    write_whole(directory / CANARY, canary_text(canary))
    if manifest:
        known = {name: record for name, record in manifest.files.items() if name != CANARY}
        write_manifest(directory, command=manifest.command, source=manifest.source, known=known)
    if args.sign:
        from convert.signature import sign

        sign(directory, args.sign)
    listed = f"listed in {MANIFEST}" if manifest else f"there is no {MANIFEST} to list it in"
    count = sum(map(len, canary.logprobs))
    noise = canary.noise
    assert noise is not None
    print(f"{directory / CANARY}: {count} log-probabilities, {listed}")
    print(f"rounding moves half of them by more than {noise.median:.3g}, a tenth by more than {noise.tenth:.3g}")
    return 0


def compute(checkpoint: Checkpoint) -> Canary:
    """Run the model. Raises `UserError` for a checkpoint that is damaged, or gives no finite log-probabilities."""
    stored = stored_weights(checkpoint.tensors)
    with torch.device("meta"):
        model = BailingMoeV2ForCausalLM(CONFIGS[checkpoint.config["model_type"]](**checkpoint.config)).float()
    check_tensors(checkpoint.path, stored, model)
    prompts = canary_prompts(model.config.vocab_size)
    texts, tokens = [*prompts] * (1 + TWINS), sum(map(len, prompts))
    depth = model.config.num_hidden_layers
    x_TH = torch.empty(0)
    with Threads() as threads, Progress("layers", depth, " layers") as progress, torch.inference_mode():
        for x, residual in hidden_states(model, stored, texts, Observer[None](), threads):
            for states in (x, residual):
                for twin, rounded in enumerate(states.split(tokens, dim=1)[1:]):
                    rounded.copy_(_coarse(rounded, twin / TWINS))
            x_TH = (x + residual)[0]
            progress.advance(1)
        x_TH = F.rms_norm(x_TH, x_TH.shape[-1:], read_weight(stored["model.norm.weight"]), model.config.rms_norm_eps)
        lm_head = stored.get("lm_head.weight", stored["model.word_embeddings.weight"])  # the latter: tied
        logprobs = _logprobs(x_TH, lm_head, texts, threads)
    if not all(torch.isfinite(torch.tensor(row)).all() for row in logprobs):
        raise UserError(f"{checkpoint.path}: gives no finite log-probabilities: its weights are damaged")
    plain, twins = logprobs[: len(prompts)], logprobs[len(prompts) :]
    noise = noise_of(differences(twins, plain * TWINS))
    return Canary(model.config.vocab_size, _format(stored, checkpoint), plain, noise)


def _coarse(states: Tensor, shift: float) -> Tensor:
    """Round to `MANTISSA_STEPS` steps between a power of two and the next, the steps moved by a part of one."""
    mantissa, exponent = states.frexp()  # the mantissa is from 0.5 to 1
    return ((mantissa * (2 * MANTISSA_STEPS) + shift).round() - shift).div(2 * MANTISSA_STEPS).ldexp(exponent)


def _format(stored: Mapping[str, StoredWeight], checkpoint: Checkpoint) -> str:
    """What the experts are stored as; where they are plain, their dtype."""
    formats = {weight.format for name, weight in stored.items() if ".experts." in name} - {"plain"}
    dtype = checkpoint.tensors["model.word_embeddings.weight"].dtype
    return "+".join(sorted(formats)) or {"F32": "fp32", "F16": "fp16"}.get(dtype, dtype.lower())


def _logprobs(
    x_TH: Tensor, lm_head: StoredWeight, texts: Sequence[Sequence[int]], threads: Threads
) -> list[list[float]]:
    """Return the log-probability of each text's tokens from the second on; some rows of the head at a time."""
    begins = [sum(map(len, texts[:at])) for at in range(len(texts))]
    at_T = torch.tensor([begin + t for begin, text in zip(begins, texts, strict=True) for t in range(len(text) - 1)])
    next_T = torch.tensor([token for text in texts for token in text[1:]])
    x_TH = x_TH[at_T]

    def some(rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        begin, end = rows
        with Reader() as reader:
            part = decoded(lm_head, reader, begin, end).float()
        check_finite(lm_head.name, part)
        logits_TV = x_TH @ part.T
        is_here_T = (next_T >= begin) & (next_T < end)
        own_T = logits_TV.gather(1, (next_T - begin).clamp(0, end - begin - 1)[:, None])[:, 0]
        return logits_TV.logsumexp(1), own_T.where(is_here_T, 0.0)

    total_T, own_T = torch.full(next_T.shape, -torch.inf), torch.zeros(next_T.shape)
    for sum_T, found_T in threads.map(some, steps(*lm_head.shape)):
        total_T, own_T = torch.logaddexp(total_T, sum_T), own_T + found_T
    flat = [round(one, 6) for one in (own_T - total_T).tolist()]
    lengths = [len(text) - 1 for text in texts]
    return [flat[sum(lengths[:at]) : sum(lengths[: at + 1])] for at in range(len(texts))]
