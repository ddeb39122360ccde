"""The module behind `dhsa.check` and `python -m dhsa check`.

It reads a prompt by exact and by sparse attention and describes the differences. `run.py` runs both prefills and
observes each layer. `reasons.py` states why a layer left no key out. `findings.py` decides what to warn about.
`report.py` has the result and its table. `command.py` is the command line, whose arguments can be parsed without torch.
"""

__all__: list[str] = []
