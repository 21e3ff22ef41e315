"""The device layer: every refusal by its exact words, quick and without torch; the facts; the CPU against psutil."""

import os
import re
import subprocess
import sys
import textwrap
import time
import timeit
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascend import devices
from ascend.devices import Host, choose, cuda, get_device, lookup, npu
from ascend.devices.base import last_line
from ascend.devices.cpu import CpuDevice
from ascend.devices.facts import TABLE, Figure
from ascend.errors import UserError
from tests.machines import DRIVER_FILE, NEW_DRIVER, OLD_DRIVER, SOURCED, machine

REPOSITORY = Path(__file__).parents[1]
NPU_NODES = ("/dev/davinci_manager", "/dev/davinci0", "/dev/davinci1")
CUDA_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia-uvm")


def refusal(name, host):
    with pytest.raises(UserError) as error:
        get_device(name, host)
    assert "\n" not in str(error.value)
    return str(error.value)


CPU_TORCH, PAIR = {"torch": "2.13.0+cpu"}, {"torch": "2.10.0+cpu", "torch_npu": "2.10.0.post4"}
CANN = {"packages": PAIR, "environ": SOURCED, "files": {"/cann/opp/x": ""}}
ROOT_CANN, USER_CANN = "/usr/local/Ascend/ascend-toolkit/set_env.sh", "/home/doc/Ascend/cann/set_env.sh"
HALF_SOURCED = {"HOME": "/home/doc", "ASCEND_HOME_PATH": "/cann"}
CUDA_13 = {"nodes": CUDA_NODES, "packages": {"torch": "2.13.0+cu130"}, "built_with": "13.0"}

MACHINES = {
    "npu, no torch_npu": {"packages": CPU_TORCH},
    "npu, bare": {"packages": {"torch_npu": "2.10.0.post4"}},
    "npu, torch too new": {"packages": {**PAIR, **CPU_TORCH}},
    "npu, torch too old": {"packages": {"torch": "2.9.1", "torch_npu": "2.13.0"}},
    "npu, no CANN": {"packages": PAIR},
    "npu, not sourced": {"packages": PAIR, "files": {ROOT_CANN: ""}},
    "npu, half sourced": {**CANN, "files": {USER_CANN: "", "/cann/x": ""}, "environ": HALF_SOURCED},
    "npu, CANN moved": {**CANN, "files": {}},
    "npu, no driver": CANN,
    "npu, no card": {**CANN, "nodes": NPU_NODES[:1]},
    "npu, hidden": {**CANN, "nodes": NPU_NODES, "environ": {**SOURCED, "ASCEND_RT_VISIBLE_DEVICES": ""}},
    "cuda, no driver": {"packages": CPU_TORCH},
    "cuda, no card": {"nodes": ("/dev/nvidiactl", "/dev/nvidia-uvm")},
    "cuda, hidden": {"nodes": CUDA_NODES, "environ": {"CUDA_VISIBLE_DEVICES": "-1"}},
    "cuda, no torch": {"nodes": CUDA_NODES},
    "cuda, CPU build": {"nodes": CUDA_NODES, "packages": CPU_TORCH},
    "cuda, CPU build by its version.py": {"nodes": CUDA_NODES, "packages": {"torch": "2.10.0"}},
    # These two get as far as the torch of these tests, a CPU build, which cannot start CUDA.
    "cuda, old driver": {**CUDA_13, "files": {DRIVER_FILE: OLD_DRIVER}},
    "cuda, torch fails": {**CUDA_13, "files": {DRIVER_FILE: NEW_DRIVER}},
}
# What each is told after "device … is not available: " and before ", or use device cpu", wrapped.
TOLD = """
npu, no torch_npu: torch_npu is not installed; on a machine with an Ascend card run pip install torch==2.10.0
    torch-npu==2.10.0.post4 in an environment of its own
npu, bare: torch is not installed; run pip install torch==2.10.0 torch-npu==2.10.0.post4 in an environment of its own
npu, torch too new: torch_npu 2.10.0.post4 does not match torch 2.13.0+cpu: it is built for torch 2.10.0;
    pip install torch==2.10.0, or torch-npu==2.13.0 for this torch
npu, torch too old: torch_npu 2.13.0 does not match torch 2.9.1: it is built for torch 2.13.0; pip install torch==2.13.0
npu, no CANN: CANN is not sourced: ASCEND_HOME_PATH is not set; install CANN 9.1.0, then
    source /usr/local/Ascend/cann/set_env.sh
npu, not sourced: CANN is not sourced: ASCEND_HOME_PATH is not set; source /usr/local/Ascend/ascend-toolkit/set_env.sh
npu, half sourced: CANN is not sourced: ASCEND_OPP_PATH is not set; source /home/doc/Ascend/cann/set_env.sh
npu, CANN moved: CANN is not where ASCEND_HOME_PATH says: there is no /cann; install CANN 9.1.0, then
    source /usr/local/Ascend/cann/set_env.sh
npu, no driver: no Ascend driver: /dev/davinci_manager is missing; install the driver until npu-smi info lists the
    cards; into a container pass CONTAINER
npu, no card: no Ascend card is visible: the driver is there, but no /dev/davinci0 or other card; check npu-smi info;
    into a container pass CONTAINER
npu, hidden: ASCEND_RT_VISIBLE_DEVICES='' hides every card; unset it, or list indices from 0 to 1 in rising order, such
    as ASCEND_RT_VISIBLE_DEVICES=0
cuda, no driver: no NVIDIA driver: /dev/nvidiactl is missing; install the driver until nvidia-smi lists the cards;
    start a container with --gpus all
cuda, no card: no NVIDIA card is visible: the driver is there, but no /dev/nvidia0 or other card; check nvidia-smi;
    start a container with --gpus all
cuda, hidden: CUDA_VISIBLE_DEVICES='-1' hides every card; unset it, or list indices from 0 to 1, such as
    CUDA_VISIBLE_DEVICES=0
cuda, no torch: torch is not installed; pip install a CUDA build of torch
cuda, CPU build: torch 2.13.0+cpu is a CPU build; install the CUDA build of torch 2.13.0 in its place
cuda, CPU build by its version.py: torch 2.10.0 is a CPU build; install the CUDA build of torch 2.10.0 in its place
cuda, old driver: the NVIDIA driver 535.129.03 is too old for torch 2.13.0+cu130: CUDA 13.0 needs driver 580 or newer;
    update the driver, or install a torch built for an older CUDA
cuda, torch fails: torch cannot start CUDA: Torch not compiled with CUDA enabled;
    python -c 'import torch; torch.cuda.init()' shows it whole
"""
CONTAINER = "--device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc"
UNWRAPPED = TOLD.replace("\n    ", " ").replace("CONTAINER", CONTAINER).strip()
LINES = dict(line.split(": ", 1) for line in UNWRAPPED.splitlines())


@pytest.mark.parametrize("case", MACHINES)
def test_unavailable(case, tmp_path):
    name = case.split(",")[0]
    told = f"device {name} is not available: {LINES[case]}, or use device cpu"
    assert refusal(name, machine(tmp_path, **MACHINES[case])) == told


LAUNCH = "start through serve/launch.sh, which installs it"
NOTHING = "no NPU (torch_npu is not installed), no CUDA device (no NVIDIA driver: /dev/nvidiactl is missing)"
NAMES = "choose one of auto, cpu, cuda, npu"
NO_NUMBER = "a card is named by its number, as in npu:0 or cuda:1"


@pytest.mark.parametrize(
    ("name", "packages", "line"),
    [
        ("cpu", {}, f"device cpu is not available: torch is not installed; {LAUNCH}"),
        ("auto", {}, f"no device is available: {NOTHING}, no CPU (torch is not installed); {LAUNCH}"),
        ("cpu:1", CPU_TORCH, "device cpu:1 does not exist: this process sees cpu:0 alone"),
        ("npx", {}, f"unknown device 'npx' (did you mean 'npu'?): {NAMES}"),
        ("GPU", {}, f"unknown device 'GPU' (did you mean 'cuda'?): {NAMES}"),
        ("", {}, f"unknown device '': {NAMES}"),
        ("npu:a", {}, f"unknown device 'npu:a': {NO_NUMBER}"),
        ("cuda:-1", {}, f"unknown device 'cuda:-1': {NO_NUMBER}"),
        ("auto:1", {}, f"unknown device 'auto:1': {NO_NUMBER}"),
    ],
)
def test_refused_name(name, packages, line, tmp_path):
    assert refusal(name, machine(tmp_path, packages=packages)) == line


@pytest.fixture
def npu_machine(tmp_path, monkeypatch):
    """Return a function: a machine on which nothing is missing but a working torch_npu, which has ``source`` in it."""

    def lay_out(source):
        host = machine(tmp_path, **CANN, nodes=NPU_NODES)
        (tmp_path / "site" / "torch_npu" / "__init__.py").write_text(source)
        (tmp_path / "site" / "torch").rename(tmp_path / "site" / "torch_unused")  # the real one is imported
        monkeypatch.syspath_prepend(tmp_path / "site")
        return host

    yield lay_out
    sys.modules.pop("torch_npu", None)


LOAD = "python -c 'import torch_npu' shows it whole; check the CANN release and the driver's libraries"
NO_LIBRARY = "libhccl.so: cannot open shared object file: No such file or directory"
CODED = r"Two accelerators.\nUse one.\n[ERROR] 2026-01-01 (PID:1) ERR00007 not supported"
SEES_NONE = "torch_npu finds no card although the driver shows one"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (f"raise ImportError('{NO_LIBRARY}')", f"torch_npu does not load: {NO_LIBRARY}; {LOAD}"),
        (f"raise RuntimeError('{CODED}')", f"torch_npu does not load: Use one.; {LOAD}"),
        (
            "class npu: device_count = staticmethod(lambda: 0)",
            f"{SEES_NONE}; check npu-smi info, and that this user is in the driver's group (HwHiAiUser)",
        ),
    ],
)
def test_unavailable_by_torch_npu_itself(source, line, npu_machine):
    assert refusal("npu", npu_machine(source)) == f"device npu is not available: {line}, or use device cpu"


def test_auto_takes_the_npu_first_and_no_card_it_lacks(npu_machine):
    host = npu_machine("class npu: device_count = staticmethod(lambda: 2)")
    assert choose("auto", host)[1] == "device npu: 2 visible"
    assert [str(get_device(name, host)) for name in ("auto", "npu", "npu:1")] == ["npu:0", "npu:0", "npu:1"]
    assert refusal("npu:2", host) == "device npu:2 does not exist: this process sees npu:0 to npu:1"


def test_auto_on_a_machine_without_cards(tmp_path):
    host = machine(tmp_path, packages=CPU_TORCH)
    device, why = choose("auto", host)
    assert (str(device), why) == ("cpu", f"device cpu: {NOTHING}")
    # torch must not load by itself the torch_npu that was passed over
    assert host.environ == {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def test_auto_here_takes_the_first_that_is_there():
    available = [name for name in ("npu", "cuda", "cpu") if devices.DEVICES[name]().why_unavailable() is None]
    device, why = choose()
    assert (device.type, why.split(":")[0]) == (available[0], f"device {available[0]}")


def test_device_nodes_elsewhere(tmp_path):
    elsewhere = {**CANN, "nodes": ["/nodes/davinci_manager"]}
    host = machine(tmp_path, **{**elsewhere, "environ": {**SOURCED, "ASCEND_DEV": str(tmp_path / "nodes")}})
    assert "no Ascend card is visible" in refusal("npu", host)


def run_python(code):
    """Run ``code`` in a fresh interpreter; return (standard output, seconds)."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout, time.perf_counter() - start


def test_import_is_light():
    code = """
        import time; start = time.perf_counter()
        import ascend.devices
        seconds = time.perf_counter() - start
        import sys
        print(seconds, *({"torch", "transformers", "numpy", "torch_npu", "vllm"} & set(sys.modules)))
        """
    runs = [run_python(code)[0].split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.3
    assert [heavy for _, *heavy in runs] == [[], [], []]


@pytest.mark.parametrize("name", ["npu", "cuda"])
def test_refusals_here_are_quick_and_without_torch(name):
    if devices.DEVICES[name](host=Host()).why_unavailable() is None:
        pytest.skip(f"this machine has a device {name}, so there is no refusal to time")
    out, seconds = run_python(f"""
        import sys
        from ascend.devices import UserError, get_device
        try:
            get_device("{name}")
        except UserError as error:
            print("torch" in sys.modules, error)
        """)
    assert out.startswith(f"False device {name} is not available: ")
    assert seconds < 2


FIGURES = [
    (row.name, label, figure)
    for row in TABLE.values()
    for label, figure in {"memory": row.memory, "bandwidth": row.bandwidth, **row.peak}.items()
]
CARDS = {
    *("910B1", "910B2", "910B2C", "910B3", "910B4", "910B4-1", "A100-40G", "A100-80G", "A800-80G", "L20-48G"),
    *("H20-96G", "H20-3e-141G", "H100-80G", "H200-141G", "H800-80G", "CPU"),
}
PLAUSIBLE = {"B": (16 * 2**30, 256 * 2**30), "B/s": (0.5e12, 10e12), "FLOP/s": (1e14, 1e16), "OP/s": (1e14, 1e16)}


@pytest.mark.parametrize(("row", "label", "figure"), FIGURES, ids=lambda value: value if isinstance(value, str) else "")
def test_figure_has_a_source_and_a_plausible_value(row, label, figure):
    low, high = PLAUSIBLE[figure.unit]
    assert figure.value is None or low <= figure.value <= high
    assert re.fullmatch("unknown" if figure.value is None else r"[\d.]+ (GiB|[GT](B|FLOP|OP)/s)", str(figure))
    assert len(figure.source) > 15


def test_eight_bits_are_twice_as_fast_as_sixteen_and_910b_has_no_fp8():
    peaks = [(row.peak["bf16"], row.peak[dtype]) for row in TABLE.values() for dtype in row.peak if "8" in dtype]
    known = [(sixteen.value, eight.value) for sixteen, eight in peaks if eight.value]
    assert (set(TABLE), len(known)) == (CARDS, 14)
    assert all(eight == pytest.approx(2 * sixteen) for sixteen, eight in known)
    assert {name[0] for name, row in TABLE.items() if "fp8" in row.peak} == {"H", "L"}
    assert npu.NpuDevice().quantised_formats() == ("w8a8", "w4a16")


DRIVER_NAMES = [
    *(("Ascend" + name, name) for name in ("910B1", "910B2", "910B2C", "910B3", "910B4", "910B4-1")),
    *(("NVIDIA H20", "H20-96G"), ("NVIDIA H20-3e", "H20-3e-141G"), ("NVIDIA H100 80GB HBM3", "H100-80G")),
    *(("NVIDIA H200", "H200-141G"), (" nvidia  h200\n", "H200-141G"), ("910B3", "910B3")),
]


@pytest.mark.parametrize(("driver_name", "row"), DRIVER_NAMES)
def test_lookup_by_the_driver_s_name(driver_name, row):
    assert lookup(driver_name) is TABLE[row]


ALIKE = ["Ascend910_9392", "NVIDIA H800 PCIe", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA L20Z", ""]


@pytest.mark.parametrize("name", ALIKE)
def test_a_card_like_another_is_not_that_card(name):
    row = lookup(name)
    assert (row.name, str(row.memory), str(row.bandwidth), dict(row.peak)) == (name, "unknown", "unknown", {})


def test_facts_are_frozen_and_printed_in_units():
    with pytest.raises(AttributeError):
        TABLE["910B3"].name = "other"
    assert str(TABLE["910B3"].memory) == "64.0 GiB"
    assert str(TABLE["910B4"].bandwidth) == "800 GB/s"
    assert str(TABLE["H100-80G"].peak["fp8"]) == "1979 TFLOP/s"
    assert str(Figure(2.5e10, "B/s", "measured")) == "25 GB/s"


CPU = CpuDevice()


def test_cpu_memory_agrees_with_psutil():
    """psutil knows no cgroups: where one limits this process, only the bound can be checked against it."""
    memory, truth = CPU.memory(), psutil.virtual_memory()
    limited = any(limit < truth.total for limit, _ in CPU._cgroup_limits())
    assert memory.total <= truth.total if limited else memory.total == pytest.approx(truth.total, rel=0.05)
    assert memory.free <= truth.available if limited else memory.free == pytest.approx(truth.available, rel=0.05)
    assert memory.reserved == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


MEMINFO = {"/proc/meminfo": "MemTotal:  1000 kB\nMemFree:  1 kB\nMemAvailable:  800 kB\n"}
KIB = 1024


BYTES = st.integers(0, 2**41)


@given(limit=st.integers(0, 2**63), one=BYTES, other=BYTES, version=st.sampled_from([1, 2]), above=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_cgroup_limits_bound_total_and_free(limit, one, other, version, above, tmp_path):
    cache, used = sorted((one, other))
    level = "" if above else "/job"
    if version == 2:
        folder, names, line = f"/sys/fs/cgroup{level}", ("memory.max", "memory.current", "inactive_file"), "0::/job\n"
    else:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder, line = f"/sys/fs/cgroup/memory{level}", "7:cpu,cpuacct:/tight\n4:memory:/job\n0::/\n"
    files = {
        f"{folder}/{names[0]}": str(limit),
        f"{folder}/{names[1]}": str(used),
        f"{folder}/memory.stat": f"cache 7\n{names[2]} {cache}\n",
        "/proc/self/cgroup": line,
        "/sys/fs/cgroup/memory/tight/memory.limit_in_bytes": "1",  # another controller's group
        "/sys/fs/cgroup/memory/tight/memory.usage_in_bytes": "1",
    }
    memory = CpuDevice(host=machine(tmp_path / f"{version}{above}", files={**MEMINFO, **files})).memory()
    assert memory.total == min(1000 * KIB, limit)
    assert memory.free == min(800 * KIB, max(limit - (used - cache), 0))


def test_an_unlimited_cgroup_and_none_change_nothing(tmp_path):
    files = {"/sys/fs/cgroup/job/memory.max": "max\n", "/sys/fs/cgroup/job/memory.current": "5\n"}
    for folder, cgroup in (("a", "0::/job\n"), ("b", "")):
        memory = CpuDevice(host=machine(tmp_path / folder, files={**MEMINFO, **files, "/proc/self/cgroup": cgroup}))
        assert (memory.memory().total, memory.memory().free) == (1000 * KIB, 800 * KIB)


ARM = "processor\t: 0\nBogoMIPS\t: 200.00\nCPU implementer\t: {}\nCPU architecture: 8\nCPU part\t: {}\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9654\nflags\t\t: a b\n", "AMD EPYC 9654"),
        (ARM.format("0x48", "0xd01") * 2, "HiSilicon Kunpeng 920 (TaiShan v110)"),
        (ARM.format("0x41", "0xabc"), "(implementer 0x41, part 0xabc)"),
        ("", "(implementer unknown, part unknown)"),
    ],
)
def test_cpu_name(cpuinfo, name, tmp_path):
    assert CpuDevice(host=machine(tmp_path, files={"/proc/cpuinfo": cpuinfo})).name().endswith(name)


def test_cpu_facts_have_the_processor_s_name_and_nothing_assumed():
    facts = CPU.facts()
    assert facts.name == CPU.name()
    assert {str(facts.memory), str(facts.bandwidth), *map(str, facts.peak.values())} == {"unknown"}


def test_cpu_cores_follow_the_affinity():
    assert CPU.cores() == len(os.sched_getaffinity(0))
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert run_python(f"{pin}; from ascend.devices.cpu import CpuDevice; print(CpuDevice().cores())")[0] == "1\n"


def test_events_measure_a_sleep():
    start, end = CPU.event(), CPU.event()
    with pytest.raises(RuntimeError, match="before it is recorded"):
        start.elapsed_time(end)

    def sleep():
        start.record()
        time.sleep(0.05)
        end.record()

    around_ms = 1e3 * timeit.timeit(sleep, number=1)
    assert 50 <= start.elapsed_time(end) <= around_ms


def test_cpu_streams_and_capture_run_eagerly():
    CPU.activate()
    side = CPU.stream()
    with CPU.on(side):
        assert torch.cpu.current_stream() is side
    value = torch.zeros(3)
    step = CPU.capture(lambda: value + 1, pool=CPU.graph_pool())
    value += 2
    assert not CPU.captures_graphs
    assert step().tolist() == [3, 3, 3]
    CPU.synchronize()
    assert CPU.torch_device == torch.device("cpu")


@pytest.mark.slow
def test_bandwidth_is_measured_from_memory():
    """Against one read of another array timed here; the bounds are wide because neighbours halve either figure."""
    data = torch.ones(2**26)
    plain = data.nbytes / min(timeit.repeat(data.sum, number=1, repeat=5))
    assert plain / 4 < CPU.measure_bandwidth(seconds=0.2) < plain * 4


def test_last_level_cache_counts_each_once(tmp_path):
    files = {}
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for level, size in (("1", "48K"), ("2", "1024K"), ("3", "32768K")):
            folder = f"/sys/devices/system/cpu/cpu{cpu}/cache/index{level}"
            files |= {f"{folder}/level": level, f"{folder}/size": f"{size}\n", f"{folder}/shared_cpu_list": shared}
    assert CpuDevice(host=machine(tmp_path, files=files))._last_level_cache() == 2 * 32 * 2**20
    assert CpuDevice(host=machine(tmp_path / "none"))._last_level_cache() == 0


ENTRIES = st.one_of(st.integers(-1, 9).map(str), st.sampled_from(["", " 1", "7x", "+2", "GPU-8f", "MIG-1", "all"]))
ONCE_EACH = st.lists(ENTRIES, max_size=4, unique_by=lambda entry: re.sub(r"\D", "", entry))


@given(visible=ONCE_EACH.map(",".join), cards=st.integers(1, 8))
def test_cuda_cards_are_hidden_where_torch_says_so(visible, cards):
    """torch's own reading of the variable is the judge (a card named twice, which hides all, is left to it)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        read = torch.cuda._parse_visible_devices()
    shown = bool(read) and (isinstance(read[0], str) or read[0] < cards)
    assert cuda._shows_a_card(visible, cards) == shown


INDICES, TAILS = st.lists(st.integers(0, 9), max_size=4), st.sampled_from(["", ",", "x", "-2"])


@given(indices=INDICES, cards=st.integers(1, 8), tail=TAILS)
def test_npu_cards_are_shown_in_rising_order(indices, cards, tail):
    """The rule in torch_npu's words: rising order or none, up to the first index that has no card."""
    known = [index for position, index in enumerate(indices) if all(other < cards for other in indices[: position + 1])]
    expected = bool(known) and known == sorted(set(known))
    assert npu._shows_a_card(",".join(map(str, indices)) + tail, cards) == expected


@pytest.mark.parametrize(
    ("text", "line"), [("a\n  b \n\n[ERROR] ERR1\n", "b"), ("[ERROR] 1", "[ERROR] 1"), ("", "ValueError")]
)
def test_last_line_of_an_error(text, line):
    assert last_line(ValueError(text)) == line


def test_contract_of_each_kind():
    kinds = [kind() for kind in devices.DEVICES.values()]
    assert [str(kind) for kind in kinds] == ["npu:0", "cuda:0", "cpu"]
    assert [kind.collective_backend for kind in kinds] == ["hccl", "nccl", "gloo"]
    assert [kind.captures_graphs for kind in kinds] == [True, True, False]
    assert all(kind.compute_dtypes == ("bf16", "fp16", "fp32") for kind in kinds)
    assert CPU.quantised_formats() == ("fp8", "w8a8", "w4a16")


KINDS = [pytest.param(cuda.CudaDevice, marks=pytest.mark.gpu), pytest.param(npu.NpuDevice, marks=pytest.mark.npu)]


@pytest.mark.parametrize("kind", KINDS)
def test_card(kind):
    """The whole contract on a card that is there: memory, events, streams, and a graph that replays."""
    device = kind()
    problem = device.why_unavailable()
    if problem is not None:
        pytest.skip(f"no {device.label} here: {problem.reason}")
    device.activate()
    assert 0 < device.memory().free <= device.memory().total
    value = torch.zeros(3, device=device.torch_device)
    step = device.capture(lambda: value + 1, pool=device.graph_pool())
    start, end = device.event(), device.event()
    device.synchronize()
    with device.on(device.stream()):
        start.record()
        value += 2
        end.record()
    device.synchronize()
    assert step().tolist() == [3, 3, 3]
    assert start.elapsed_time(end) >= 0
    assert device.memory().reserved > 0
