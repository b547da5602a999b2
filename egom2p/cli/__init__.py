"""`egom2p COMMAND`. Each command parses its arguments and calls one function elsewhere."""

import argparse
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import egom2p
from egom2p.cli import data, models, tokenizer, training
from egom2p.errors import Preempted, UserError, refusal
from egom2p.processes import set_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 1 when part of the work failed; 2 after one line about a mistake of
    the user's; 75 when a run was asked to stop and saved; 130 after Ctrl-C; 141 when the reader of the output left."""
    parser = _parser()
    args, left = parser.parse_known_args(argv)
    if left and not (hasattr(args, "overrides") and all("=" in a and not a.startswith("-") for a in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:  # overrides given after options, which argparse does not join to those before
        args.overrides = [*args.overrides, *left]
    _set_up_logging()
    set_environment()
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"egom2p: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe went away (`| head`); nothing may be printed there any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if not refusal(error):
            raise
        print(f"egom2p: {refusal(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("egom2p: interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    except Preempted as stopped:
        print(f"egom2p: {stopped}", file=sys.stderr)
        return Preempted.EXIT_CODE


def _set_up_logging() -> None:
    for stream in (sys.stdout, sys.stderr):  # names of files that are no UTF-8, or that this locale cannot print
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpx2", "matplotlib", "PIL", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            close = difflib.get_close_matches(match[1], [name.strip("' ") for name in match[2].split(",")], n=1)
            message += f"; did you mean '{close[0]}'?" if close else ""
        self.exit(2, f"egom2p: {message} (see `{self.prog} --help`)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="egom2p",
                     description="One masked transformer over egocentric video, depth, camera motion and gaze.")
    parser.add_argument("--version", action="version", version=f"egom2p {egom2p.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (data, tokenizer, training, models):
        group.add_commands(commands)
    parser.set_defaults(parse=parser.parse_args)  # for commands that hand on another one, such as submit
    return parser
