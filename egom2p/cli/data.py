"""Commands that make and look after data: world, prepare, tokens, depth, shards."""

import os
from pathlib import Path

from egom2p.cli.common import add_config, add_device
from egom2p.errors import UserError


def add_commands(commands) -> None:
    _add_world(commands)
    _add_prepare(commands)
    _add_tokens(commands)
    _add_depth(commands)
    _add_shards(commands)


def _add_world(commands) -> None:
    parser = commands.add_parser("world", help="write procedural clips")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clip tars")
    parser.add_argument("--clips", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first clip")
    parser.add_argument("--size", type=int, default=64, help="side of the frames in pixels")
    parser.add_argument("--dataset", default="world", help="data set name written into the clips")
    parser.add_argument("--without", default="", help="signals to leave out, for instance depth,gaze")
    parser.add_argument("--processes", type=int, default=None)
    parser.set_defaults(run=_world)


def _world(args) -> None:
    from egom2p.datasets.world import write_world

    without = tuple(s for s in args.without.split(",") if s)
    write_world(args.out, args.clips, args.seed, args.size, args.dataset, without, args.processes, args.first)


def _add_prepare(commands) -> None:
    parser = commands.add_parser("prepare", help="real recordings -> clips, a card and a contact sheet")
    _add_recordings(parser, "folder for the clips; a second run does what is missing")
    parser.set_defaults(run=_prepare)


def _add_recordings(parser, out: str) -> None:
    from egom2p.datasets import ADAPTERS

    parser.add_argument("dataset", help=f"one of {', '.join(ADAPTERS)} (docs/data.md says how to get them), "
                                             "or your own as package.module:Class")
    parser.add_argument("--root", type=Path, required=True, help="folder of the raw data as its authors publish it")
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--size", type=int, default=256, help="side of the stored frames")
    parser.add_argument("--limit", type=int, default=0, help="at most so many clips a sequence")
    parser.add_argument("--sequences", nargs="*", default=[], help="only these")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--split", default="", help="what every sequence is for, instead of what the set's lists say")
    parser.add_argument("--gaze-units", default="", choices=("pixels", "normalized"),
                        help="of gaze files that do not say themselves (default: pixels; asked when they look like 0 "
                             ".. 1)")
    parser.add_argument("--depth-with-wearer", action="store_true",
                        help="depth that shows the wearer's own body, where a set has both (adt)")
    parser.add_argument("--series", nargs="+", default=[], metavar="NAME=HZ",
                        help="signals of your own, for instance imu=200: for `video` from NAME.imu.csv beside each one")
    parser.add_argument("--store", default="", choices=("npy", "mp4"),
                        help="frames and depth as arrays (npy), or as H.264 (visually lossless) and FFV1 "
                             "(lossless), a tenth of the size (default: npy, for prepare above 128 pixels mp4)")


def _prepare_args(args, store: str):
    from egom2p.datasets.prepare import PrepareArgs

    if args.size < 8 or min(args.limit, args.workers) < 0:
        raise UserError("--size must be at least 8, --limit and --workers not below 0")
    return PrepareArgs(args.size, args.limit, args.workers, args.split, args.gaze_units, args.depth_with_wearer, store,
                       _series(args.series))


def _series(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, _, rate = text.partition("=")
        try:
            found[name] = float(rate)
        except ValueError as error:
            raise UserError(f"--series {text}: write NAME=HZ, for instance imu=200") from error
    return found


def _prepare(args) -> int:
    from egom2p.datasets.card import describe
    from egom2p.datasets.prepare import prepare

    card = prepare(args.dataset, args.root, args.out, _prepare_args(args, args.store), tuple(args.sequences))
    print(f"{describe(card)}\ncard: {args.out / 'card.json'}, contact sheet: {args.out / 'contact_sheet.png'}")
    return 0 if card["clips"] and not card["failed"] else 1


def _add_tokens(commands) -> None:
    parser = commands.add_parser("tokens", help="real recordings -> token shards in one pass, no clips kept")
    _add_recordings(parser, "root of the token shards; a second run goes on where it was")
    parser.add_argument("--tokenizers", nargs="+", required=True, help="tokenizer folders or Hub names")
    parser.add_argument("--group", type=int, default=32, help="sequences a shard")
    parser.add_argument("--batch", type=int, default=0, help="clips that a network takes at once")
    add_device(parser)
    parser.set_defaults(run=_tokens)


def _tokens(args) -> int:
    from egom2p.datasets.card import describe
    from egom2p.datasets.tokenise import prepared_beside, tokenise
    from egom2p.distributed import environment_world
    from egom2p.tokenizers import load
    from egom2p.tokenizers.encode import EncodeArgs

    if args.group < 1:
        raise UserError("--group must be at least 1")
    device = environment_world(args.device).device
    card = tokenise(args.dataset, args.root, args.out, [load(t).to(device) for t in args.tokenizers],
                    _prepare_args(args, args.store or "npy"), tuple(args.sequences), args.group,
                    EncodeArgs(batch=args.batch))
    folder = prepared_beside(args.out)
    print(f"{describe(card)}\ncard: {folder / 'card.json'}, contact sheet: {folder / 'contact_sheet.png'}")
    return 0 if card["clips"] and not card["failed"] else 1


def _add_depth(commands) -> None:
    parser = commands.add_parser("depth", help="pseudo-label clips that have no depth")
    parser.add_argument("--clips", required=True, help="pattern of clip tars, which are rewritten")
    parser.add_argument("--model", required=True,
                        help="rollingdepth, video-depth-anything:WEIGHTS, or package.module:Class")
    parser.set_defaults(run=_depth)


def _depth(args) -> None:
    from egom2p.datasets.pseudo import label_depth

    labelled, had = label_depth(args.clips, args.model)
    print(f"{labelled} clips labelled, {had} had depth")


def _add_shards(commands) -> None:
    shards = commands.add_parser("shards", help="check, describe, index, convert or invent token shards")
    verbs = shards.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in (("check", "read every token file and list what is wrong"),
                       ("stats", "clips, ids and sizes by folder"),
                       ("index", "write index.json beside the shards")):
        parser = verbs.add_parser(verb, help=text)
        parser.add_argument("pattern", help="for instance 'tokens/[rgb,cam]/rooms/shard-{000000..000004}.tar' or a "
                                            "folder")
        if verb == "check":
            parser.add_argument("--config", type=Path, help="train config whose modalities the tokens must fit")
        parser.set_defaults(run={"check": _shards_check, "stats": _shards_stats, "index": _shards_index}[verb])
    convert = verbs.add_parser("convert", help="rewrite released or loose token files in the compact form")
    convert.add_argument("pattern")
    convert.add_argument("--out", type=Path, required=True)
    convert.add_argument("--config", type=Path, help="train config whose modalities name the folders (default: those "
                                                     "of the released model)")
    convert.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    convert.set_defaults(run=_shards_convert)
    random = verbs.add_parser("random", help="random tokens in the layout a config expects")
    add_config(random)
    random.add_argument("--out", type=Path, required=True)
    random.add_argument("--count", type=int, required=True, help="clips of each data set")
    random.add_argument("--seed", type=int, default=0)
    random.set_defaults(run=_shards_random)


def _shards_check(args) -> int:
    from egom2p.data.shardtools import check, modality_folders
    from egom2p.tokenizers.origin import origin_problems

    modalities = _modalities_of(args.config)
    found = check(args.pattern, modalities)
    strangers = origin_problems(modality_folders(args.pattern), modalities)
    for kind, rows in (("damage", found.problems), ("note", found.notes)):
        for row in rows:
            print(f"{kind}\t{row['file']}{': ' + row['key'] if row['key'] else ''}: {row['problem']}")
    for problem in strangers:
        print(f"origin\t{problem}")
    problems = len(found.problems) + len(strangers)
    print(f"{found.files} token files read, {problems or 'no'} problem{'' if problems == 1 else 's'}")
    return 1 if problems else 0


def _shards_stats(args) -> None:
    from egom2p.data.shardtools import stats

    columns = ("folder", "shards", "clips", "bytes", "dtype", "shape", "distinct_ids", "commonest_share", "unobserved",
               "unreadable")
    print("\t".join(columns))
    for row in stats(args.pattern):
        print("\t".join(f"{row[c]:.4f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))


def _shards_index(args) -> None:
    from egom2p.data.clips import expand_paths
    from egom2p.data.tarindex import index_tars

    tars = [p for p in expand_paths(args.pattern) if p.suffix == ".tar"]
    if not tars:
        raise UserError(f"{args.pattern}: no tar there; loose files need no index")
    entries = index_tars(tars)
    print(f"{len(entries)} shards, {sum(len(e.keys) for e in entries)} files indexed, "
          f"{sum(bool(e.damage) for e in entries)} damaged")


def _shards_convert(args) -> None:
    from egom2p.config import read_yaml
    from egom2p.data.shardtools import convert

    released = read_yaml(Path("cfgs/modalities/egom2p.yaml")).modalities
    names = _modalities_of(args.config).names if args.config else map(str, released)
    done = convert(args.pattern, args.out, names, args.workers or os.cpu_count() or 1)
    print(f"{done.files} token files in {done.written + done.kept} shards below {args.out}, {done.kept} of them from "
          f"before")
    before, after = done.rates
    print(f"one core reads {before:,.0f} token files a second of the old form, {after:,.0f} of the new "
          f"({after / before:.1f} times)")


def _shards_random(args) -> None:
    from egom2p.config import load
    from egom2p.data.shardtools import write_random
    from egom2p.modalities import ModalitySet
    from egom2p.training.pretraining import PretrainConfig

    if args.count < 1:
        raise UserError(f"--count must be at least 1, not {args.count}")
    config = load(PretrainConfig, args.config, args.overrides)
    held_out = config.eval.datasets if not config.eval.root else ()
    write_random(config.data, held_out, ModalitySet.from_config(config.modalities), args.out, args.count, args.seed)


def _modalities_of(config: Path | None):
    if config is None:
        return None
    from egom2p.config import load
    from egom2p.modalities import ModalitySet
    from egom2p.training.pretraining import PretrainConfig

    return ModalitySet.from_config(load(PretrainConfig, config).modalities)
