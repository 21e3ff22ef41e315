"""The demo's tokenizer: a small byte-level BPE, trained on the spot, in the model family's files and chat format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend.errors import UserError

CORPUS = Path(__file__).with_name("demo_corpus.txt")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# The family's added tokens in its order of ids (<|startoftext|> is 156891 there, <|role_end|> 156895). The True ones
# are "special": left out of decoded text. Thoughts and tool calls must stay in it for the server's parsers to find.
ADDED_TOKENS = {
    "<|startoftext|>": True,
    "<|endoftext|>": True,
    "[CLS]": True,
    "[gMASK]": True,
    "<|role_end|>": True,
    "<role>": True,
    "</role>": True,
    "<think>": False,
    "</think>": False,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<tools>": False,
    "</tools>": False,
}
BPE_SIZE = 2033  # with the added tokens exactly the tiny demo's vocabulary of 2048
NUM_BYTES = 256  # the BPE's alphabet: any text can be encoded

# How the family splits text before BPE: contractions, words with one leading sign, single digits, punctuation, spaces.
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a vocabulary lie: BPE from 0, unused ids, added tokens from `first_added`, unused ids."""

    bpe_size: int
    first_added: int
    vocab_size: int

    def id_of(self, added_token: str) -> int:
        """Return the id of one of `ADDED_TOKENS`."""
        return self.first_added + list(ADDED_TOKENS).index(added_token)

    @property
    def unused(self) -> list[range]:
        """The ids that no text is encoded to."""
        return [range(self.bpe_size, self.first_added), range(self.first_added + len(ADDED_TOKENS), self.vocab_size)]


def layout(vocab_size: int, first_added: int | None = None) -> Layout:
    """Return the layout of a vocabulary; the added tokens follow the BPE unless ``first_added`` puts them elsewhere."""
    if vocab_size < NUM_BYTES + len(ADDED_TOKENS):
        need = NUM_BYTES + len(ADDED_TOKENS)
        raise UserError(f"vocab_size {vocab_size} is too small: {NUM_BYTES} bytes and the added tokens need {need}")
    bpe_size = min(BPE_SIZE, vocab_size - len(ADDED_TOKENS))
    return Layout(bpe_size, bpe_size if first_added is None else first_added, vocab_size)


def tokenizer_files(tokens: Layout, config: Mapping[str, Any]) -> dict[str, str]:
    """Return ``{file name: text}`` of the tokenizer that fits ``config``: every id below `vocab_size` has a token."""
    # The names of tokens with a role, as the family's tokenizer_config.json and special_tokens_map.json give them.
    roles = {
        "bos_token": "<|startoftext|>",
        "cls_token": "[CLS]",
        "eos_token": "<|role_end|>",
        "gmask_token": "[gMASK]",
        "pad_token": "<|endoftext|>",
    }
    chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        **roles,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "fast_tokenizer": True,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": to_json(_tokenizer(tokens)),
        "tokenizer_config.json": to_json(tokenizer_config),
        "special_tokens_map.json": to_json(roles),
        "chat_template.jinja": chat_template,
    }


def to_json(document: Mapping[str, Any]) -> str:
    """Return ``document`` as the text of a JSON file, in the order given."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _tokenizer(tokens: Layout) -> dict[str, Any]:
    """Train the BPE and return the content of `tokenizer.json`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=tokens.bpe_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.read_text(encoding="utf-8").splitlines(keepends=True), trainer)

    document: dict[str, Any] = json.loads(tokenizer.to_str())
    # Added tokens and unused ids are entries of the vocabulary too: the ids are then the config's, without gaps.
    vocab: dict[str, int] = document["model"]["vocab"]
    vocab |= {token: tokens.id_of(token) for token in ADDED_TOKENS}
    taken = set(vocab.values())
    vocab |= {f"<|reserved_token_{i}|>": i for i in range(tokens.vocab_size) if i not in taken}
    document["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document["added_tokens"] = [
        {"id": tokens.id_of(token), "content": token, **flags, "special": special}
        for token, special in ADDED_TOKENS.items()
    ]
    return document
