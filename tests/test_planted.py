"""The script that plants bugs: its texts still stand once in the package, and it tells caught from missed."""

import pytest

from tests import planted
from tests.planted import INERT, PLANTS, Plant, check_plant, main

PACKAGE = """
def step(x):
    return x + 1


def trusted(x):
    if x < 1:
        raise ValueError("not to be trusted")


def twice(x):
    return 2 * x


VERSION = 1
"""

TESTS = """
import warnings

import pytest
from pyro_elbo_ext import step, trusted, twice


@pytest.fixture
def four():
    assert twice(2) == 4
    return 4


def test_twice():
    assert twice(3) == 6


def test_weak():
    assert twice(0) == 0


def test_by_fixture(four):
    assert four == 4


@pytest.mark.convergence
def test_it_moves():
    assert step(1) > 1


@pytest.mark.slow
@pytest.mark.convergence
@pytest.mark.parametrize("start", [0, 5])
def test_it_gets_there(start):
    assert abs(step(start) - start - 1) < 1


@pytest.mark.convergence
def test_it_claims_to_move():
    assert step(1) >= 1


@pytest.mark.convergence
def test_it_warns():
    if step(1) == 1:
        warnings.warn("it stands still")


@pytest.mark.convergence
def test_it_is_trusted():
    trusted(step(0))
"""


def toy(name, old, new, *tests):
    return Plant(name, "__init__.py", old, new, tuple(f"tests/test_toy.py::{test}" for test in tests))


SEEN = toy("seen", "2 * x", "3 * x", "test_weak", "test_twice")
UNSEEN = toy("unseen", "2 * x", "3 * x", "test_weak")
STILL = toy("still", "x + 1", "x")


@pytest.fixture
def root(tmp_path):
    for path, text in {"pyro_elbo_ext/__init__.py": PACKAGE, "tests/test_toy.py": TESTS}.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    settings = "[tool.pytest.ini_options]\naddopts = \"-m 'not slow' --strict-markers\"\nfilterwarnings = ['error']\n"
    (tmp_path / "pyproject.toml").write_text(f'{settings}markers = ["slow: long", "convergence: gets there"]\n')
    return tmp_path


@pytest.mark.parametrize("plant", [*PLANTS, *INERT], ids=lambda plant: plant.name)
def test_each_bug_can_be_planted(plant):
    check_plant(plant)
    assert plant.new != plant.old
    assert plant.tests or plant in INERT


def test_bugs_have_names_of_their_own():
    assert len({plant.name for plant in PLANTS}) == len(PLANTS) >= 16


def test_all_is_proved(root, capsys):
    path = root / "tests/test_toy.py"
    path.write_text(path.read_text().replace("step(1) >= 1", "step(1) > 1.5").replace("warnings.warn", "pytest.fail"))
    assert main(["--jobs", "1"], root, [SEEN], [STILL]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "without a bug the 2 tests pass",
        "caught  seen  tests/test_toy.py::test_twice",
        "1 of 1 bugs were caught",
        "fails   tests/test_toy.py::test_it_moves",
        "fails   tests/test_toy.py::test_it_gets_there[0]",
        "fails   tests/test_toy.py::test_it_gets_there[5]",
        "fails   tests/test_toy.py::test_it_claims_to_move",
        "fails   tests/test_toy.py::test_it_warns",
        "fails   tests/test_toy.py::test_it_is_trusted",
        "without steps 6 of 6 tests of convergence fail",
    ]
    assert (root / "pyro_elbo_ext/__init__.py").read_text() == PACKAGE


def test_a_bug_that_is_missed_and_a_claim_that_holds_without_steps_are_told(root, capsys):
    assert main([], root, [UNSEEN, SEEN], [STILL]) == 1
    printed = capsys.readouterr().out
    assert "MISSED  unseen  all its tests pass\ncaught  seen    tests/test_toy.py::test_twice\n" in printed
    assert "1 of 2 bugs were caught" in printed
    assert "MISSED  tests/test_toy.py::test_it_claims_to_move\n" in printed
    assert "MISSED  tests/test_toy.py::test_it_warns: UserWarning: it stands still\n" in printed
    assert "without steps 4 of 6 tests of convergence fail" in printed


@pytest.mark.parametrize(
    ("new", "test", "says"),
    [
        ("2 *", "test_twice", "SyntaxError"),
        ("2 * y", "test_twice", "NameError"),
        ("3 * x", "test_by_fixture", "pytest ended with 1"),
    ],
    ids=["does not compile", "does not run", "fails in a fixture"],
)
def test_a_failure_that_is_not_the_tests_own_is_none(root, new, test, says):
    caught, why = planted.judge(toy("bug", "2 * x", new, test), root)
    assert not caught
    assert says in why


def test_tests_that_fail_without_a_bug_prove_nothing(root, capsys):
    path = root / "tests/test_toy.py"
    path.write_text(path.read_text().replace("twice(3) == 6", "twice(3) == 7"))
    assert main(["--only", "seen"], root, [SEEN], ()) == 1
    assert "tests fail without a bug" in capsys.readouterr().out


def test_another_package_than_the_copys_is_refused(root):
    with planted.copied(root, [toy("elsewhere", "VERSION = 1", "__file__ = '/elsewhere/__init__.py'")]) as copy:
        result = planted.run_tests(copy, ["tests/test_toy.py"])
    assert result.status == 4
    assert "/elsewhere/__init__.py, not that of the copy" in result.output
    assert not result.reports


STALE = {
    "text": (
        "5 * x",
        "tests/test_toy.py::test_weak",
        "plant 'bug': its text stands 0 times in pyro_elbo_ext/",
    ),
    "twice": (
        "x",
        "tests/test_toy.py::test_weak",
        "its text stands 6 times in .*__init__.py, expected once",
    ),
    "test": ("2 * x", "tests/test_toy.py::test_twi", "there is no test tests/test_toy.py::test_twi. Name the one that"),
    "file": ("2 * x", "tests/test_other.py::test_weak", "there is no test tests/test_other.py::test_weak"),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_plant_is_refused(root, case):
    old, test, message = STALE[case]
    with pytest.raises(ValueError, match=message):
        main([], root, [Plant("bug", "__init__.py", old, "y", (test,))], ())


def test_names(root, capsys):
    assert main(["--list"], root, [SEEN, UNSEEN], ()) == 0
    assert capsys.readouterr().out == "seen  (__init__.py)\nunseen  (__init__.py)\n"
    with pytest.raises(SystemExit) as exit:
        main(["--only", "no such"], root, [SEEN], ())
    assert exit.value.code == 2
    assert "there is no bug 'no such': see --list" in capsys.readouterr().err
