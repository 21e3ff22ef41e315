"""`--config` and `--profile`: keys are flags, checked as flags, and the command line wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascend.errors import UserError
from serve.args import parse
from serve.config_file import LARGEST_BYTES, as_flags, profiles
from tests.tiny import user_error


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "port: 8123\nmax_num_seqs: 4\nexpert-parallel: false\nhang: 2.5\nmodel: models/one\n"
        "engine-flags: {seed: 3, enable-prefix-caching: false, hf-overrides: {a: {b: true}}}\n"
        'environment: {HCCL_BUFFSIZE: 200, OMP_PROC_BIND: "false"}\n',
    )
    asked = parse(["--config", file, "--", "--max-logprobs", "5"])
    assert (asked.port, asked.max_num_seqs, asked.expert_parallel, asked.hang) == (8123, 4, False, 2.5)
    assert asked.model == tmp_path / "models" / "one"
    assert asked.engine_flags == (
        "--seed",
        "3",
        "--no-enable-prefix-caching",
        "--hf-overrides",
        '{"a": {"b": true}}',
        "--max-logprobs",
        "5",
    )
    assert asked.environment == {"HCCL_BUFFSIZE": "200", "OMP_PROC_BIND": "false"}


def test_the_command_line_wins(tmp_path: Path) -> None:
    file = written(tmp_path, "port: 8123\nexpert-parallel: true\nmax-num-seqs: 4\n")
    for arguments in (
        ["--config", file, "--port", "9000", "--no-expert-parallel"],
        ["--port=9000", "--no-expert-parallel", "--config", file],
    ):
        asked = parse(arguments)
        assert (asked.port, asked.expert_parallel, asked.max_num_seqs) == (9000, False, 4)


def test_a_file_wins_over_a_profile(tmp_path: Path) -> None:
    file = written(tmp_path, "max-num-seqs: 3\nenvironment: {OMP_NUM_THREADS: 2}\n")
    name = next(name for name in profiles() if name.startswith("910b-8x"))
    profile = parse(["--profile", name])
    both = parse(["--profile", name, "--config", file])
    assert profile.max_num_seqs != 3 == both.max_num_seqs
    assert both.tensor_parallel_size == profile.tensor_parallel_size is not None
    assert both.environment == {**profile.environment, "OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot: 8123", "unknown key 'prot' (did you mean 'port'?)"),
        ("tensor-paralel-size: 8", "did you mean 'tensor-parallel-size'?"),
        ("enviroment: {A: 1}", "did you mean 'environment'?"),
        ("port: http", "'http' is not a port"),
        ("port: |\n  8123\n", "'8123\\n' is not a port"),
        ('port: "\\e[2J"', "'\\x1b[2J' is not a port"),
        ("port: [1, 2]", "'port' is one value, not a list"),
        ("port: true", "'port' is True, it must be a value"),
        ("expert-parallel: 8", "'expert-parallel' is 8, it must be true or false"),
        ("dry-run: true", "'dry-run' belongs on the command line"),
        ("config: other.yaml", "'config' belongs on the command line"),
        ("port: 1\nport: 2", "line 1: 'port' stands there twice"),
        ("engine-flags: {seed: 1, seed: 2}", "'seed' stands there twice"),
        ("engine-flags: {trust-remote-code: true}", "engine flag '--trust-remote-code' is refused: code that lies in"),
        ("engine-flags: {port: 1}", "engine flag '--port' is refused: it is the launcher's own flag"),
        ("engine-flags: [seed]", "'engine-flags' must be a mapping"),
        ("environment: {a b: 1}", "'a b' must be a variable's name"),
        ("environment: {A: [1]}", "'A' must be a variable's name with a text or a number"),
        ("", "it must be a mapping of flags to values"),
        ("- port", "it must be a mapping of flags to values"),
        ("{", "not readable as YAML"),
        ("port: !!python/object/apply:os.system [true]", "not readable as YAML"),
        ("a: &a [*a]", "line 1: aliases are not read"),
        ("engine-flags: {a: &a [1], hf-overrides: {b: *a}}", "line 1: aliases are not read"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "'max-num-seqs' and 'max_num_seqs' are the same"),
        ("engine-flags: {max-logprobs: 1, max_logprobs: 2}", "'max-logprobs' and 'max_logprobs' are the same"),
        ("engine_flags: {seed: 1}\nengine-flags: {seed: 2}", "'engine_flags' and 'engine-flags' are the same"),
        ("port: !!map [b]", "not readable as YAML"),
        ("port: !!set [b]", "not readable as YAML"),
        ("port: !!omap [b]", "not readable as YAML"),
        ("served-model-name: !!set {b}", "'served-model-name' is set that no program takes"),
        ("served-model-name: !!binary AAAA", "'served-model-name' is bytes that no program takes"),
        ('served-model-name: "a\\0b"', "'served-model-name' is str that no program takes"),
        ('served-model-name: "\\ud800"', "'served-model-name' is no text"),
        ('environment: {A: "a\\0b"}', "'A' is str that no program takes"),
        ('engine-flags: {tokenizer-mode: "a\\0"}', "'tokenizer-mode' is str that no program takes"),
        ('engine-flags: {stop: [a, "b\\0"]}', "'stop' is str that no program takes"),
        ("engine-flags: {hf-overrides: {a: 2024-01-01}}", "'hf-overrides' is no text"),
        (f"port: 0x{'f' * 9999}", "'port' is no text"),
        ("2024-01-01: 1", "unknown key datetime.date(2024, 1, 1)"),
        ("[a]: 1", "not readable as YAML"),
    ],
)
def test_a_mistake_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    file = written(tmp_path, text)
    said = user_error(parse, ["--config", file])
    assert expected in said
    assert said.startswith(file)
    assert "\n" not in said


def test_a_file_that_is_none(tmp_path: Path) -> None:
    assert "cannot be read" in user_error(parse, ["--config", str(tmp_path / "none.yaml")])
    assert "cannot be read" in user_error(parse, ["--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    assert "not readable as YAML" in user_error(parse, ["--config", str(tmp_path / "latin.yaml")])
    assert "larger than" in user_error(parse, ["--config", written(tmp_path, "#" * (LARGEST_BYTES + 1))])
    assert "unknown profile '910b-8x64-bf16' (did you mean '910b-8x64g-bf16'?)" in user_error(
        parse, ["--profile", "910b-8x64-bf16"]
    )
    assert "unknown profile '../../etc/passwd'" in user_error(parse, ["--profile", "../../etc/passwd"])


WORDS = [
    "port: ",
    "8123\n",
    "a: ",
    "model: ",
    "engine-flags: ",
    "environment: ",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "x: 1",
    "A",
    "&a ",
    "*a",
    "<<: ",
    "!!map ",
    "!!set ",
    "!!omap ",
    "!!pairs ",
    "!!binary ",
    "!!timestamp ",
    "!!int ",
    "!!float ",
    "!!str ",
    "!!null ",
    "!!bool ",
    "? ",
    ": ",
    "- ",
    "\n",
    "\n  ",
    "|\n  ",
    "'",
    '"',
    "\\0",
    "1e999",
    "2024-01-01",
    "~",
    "--- ",
    "%x ",
]
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
names = st.sampled_from(["port", "model", "hang", "expert-parallel", "engine-flags", "environment", "cards", "x"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        names, st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(scalars, inner), max_leaves=4)
    )
)
def test_whatever_a_file_holds_there_are_settings_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object]
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    try:
        port = parse(["--config", str(file)]).port
    except UserError as error:
        said = str(error)
    else:
        said = ""
        assert content.get("port") is None or int(str(content["port"])) == port
    assert "\n" not in said


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9))
def test_whatever_yaml_is_made_of_there_are_settings_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "words.yaml"
    file.write_text("".join(words))
    try:
        found = str(parse(["--config", str(file)]).port)
    except UserError as error:
        found = str(error)
    assert found
    assert "\n" not in found


def test_flags_of_settings() -> None:
    assert as_flags({"a": True, "b": False, "c": None, "d": [1, 2], "e": {"x": 1}, "f": "-1"}) == [
        "--a",
        "--no-b",
        "--d",
        "1",
        "2",
        "--e",
        '{"x": 1}',
        "--f=-1",
    ]


@pytest.mark.parametrize("words", [["--model", "a\0b"], ["--served-model-name=a\0"], ["--", "--seed", "1\0"]])
def test_a_nul_on_the_command_line_is_one_line(words: list[str]) -> None:
    with pytest.raises(UserError, match="NUL character") as caught:
        parse(words)
    assert "\0" not in str(caught.value)
