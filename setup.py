# SPDX-License-Identifier: Apache-2.0
"""Packaging; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "ctrbench" / "__init__.py").read_text()).group(1)

setup(
    name="ctrbench",
    version=VERSION,
    description="Config-first benchmarking of click-through-rate models, in the style of FuxiCTR",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "ctrbench",
        "ctrbench.commands",
        "ctrbench.datasets",
        "ctrbench.inspection",
        "ctrbench.leaderboard",
        "ctrbench.tuner",
    ],
    # Plain C that is called through ctypes; without a compiler the package installs and works all the same, more slowly.
    ext_modules=[
        Extension(
            "ctrbench._native",
            ["csrc/crosslayer.c", "csrc/interface.c", "csrc/masks.c", "csrc/norms.c", "csrc/scatter.c"],
            depends=["csrc/simd.h"],
            extra_compile_args=["-O3", "-fno-trapping-math", "-fno-math-errno", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
    package_data={
        "ctrbench": ["py.typed"],
        "ctrbench.inspection": ["*.j2"],
        "ctrbench.leaderboard": ["*.j2"],
        "ctrbench.tuner": ["*.j2"],
    },
    install_requires=[
        "torch>=2.4,<3",
        "fuxictr>=2.3.10,<2.4",
        "h5py>=3.10,<4",
        "polars>=2,<3",
        "pandas>=2,<4",
        "pyarrow>=14,<27",
        "pyyaml>=6.0.1,<7",
        "pydantic>=2.5,<3",
        "numpy>=1.26,<3",
        "scipy>=1.11,<2",
        "rich>=13,<16",
        "matplotlib>=3.8,<4",
        "safetensors>=0.4,<1",
        "filelock>=3.13,<5",
        "optuna>=4,<6",
        "sqlalchemy>=2,<3",
        "jinja2>=3.1,<4",
    ],
    extras_require={
        "postgresql": ["psycopg[binary]>=3.1,<4"],
        "test": ["pytest>=8,<10", "pytest-xdist>=3.5,<4", "hypothesis>=6.100,<7", "scikit-learn>=1.4,<2"],
        "lint": ["ruff>=0.6", "mypy>=1.11", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["ctrbench=ctrbench.cli:main"]},
)
