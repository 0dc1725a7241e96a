"""Estimates from a config alone: parameters, FLOPs, memory, communication and step time, and the fastest layout."""

from moelm.plan.counts import count_model
from moelm.plan.search import Plan, make_plan

__all__ = ["Plan", "count_model", "make_plan"]
