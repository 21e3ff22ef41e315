"""Custom ops of vllm-ascend return tensors that they were given, which torch's compiler forbids.

Calls one as a model does between its layers, then compiles a function with it twice: as torch does everywhere, and as
it does where the environment has ``CI`` set. torch 2.11 or newer. Without a card:
`python -m ascend.emulator -- python serve/upstream/op_aliases.py`.
"""

import os
import warnings

import torch
import vllm_ascend.ops.register_custom_ops  # noqa: F401, brings the device, too
from torch._functorch import config

os.environ["PYTORCH_NPU_ALLOC_CONF"] = ""  # an emulated card would complain of the platform's choice
hidden, residual = torch.ones(4, 8).npu(), torch.ones(4, 8).npu()
op = torch.ops.vllm.maybe_chunk_residual
print(f"the output is the input: {op(hidden, residual).data_ptr() == residual.data_ptr()}")
for name, strict in (("CI not set", False), ("CI set", True)):
    torch.compiler.reset()
    with config.patch(error_on_custom_op_aliasing=strict), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            torch.compile(lambda x, r: op(x, r) + 1, backend="aot_eager")(hidden, residual)
            end = next(one.category.__name__ for one in seen if "may not alias any inputs" in str(one.message))
        except RuntimeError as error:
            end = f"{type(error).__name__}: {str(error).partition(' (1)')[0]} …"
    print(f"compiled, {name}: {end}")
