"""Rankers that train nothing: the floors and the toy shop's ceilings."""
