"""The table of mutants fits the code: each text is there once, what replaces it compiles, and the tests exist."""

import ast
import csv
import re

import pytest

from experiments.mutants import mutants
from experiments.mutants.mutants import Mutant
from helpers.running import ROOT

pytestmark = pytest.mark.slow  # fails where a line of the package has changed, which is no fault of it
TABLE = mutants.mutants()


def test_what_is_recorded_is_of_this_table() -> None:
    mutations = {mutant.id: mutants.mutation(mutant) for mutant in TABLE}
    with mutants.RESULTS.open(newline="") as file:
        assert all(mutations[row["id"]] == row["mutation"] for row in csv.DictReader(file))


@pytest.mark.parametrize("mutant", TABLE, ids=lambda mutant: mutant.id)
def test_the_line_is_still_there(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.text) == 1
    ast.parse(source.replace(mutant.text, mutant.replacement))
    named = re.findall(r"(\S+\.py)(?:::(\w+))?", mutant.tests)
    assert named
    for file, function in named:
        assert f"def {function}" in (ROOT / "tests" / file).read_text()
