"""The doctor: `dhsa.check` and `python -m dhsa check` read a prompt exact and sparse and say in words what differs.

`run.py`: both prefills, watched layer by layer. `reasons.py`: why a layer left nothing out. `findings.py`: what of it
deserves a sentence. `report.py`: the result and its table. `command.py`: the command line, which needs no torch to be
parsed.
"""

__all__: list[str] = []
