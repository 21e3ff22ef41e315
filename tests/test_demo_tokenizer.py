"""The demo's tokenizer and the chat format of the model family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from convert.demo import write_demo


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "tiny"
    write_demo(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny / "tokenizer.json"))


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(st.sampled_from("患者胸痛 \n\t'sreLL0159<>|/think role_end🩺é\u0301\u200d")))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids, default=0) < 2048


def test_decoded_text_keeps_what_parsers_look_for(tokenizer):
    ids = tokenizer.encode("<role>HUMAN</role>hi<|role_end|><think>a</think><tool_call>b</tool_call>").ids
    assert tokenizer.decode(ids) == "HUMANhi<think>a</think><tool_call>b</tool_call>"


def test_transformers_reads_the_tokenizer_without_remote_code(tiny):
    tokenizer = auto_tokenizer(tiny)
    assert len(tokenizer) == 2048
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|startoftext|>",
        "<|role_end|>",
        "<|endoftext|>",
    )
    text = "<role>HUMAN</role>hi<|role_end|><think>a</think><tool_call>b</tool_call>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eos_token_id) == 1


def auto_tokenizer(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


# The expected strings are literal; they were checked once against the family's own template.

SYSTEM_OFF = "<role>SYSTEM</role>detailed thinking off<|role_end|>"
LOOKUP = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
TOOLS_TEXT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n'
)
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}

CONVERSATIONS = {
    "one question": (
        [{"role": "user", "content": "What is sepsis?"}],
        {"add_generation_prompt": True},
        SYSTEM_OFF + "<role>HUMAN</role>What is sepsis?<|role_end|><role>ASSISTANT</role>",
    ),
    "thinking on": (
        [{"role": "user", "content": "你好"}],
        {"add_generation_prompt": True, "enable_thinking": True},
        "<role>SYSTEM</role>detailed thinking on<|role_end|><role>HUMAN</role>你好<|role_end|><role>ASSISTANT</role>",
    ),
    "system turn, no generation prompt": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        {},
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|><role>HUMAN</role>Hi<|role_end|>",
    ),
    "a second system turn": (
        [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Now in French."}],
        {},
        SYSTEM_OFF + "<role>HUMAN</role>Hi<|role_end|><role>SYSTEM</role>Now in French.<|role_end|>",
    ),
    "thoughts before the last question are dropped": (
        [{"role": "user", "content": "Fever?"}, THOUGHT, {"role": "user", "content": "And now?"}],
        {"add_generation_prompt": True},
        SYSTEM_OFF + "<role>HUMAN</role>Fever?<|role_end|><role>ASSISTANT</role>Yes.<|role_end|>"
        "<role>HUMAN</role>And now?<|role_end|><role>ASSISTANT</role>",
    ),
    "thoughts after it are kept": (
        [{"role": "user", "content": "Fever?"}, THOUGHT],
        {},
        SYSTEM_OFF + "<role>HUMAN</role>Fever?<|role_end|>"
        "<role>ASSISTANT</role>\n<think>\nhm\n</think>\n\nYes.<|role_end|>",
    ),
    "thoughts given apart": (
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "\nwhy\n"}],
        {},
        SYSTEM_OFF + "<role>HUMAN</role>Q<|role_end|><role>ASSISTANT</role>\n<think>\nwhy\n</think>\n\nA<|role_end|>",
    ),
    "tools, two calls, two answers": (
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Dose?"},
            {
                "role": "assistant",
                "content": "Looking.",
                "tool_calls": [
                    {"type": "function", "function": {"name": "lookup", "arguments": {"药": "阿司匹林"}}},
                    {"name": "lookup", "arguments": '{"x": 1}'},
                ],
            },
            {"role": "tool", "content": "100 mg"},
            {"role": "tool", "content": "none"},
        ],
        {"tools": [LOOKUP], "add_generation_prompt": True},
        f"<role>SYSTEM</role>S\n{TOOLS_TEXT}detailed thinking off<|role_end|><role>HUMAN</role>Dose?<|role_end|>"
        '<role>ASSISTANT</role>Looking.\n<tool_call>\n{"name": "lookup", "arguments": {"药": "阿司匹林"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "lookup", "arguments": {"x": 1}}\n</tool_call><|role_end|>'
        "<role>OBSERVATION</role>\n<tool_response>\n100 mg\n</tool_response>\n<tool_response>\nnone\n</tool_response>"
        "<|role_end|><role>ASSISTANT</role>",
    ),
    "a call without text, thoughts kept across the tool's answer": (
        [
            {"role": "user", "content": "Dose?"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "look",
                "tool_calls": [{"function": {"name": "lookup", "arguments": {}}}],
            },
            {"role": "tool", "content": "100 mg"},
            {"role": "assistant", "content": "100 mg."},
        ],
        {},
        SYSTEM_OFF + "<role>HUMAN</role>Dose?<|role_end|><role>ASSISTANT</role>\n<think>\nlook\n</think>\n\n"
        '<tool_call>\n{"name": "lookup", "arguments": {}}\n</tool_call><|role_end|>'
        "<role>OBSERVATION</role>\n<tool_response>\n100 mg\n</tool_response><|role_end|>"
        "<role>ASSISTANT</role>100 mg.<|role_end|>",
    ),
    "a tool's answer in a user turn is no new question": (
        [
            {"role": "user", "content": "Dose?"},
            THOUGHT,
            {"role": "user", "content": "<tool_response>\n1\n</tool_response>"},
        ],
        {},
        SYSTEM_OFF + "<role>HUMAN</role>Dose?<|role_end|>"
        "<role>ASSISTANT</role>\n<think>\nhm\n</think>\n\nYes.<|role_end|>"
        "<role>HUMAN</role><tool_response>\n1\n</tool_response><|role_end|>",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template(tiny, name):
    messages, options, expected = CONVERSATIONS[name]
    assert auto_tokenizer(tiny).apply_chat_template(messages, tokenize=False, **options) == expected


def test_the_template_lies_in_both_places(tiny):
    template = (tiny / "chat_template.jinja").read_text()
    assert json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"] == template
