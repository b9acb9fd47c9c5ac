"""``python -m pyro_elbo_ext.testing module:ClassName``: the conformance table of a class."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pyro_elbo_ext.testing import conformance

REQUIRED = ("value <= evidence", "minibatch", "belief network")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the suite's table for ``module:ClassName``; return 0 only if what is required ran and all that ran held."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].count(":") != 1:
        sys.stderr.write("usage: python -m pyro_elbo_ext.testing module:ClassName\n")
        return 2
    module, _, name = arguments[0].partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        sys.stderr.write(f"cannot load {arguments[0]}: {error}\n")
        return 2
    checks = conformance(make, size=0.2)
    for check in checks:
        word = {True: "pass", False: "FAIL", None: "n/a"}[check.passed]
        sys.stdout.write(f"{word:5} {check.name:40} {check.detail}\n")
    required = [check for check in checks if check.name.startswith(REQUIRED)]
    held = all(check.passed is not False for check in checks) and all(check.passed for check in required)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
