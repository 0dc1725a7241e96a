"""Ladders: variants in several sizes, and what compute one needs for the losses of another."""
