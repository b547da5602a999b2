"""`egom2p tokenizer ...`."""

from pathlib import Path

from egom2p.cli.common import add_config, add_device


def add_commands(commands) -> None:
    _add_tokenizer(commands)


def _add_tokenizer(commands) -> None:
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer, encode clips, measure and compare")
    verbs = tokenizer.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train from a config")
    add_config(train)
    train.set_defaults(run=_tokenizer_train)
    encode = verbs.add_parser("encode", help="clips -> token shards")
    encode.add_argument("tokenizers", nargs="+", help="tokenizer folders or Hub names")
    encode.add_argument("--clips", required=True, help="pattern of clip tars")
    encode.add_argument("--out", type=Path, required=True, help="root of the token shards")
    encode.add_argument("--dataset", default="", help="data set name, instead of the one in the clips")
    encode.add_argument("--batch", type=int, default=0,
                        help="clips that a network takes at once (default: 16 videos, 1024 motions)")
    encode.add_argument("--workers", type=int, default=-1,
                        help="reading processes beside each encoding one (default: its other cores, at most 16)")
    add_device(encode)
    encode.set_defaults(run=_tokenizer_encode)
    reconstruct = verbs.add_parser("reconstruct", help="error table of encoding and decoding clips")
    reconstruct.add_argument("tokenizer", help="tokenizer folder or Hub name")
    reconstruct.add_argument("--clips", required=True, help="pattern of clip tars")
    reconstruct.add_argument("--limit", type=int, default=200, help="at most so many clips (0 = all)")
    add_device(reconstruct)
    reconstruct.set_defaults(run=_tokenizer_reconstruct)
    compare = verbs.add_parser("compare", help="tokenizers of one signal side by side: errors, bits, ids in use, speed")
    compare.add_argument("tokenizers", nargs="+", help="tokenizer folders or Hub names")
    compare.add_argument("--clips", required=True, help="pattern of clip tars")
    compare.add_argument("--limit", type=int, default=200, help="at most so many clips (0 = all)")
    add_device(compare)
    compare.set_defaults(run=_tokenizer_compare)


def _tokenizer_compare(args) -> None:
    from egom2p.distributed import environment_world
    from egom2p.evaluation.run import comparison_table
    from egom2p.tokenizers import load

    device = environment_world(args.device).device
    names = [Path(t).name for t in args.tokenizers]
    labels = names if len(set(names)) == len(names) else args.tokenizers
    made = {label: load(t).to(device) for label, t in zip(labels, args.tokenizers, strict=True)}
    print(comparison_table(made, args.clips, args.limit))


def _tokenizer_train(args) -> None:
    from egom2p.config import load
    from egom2p.training.tokenizer_training import TokenizerConfig, train_tokenizer

    train_tokenizer(load(TokenizerConfig, args.config, args.overrides))


def _tokenizer_encode(args) -> None:
    from egom2p.distributed import environment_world
    from egom2p.tokenizers import load
    from egom2p.tokenizers.encode import EncodeArgs, encode_clips

    world = environment_world(args.device)
    asked = EncodeArgs(args.dataset, args.batch, args.workers)
    written = encode_clips([load(t).to(world.device) for t in args.tokenizers], args.clips, args.out, asked, world)
    if world.is_main:
        for name, entry in written.items():
            left_out = "".join(f", {n} left out: {reason}" for reason, n in entry["left_out"].items())
            print(f"{name}: {entry['clips']} clips{left_out}")


def _tokenizer_reconstruct(args) -> None:
    from egom2p.distributed import environment_world
    from egom2p.evaluation.run import reconstruction_table
    from egom2p.tokenizers import load

    device = environment_world(args.device).device
    print(reconstruction_table(load(args.tokenizer).to(device), args.clips, args.limit))
