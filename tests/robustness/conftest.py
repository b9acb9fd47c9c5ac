import pytest

import pyro_elbo_ext.run.compiled.svi as compiled_svi
from pyro_elbo_ext.run.compiled import loop


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiled steps operation by operation, which need not wait for a compiler."""
    monkeypatch.setattr(compiled_svi, "compile_block", lambda step, *_: (loop._python_loop(step), "graph"))
