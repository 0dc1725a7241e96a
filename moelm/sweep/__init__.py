"""Training and comparison of many runs that one file describes: its variants, matching sizes, budgets, execution."""
