"""Packaging. Requirements live in req.txt, tool settings in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
requirements = [line for line in (HERE / "req.txt").read_text().splitlines() if line and not line.startswith("#")]

setup(
    name="egom2p",
    version="0.1.0",
    description="One masked transformer over egocentric video, depth, camera motion and gaze",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["egom2p", "egom2p.*"]),
    install_requires=requirements,
    extras_require={
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "moto[server]>=5", "s3fs>=2024.6", "aiohttp>=3.9", "ruff>=0.6", "hypothesis>=6", "evo>=1.28", "pre-commit>=3"],
        "remote": ["s3fs>=2024.6", "aiohttp>=3.9"],
        "viewer": ["rerun-sdk>=0.18"],
        "aria": ['projectaria-tools>=1.5; platform_machine == "x86_64" or sys_platform == "darwin"'],
    },
    entry_points={"console_scripts": ["egom2p = egom2p.cli:main"]},
)
