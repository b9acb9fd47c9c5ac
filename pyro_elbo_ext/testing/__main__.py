"""``python -m pyro_elbo_ext.testing module:ClassName``: the conformance table of a class."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pyro_elbo_ext.testing import conformance


def main(argv: Sequence[str] | None = None) -> int:
    """Print the suite's table for ``module:ClassName`` and return 0 only if nothing failed."""
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
        sys.stdout.write(f"{'pass' if check.passed else 'FAIL':5} {check.name:32} {check.detail}\n")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
