"""The readers of vendors' tools, on recorded outputs and on every way to cut them off."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.doctor import hccn_tool, npu_smi, nvidia_smi
from tests.sick_machines import RECORDED, recorded

ALL = sorted(path.name for path in RECORDED.glob("*.txt"))
TABLES = [name for name in ALL if "+---" in recorded(name)]

# version, cards as (npu, chip, name), all healths, HBM used and total of the first, processes
SHOWN = {
    "npu-smi-24.1.0.3-910b3-idle.txt": (
        "24.1.0.3",
        [(i, 0, "910B3") for i in range(8)],
        {"OK"},
        (3382, 65536),
        [],
    ),
    "npu-smi-23.0.7-910b2-held-elsewhere.txt": (
        "23.0.7",
        [(i, 0, "910B2") for i in range(8)],
        {"OK"},
        (29954, 65536),
        [],
    ),
    "npu-smi-24.1.rc3-910b4-in-kubernetes.txt": (
        "24.1.rc3",
        [(i, 0, "910B4") for i in (0, 3, 4, 7)],
        {"OK"},
        (2843, 32768),
        [],
    ),
    "npu-smi-25.2.2-910b4-1-serving.txt": (
        "25.2.2",
        [(0, 0, "910B4-1"), (1, 0, "910B4-1")],
        {"OK"},
        (61825, 65536),
        [(0, 0, 19334, "VLLMWorker_TP", 58472), (1, 0, 19341, "VLLMWorker_TP", 58472)],
    ),
    "npu-smi-24.1.rc1-910b3-cut-off.txt": ("24.1.rc1", [(0, 0, "910B3")], {"OK"}, (3525, 65536), []),
    "npu-smi-23.0.rc1-910prob.txt": ("23.0.rc1", [(2, 0, "910ProB")], {"OK"}, (1, 32768), []),
    "npu-smi-26.0.rc2-a3-beginning.txt": (
        "26.0.rc2",
        [(0, 0, "Ascend910"), (0, 1, "Ascend910")],
        {"OK"},
        (3419, 65536),
        [],
    ),
    "npu-smi-23.0.rc3-310b4.txt": ("23.0.rc3", [(0, 0, "310B4")], {"OK"}, (None, None), []),
    "npu-smi-ours-26-two-dies-serving.txt": (
        "26.0.rc1",
        [(5, 0, "Ascend910"), (5, 1, "Ascend910")],
        {"OK"},
        (3140, 65536),
        [(5, 1, 1777209, "", 56684)],
    ),
    "npu-smi-ours-alarm.txt": (
        "24.1.0.3",
        [(i, 0, "910B3") for i in range(8)],
        {"OK", "Warning", "Alarm", "Critical"},
        (3382, 65536),
        [],
    ),
    "npu-smi-ours-other-language.txt": (
        "24.1.0.3",
        [(i, 0, "910B3") for i in range(8)],
        {"正常"},
        (3382, 65536),
        [],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_recorded_table(name):
    version, cards, healths, hbm, processes = SHOWN[name]
    table = npu_smi.parse_info(recorded(name))
    assert [(card.npu, card.chip, card.name) for card in table.cards] == cards
    assert {card.health for card in table.cards} == healths
    assert (table.cards[0].hbm_used, table.cards[0].hbm_total) == hbm
    assert [(one.npu, one.chip, one.pid, one.name, one.memory) for one in table.processes] == processes
    assert table.version == version
    assert all(20 < card.temperature < 70 for card in table.cards)


@given(st.sampled_from(TABLES), st.data())
def test_a_table_cut_anywhere_shows_no_card_that_is_not_whole(name, data):
    """Whatever is left shows cards and processes as the whole table does, or not at all."""
    text = recorded(name)
    whole = npu_smi.parse_info(text)
    at = data.draw(st.integers(0, len(text.encode())))
    table = npu_smi.parse_info(text.encode()[:at].decode(errors="replace"))
    assert table.cards == whole.cards[: len(table.cards)]
    assert table.processes == whole.processes[: len(table.processes)]
    assert len(table.cards) < len(whole.cards) or text[:at].count("|") > 0


@given(st.sampled_from(TABLES), st.data())
def test_a_table_with_a_line_lost_shows_no_card_with_another_s_figures(name, data):
    lines = recorded(name).splitlines(keepends=True)
    lost = data.draw(st.integers(0, len(lines) - 1))
    whole = npu_smi.parse_info("".join(lines))
    table = npu_smi.parse_info("".join(lines[:lost] + lines[lost + 1 :]))
    assert len({(card.npu, card.chip) for card in table.cards}) == len(table.cards)
    without_hbm = [replace(card, hbm_used=None, hbm_total=None) for card in whole.cards]  # if the heading is lost
    assert all(card in whole.cards or card in without_hbm for card in table.cards)


@given(st.text())
def test_any_text_is_read_without_a_fault(text):
    npu_smi.parse_info(text)
    npu_smi.parse_fields(text)
    npu_smi.says(text)
    nvidia_smi.parse_csv(text, nvidia_smi.GPU)
    nvidia_smi.says(text)
    for parse in (hccn_tool.parse_link, hccn_tool.parse_net_health, hccn_tool.parse_ip, hccn_tool.parse_tls):
        parse(text)


@pytest.mark.parametrize("name", [name for name in ALL if "npu-smi" in name and name not in TABLES])
@settings(max_examples=25)
@given(data=st.data())
def test_a_list_cut_anywhere_says_nothing_that_it_did_not(name, data):
    text = recorded(name)
    fields = npu_smi.parse_fields(text)
    part = npu_smi.parse_fields(text[: data.draw(st.integers(0, len(text)))])
    assert part.items() <= fields.items()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("npu-smi-health-ok.txt", {"NPU ID": "0", "Health": "OK", "Error Code": "NA", "Error Information": "NA"}),
        ("npu-smi-board-23.0.5.txt", {"Firmware Version": "7.1.0.7.220", "PCIe Bus Info": "0000:61:00.0"}),
        ("npu-smi-ecc-23.0.5.txt", {"HBM Double Bit Error Count": "0", "DDR Single Bit Error Count": "0"}),
    ],
)
def test_a_recorded_list(name, expected):
    assert expected.items() <= npu_smi.parse_fields(recorded(name)).items()


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("npu-smi-ecc-clean.txt", (0, 0, 0)),
        ("npu-smi-ecc-23.0.5.txt", (0, 0, 0)),
        ("npu-smi-ours-ecc-now.txt", (1, 3, 0)),
        ("npu-smi-ours-ecc-before.txt", (0, 3, 3)),
    ],
)
def test_uncorrected_errors(name, counts):
    found = npu_smi.uncorrected_errors(npu_smi.parse_fields(recorded(name)))
    assert tuple(found.values()) == counts


def test_no_counts_are_not_zero_errors():
    assert npu_smi.uncorrected_errors(npu_smi.parse_fields(recorded("npu-smi-health-ok.txt"))) is None
    assert npu_smi.uncorrected_errors({"HBM Double Bit Error Count": "NA"}) is None


@pytest.mark.parametrize(
    ("name", "chips", "family"),
    [
        ("910B3", 1, "A2"),
        ("910B4-1", 1, "A2"),
        ("910B2C", 1, "A2"),
        ("Ascend910", 2, "A3"),
        ("Ascend910", 1, None),
        ("910B", 1, "the first Ascend 910"),
        ("910ProB", 1, "the first Ascend 910"),
        ("310P3", 1, "310P"),
        ("Ascend950DT", 1, None),
    ],
)
def test_family(name, chips, family):
    assert npu_smi.family(name, chips) == family


SAYS = [
    ("npu-smi-8005.txt", npu_smi.says, "the driver does not start"),
    ("npu-smi-8020.txt", npu_smi.says, "another container holds the cards"),
    ("nvidia-smi-mismatch.txt", nvidia_smi.says, "the driver was updated while an older one was loaded"),
    ("nvidia-smi-no-driver.txt", nvidia_smi.says, "no driver is loaded"),
    ("nvidia-smi-lost.txt", nvidia_smi.says, "a card does not answer any more"),
    ("nvidia-smi-no-devices.txt", nvidia_smi.says, "the driver sees no card"),
]


@pytest.mark.parametrize(("name", "says", "meaning"), SAYS)
def test_what_a_tool_says_instead(name, says, meaning):
    assert says(recorded(name))[0] == meaning
    assert npu_smi.parse_info(recorded(name)).cards == []


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_no_complaint(name):
    assert npu_smi.says(recorded(name)) is None


HCCN = [
    ("hccn-link-up.txt", hccn_tool.parse_link, "UP"),
    ("hccn-link-down.txt", hccn_tool.parse_link, "DOWN"),
    ("hccn-health-success.txt", hccn_tool.parse_net_health, "Success"),
    ("hccn-health-fault.txt", hccn_tool.parse_net_health, "Fault"),
    ("hccn-health-init.txt", hccn_tool.parse_net_health, "Init"),
    ("hccn-ip.txt", hccn_tool.parse_ip, "10.20.30.10"),
    ("hccn-tls-off.txt", hccn_tool.parse_tls, False),
    ("hccn-tls-off-long.txt", hccn_tool.parse_tls, False),
    ("hccn-tls-on.txt", hccn_tool.parse_tls, True),
]


@pytest.mark.parametrize(("name", "parse", "value"), HCCN)
def test_hccn_tool(name, parse, value):
    text = recorded(name)
    assert parse(text) == value
    assert {parse(text[:at]) for at in range(len(text))} <= {None, value}  # cut off it says the same, or nothing


@pytest.mark.parametrize("text", ["link status: DISCONNECTED\n", "link status:\n", "net health status: fine\n", ""])
def test_hccn_tool_in_words_that_are_not_known(text):
    assert hccn_tool.parse_link(text) is None
    assert hccn_tool.parse_net_health(text) is None


def test_rows_of_nvidia_smi():
    rows = nvidia_smi.parse_csv(recorded("nvidia-smi-ours-h20-idle.txt"), nvidia_smi.GPU)
    assert (len(rows), rows[7]["index"], rows[7]["name"], rows[7]["driver_version"]) == (
        8,
        "7",
        "NVIDIA H20",
        "570.124.06",
    )


@given(st.sampled_from([name for name in ALL if "nvidia-smi-ours-h20-" in name and "apps" not in name]), st.data())
def test_rows_cut_anywhere_are_whole_or_left_out(name, data):
    text = recorded(name)
    whole = nvidia_smi.parse_csv(text, nvidia_smi.GPU)
    rows = nvidia_smi.parse_csv(text[: data.draw(st.integers(0, len(text)))], nvidia_smi.GPU)
    assert rows == whole[: len(rows)]


@pytest.mark.parametrize("value", ["[N/A]", "ERR!", "-1", "1.5", "", "[GPU requires reset]"])
def test_what_is_no_number(value):
    assert nvidia_smi.number(value) is None


def test_every_recording_has_its_source():
    page = recorded("README.md")
    patterns = [
        re.compile(name.replace("\\", "").replace(".", r"\.").replace("*", ".*")) for name in NAME.findall(page)
    ]
    unnamed = [path.name for path in RECORDED.iterdir() if not any(one.fullmatch(path.name) for one in patterns)]
    assert unnamed == ["README.md"]


NAME = re.compile(r"[\w.-]+(?:\\\*)?[\w.-]*\.(?:txt|info)")
