"""`serve doctor` on Ascend: driver, CANN, packages, cards and links, each sick and well."""

import json

import pytest

from serve.doctor import links, npu_cards, npu_driver, packages
from tests.sick_machines import OPP_KERNELS, case_name, lay_out, npu_smi, recorded, told

SEVERAL = {"asked": {"nodes": 2}}
ETH0 = {"asked": {"nodes": 2, "network_interface": "eth0"}}
TABLE = recorded("npu-smi-24.1.0.3-910b3-idle.txt")
NO_CARDS = ["/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"]


def tool(cases):
    return {"tools": {"npu-smi": cases}}


def hccn(cases):
    """Two cards, and what hccn_tool says of them."""
    two = {"info": "npu-smi-25.2.2-910b4-1-serving.txt"}
    return {**ETH0, "tools": {"npu-smi": two, "hccn_tool": cases}}


# check: what is changed on a healthy machine, and the beginning of a line that it then says.
SICK = {
    npu_driver.check_device: [
        ("npu", {"packages": {"torch_npu": None}}, "error torch_npu is not installed"),
        ("npu", {"packages": {"torch": "2.9.0"}}, "error torch_npu 2.10.0.post4 does not match torch 2.9.0"),
        ("npu", {"environ": {"ASCEND_HOME_PATH": None}}, "error CANN is not sourced"),
        ("npu", {"nodes": []}, "error no Ascend driver"),
        ("npu", {"nodes": NO_CARDS}, "error no Ascend card is visible"),
    ],
    npu_driver.check_nodes: [
        ("npu", {"without": ["/dev/devmm_svm"]}, "error /dev/devmm_svm is missing"),
        ("npu", {"without": ["/dev/hisi_hdc"]}, "error /dev/hisi_hdc is missing"),
    ],
    npu_driver.check_driver: [
        (
            "npu",
            {"files": {"/usr/local/Ascend/driver/lib64/libdriver.so": None}},
            "error there is no /usr/local/Ascend",
        ),
        ("npu", {"files": {"/usr/local/Ascend/driver/version.info": None}}, "unknown the driver's version"),
        ("npu", {"files": {"/usr/local/Ascend/firmware/version.info": None}}, "unknown whether driver and firmware"),
        (
            "npu",  # a pair seen in public: parts of the runtime failed until the driver was updated
            {"files": {"/usr/local/Ascend/driver/version.info": recorded("driver-24.1.rc2.2-version.info")}},
            "warning firmware 7.5.0.1.129 does not fit (driver 24.1.rc2.2 names 7.0.0 to 7.2.99",
        ),
    ],
    npu_driver.check_cann: [
        ("npu", {"files": {"/cann/version.cfg": "version=8.5.1\n"}}, "warning CANN is 8.5.1"),
        ("npu", {"files": {"/cann/version.cfg": None}}, "unknown CANN's version"),
        (
            "npu",
            {"files": {f"{OPP_KERNELS}/ascend910b/binary_info_config.json": None, f"{OPP_KERNELS}/ascend310p/x": ""}},
            "error the kernels of the 910B are not installed, only those of ascend310p",
        ),
        (
            "npu",
            {"files": {f"{OPP_KERNELS}/ascend910b/binary_info_config.json": None}},
            "unknown whether the kernels of the 910B are installed",
        ),
    ],
    npu_driver.check_nnal: [
        ("npu", {"files": {"/nnal/lib/libatb.so": None}}, "error libatb.so is not found"),
        ("npu", {"environ": {"LD_LIBRARY_PATH": None}}, "error libatb.so is not found"),
    ],
    packages.check_wheel: [
        (
            "npu",
            {"files": {"/site/vllm_ascend/_build_info.py": "__device_type__ = 'A3'"}},
            "error vllm-ascend is built",
        ),
        ("npu", {"files": {"/site/vllm_ascend/_build_info.py": None}}, "unknown whether vllm-ascend is built"),
        (
            "npu",
            {
                "files": {
                    "/site/vllm_ascend/_build_info.py": None,
                    "/site/vllm_ascend-0.23.0.post1.dist-info/direct_url.json": '{"url": 3}',
                }
            },
            "unknown whether vllm-ascend is built",
        ),
        ("npu", {"tools": {"npu-smi": None}}, "unknown whether vllm-ascend is built"),
    ],
    packages.check_triton: [
        ("npu", {"packages": {"triton_ascend": None}}, "error triton-ascend is not installed"),
        ("npu", {"packages": {"triton": "3.5.0"}}, "warning triton 3.5.0 lies beside triton-ascend"),
        (
            "npu",
            {"files": {"/site/triton/__init__.py": "raise OSError('no bishengir')"}},
            "error triton does not import",
        ),
        ("npu", {"files": {"/site/triton/backends.py": "backends = {'nvidia': 1}"}}, "error triton has no backend"),
    ],
    npu_cards.check_npu_smi: [
        ("npu", {"tools": {"npu-smi": None}}, "unknown health and free memory of the cards (npu-smi is not installed)"),
        ("npu", npu_smi(("", 0)), "unknown health and free memory of the cards (npu-smi's table is of a layout"),
        ("npu", npu_smi((TABLE, 3)), "unknown health and free memory of the cards (npu-smi ended with code 3)"),
        (
            "npu",
            npu_smi((recorded("npu-smi-8005.txt"), 255)),
            "error npu-smi shows no cards: the driver does not start",
        ),
        ("npu", npu_smi((recorded("npu-smi-8020.txt"), 255)), "error npu-smi shows no cards: another container holds"),
        (
            "npu",
            npu_smi("npu-smi-24.1.rc1-910b3-cut-off.txt"),
            "error not every card is shown (npu-smi shows 1 and /dev has 8",
        ),
        ("npu", npu_smi((TABLE.replace("3     910B3", "3     910B4"), 0)), "warning the cards are of different kinds"),
    ],
    npu_cards.check_chip: [
        ("npu", npu_smi("npu-smi-23.0.rc1-910prob.txt"), "error 910ProB is the first Ascend 910"),
        ("npu", npu_smi("npu-smi-26.0.rc2-a3-beginning.txt"), "error Ascend910 is A3"),
        ("npu", npu_smi((TABLE.replace("910B3", "X9000"), 0)), "unknown what kind of chip X9000 is"),
    ],
    npu_cards.check_health: [
        ("npu", npu_smi("npu-smi-ours-alarm.txt"), "warning card 2 has health Warning (a minor alarm"),
        ("npu", npu_smi("npu-smi-ours-alarm.txt"), "error card 5 has health Alarm (a major alarm"),
        ("npu", npu_smi("npu-smi-ours-alarm.txt"), "error card 7 has health Critical (a critical alarm"),
        ("npu", npu_smi("npu-smi-ours-other-language.txt"), "unknown the health of card 0 (npu-smi says '正常')"),
        ("npu", npu_smi((TABLE.replace("98.9        38 ", "98.9        95 "), 0)), "warning card 0 has 95 °C"),
        ("npu", npu_smi((TABLE.replace("98.9        38 ", "98.9        -  "), 0)), "unknown card 0: its temperature"),
    ],
    npu_cards.check_memory: [
        (
            "npu",
            npu_smi("npu-smi-25.2.2-910b4-1-serving.txt"),
            "warning card 1: pid 19341 (VLLMWorker_TP) holds 58472 MB",
        ),
        (
            "npu",
            npu_smi("npu-smi-23.0.7-910b2-held-elsewhere.txt"),
            "warning card 3: 29951 of 65536 MB are in use, and no",
        ),
        ("npu", npu_smi("npu-smi-ours-26-two-dies-serving.txt"), "warning card 5: pid 1777209 (name not shown)"),
        ("npu", npu_smi("npu-smi-23.0.rc3-310b4.txt"), "unknown card 0: its free memory"),
    ],
    npu_cards.check_visible: [
        (
            "npu",
            {"environ": {"ASCEND_RT_VISIBLE_DEVICES": "4,9"}},
            "error ASCEND_RT_VISIBLE_DEVICES=4,9 names card 9, and 8 are there",
        )
    ],
    npu_cards.check_ecc: [
        (
            "npu",
            tool({"info -t ecc*": "npu-smi-ours-ecc-now.txt"}),
            "error card 0: HBM Double Bit Error",
        ),
        (
            "npu",
            tool({"info -t ecc*": "npu-smi-ours-ecc-before.txt"}),
            "warning card 0: HBM Double Bit",
        ),
        (
            "npu",
            tool({"info -t ecc*": ("not supported\n", 1)}),
            "unknown card 0: errors of its memory",
        ),
    ],
    npu_cards.check_firmware: [
        (
            "npu",
            tool({"info -t board*": "npu-smi-ours-board-mismatch.txt"}),
            "error npu-smi says 'NOT OK'",
        ),
        ("npu", tool({"info -t board*": ("", 1)}), "unknown whether driver and firmware fit"),
    ],
    links.check_interface: [
        ("cpu", {"asked": {"nodes": 2, "network_interface": "ib7"}}, "error there is no network interface ib7"),
        ("cpu", {"asked": {"nodes": 2, "network_interface": "eth1"}}, "error network interface eth1 is down"),
        ("cpu", SEVERAL, "warning no network interface is chosen, and not set: GLOO_SOCKET_IFNAME (servers"),
    ],
    links.check_hccl_port: [
        (
            "npu",
            {**ETH0, "files": {"/proc/net/tcp": "head\n 0: 00000000:EA7F 00000000:0000 0A\n"}},
            "error of HCCL's ports, 60031 is taken",
        ),
        ("npu", {**ETH0, "files": {"/proc/net/tcp": None}}, "unknown whether ports 60000 to 60031 are free"),
        ("npu", {**ETH0, "environ": {"HCCL_IF_BASE_PORT": "8075"}}, "error of HCCL's ports, 8080 is taken"),
        ("npu", {**ETH0, "environ": {"HCCL_IF_BASE_PORT": "x"}}, "error HCCL_IF_BASE_PORT=x"),
        ("npu", {**ETH0, "environ": {"HCCL_HOST_SOCKET_PORT_RANGE": "auto"}}, "note HCCL_HOST_SOCKET_PORT_RANGE=auto"),
    ],
    links.check_hccn: [
        ("npu", hccn(None), "unknown the cards' network ports (hccn_tool is not installed)"),
        ("npu", {**ETH0, "tools": {"npu-smi": None}}, "unknown the cards' network ports (npu-smi did not tell"),
        ("npu", hccn({"-i 1 -link -g": "hccn-link-down.txt"}), "error card 1: its network port is DOWN"),
        ("npu", hccn({"-i 1 -link -g": ("", 1)}), "unknown card 1: its network port"),
        ("npu", hccn({"*-net_health -g": "hccn-health-fault.txt"}), "error card 0: network health Fault"),
        ("npu", hccn({"*-net_health -g": "hccn-health-init.txt"}), "note card 0: its network health is not watched"),
        ("npu", hccn({"*-net_health -g": ("?", 0)}), "unknown card 0: its network health"),
        ("npu", hccn({"*-ip -g": ("", 1)}), "unknown card 0: the address of its network port"),
        ("npu", hccn({"-i 1 -tls -g": "hccn-tls-on.txt"}), "error TLS is on for some cards and off for others"),
        ("npu", hccn({"*-tls -g": ("", 1)}), "unknown whether TLS is the same on all cards"),
    ],
}
SLOW = (links.check_hccn, npu_cards.check_ecc)  # they ask a tool for every card
CASES = [
    pytest.param(check, *case, marks=(pytest.mark.slow, pytest.mark.beside) if check in SLOW else ())
    for check, cases in SICK.items()
    for case in cases
]


@pytest.mark.parametrize(("check", "device", "changes", "line"), CASES, ids=case_name)
def test_a_sick_machine(check, device, changes, line, tmp_path):
    found = told(check, lay_out(tmp_path, device, **changes))
    assert any(one.startswith(line) for one in found), found


def test_detail_of_a_sick_card(tmp_path):
    """The error code is asked for where there is time."""
    changes = {
        "tools": {"npu-smi": {"info": "npu-smi-ours-alarm.txt", "info -t health*": "npu-smi-ours-health-alarm.txt"}}
    }
    line = "error card 5 has health Alarm: 80E01801, node type=SOC, sensor type=Temperature (a major alarm"
    assert any(one.startswith(line) for one in told(npu_cards.check_health, lay_out(tmp_path, **changes)))


@pytest.mark.parametrize(("codes", "nodes", "level"), [
    ("81078603", 1, "warning"), ("0x81078603", 1, "warning"), ("81078603,80E01801", 1, "error"),
    ("81078603", 2, "error"), ("NA", 1, "error"),
])  # fmt: skip
def test_an_alarm_of_a_network_that_is_not_used_stops_nothing(codes, nodes, level, tmp_path):
    said = f"  Health Status : Alarm\n  Error Code : {codes}\n  Error Information : NA\n"
    tools = {"npu-smi": {"info": "npu-smi-ours-alarm.txt", "info -t health*": (said, 0)}}
    found = told(npu_cards.check_health, lay_out(tmp_path, tools=tools, asked={"nodes": nodes}, quick=True))
    assert [line.split()[0] for line in found if "has health Alarm" in line] == [level]


def test_an_editable_install_says_what_it_was_built_for(tmp_path):
    source = tmp_path / "a source"
    (source / "vllm_ascend").mkdir(parents=True)
    (source / "vllm_ascend" / "_build_info.py").write_text("__device_type__ = 'A2'\n")
    files = {
        "/site/vllm_ascend/_build_info.py": None,
        "/site/vllm_ascend-0.23.0.post1.dist-info/direct_url.json": json.dumps({"url": source.as_uri()}),
    }
    found = told(packages.check_wheel, lay_out(tmp_path / "machine", files=files))
    assert found == ["ok vllm-ascend is built for A2"]


@pytest.mark.parametrize(("visible", "cards"), [(None, {2, 5, 7}), ("0,1", set()), ("5", {5}), ("6,7", {7})])
def test_cards_that_are_left_out_are_not_looked_at(visible, cards, tmp_path):
    m = lay_out(tmp_path, environ={"ASCEND_RT_VISIBLE_DEVICES": visible}, **npu_smi("npu-smi-ours-alarm.txt"))
    lines = [line for line in told(npu_cards.check_health, m) if "has health" in line]
    assert {int(line.split()[2]) for line in lines} == cards


def test_with_a_card_missing_nobody_knows_how_they_count(tmp_path):
    m = lay_out(tmp_path, environ={"ASCEND_RT_VISIBLE_DEVICES": "5"}, **npu_smi("npu-smi-24.1.rc1-910b3-cut-off.txt"))
    assert [card.npu for card in npu_cards.used(m)] == [0]


def test_a_device_node_that_may_not_be_opened(tmp_path, monkeypatch):
    m = lay_out(tmp_path)
    monkeypatch.setattr(npu_driver, "_may_open", lambda m, name: name not in ("davinci2", "davinci3"))
    assert told(npu_driver.check_nodes, m) == [
        "error this user may not open /dev/davinci2 and 1 more (torch_npu would find no card); usermod -aG HwHiAiUser "
        "USER, then log in again; in a container run as a user of that group"
    ]
