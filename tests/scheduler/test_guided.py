"""Drafts of a sequence that has a grammar."""

from __future__ import annotations

from jaxserve.scheduler.guided import GuidedDrafts


class Guide:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.must: list[int] = []
        self.most = 100

    def forced(self) -> list[int]:
        return self.must

    def admitted(self, draft: list[int]) -> int:
        return min(self.most, len(draft))


def made(tokens: list[int], prompt_len: int) -> tuple[GuidedDrafts, Guide]:
    guide = Guide()
    drafts = GuidedDrafts(tokens, prompt_len, guide)
    return drafts, guide


def test_what_must_come_is_foretold_as_far_as_it_goes():
    drafts, guide = made([1, 2, 3], 3)
    drafts.take_in()
    assert not drafts.foretells
    guide.must = [7, 8, 9]
    drafts.take_in()
    assert drafts.foretells and drafts.guess(2) == [7, 8] and drafts.guess(9) == [7, 8, 9]
    assert drafts.accuracy(2) > 0.8 and drafts.accuracy(3) == 0.0


def test_spellings_that_the_model_does_not_take_are_trusted_less():
    tokens = [1, 2, 3]
    drafts, guide = made(tokens, 3)
    guide.must = [7]
    drafts.take_in()
    at_first = drafts.accuracy()
    for _ in range(20):
        tokens.append(6)
        drafts.take_in()
    assert drafts.accuracy() < at_first / 3
    for _ in range(100):
        tokens.append(7)
        drafts.take_in()
    assert drafts.accuracy() > at_first


def test_elsewhere_guesses_are_cut_where_the_grammar_ends_them():
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    drafts, guide = made(tokens, 2)
    drafts.take_in()
    assert drafts.guess(3) == [4, 5, 6]
    guide.most = 2
    assert drafts.guess(3) == [4, 5]
    guide.most = 0
    assert drafts.guess(3) == []
