"""Every feature with every other, over the fake engine: tokens equal the oracle, whatever acts."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.interplay.catalogue import FEATURES, GRAMMARS, PREEMPTION
from tests.interplay.features import Feature, Trial


@pytest.mark.parametrize(
    "pair",
    [*combinations(FEATURES, 2), *product(FEATURES, PREEMPTION)],
    ids=lambda pair: " + ".join(f.name for f in pair),
)
def test_pair(pair: tuple[Feature, Feature]) -> None:
    trial = Trial(pair)
    trial.run()
    trial.check()


@pytest.mark.parametrize("preemption", PREEMPTION, ids=lambda feature: feature.name)
def test_all_together(preemption: Feature) -> None:
    one_grammar = [feature for feature in FEATURES if feature.name not in GRAMMARS[1:]]
    trial = Trial((*one_grammar, preemption))
    trial.run()
    trial.check()
