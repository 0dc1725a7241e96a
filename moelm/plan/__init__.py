"""What a run will need and how long it will take, from its config alone: memory, messages, time, and the best layout."""

from moelm.plan.search import Plan, make_plan

__all__ = ["Plan", "make_plan"]
