"""Packaging of brt_dist. Settings of the tools (ruff, mypy, pytest) stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "brt_dist/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)

setup(
    name="brt_dist",
    version=VERSION[1],
    description="Distributed pretraining of Block-Recurrent Transformers on long documents",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["brt_dist", "brt_dist.*", "preprocessing", "preprocessing.*"]),
    install_requires=[
        "torch>=2.7",
        "deepspeed>=0.18",
        # From 0.17 on for Python 3.12 and newer only.
        "megatron-core>=0.16",
        "sentencepiece>=0.2",
        "pyarrow>=16",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "typer>=0.29",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "xxhash>=3.4",
        "fsspec>=2024.2",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100",
            "mpich>=4.3",
            "mypy>=1.10",
            "pre-commit>=3.7",
            "pytest>=8.2",
            "ruff>=0.5",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["brt=brt_dist.cli:main"]},
)
