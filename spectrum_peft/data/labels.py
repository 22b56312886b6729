"""Names and ids of the classes in a column of labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError, near_matches

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

_DEFAULT_LABEL = re.compile(r"LABEL_\d+")


def label_names(dataset: Dataset, config: PretrainedConfig | None, source: str, column: str = "label") -> list[str]:
    """Names of the classes, in the order of their ids.

    A checkpoint that was trained as a classifier brings its own names and they win; else a `ClassLabel` column brings
    them; else they are the sorted values of the column, integers by value.

    Args:
        dataset: with the column; of labels, or of lists of labels.
        config: of the checkpoint if it already has a classification head, else None.
    Raises:
        DataError: a label is not among the checkpoint's, or there is only one.
    """
    import datasets

    feature, values = _labels_in(dataset, column)
    found = list(feature.names) if isinstance(feature, datasets.ClassLabel) else [str(v) for v in values]
    if config is not None:
        known = [config.id2label[i] for i in sorted(config.id2label)]
        if not all(_DEFAULT_LABEL.fullmatch(name) for name in known):
            unknown = [name for name in found if name not in known]
            if unknown and not _are_ids(values, len(known)):
                raise DataError(
                    f"{source}: label {unknown[0]!r} is not one of the {len(known)} that the checkpoint's head knows."
                    + near_matches(unknown[0], known)
                )
            return known
        if len(found) != len(known):
            raise DataError(f"{source}: {len(found)} labels, but the checkpoint's head has {len(known)} outputs.")
    if len(found) < 2:
        raise DataError(f"{source}: column {column!r} holds only {found}, wanted at least two classes.")
    return found


def label_ids(dataset: Dataset, names: Sequence[str], column: str = "label") -> Callable[[Any], int]:
    """How a label of the column becomes the id of a class: by name, or as it is where the column holds ids.

    Raises:
        DataError: a value is none of `names`.
    """
    import datasets

    feature, values = _labels_in(dataset, column)
    position = {name: i for i, name in enumerate(names)}
    if isinstance(feature, datasets.ClassLabel) and set(feature.names) <= set(names):
        return lambda value: position[feature.int2str(value)]
    if all(str(value) in position for value in values):
        return lambda value: position[str(value)]
    if _are_ids(values, len(names)):
        return int
    unknown = next(str(value) for value in values if str(value) not in position)
    near = near_matches(unknown, names)
    raise DataError(f"label {unknown!r} is none of the {len(names)} that the model knows." + near)


def _labels_in(dataset: Dataset, column: str) -> tuple[Any, list[Any]]:
    """(feature of one label, the labels that occur, sorted) of a column of labels, or of lists of them."""
    feature = dataset.features[column]
    if hasattr(feature, "feature"):
        return feature.feature, sorted({value for row in dataset[column] for value in row})
    return feature, sorted(dataset.unique(column))


def _are_ids(values: Sequence[Any], n: int) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < n for v in values)
