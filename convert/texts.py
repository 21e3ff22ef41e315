"""Prompts from a file, as token ids: for `--calibrate` and `--check`.

They may be patients' data: what is said of them, in errors too, are numbers of lines and of tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from ascend.checkpoint import read_config
from ascend.errors import UserError

# A calibration holds some five fp32 vectors per token: 2.7 GB at this many of a hidden size of 4096. With 8 of 256
# experts chosen by a token, each sees 1024 of them.
MOST_TOKENS = 32768
MOST_BYTES = 16 << 20  # of the file: 512 for each token


def read_texts(file: Path, model_dir: Path) -> list[list[int]]:
    """Return the token ids of each prompt of ``file``, by the model's `tokenizer.json`.

    A prompt is a line of text, taken as it stands (no chat template is put around it), or in a file `*.jsonl` the
    ``text`` of a line's object. Empty lines count for nothing. Raises `UserError` for a file without prompts or not to
    be read so, a model without a tokenizer, a prompt longer than the model's context, and more than `MOST_TOKENS`.
    """
    config = read_config(model_dir)
    lines = _lines(file)
    tokenizer = _tokenizer(model_dir / "tokenizer.json")
    context, vocabulary = config["max_position_embeddings"], config["vocab_size"]
    texts: list[list[int]] = []
    total = 0
    for number, line in lines:
        text = _text(line, f"{file}: line {number}") if file.suffix == ".jsonl" else line
        ids: list[int] = tokenizer.encode(text).ids
        if len(ids) > context:
            raise UserError(f"{file}: line {number} has {len(ids)} tokens, the model's context {context}: shorten it")
        if ids and max(ids) >= vocabulary:
            raise UserError(
                f"{model_dir}/tokenizer.json: makes token {max(ids)} of {vocabulary}: is it another model's?"
            )
        total += len(ids)
        if total > MOST_TOKENS:
            raise UserError(f"{file}: has more than {MOST_TOKENS} tokens up to line {number}: give fewer prompts")
        if ids:
            texts.append(ids)
    if not texts:
        raise UserError(f"{file}: holds no prompt; write one per line")
    return texts


def _lines(file: Path) -> list[tuple[int, str]]:
    """Return the lines that are not empty, with their numbers."""
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{file}: is {size:,} bytes large, prompts may have {MOST_BYTES:,}: give fewer")
        content = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no text in UTF-8 (byte {error.start})") from None
    return [(number, line.rstrip("\r")) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def _text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UserError(f'{where} is no JSON object with a string "text"')
    text: str = value["text"]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate)") from None
    return text


def _tokenizer(file: Path):  # type: ignore[no-untyped-def]  # its library has no types
    from tokenizers import Tokenizer

    if not file.is_file():
        raise UserError(f"{file}: missing, and prompts need a tokenizer; copy it from where the model came from")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{file}: is no tokenizer ({str(error).splitlines()[0][:100]}); copy it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
