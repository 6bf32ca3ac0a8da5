"""Baselines: floors without training, the toy shop's ceilings, and models over item ids."""
