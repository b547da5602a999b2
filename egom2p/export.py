"""Folders with `config.json` and `model.safetensors`, from disk or the Hugging Face Hub.

A subclass of `Exportable` says how it becomes a plain config (`to_config`) and how it is rebuilt from one
(`from_config`). Nothing here runs code from a file: weights are safetensors, configs are JSON.

A model's config names its tokenizers. Local ones are written relative to the folder that holds the config, so that a
tree can be moved or opened from anywhere; `egom2p export` puts them inside it.
"""

import dataclasses
import json
import os
import tempfile
import typing
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from egom2p import resources
from egom2p.config import build, read_json, to_plain
from egom2p.errors import UserError
from egom2p.modalities import ModalityArgs, ModalitySet

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Exportable(nn.Module):
    """A module that saves itself to a folder and comes back from it."""

    def to_config(self) -> dict[str, Any]:
        """Plain JSON values from which `from_config` rebuilds an equal module."""
        modalities = {m.name: {k: v for k, v in to_plain(m).items() if k != "name"} for m in self.modalities}
        return {"modalities": modalities, "model": to_plain(self.args)}

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str) -> Self:
        """source: the file `config` comes from, for messages and for paths relative to its folder."""
        if not {"modalities", "model"} <= config.keys():
            raise UserError(f"{source}: not an {cls.__name__} export (no 'modalities' and 'model' in {CONFIG})")
        entries = build(dict[str, ModalityArgs], config["modalities"], "modalities", source)
        entries = {name: dataclasses.replace(entry, tokenizer=resolve_beside(entry.tokenizer, Path(source).parent))
                   for name, entry in entries.items()}
        args_type = typing.get_type_hints(cls.__init__)["args"]
        return cls(ModalitySet.from_config(entries), build(args_type, config["model"], "model", source))

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and `model.safetensors` into `folder` (made if needed). weights: a copy of the state
        dictionary to write instead of the module's own, as checkpoints in the background do."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.to_config()
        for entry in config.get("modalities", {}).values():
            entry["tokenizer"] = relative_to(entry["tokenizer"], folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=1))
        weights = self.state_dict() if weights is None else weights
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> Self:
        """Load a folder written by `save_pretrained`, a run (its latest checkpoint) or a Hub repository, in eval
        mode."""
        folder = resolve_folder(source)
        module = cls.from_config(read_json(folder / CONFIG), str(folder / CONFIG))
        load_weights(module, read_weights(folder / WEIGHTS), folder / WEIGHTS)
        return module.to(device).eval()

    def push_to_hub(self, repo: str, private: bool = True) -> str:
        """Upload the export to the Hub repository `owner/name`; returns its address. `egom2p push` also brings the
        tokenizers and a model card."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repo, private)


def upload(folder: Path, repo: str, private: bool, kind: str = "model") -> str:
    """Put the files of a folder into a Hub repository, which is made if needed; returns its address. Files that are
    there already, unchanged, are not sent again. Raises UserError when the Hub does not let one."""
    try:
        huggingface_hub.create_repo(repo, private=private, exist_ok=True, repo_type=kind)
        hub = huggingface_hub.HfApi()
        if private and not hub.repo_info(repo, repo_type=kind).private:
            raise UserError(f"{repo} is there already and public; nothing was uploaded. Make it private on the Hub, "
                            f"choose another name, or leave out --private")
        if kind == "dataset":
            _refuse_older_tars(folder, repo, hub.list_repo_files(repo, repo_type=kind))
        return str(huggingface_hub.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind))
    except UserError:
        raise
    except Exception as error:  # the HTTP library beneath the client, which it has changed twice, has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"{repo}: the Hub does not take it ({reason}); check the network, the name, and `hf auth "
                        f"login` with a token that may write") from error


def _refuse_older_tars(folder: Path, repo: str, there: list[str]) -> None:
    """Tars of an earlier upload would stay beside those of this one, and be read as if its note were of them too."""
    notes = {p.parent.relative_to(folder).as_posix(): json.loads(p.read_text()).get("shards", {})
             for p in folder.rglob("encode.json")}
    places = [(name, *os.path.split(name)) for name in there if name.endswith(".tar")]
    older = sorted(name for name, place, tar in places if tar not in notes.get(place, {tar: 0}))
    if older:
        raise UserError(f"{repo} holds {len(older)} tars of an earlier upload in the same folders, which would be "
                        f"mixed with these; nothing was uploaded. Remove them (`hf repos delete-files {repo} --type "
                        f"dataset {older[0]} ...`) or choose another name")


def export_in(path: Path) -> Path | None:
    """The folder below `path` that holds an export: itself, a run's latest checkpoint, or `export`."""
    for candidate in (path, path / "checkpoints" / "latest", path / "export"):
        if (candidate / CONFIG).is_file():
            return candidate
    return None


def resolve_beside(source: str, folder: Path) -> str:
    """A tokenizer's name in the config of `folder` -> an absolute path where it is found from there, else unchanged.

    Looked for in the folder itself and then in those above it, since older runs wrote paths relative to the folder that
    the training was started in.
    """
    if not source or Path(source).is_absolute():
        return source
    for place in (folder.absolute(), *folder.absolute().parents):
        if export_in(place / source):
            return str((place / source).resolve())
    return source


def relative_to(source: str, folder: Path) -> str:
    """A tokenizer as the config in `folder` names it: relative when it is a local folder of one's own."""
    if not source or not export_in(Path(source)):
        return source
    path = Path(source).resolve()
    shipped = resources.root().resolve()
    if path.is_relative_to(shipped) and resources.is_shipped(path.relative_to(shipped)):
        return path.relative_to(shipped).as_posix()
    return os.path.relpath(path, folder.resolve())


def resolve_folder(source: str | Path) -> Path:
    """The folder that holds the export `source` names: a folder, a run with checkpoints, or a Hub repository."""
    path = resources.locate(source)
    found = export_in(path)
    if found:
        return found
    if path.exists() or str(source).partition("@")[0].count("/") != 1 or str(source).startswith((".", "/", "~")):
        hint = "; a released .pth is converted by `egom2p import-released`" if path.suffix in (".pth", ".pt") else ""
        raise UserError(f"{source}: no export or checkpoint there (expected {CONFIG} and {WEIGHTS}){hint}")
    return from_hub(str(source), ["*.json", "*.safetensors", "*.jit"])


def from_hub(name: str, patterns: list[str], kind: str = "model") -> Path:
    """A Hub repository `OWNER/NAME`, or `OWNER/NAME@REVISION`, in the local cache, fetched as far as it is not there.

    Without a network the cached snapshot serves. Raises UserError, in one line that names the fix, when it cannot be
    had.
    """
    repo, _, revision = name.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns,
                                                      repo_type=kind))
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its conditions on {huggingface_hub.constants.ENDPOINT}/{repo}, then "
                        f"`hf auth login`") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision '{revision}'; leave it out, or name a branch, tag or "
                        f"commit") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name}: neither a folder here nor a Hub repository that you can see (there is none of this "
                        f"name, or it is private: `hf auth login`)") from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"{name}: neither a folder here nor a Hub repository that can be fetched "
                        f"({type(error).__name__}); check the name, the network, and for gated repositories "
                        f"`hf auth login`") from error


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) put before all of
    them."""
    while state and (prefix := next((p for p in ("module.", "_orig_mod.") if all(k.startswith(p) for k in state)), "")):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return strip_prefixes(load_file(path))
    except FileNotFoundError as error:
        raise UserError(f"no weights {path}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from error


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Strict: every name and shape must fit, or one line says which does not."""
    own = module.state_dict()
    for name in own.keys() ^ weights.keys():
        raise UserError(f"{path}: weight '{name}' is {'missing' if name in own else 'not part of this model'}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise UserError(f"{path}: weight '{name}' is {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}")
    with torch.no_grad():
        module.load_state_dict(weights)
