"""`serve/launch.sh --speculative` as a user calls it: text as without drafts, and what was accepted is said."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest
import torch

import ascend
from convert.demo import write_demo
from convert.eagle3_init import write_head
from perf import serve
from serve.watch.acceptance import Acceptance, acceptance_of
from tests.drafts import fit_eagle3
from tests.launcher import Launched

PROMPT = list(range(100, 130))
TOKENS = 40
PAGE = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 20.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 300.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 60.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 30.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 0.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 30.0
"""


def test_acceptance_is_read_over_all_ranks() -> None:
    found = acceptance_of(PAGE)
    assert found == Acceptance(120, 360, 30)
    assert str(found) == "30 of 360 accepted (8%), 1.25 tokens a step"
    assert str(Acceptance(0, 0, 0)) == "none verified yet"
    assert acceptance_of("vllm:num_requests_running 0") is None


@pytest.mark.slow
@pytest.mark.beside
def test_the_launcher_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With an EAGLE3 head; with MTP layers it does in `tests/npu_launch`. `perf serve` says what was accepted."""
    model, head = tmp_path / "tiny", tmp_path / "head"
    write_demo(model, dtype="fp32")
    write_head(head, model, dtype="fp32")
    fit_eagle3(head, model, [PROMPT], TOKENS, steps=60)
    launched = Launched(
        tmp_path, "--device", "cpu", "--dtype", "float32", "--model", str(model), "--speculative", f"eagle3:{head}"
    )
    try:
        ready = launched.wait_until_ready()
        asked = {"model": ready["model"], "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        body = json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode()
        request = urllib.request.Request(f"{ready['base_url']}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            tokens = json.load(answer)["choices"][0]["token_ids"]
        load = ["--concurrency", "1", "--requests", "1", "--repeats", "1", "--scale", "0.1", "--precision", "fp32"]
        where = ["--base-url", ready["base_url"], "--served-model-name", ready["model"], "--model", str(model)]
        assert serve.main([*where, *load, "--out", str(tmp_path / "out.json")]) == 0
    finally:
        assert launched.stop() == 0
    expected = ascend.generate(ascend.load_model(model), torch.tensor([PROMPT]), TOKENS)[0, len(PROMPT) :]
    assert tokens == expected.tolist()
    heading, line = capsys.readouterr().out.splitlines()[1:3]
    assert heading.split()[-2:] == ["%", "tok/step"]
    assert float(line.split()[-1]) >= 1.0
    output = launched.output
    assert re.search(r"drafts:   \d+ of \d+ accepted", output), output
    accepted = re.search(r"^drafts: (\d+) of \d+ accepted", output, re.MULTILINE)
    assert accepted, output
    assert int(accepted[1]) > 5
