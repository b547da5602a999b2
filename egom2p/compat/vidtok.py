"""Microsoft's VidTok checkpoints (`vidtok_fsq_causal_*.ckpt`) -> VidTokTokenizer.

Widths, levels of the pyramid and where time is halved are read off the tensors; the quantiser has none, and all
published ones have levels of 8. Version 1.1 has the same tensors as 1.0: only the file's name tells.
"""

import re
from pathlib import Path

from torch import Tensor

from egom2p.errors import UserError
from egom2p.modalities import Modality
from egom2p.tokenizers.vidtok import VidTokArgs, VidTokTokenizer

CLIP_FRAMES, CLIP_SIDE = 16, 256  # the clips that `egom2p prepare` makes


def is_vidtok(state: dict[str, Tensor]) -> bool:
    return "encoder.down_temporal.0.block.0.conv1.conv.weight" in state


def convert_vidtok(state: dict[str, Tensor], path: Path, left_out: list[str]) -> VidTokTokenizer:
    """The tokenizer of a state dict, for clips of 16 x 256 x 256. left_out gets what training only needs. Raises
    UserError when tensors are missing or misshapen."""
    weights = {k: v for k, v in state.items() if k.startswith(("encoder.", "decoder."))}
    if others := len(state) - len(weights):
        left_out.append(f"{others} tensors of its training (loss, discriminator)")
    try:
        args = VidTokArgs(CLIP_FRAMES, *_shape(weights), repeats_first="v1_1" in path.name)
        side = CLIP_SIDE // args.patch[1]
        grid = (args.latent_frames, side, side)
        tokenizer = VidTokTokenizer(Modality("rgb", 8 ** len(args.levels), grid, "rgb"), args)
        own = {k: v for k, v in tokenizer.state_dict().items() if not k.startswith("quantizer.")}
        if wrong := [k for k in own.keys() | weights.keys() if k not in own or k not in weights
                     or own[k].shape != weights[k].shape]:
            raise UserError(f"{path}: '{sorted(wrong)[0]}' is missing, strange or misshapen; not a whole causal FSQ "
                            f"checkpoint of VidTok")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a whole causal FSQ checkpoint of VidTok ({error})") from error
    tokenizer.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    return tokenizer.eval()


def _shape(weights: dict[str, Tensor]) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...],
                                                tuple[int, ...], int]:
    """width, multipliers, quantiser's levels, encoder's and decoder's time levels, blocks."""
    width = len(weights["encoder.conv_in.conv.weight"])
    pyramid = _numbers(weights, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    multipliers = tuple(len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) // width for i in pyramid)
    levels = (8,) * len(weights["encoder.conv_out.conv.weight"])
    down = _numbers(weights, r"encoder\.down_temporal\.(\d+)\.downsample\.mix_factor")
    up = _numbers(weights, r"decoder\.up_temporal\.(\d+)\.upsample\.mix_factor")
    repeated = _numbers(weights, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
    return width, multipliers, levels, down, up, len(repeated)


def _numbers(weights: dict[str, Tensor], pattern: str) -> tuple[int, ...]:
    return tuple(sorted(int(m[1]) for k in weights if (m := re.fullmatch(pattern, k))))
