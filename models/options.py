"""The command line that the models in this folder share: whole numbers with defaults, errors of one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def make_parser(program: str, summary: str, objectives: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with the options of every model; it prints no usage, so that an error is one line."""
    parser = argparse.ArgumentParser(f"{program}.py", argparse.SUPPRESS, summary)
    parser.add_argument("--elbo", choices=(*objectives, "all"), default="all", help="the bound to train under")
    files = f"for {program}.png and {program}.json"
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help=files)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    defaults: Mapping[str, Any],
    quick: Mapping[str, Any],
    lowest: Mapping[str, int] | None = None,
) -> argparse.Namespace:
    """Read the options, with a new one for every default that is a whole number; ``--quick`` takes other defaults.

    A number below its ``lowest``, 1 where none is given, or of more than 31 bits is an error.
    """
    numbers = [name for name, value in defaults.items() if isinstance(value, int)]
    for name in numbers:
        parser.add_argument(option(name), type=int, metavar="N")
    parser.set_defaults(**(quick if parser.parse_args(argv).quick else defaults))
    args = parser.parse_args(argv)
    for name, low in {"seed": 0, **dict.fromkeys(numbers, 1), **(lowest or {})}.items():
        if not low <= getattr(args, name) < 2**31:
            parser.error(f"{option(name)} {getattr(args, name)}: give a whole number of {low} or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU; use --device cpu")
    return args


def positive(text: str) -> float:
    """A number above 0, for ``type=``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def counts(text: str) -> list[int]:
    """Numbers of particles in rising order, for ``type=``."""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = [0]
    if not 2 <= values[0] <= values[-1] < 2**31:
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers of 2 or more, as in 2,5,10,20")
    return values


def option(name: str) -> str:
    """An attribute's option: ``num_particles`` is set by ``--num-particles``."""
    return f"--{name.replace('_', '-')}"


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Report data that cannot be read, or a folder that cannot be made, as the parser's own errors."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}; choose another path")


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """PyTorch on so many threads, and as it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
