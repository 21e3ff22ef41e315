"""vllm-ascend's YaRN does not round the range of pairs that it interpolates; vLLM's and transformers' do.

Compares the cos/sin cache of `AscendYaRNRotaryEmbedding` with that of vLLM's own class, for the rope settings of a
published model (Ling-flash-2.0 with YaRN 4: 64 rotated values, theta 600000, 32768 positions). One NPU, or none: then
`python -m ascend.emulator -- python serve/upstream/yarn_truncate.py`.
"""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

GEOMETRY = (128, 64, 32768, 600000.0, True, 4.0, torch.float32)
POSITIONS = (8192, 32768, 131071)


with set_current_vllm_config(VllmConfig()):
    plain = YaRNScalingRotaryEmbedding(*GEOMETRY)
    from vllm_ascend.ops.rotary_embedding import AscendYaRNRotaryEmbedding

    ascend = AscendYaRNRotaryEmbedding(*GEOMETRY)
    told = AscendYaRNRotaryEmbedding(*GEOMETRY, truncate=True)

for name, other in (("as it is", ascend), ("told truncate=True", told)):
    difference = (other.cos_sin_cache.cpu() - plain.cos_sin_cache.cpu()).abs()
    print(f"{name}: cos_sin_cache differs from vLLM's by up to {difference.max():.3f}")

theirs, ours = plain._compute_inv_freq(4.0).cpu(), ascend._compute_inv_freq(4.0).cpu()
print("pairs whose frequency differs:", torch.nonzero((ours / theirs - 1).abs() > 1e-6).flatten().tolist())
print(f"by {(ours / theirs - 1).min():.1%} to {(ours / theirs - 1).max():.1%}")
for position in POSITIONS:
    error = (position * (ours.double() - theirs.double())).abs().max()
    print(f"position {position}: angles are off by up to {error:.2f} rad")
