"""Commands of a trained model: generate, eval, view, features, probe, export, push, import-released."""

import sys
from pathlib import Path

from egom2p.cli.common import add_device, add_trust, read_recipe
from egom2p.errors import UserError


def add_commands(commands) -> None:
    _add_generate(commands)
    _add_eval(commands)
    _add_view(commands)
    _add_features(commands)
    _add_probe(commands)
    _add_export(commands)
    _add_push(commands)
    _add_import(commands)


def _add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="predict modalities from videos or token files")
    parser.add_argument("model", help="run folder, export folder or Hub repository")
    parser.add_argument("--inputs", nargs="+", type=Path, required=True, metavar="FILE",
                        help="videos, or token files (.npz, .npy)")
    parser.add_argument("--targets", default="",
                        help="modalities to predict, in order: cam,depth (default: those of the recipe)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modality", default="",
                        help="what the inputs are (default: the model's first picture modality)")
    parser.add_argument("--recipe", type=Path, help="YAML with recipes by target (cfgs/generate/)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="draws a window; more than one also write their spread")
    parser.add_argument("--overlap", type=float, default=0.5,
                        help="seconds that neighbouring windows of a long recording share")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the blocks: slower to start, faster for many windows")
    add_trust(parser)
    parser.set_defaults(run=_generate)


def _generate(args) -> int:
    from egom2p.distributed import environment_world
    from egom2p.generation.pipeline import Pipeline
    from egom2p.generation.recordings import GenerateArgs, generate_files
    from egom2p.generation.schedule import name_unknown

    recipe = read_recipe(args.recipe)
    targets = list(dict.fromkeys(t for t in args.targets.split(",") if t)) or list(recipe.targets)
    if not targets:
        raise UserError("say what to predict: --targets cam,depth or a --recipe")
    pipeline = Pipeline.from_pretrained(args.model, str(environment_world().device), args.trust_torchscript)
    if args.compile:
        pipeline.model.compile()
    if args.samples < 1 or not 0 <= args.overlap < 2:
        raise UserError("--samples must be at least 1 and --overlap from 0 to below 2 seconds")
    asked = GenerateArgs(targets, args.modality or recipe.input, recipe.targets, args.seed, args.samples, args.overlap)
    name_unknown(recipe.targets, pipeline.model.modalities.names)
    folders, failed = generate_files(pipeline, args.inputs, args.out, asked)
    for folder in folders:
        print(folder)
    for reason in failed.values():
        print(f"egom2p: {reason}", file=sys.stderr)
    if failed and not folders:
        return 2
    if failed:
        print(f"{len(failed)} of {len(args.inputs)} recordings failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval",
                                 help="measure tasks on held-out clips (under torchrun: clips are shared among the "
                                      "ranks)")
    parser.add_argument("model", help="run folder, export folder or Hub repository")
    parser.add_argument("--protocol", type=Path,
                        help="YAML below cfgs/eval/: tasks, data, recipes and alignments in one")
    parser.add_argument("--tasks", help="for instance rgb2cam,rgb2gaze,rgb2depth,depth2rgb")
    parser.add_argument("--data", help="pattern of clip tars")
    parser.add_argument("--recipe", type=Path, help="YAML with recipes by target (cfgs/generate/)")
    parser.add_argument("--limit", type=int, help="at most so many clips, spread evenly")
    parser.add_argument("--out", type=Path,
                        help="folder for results.json, plots and the rows a stopped evaluation goes on from (default: "
                             "MODEL/eval; of a Hub repository evaluations/OWNER_NAME/eval)")
    parser.add_argument("--seed", type=int)
    add_trust(parser)
    parser.set_defaults(run=_eval)


def _eval(args) -> None:
    from egom2p.distributed import process_group
    from egom2p.evaluation.results import table
    from egom2p.evaluation.run import evaluate_to
    from egom2p.model.egom2p import EgoM2P

    protocol = _protocol(args)
    here = Path(args.model)
    out = args.out or (here if here.exists() else Path("evaluations") / args.model.replace("/", "_")) / "eval"
    with process_group(3600) as world:
        evaluation = evaluate_to(out, EgoM2P.from_pretrained(args.model, str(world.device)), protocol, world,
                                 args.trust_torchscript)
        if world.is_main:
            print(f"{table(evaluation.summary, protocol.published)}\nresults: {out / 'results.json'}")


def _protocol(args):
    """The protocol file, with what the command line says instead."""
    from dataclasses import replace

    from egom2p.config import load
    from egom2p.evaluation.run import ProtocolConfig

    given = {"tasks": tuple(args.tasks.split(",")) if args.tasks else None, "data": args.data, "limit": args.limit,
             "seed": args.seed,
             "recipes": read_recipe(args.recipe).targets if args.recipe else None}
    given = {k: v for k, v in given.items() if v is not None}
    if args.protocol:
        return replace(load(ProtocolConfig, args.protocol), **given)
    if not {"tasks", "data"} <= given.keys():
        raise UserError("say what to evaluate: --tasks rgb2cam --data 'clips/*.tar', or --protocol cfgs/eval/NAME.yaml")
    return ProtocolConfig(**given)


def _add_view(commands) -> None:
    parser = commands.add_parser("view", help="look at clips, predictions and evaluations in 3-D")
    parser.add_argument("path", help="clips, a folder of generate or eval, or a quickstart")
    parser.add_argument("--model", default="", help="predict the clips with this run, export folder or Hub name")
    parser.add_argument("--targets", default="", help="what is predicted, comma-separated (default: everything)")
    parser.add_argument("--limit", type=int, default=3, help="at most so many clips, spread over them")
    add_trust(parser)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--save", type=Path, metavar="FILE.rrd", help="a rerun recording")
    shown.add_argument("--web", action="store_true", help="serve the rerun viewer to browsers")
    shown.add_argument("--html", type=Path, metavar="FILE", help="one page that needs neither rerun nor a network")
    parser.set_defaults(run=_view)


def _view(args) -> None:
    from egom2p.view import takes_of
    from egom2p.visualize.page import write_page
    from egom2p.visualize.rerun_view import serve, show

    if args.limit < 1:
        raise UserError("--limit must be at least 1")
    takes = takes_of(args.path, args.limit, args.model, [t for t in args.targets.split(",") if t],
                     args.trust_torchscript)
    if args.html:
        write_page(args.html, takes, f"egom2p view {args.path}")
    elif args.web:
        serve(takes)
    else:
        show(takes, args.save)
    if args.html or args.save:
        print(args.html or args.save)


def _add_features(commands) -> None:
    parser = commands.add_parser("features", help="the encoder's features of clips, for other work")
    parser.add_argument("model", help="run, export folder or Hub name")
    parser.add_argument("--clips", required=True, help="pattern of clip tars")
    parser.add_argument("--out", type=Path, required=True, help="folder of the features; a second run goes on")
    parser.add_argument("--inputs", default="rgb", help="modalities that are shown, comma-separated")
    parser.add_argument("--layer", type=int, default=-1, help="encoder blocks to run (default: all, and the last norm)")
    parser.add_argument("--pool", default="mean", choices=("mean", "none"), help="over the tokens of a clip")
    parser.add_argument("--label", default="", help="entry of the clips' json that goes into OUT/labels.csv")
    add_device(parser)
    add_trust(parser)
    parser.set_defaults(run=_features)


def _features(args) -> None:
    from egom2p.distributed import environment_world
    from egom2p.features import FeatureArgs, write_features
    from egom2p.model.egom2p import EgoM2P

    world = environment_world(args.device)
    asked = FeatureArgs(tuple(args.inputs.split(",")), args.layer, args.pool, args.label)
    count = write_features(EgoM2P.from_pretrained(args.model, str(world.device)), args.clips, args.out, asked, world,
                           args.trust_torchscript)
    if world.is_main:
        print(f"features of {count} clips in {args.out}")


def _add_probe(commands) -> None:
    parser = commands.add_parser("probe", help="how much of a label is in features")
    parser.add_argument("features", type=Path, help="folder that `egom2p features` wrote")
    parser.add_argument("--labels", type=Path, required=True, help="CSV with the columns key and label")
    parser.add_argument("--kind", default="linear", choices=("linear", "attentive"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_probe)


def _probe(args) -> None:
    from egom2p.probe import probe

    if args.folds < 2:
        raise UserError("--folds must be at least 2")
    print(probe(args.features, args.labels, args.kind, args.folds, args.seed))


def _add_export(commands) -> None:
    parser = commands.add_parser("export", help="a self-contained folder: the model and its tokenizers, movable")
    parser.add_argument("model", help="run folder, export folder or Hub repository")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.set_defaults(run=_export)


def _export(args) -> None:
    from egom2p.generation.bundle import export_bundle

    print(export_bundle(args.model, args.out))


def _add_push(commands) -> None:
    for name, what, text in (("push", "source", "a model with its tokenizers and a card -> the Hugging Face Hub"),
                             ("push-data", "pattern", "clips or token shards -> the Hugging Face Hub")):
        parser = commands.add_parser(name, help=text)
        parser.add_argument(what, help={"source": "run or export folder", "pattern": "folder or pattern of tars"}[what])
        parser.add_argument("repo", help="OWNER/NAME on the Hub")
        parser.add_argument("--private", action="store_true")
        parser.add_argument("--licence", default="other", help="as the Hub names it, for instance apache-2.0")
        parser.set_defaults(run=_push)


def _push(args) -> None:
    from egom2p.hub import push_data, push_model

    if args.command == "push":
        print(push_model(args.source, args.repo, args.private, args.licence))
    else:
        print(push_data(args.pattern, args.repo, args.private, args.licence))


def _add_import(commands) -> None:
    parser = commands.add_parser("import-released", help="official checkpoints -> our export folders")
    parser.add_argument("file", type=Path,
                        help="the main checkpoint, the camera or gaze tokenizer's .pth, or VidTok's .ckpt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ema", action="store_true", help="take the averaged weights, where the file has them")
    parser.add_argument("--num-heads", type=int, help="attention heads, when the file's model name does not tell")
    parser.add_argument("--tokenizers", default="", metavar="NAME=FOLDER,...",
                        help="tokenizer folders to write into the model's config")
    parser.set_defaults(run=_import)


def _import(args) -> None:
    from egom2p.compat.released import import_released

    pairs = [item.partition("=") for item in args.tokenizers.split(",") if item]
    if not all(name and folder for name, _, folder in pairs):
        raise UserError(f"--tokenizers {args.tokenizers}: write NAME=FOLDER,NAME=FOLDER")
    folders = {name: folder for name, _, folder in pairs}
    print(import_released(args.file, args.out, args.num_heads, folders, args.ema))
