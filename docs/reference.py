"""Writes the reference pages of the documentation site: commands, configuration keys, modules."""

import argparse
import dataclasses
import inspect
import re
import typing
from pathlib import Path

from egom2p.ablate import SweepConfig
from egom2p.cli import _parser
from egom2p.evaluation.run import ProtocolConfig
from egom2p.generation.schedule import RecipeConfig
from egom2p.quickstart import QuickstartConfig
from egom2p.training.pretraining import PretrainConfig
from egom2p.training.tokenizer_training import TokenizerConfig

PACKAGE = Path(__file__).parent.parent / "egom2p"
CONFIGURATIONS = {"egom2p train": PretrainConfig, "egom2p tokenizer train": TokenizerConfig,
                  "egom2p generate --recipe": RecipeConfig, "egom2p eval --protocol": ProtocolConfig,
                  "egom2p ablate": SweepConfig, "egom2p quickstart --config": QuickstartConfig}


def write(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "commands.md").write_text(commands())
    (folder / "configuration.md").write_text(configuration())
    (folder / "modules.md").write_text(modules())


def commands() -> str:
    """Every command with its help, from the parser itself."""
    parts = ["# Commands\n"]

    def describe(parser: argparse.ArgumentParser, about: str) -> None:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not nested:
            parts.append(f"## {parser.prog}\n\n{about}\n\n```text\n{parser.format_help()}```\n")
        for action in nested:
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, child in action.choices.items():
                describe(child, helps.get(name, ""))

    describe(_parser(), "")
    return "\n".join(parts)


def configuration() -> str:
    """Every key with type, default and the docstring of its section, from the dataclasses."""
    parts = ["# Configuration keys\n",
             "A key is written `section.key=value` on the command line. Keys without a default must be given.\n"]
    for command, cls in CONFIGURATIONS.items():
        parts.append(f"## {command}\n")
        parts += _section(cls, "", set())
    return "\n".join(parts)


def _section(cls: type, prefix: str, seen: set[type]) -> list[str]:
    hints = typing.get_type_hints(cls)
    rows, nested = [], []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        inner = [a for a in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(a)]
        name = f"{prefix}{field.name.rstrip('_')}"
        if inner and inner[0] not in seen:
            many = typing.get_origin(kind) in (dict, tuple)
            nested.append((inner[0], f"{name}.{'NAME.' if many else ''}"))
            continue
        rows.append(f"| `{name}` | `{_type(kind)}` | {_default(field)} |".replace("\n", " "))
    told = inspect.cleandoc(cls.__doc__ or "")
    title = f"### {prefix.rstrip('.') or 'top level'}\n"
    parts = [title, re.sub(r"([<*\[\]_])", r"\\\1", told) + "\n"]
    if rows:
        parts += ["| key | type | default |", "|---|---|---|", *rows, ""]
    for inner, path in nested:
        parts += _section(inner, path, seen | {cls})
    return parts


def _type(kind: object) -> str:
    text = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return text.replace("typing.", "").replace("egom2p.", "").replace("|", "or")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`".replace("|", "\\|")
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "(to be given)"


def modules() -> str:
    """One section a module, its public names by autodoc."""
    parts = ["# Modules\n", "What is public: names without a leading underscore.\n"]
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__main__.py" or {"cli", "shipped"} & set(path.parts):
            continue
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        name = ".".join(relative.parts).removesuffix(".__init__")
        parts.append(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n")
    return "\n".join(parts)
