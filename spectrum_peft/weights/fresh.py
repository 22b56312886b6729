"""Which parameters of a live model are new: no file gave them, so their values are random, or a class's first ones."""

from __future__ import annotations

from torch import nn

from ..errors import CheckpointError, MismatchError
from ..names import block_index
from .files import FileWeights
from .headers import find_shards
from .layouts import skeleton_like
from .live import base_module, checkpoint_folder
from .roles import output_head


def new_parameters(model: nn.Module) -> tuple[str, ...] | None:
    """Parameters that the checkpoint which a model was loaded from lacks, in model order, a tied one once.

    A head that the checkpoint has in another size (other labels) is new, too; tables that were grown for new tokens are not.

    Returns:
        None where nobody knows: a model without a checkpoint folder at hand, or none of transformers'.
    Raises:
        MismatchError: none of the class's blocks is in the checkpoint.
    """
    inner = base_module(model)
    folder = checkpoint_folder(inner)
    if folder is None:
        return None
    try:
        skeleton = skeleton_like(inner)
        if skeleton is None:
            return None
        files = FileWeights(find_shards(folder), folder=folder, skeleton=skeleton)
    except CheckpointError:
        return None
    if files.strange is not None:
        what = "part" if block_index(files.strange) is None else "block"
        raise MismatchError(
            f"{folder}: holds no {what} of a {type(inner).__name__}, the first is {files.strange}, so what the model computes is "
            "random; wanted a class that opens the checkpoint."
        )
    if files.layout is None:
        return None
    sizes = {info.name: info.shape for info in files.tensors()}
    embeddings = {name for name, role in files.layout.roles.items() if role == "embedding"}
    embeddings |= {name for group in files.layout.tied if embeddings & set(group) for name in group}
    resized = {
        name
        for name, shape in sizes.items()
        if shape != files.layout.shapes[name] and not _may_be_resized(name, embeddings, skeleton)
    }
    first = {name: group[0] for group in files.layout.tied for name in group}
    found = [name for name in files.layout.shapes if name in files.layout.new or name in resized]
    return tuple(dict.fromkeys(first.get(name, name) for name in found))


def _may_be_resized(name: str, embeddings: set[str], skeleton: nn.Module) -> bool:
    """Whether `resize_token_embeddings` gives a parameter another size: a table's, and the output head's."""
    head = output_head(skeleton)
    owner = skeleton.get_submodule(name.rpartition(".")[0])
    return name in embeddings or owner is head
