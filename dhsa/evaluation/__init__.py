"""The instrument: what a model loses when its attention sees a selection of the keys. `python -m dhsa eval`.

Methods of selection run over tasks at equal budgets; every prompt is the same for all of them, dense attention is the
base line, and results are rows of JSON appended as they come. Here:

- `command`: the command line.     - `settings`: method specs ("rows:query_block=64") at a budget, as Configs.
- `engine`, `likelihood`: a model's prefill by a setting, likelihoods, greedy answers.
- `runner`, `store`: which rows are missing, and rows on disk.
- `texts`: documents.              - `metrics`: F1, ROUGE-L, edit similarity and the like.
- `tasks`: one file each.          - `report`, `pairing`, `pictures`: what is made of the rows.

Not here: how keys are selected (csrc/select), what a method is (dhsa.config).
"""

__all__: list[str] = []
