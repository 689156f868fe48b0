"""Packaging. Ranges end where nothing newer has been tried; constraints.txt pins what the README's commands install.

Tried beside the pins, each in an environment of its own on a CPU: torch 2.15.0 with tests/integrations, configs/tiny.yaml
and the files of tests/kernels before test_tensor_cores.py; transformers 5.24.0 with tests/integrations, the opening of
models in tests/models and configs/tiny.yaml.
Of triton, peft, trl, lightning and accelerate the pins are the newest there are.
"""

from pathlib import Path

from setuptools import setup

# The trainer: every verb of the command line. The losses need none of it.
TRAIN = [
    "numpy>=1.26",
    "transformers>=5.17,<6",
    "safetensors>=0.5",
    "pydantic>=2.11,<3",
    "pyyaml>=6",
    "jinja2>=3.1",
    "rich>=13.7",
    "datasets>=4",
    "rouge-score>=0.1.2",
    "matplotlib>=3.9",
    "pillow>=10.3",
    "tensorboard>=2.17",
    "urllib3>=2.2,<3",
]
# What keys of a configuration need beyond that; each brings the trainer along.
FEATURES = {
    "deepspeed": ["deepspeed>=0.19,<0.20"],
    "gguf": ["gguf>=0.10", "accelerate>=1.1"],
    "lora": ["peft>=0.21,<0.22"],
    "quantization": ["bitsandbytes>=0.49,<0.51", "accelerate>=1.1"],
    "flash": ["flash-attn>=2.7"],
    "images": ["num2words>=0.5.12"],  # for SmolVLM's processor alone
    "vqa": ["easy-vqa==1.0"],
    "serve": ["starlette>=1.10,<2", "uvicorn>=0.54,<1"],
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "filelock>=3.16",
        "hypothesis>=6.115",
        "ruff>=0.9",
        "deepspeed>=0.19,<0.20",
        "peft>=0.21,<0.22",
        "bitsandbytes>=0.49,<0.51",
        "accelerate>=1.1",
        "trl>=1.16,<2",
        "lightning>=2.6,<3",
        "starlette>=1.10,<2",
        "uvicorn>=0.54,<1",
        "easy-vqa==1.0",
        "mypy>=2",
    ],
}

setup(
    name="minillm",
    version="0.1.0",
    description="On-policy distillation of language models with fused losses that never hold full logits",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "minillm",
        "minillm.kernels",  # a symlink to ../kernels: see the tree in the README
        "minillm.benchmarks",  # a symlink to ../benchmarks
        "minillm.cli",
        "minillm.config",
        "minillm.config.checks",
        "minillm.config.loader",
        "minillm.config.methods",
        "minillm.data",
        "minillm.distributed",
        "minillm.engine",
        "minillm.evaluate",
        "minillm.experiment",
        "minillm.integrations",
        "minillm.methods",
        "minillm.models",
        "minillm.planning",
        "minillm.reporting",
        "minillm.rollout",
        "minillm.rollout.local",
        "minillm.serving",
        "minillm.storage",
        "minillm.teachers",
        "minillm.train",
    ],
    package_data={"minillm": ["py.typed"]},
    install_requires=["torch>=2.11,<2.16", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={"train": TRAIN} | {name: TRAIN + packages for name, packages in FEATURES.items()},
    entry_points={"console_scripts": ["minillm=minillm.cli.main:program"]},
    classifiers=["License :: OSI Approved :: Apache Software License", "Programming Language :: Python :: 3"],
)
