"""Chooses n_tip, budget and dense layers of a build: least KV bytes per decode step within a bound on the loss.

`grid.py` lists what a target can build, `windows.py` makes the text that `meter.py` measures its loss on, `search.py`
chooses, `plot.py` draws it.
"""
