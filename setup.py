"""Packaging. Requirements live in req.txt, the version in egom2p/__init__.py, tool settings in pyproject.toml.

The YAMLs, tokenizer configs and the SLURM script stay at the top level, where people look for them; a wheel gets a copy
below `egom2p/shipped/`, where `egom2p.resources` finds it.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# No wheel exists for aarch64 Linux.
DOCS = ["sphinx>=8", "myst-parser>=4", "furo>=2024.8.6"]
ARIA = ['projectaria-tools>=1.5; platform_machine == "x86_64" or sys_platform == "darwin"']
SHIPPED = ("cfgs", "tokenizers", "scripts/slurm")


class BuildWithShippedFiles(build_py):
    """build_py, and the shipped files beside the code. An editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                shutil.copytree(HERE / folder, Path(self.build_lib) / "egom2p/shipped" / folder, dirs_exist_ok=True)


requirements = [line for line in (HERE / "req.txt").read_text().splitlines() if line and not line.startswith("#")]
version = re.search(r'^__version__ = "(.+)"', (HERE / "egom2p/__init__.py").read_text(), re.M)[1]

setup(
    name="egom2p",
    version=version,
    description="One masked transformer over egocentric video, depth, camera motion and gaze",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["egom2p", "egom2p.*"]),
    package_data={"egom2p": ["py.typed", "visualize/viewer.js"]},
    cmdclass={"build_py": BuildWithShippedFiles},
    install_requires=requirements,
    extras_require={
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "moto[server]>=5", "s3fs>=2024.6",
                "aiohttp>=3.9", "ruff>=0.6", "mypy>=1.11", "mutmut>=3.8", "hypothesis>=6", "evo>=1.28",
                "pre-commit>=3", "nbclient>=0.10", "ipykernel>=6", *DOCS, *ARIA],
        "remote": ["s3fs>=2024.6", "aiohttp>=3.9"],
        "docs": DOCS,
        "viewer": ["rerun-sdk>=0.18"],
        "aria": ARIA,
    },
    entry_points={"console_scripts": ["egom2p = egom2p.cli:main"]},
)
