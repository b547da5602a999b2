"""Arguments that several commands have."""

import argparse
from pathlib import Path


def add_device(parser) -> None:
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: its GPU, if there is one)")


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, for instance train.steps=100")


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-torchscript", action="store_true",
                        help="run TorchScript networks (Cosmos) that came along with the model; they are programs")


def read_recipe(path: Path | None):
    from egom2p.config import load
    from egom2p.generation.schedule import RecipeConfig

    return load(RecipeConfig, path) if path else RecipeConfig()
