"""Device faults are found by what the runtimes print, on the right card, and never in what a client could write."""

from __future__ import annotations

import pytest

from serve.watch.faults import ACTIONS, TABLE, faults_in

# As the sources of the table have it: torch_npu's own words, CANN's, CUDA's, with a Python name before them.
PRINTED = {
    "HBM-ECC": "RuntimeError: Run:NPUQueue.cpp:47 NPU function error: HBM MULTI BIT ECC ERROR, error code is 507054",
    "UCE": "RuntimeError: operator():NPUStream.cpp:47 NPU function error: UCE ERROR, error code is 507053",
    "suspect-memory": "RuntimeError: Run:NPUQueue.cpp:1 NPU function error: SUSPECT MEM ERROR, error code is 507055",
    "CUDA-ECC": "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
    "Xid-memory": "NVRM: Xid (PCI:0000:3b:00): 48, pid=1234, An uncorrectable double bit error (DBE) has been detected",
    "card-lost": "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.",
    "fabric": "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    "driver": "RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version",
    "other-chip": "RuntimeError: CUDA error: no kernel image is available for execution on the device",
    "CANN-missing": "ImportError: libatb.so: cannot open shared object file: No such file or directory",
    "HCCS-link": "RuntimeError: NPU function error: HCCS LINK ERROR, error code is 507056",
    "HCCL-retry": "RuntimeError: NPU function error: HCCL OP RETRY FAILED, error code is 507904",
    "suspect-remote": "RuntimeError: NPU function error: SUSPECT REMOTE ERROR, error code is 507057",
    "aicore-timeout": "RuntimeError: ACL stream synchronize failed, error code:507014",
    "aicore-exception": "RuntimeError: ACL stream synchronize failed, error code:507035",
    "aicpu": "RuntimeError: NPU function error: aclrtSynchronizeStream, error code is 507018",
    "fftsplus-timeout": "EH9999: [PID: 961] 2025-09-07-01:11:09 synchronize stream failed, runtime result = 507048",
    "stream-timeout": "RuntimeError: NPU function error: AclrtSynchronizeStreamWithTimeout, error code is 507046",
    "heartbeat-lost": "RuntimeError: NPU function error: aclrtSynchronizeStream, error code is 507010",
    "driver-internal": "RuntimeError: NPU function error: aclrtMalloc, error code is 507899",
    "HCCL-connect": "EI0006: [PID: 1] 2025-09-07-01:11:09 Getting socket times out. Reason: Remote Rank did not send",
    "collective-timeout": "[rank3]:[E904 ProcessGroupNCCL.cpp:6] [Rank 3] Watchdog caught collective operation timeout",
    "NPU-memory": "torch.OutOfMemoryError: NPU out of memory. Tried to allocate 2.00 GiB (NPU 3; 60.97 GiB total)",
    "NVLink": "RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution",
    "illegal-access": "RuntimeError: CUDA error: an illegal memory access was encountered",
    "illegal-instruction": "RuntimeError: CUDA error: an illegal instruction was encountered",
    "device-assert": "RuntimeError: CUDA error: device-side assert triggered",
    "launch-failure": "RuntimeError: CUDA error: unspecified launch failure",
    "launch-timeout": "RuntimeError: CUDA error: the launch timed out and was terminated",
    "NCCL": "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77: remote process exited or there",
    "CUDA-memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity",
    "force-stop": "RuntimeError: NPU function error: FORCE STOP., error code is 107022",
}  # fmt: skip
# The other spelling of those that have two.
REASONS = {
    "HBM-ECC": "rtStreamSynchronize execute failed, reason=[hbm Multi-bit ECC error][FUNC:FuncErrorReason]",
    "UCE": "rtStreamSynchronize execute failed, reason=[device mem error][FUNC:FuncErrorReason]",
    "suspect-memory": "rtStreamSynchronize execute failed, reason=[suspect device mem error]",
    "HCCS-link": "rtStreamSynchronize execute failed, reason=[link error]",
    "HCCL-retry": "rtStreamSynchronize execute failed, reason=[hccl op retry failed]",
    "aicore-exception": "rtStreamSynchronize execute failed, reason=[aicore exception][FUNC:FuncErrorReason]",
    "aicore-timeout": "rtStreamSynchronize execute failed, reason=[aicore timeout]",
    "fftsplus-timeout": "hccl fftsplus task timeout, timeout=1836s",
    "force-stop": "rtStreamSynchronize execute failed, reason=[device task abort]",
}
PLACE = "ERROR 11-23 08:00:00 [core.py:702] "


@pytest.mark.parametrize("name", [kind.name for kind in TABLE])
def test_each_row_is_found_in_every_process_of_the_engine_and_in_raw_output(name: str) -> None:
    kind = next(kind for kind in TABLE if kind.name == name)
    spellings = [text for text in (PRINTED[name], REASONS.get(name)) if text]
    for text in spellings:
        for prefix in (f"(EngineCore pid=7) {PLACE}", f"(Worker pid=7) {PLACE}", "(EngineCore pid=7) "):
            (fault,) = faults_in([prefix + text])
            assert (fault.name, fault.action) == (name, kind.action)
            assert fault.meaning == kind.meaning
            assert fault.line == prefix + text
        assert faults_in([f"(APIServer pid=7) {PLACE}{text}", f"(ApiServer_1 pid=7) {text}"]) == []
        assert faults_in([f"(EngineCore pid=7) INFO 11-23 08:00:00 [core.py:702] {text}"]) == []
        assert faults_in([f"what a client wrote: {text}", f"user: {text}"]) == []
    assert [fault.name for fault in faults_in([PRINTED[name]])] == [name]
    assert not faults_in([PRINTED[name]])[0].is_signed
    assert kind.action in ACTIONS


def test_memory_faults_isolate_and_what_was_asked_for_is_no_fault() -> None:
    actions = {kind.name: kind.action for kind in TABLE}
    memory = ("HBM-ECC", "UCE", "suspect-memory", "CUDA-ECC", "Xid-memory")
    assert {actions[name] for name in memory} == {"isolate"}
    assert actions["force-stop"] == "ignore"


@pytest.mark.parametrize(
    ("line", "cards"),
    [
        (f"(Worker_TP3 pid=7) {PLACE}{PRINTED['UCE']}", (3,)),
        (f"(VllmWorker TP1 pid=961) {PLACE}{PRINTED['UCE']} (PID:961, Device:5, RankID:-1)", (5,)),
        (f"(EngineCore pid=7) {PLACE}{PRINTED['UCE']}", ()),
        (f"(Worker_DP1_TP0 pid=7) {PLACE}{PRINTED['UCE']} Device:0", ()),
        (f"(EngineCore_DP1 pid=7) {PLACE}{PRINTED['UCE']} npu:0", ()),
        (f"(EngineCore pid=7) {PLACE}{PRINTED['CUDA-memory']}", (1,)),
        (f"(EngineCore pid=7) {PLACE}{PRINTED['UCE']} on npu:6", (6,)),
        (f"(EngineCore pid=7) {PLACE}{PRINTED['UCE']} device id=2 ", (2,)),
        (f"[2026-11-23 08:00:00 TP2] {PRINTED['CUDA-ECC']}", (2,)),
    ],
)
def test_a_card_is_named_only_where_a_line_says_which(line: str, cards: tuple[int, ...]) -> None:
    (fault,) = faults_in([line])
    assert fault.cards == cards


def test_one_fault_in_many_lines_is_one_and_takes_the_card_that_a_near_line_names() -> None:
    prefix = f"(EngineCore pid=7) {PLACE}"
    lines = [prefix + PRINTED["HBM-ECC"], prefix + "[ERROR] 2025-09-07 (PID:9, Device:4, RankID:-1) ERR00100 PTA"]
    lines += [prefix + REASONS["HBM-ECC"], f"(Worker_TP2 pid=8) {PLACE}something of Device:7"]
    (fault,) = faults_in(lines)
    assert (fault.name, fault.cards, fault.line) == ("HBM-ECC", (4,), lines[0])
    assert faults_in([f"(EngineCore pid=7) {PLACE}processed 507015 tokens", "loaded 507054 of 600000"]) == []


def test_only_lines_with_the_mark_of_this_start_are_signed_and_they_count_for_more() -> None:
    signed = f"(Worker_TP3 pid=7) ERROR 11-23 08:00:00 [core.py:702 5eed] {PRINTED['UCE']}"
    (fault,) = faults_in([signed], "5eed")
    assert (fault.is_signed, fault.cards) == (True, (3,))
    planted = [
        signed.replace("5eed", "beef"),
        signed.replace(" 5eed", ""),
        f"(Worker_TP3 pid=7) {PRINTED['UCE']} 5eed] [core.py:702 5eed] ",
        f"[2026-11-23 08:00:00 TP2] {PRINTED['UCE']} 5eed",
        f"{PRINTED['UCE']} [core.py:702 5eed]",
    ]
    assert [fault.is_signed for line in planted for fault in faults_in([line], "5eed")] == [False] * len(planted)
    assert not any(fault.is_signed for fault in faults_in([signed], ""))
    near = "(EngineCore pid=7) ERROR 11-23 08:00:00 [core.py:702 5eed] "
    others = ["(EngineCore pid=7) ERROR 11-23 08:00:00 [core.py:702] Device:4", f"{near}Device:6"]
    (fault,) = faults_in([others[0], near + PRINTED["UCE"], PRINTED["UCE"] + " npu:1", others[1]], "5eed")
    assert (fault.is_signed, fault.cards) == (True, (6,))
