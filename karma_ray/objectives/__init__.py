"""The formulas of the paper, without weights: each is one function that cites its equation."""
