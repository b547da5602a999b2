"""Official EgoM2P checkpoints (and VidTok's) -> our exports, without ever running a pickle's code.

A released file is a pickled dict: `model` (state dict), `args` (an argparse.Namespace) and training state.
It is read by torch's restricted unpickler, which admits tensors, plain containers, that Namespace, and the numpy
scalars of the released schedules (by stand-ins), and nothing else. Sizes come from tensor shapes, the number of heads
from the model's name in `args`.
"""

import argparse
import logging
import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from torch import Tensor

from egom2p import resources
from egom2p.compat.vidtok import convert_vidtok, is_vidtok
from egom2p.errors import UserError
from egom2p.export import strip_prefixes
from egom2p.modalities import Modality, ModalitySet
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.model.positions import position_table
from egom2p.tokenizers import check_fits, load
from egom2p.tokenizers.motion import MotionArgs, MotionTokenizer

log = logging.getLogger(__name__)

# Heads of the released sizes, by the size's name in `args.model` and the width.
HEADS = {("tiny", 384): 6, ("small", 512): 8, ("base", 768): 12, ("large", 1024): 16, ("large", 1020): 15,
         ("xlarge", 2048): 32, ("xlarge", 2046): 31}

# Released modality -> our name and kind of signal.
MODALITIES = {"tok_rgb": ("rgb", "rgb"), "tok_depth": ("depth", "depth"), "tok_cam": ("cam", "pose"),
              "tok_gaze": ("gaze", "gaze"), "tok_rgb_512": ("rgb_512", "rgb"), "tok_depth_512": ("depth_512", "depth"),
              "tok_lhand": ("lhand", "motion"), "tok_rhand": ("rhand", "motion"), "tok_body": ("body", "motion")}

METRIC = {"depth_512"}

# The released inference recipe (facts of EgoM2P's README and configs).
RECIPES = {name: {"steps": steps, "temperature": 0.01, "top_p": 0.8, "guidance": 2.0}
           for name, steps in (("cam", 3), ("gaze", 5), ("depth", 3), ("rgb", 6))}

CAMERA_MEAN = (0.93305040, 0.00441131, -0.00474551, -0.00403111, 0.96702217, 0.01229744, 0.00253670, -0.00253452,
               0.03687088)
CAMERA_STD = (0.22410283, 0.15409595, 0.23538763, 0.15159239, 0.09890854, 0.17871061, 0.16229750, 0.11305995,
              0.22450156)
# Channels of a motion tokenizer -> modality, kind, mean, std. The constants are not in the released files.
MOTIONS = {9: ("cam", "pose", CAMERA_MEAN, CAMERA_STD), 2: ("gaze", "gaze", (0.5, 0.5), (0.5, 0.5))}

_MODEL_NAMES = (("decoder_proj_context", "context_projection"), (".q_norm", ".qk_norm.q_norm"),
                (".k_norm", ".qk_norm.k_norm"))
_MOTION_NAMES = (("encoder.conv.", "conv."), (".norm_mlp.", ".norm."), (".post_mlp.", "."),
                 ("post_quant_proj.", "from_latent."),
                 ("quant_proj.", "to_latent."), ("quantize._codebook.", "quantizer."), ("decoder.out_proj.", "out."))
_MOTION_DERIVED = ("encoder.position_embeddings", "decoder.position_embeddings", "quantize._codebook.initted")


def import_released(path: Path, out: Path, num_heads: int | None = None, tokenizers: dict[str, str] | None = None,
                    ema: bool = False) -> str:
    """Convert the main checkpoint or a camera or gaze tokenizer into an export folder; returns one line about it.

    num_heads overrides what the file's model name says; tokenizers {modality: folder} are written into the model's
    config; ema: take the averaged weights (`model_ema`) instead. Raises UserError for files that are not what they
    should be.
    """
    if any((out / name).exists() for name in ("config.yaml", "checkpoints")):
        raise UserError(f"{out} holds a run, which could not be loaded any more; choose another --out")
    state, args = read_checkpoint(path, ema)
    if "causal" in str(getattr(args, "model", "")):
        raise UserError(f"{path}: a model of causal decoders ({args.model}); here the decoder sees all targets")
    left_out: list[str] = []
    if "mask_token" in state:
        module = convert_model(state, _size_name(args), num_heads, tokenizers or {}, path, left_out)
        _check_tokenizers(tokenizers or {}, module.modalities)
        module.generation = {m.name: RECIPES[m.name] for m in module.modalities if m.name in RECIPES}
        found = ", ".join(f"{m.name} {list(m.grid)} of {m.vocab_size}" for m in module.modalities)
        line = f"EgoM2P: {found}; {module.args}"
    elif "quantize._codebook.embed" in state:
        module = convert_motion(state, num_heads, path)
        made = module.modality
        line = f"tokenizer '{made.name}': {list(made.grid)} tokens of {made.vocab_size} ids; dim {module.args.dim}"
    elif is_vidtok(state):
        module = convert_vidtok(state, path, left_out)
        line = (f"VidTok {'1.1' if module.args.repeats_first else '1.0 (no v1_1 in the name)'}: "
                f"{list(module.modality.grid)} tokens of {module.modality.vocab_size} ids for 16 frames of 256 x 256; "
                f"for other clips or depth edit {out / 'config.json'}")
    else:
        raise UserError(f"{path}: neither an EgoM2P checkpoint (no 'mask_token') nor a motion tokenizer (no "
                        f"'quantize._codebook.embed') nor VidTok")
    module.save_pretrained(out)
    if METRIC & set(tokenizers or {}):
        log.warning("%s is metric depth, 0 to 15 m linearly, where the tokenizers here decode relative inverse depth: "
                    "what comes out of it is not what its unit says", ", ".join(sorted(METRIC & set(tokenizers))))
    return line + (f"; left out: {', '.join(left_out)}" if left_out else "")


@contextmanager
def _sizes_of(path: Path | str) -> Iterator[None]:
    """What the network refuses, said of the file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}; check --num-heads") from error


def _check_tokenizers(sources: dict[str, str], modalities: ModalitySet) -> None:
    """UserError for a modality that the model lacks. A folder that is none of its tokenizers is said, and refused when
    it is used; one that is not there may be a Hub repository or come later."""
    if strangers := [name for name in sources if name not in modalities.names]:
        raise UserError(f"--tokenizers: the model has no modality '{strangers[0]}'; its own are "
                        f"{', '.join(modalities.names)}")
    for name, source in sources.items():
        if not resources.locate(source).exists():
            log.warning("the tokenizer of %s, %s, is not on this machine (yet)", name, source)
            continue
        try:
            check_fits(load(source), replace(modalities.by_name(name), tokenizer=source))
        except UserError as error:
            log.warning("%s; decoding will be refused", error)


def read_checkpoint(path: Path, ema: bool = False) -> tuple[dict[str, Tensor], argparse.Namespace]:
    """State dict and arguments of a released file, by the restricted unpickler; DDP's and the compiler's prefixes are
    stripped."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except UnpicklingError as error:
        raise UserError(f"{path}: refused, it holds more than tensors, numbers and an argparse.Namespace "
                        f"({_culprit(error)})") from error
    except Exception as error:  # a malformed pickle fails in any way, and runs nothing
        raise UserError(f"{path}: not a whole torch checkpoint ({_first_line(error)}); expected a pickled dict with "
                        f"'model' and 'args'") from error
    name = "model_ema" if ema else "model"
    state = content.get(name) if isinstance(content, dict) else None
    if state is None and isinstance(content, dict) and not ema:  # VidTok's: Lightning's own, or the tensors alone
        state = content.get("state_dict", content) or None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: expected a dict with '{name}' (a state dict of tensors) and 'args'; found "
                        f"{sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__}")
    args = content.get("args", argparse.Namespace())
    return strip_prefixes(state), args if isinstance(args, argparse.Namespace) else argparse.Namespace()


class _Dtype:
    """Stands for numpy.dtype in a pickle: a code and a byte order, and no numpy object that a file could reach."""

    def __init__(self, code: str = "", *_: object) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = str(state[1])


def _scalar(dtype: _Dtype, raw: bytes = b"") -> float | int | bool | None:
    """Stands for numpy's scalars, which the released schedules leave in the optimizer's groups: a number, or None for
    what is none."""
    letter = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I",
              "u2": "H",
              "u1": "B", "b1": "?"}.get(getattr(dtype, "code", ""))
    if letter is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(f"<{letter}"):
        return None
    return struct.unpack((">" if dtype.order == ">" else "<") + letter, raw)[0]


# All that a released file asks for beside tensors and plain containers, by numpy 1's names and numpy 2's.
# (`_codecs.encode`, which turns the scalars' bytes from text, is on torch's own list.)
SAFE = [argparse.Namespace, (_Dtype, "numpy.dtype"), (_scalar, "numpy.core.multiarray.scalar"),
        (_scalar, "numpy._core.multiarray.scalar")]


def _culprit(error: UnpicklingError) -> str:
    """What the restricted unpickler stumbled on, without the advice and the terminal escapes of its message."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"GLOBAL (\S+)", text) or re.search(r"(Can only \w+ [^\n]{0,120})", text)
    if found:
        return f"it asks for {found[1]}" if found[0].startswith("GLOBAL") else found[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "unreadable"


def convert_model(state: dict[str, Tensor], size_name: str, num_heads: int | None, tokenizers: dict[str, str],
                  path: Path | str, left_out: list[str] | None = None) -> EgoM2P:
    """A released state dict -> EgoM2P. Sizes come from tensor shapes. Modalities without tokens of their own (ReViV's
    raw pictures, which have a projection instead) have no place in it: their names are added to `left_out`."""
    found = dict.fromkeys(m[1] for k in state if (m := re.match(r"(?:encoder|decoder)_embeddings\.([^.]+)\.", k)))
    names = sorted((n for n in found if f"encoder_embeddings.{n}.token_emb.weight" in state),
                   key=lambda n: [*MODALITIES, n].index(n))
    raw = [n for n in found if n not in names]
    if left_out is not None:
        left_out += [f"{n} (raw input, no tokens)" for n in raw]
    if not names or "encoder.0.mlp.fc1.weight" not in state:
        raise UserError(f"{path}: no 'encoder_embeddings' or no encoder block in it; the file is cut off or of another "
                        f"model")
    for name in names if left_out is not None else ():
        encoder, decoder = (state.get(f"{side}_embeddings.{name}.mod_emb") for side in ("encoder", "decoder"))
        if encoder is not None and decoder is not None and not torch.equal(encoder, decoder):
            left_out.append(f"{name}'s modality embedding of the decoder (share_modality_embeddings=False), whose "
                            "predictions are others here")
    dim = state["mask_token"].shape[-1]
    heads = num_heads or next((h for (name, width), h in HEADS.items() if name == size_name and width == dim), None)
    if heads is None:
        raise UserError(f"{path}: the number of heads of a '{size_name or 'nameless'}' model {dim} wide is not known; "
                        f"give --num-heads")
    gated = "encoder.0.mlp.fc3.weight" in state
    variant = "gelu" if not gated else "swiglu_qknorm" if "encoder.0.attn.q_norm.weight" in state else "swiglu"
    hidden = state["encoder.0.mlp.fc1.weight"].shape[0]
    ratio = hidden / dim if not gated else 4.0
    if gated and hidden != int(2 * int(dim * ratio) / 3):
        raise UserError(f"{path}: SwiGLU of hidden width {hidden} at dim {dim}; the released models have "
                        f"{int(2 * int(dim * 4) / 3)}")
    depths = [1 + max(int(m[1]) for k in state if (m := re.match(rf"{side}\.(\d+)\.", k)))
              for side in ("encoder", "decoder")]
    modalities = ModalitySet(_modality(name, state, dim, tokenizers, path) for name in names)
    with _sizes_of(path):
        model = EgoM2P(modalities, ModelArgs(dim, heads, *depths, mlp_ratio=ratio, variant=variant))
    dropped = tuple(f"{side}_embeddings.{n}." for side in ("encoder", "decoder") for n in raw)
    kept = {k: v for k, v in state.items() if not k.startswith(dropped)}
    _load(model, {new: v for k, v in kept.items() if (new := _model_name(k))}, path)
    return model


def convert_motion(state: dict[str, Tensor], num_heads: int | None, path: Path | str) -> MotionTokenizer:
    """A released camera or gaze VQ-VAE -> MotionTokenizer. Codes keep their norms."""
    if state.get("encoder.conv.weight", torch.empty(0)).ndim == 4:
        raise UserError(f"{path}: a ReViV hand or body tokenizer, whose patches span joints and frames; only camera "
                        "and gaze tokenizers are imported (tokens of hands and body are read as they are)")
    try:
        dim, channels, stride = state["encoder.conv.weight"].shape
        codes = state["quantize._codebook.embed"].reshape(-1, state["quant_proj.weight"].shape[0])
        tokens = state["encoder.position_embeddings"].shape[1]
        depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.blocks\.(\d+)\.", k)))
        ratio = state["encoder.blocks.0.mlp.fc1.weight"].shape[0] / dim
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a whole motion tokenizer ({_first_line(error)} is missing or "
                        "misshapen)") from error
    if channels not in MOTIONS:
        raise UserError(f"{path}: a motion of {channels} channels; the released tokenizers have 9 (camera) or 2 (gaze)")
    name, kind, mean, std = MOTIONS[channels]
    with _sizes_of(path):
        args = MotionArgs(tokens * stride, mean, std, dim, depth, num_heads or max(1, dim // 64), ratio, codes.shape[1],
                          stride, stride)
        tokenizer = MotionTokenizer(Modality(name, len(codes), (tokens,), kind), args)
    renamed = {}
    for key, value in state.items():
        if key not in _MOTION_DERIVED:
            for old, new in _MOTION_NAMES:
                key = key.replace(old, new)
            renamed[key] = value
    renamed["quantizer.embed_sum"] = codes * renamed["quantizer.cluster_size"].reshape(-1, 1)
    _load(tokenizer, renamed, path)
    return tokenizer


def _modality(name: str, state: dict[str, Tensor], dim: int, tokenizers: dict[str, str], path: Path | str) -> Modality:
    ours, kind = MODALITIES.get(name, (name.removeprefix("tok_"), "motion"))
    vocab_size = state[f"encoder_embeddings.{name}.token_emb.weight"].shape[0]
    table = state.get(f"encoder_embeddings.{name}.pos_emb")
    if table is None:
        raise UserError(f"{path}: no position table 'encoder_embeddings.{name}.pos_emb'")
    grid, positions = _grid(table.reshape(-1, dim), name, path)
    return Modality(ours, vocab_size, grid, kind, tokenizer=tokenizers.get(ours, ""), positions=positions)


def _grid(table: Tensor, name: str, path: Path | str) -> tuple[tuple[int, ...], str]:
    """The grid and the kind of position table whose entries these are; UserError when there is none."""
    count, dim = table.shape
    side = math.isqrt(count // 5)
    grids = [((count,), "axes"), ((5, side, side), "axes"), ((30, count // 30), "reviv")]
    for grid, kind in grids:
        fits = math.prod(grid) == count and not (kind == "reviv" and dim % 4)
        if fits and torch.allclose(table, position_table(grid, dim, kind), atol=1e-4):
            return grid, kind
    raise UserError(f"{path}: the position table of '{name}' ({count} x {dim}) is none that is known here")


def _model_name(key: str) -> str:
    """Our name of a released parameter; "" for those derived (position tables, tied and zero-bias buffers)."""
    match = re.match(r"(encoder|decoder)_embeddings\.([^.]+)\.(.*)", key)
    if match:
        side, released, rest = match.groups()
        name = MODALITIES.get(released, (released.removeprefix("tok_"), ""))[0]
        return {("encoder", "mod_emb"): f"embeddings.{name}.modality",
                ("encoder", "token_emb.weight"): f"embeddings.{name}.token.weight",
                ("decoder", "to_logits.weight"): f"heads.{name}.weight"}.get((side, rest), "")
    for old, new in _MODEL_NAMES:
        key = key.replace(old, new)
    return key


def _load(module: torch.nn.Module, weights: dict[str, Tensor], path: Path | str) -> None:
    """Strict, but a norm's all-zero bias buffer may be left out where our norm has none."""
    own = module.state_dict()
    for name, value in list(weights.items()):
        if name not in own:
            if name.endswith("bias") and not value.any():
                del weights[name]
                continue
            raise UserError(f"{path}: holds '{name}', which this model has no place for")
        if value.numel() != own[name].numel():
            raise UserError(f"{path}: '{name}' has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}")
        weights[name] = value.reshape(own[name].shape).to(own[name].dtype)
    for name in own.keys() - weights.keys():
        raise UserError(f"{path}: lacks '{name}'; the file is cut off or of another model")
    module.load_state_dict(weights)


def _size_name(args: argparse.Namespace) -> str:
    """`base` of `fm_base_12e_12d_swiglu_nobias` and the like; "" when there is none."""
    match = re.search(r"xlarge|large|base|small|tiny", str(getattr(args, "model", "")))
    return match[0] if match else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
