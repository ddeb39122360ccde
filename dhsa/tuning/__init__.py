"""Tuning: a Config for each layer of a model, found by measuring it. `python -m dhsa tune`.

Each layer's attention is measured by many configs on its own queries, keys and values: the seconds, and the relative
error of the output. How much an error of a layer changes the model's predictions is measured by making one layer sparse
at a time. From both follows the choice; it is then measured as a whole, and corrected. The modules:

- `command`: the command line, the order of the steps, and the file.
- `candidates`: the configs that are tried.
- `measure`: the measurements.
- `choose`: the choice, from numbers only.
"""

__all__: list[str] = []
