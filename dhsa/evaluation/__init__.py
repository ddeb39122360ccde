"""Evaluation: what a model loses when its attention sees a selection of the keys. `python -m dhsa eval`.

Methods of selection run on tasks at equal budgets. Every prompt is the same for all of them, dense attention is the
baseline, and results are rows of JSON, appended as they are measured. The modules:

- `command`: the command line.
- `settings`: method specifications ("rows:query_block=64") at a budget, as Configs.
- `engine`, `likelihood`: a model's prefill by a setting, likelihoods, greedy answers.
- `runner`, `store`: which rows are missing, and rows on disk.
- `texts`: documents.
- `metrics`: F1, ROUGE-L, edit similarity and others.
- `tasks`: one file for each task.
- `prompts`, `haystack`, `answers`: chat templates, long texts, and answers through a cache, which tasks share.
- `report`, `pairing`, `pictures`: tables and pictures made from the rows.
- `table`: all methods at one density, by task, length and subtask.

How keys are selected is in csrc/select, what a method is in dhsa.config.
"""

__all__: list[str] = []
