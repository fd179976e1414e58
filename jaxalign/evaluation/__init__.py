"""Judging what a model writes."""

from jaxalign.evaluation.answers import Comparison, Side, check_rules, judge, make_answer, readable, texts
from jaxalign.evaluation.rules import RULES, concise, mentions

__all__ = [
    "RULES",
    "Comparison",
    "Side",
    "check_rules",
    "concise",
    "judge",
    "make_answer",
    "mentions",
    "readable",
    "texts",
]
