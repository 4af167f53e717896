"""The logit lens of neurons' own weights: the rows of `neuron_weights`.

For y = x W, the vector of a neuron is a column of W in modules that read the residual stream (`mlp.up`, …) and a row of
W in those that write to it (`mlp.down`, `attn.o`). All modules give (neuron, d_model), however the weight is stored.

This takes the model, which a run names but does not contain. It is used if it can be read and has exactly the weights
of the run. Otherwise the table has no rows, and the manifest says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Conv1D

from backlens import demo
from backlens.atlas.tables import NEURON_WEIGHTS
from backlens.config import Vocabulary
from backlens.errors import BacklensError
from backlens.models.blocks import Block, matrix_shape
from backlens.models.checkpoint import ModelSource, Proof, pinned
from backlens.models.layout import read_layout
from backlens.models.load import load_model, prove
from backlens.projection.lens import Lens, Scaling, make_lens
from backlens.projection.project import TopK, Vectors, project
from backlens.store.directory import Directory
from backlens.store.input_paths import located
from backlens.store.run_record import RunRecord
from backlens.terms import READS


def neuron_weights(block: Block, module: str, expert: int | None) -> Float[Tensor, "neuron d_model"]:
    """The vectors of all neurons of a module, or of one expert, in the dtype in which they compute.

    Raises KeyError if the block has no such module.
    """
    if expert is None:
        located = block.matrices[module]
        matrix = _matrix(block.module.get_submodule(located.path))
    else:
        if block.experts is None:
            raise KeyError(module)
        located = block.experts.matrices[module]
        experts: Any = block.experts.module
        weight = getattr(experts, located.path)[expert]
        matrix = weight if experts.is_transposed else weight.mT
    part = located.part_of(matrix)
    return part.mT if module in READS else part


@torch.no_grad()
def _matrix(module: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """W of y = x W + b."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_floating_point() and weight.ndim == 2:
        return weight if isinstance(module, Conv1D) else weight.mT
    # Quantized weights (8 and 4 bits) are packed: apply the module to unit vectors instead.
    found = matrix_shape(module)
    assert found is not None
    bias = getattr(module, "bias", None)
    wide = bias.dtype if isinstance(bias, Tensor) else torch.float32
    output = module(torch.eye(found[0], device=weight.device, dtype=wide))
    return output - bias if isinstance(bias, Tensor) else output


CHUNK = 512
"""Neurons that are projected at a time."""
NONE = "none"
"""The value of `--weights` that leaves the table out."""


@dataclass(frozen=True)
class WeightSource:
    """The proven model of a run and its lens options; small, and sent to every worker."""

    model: ModelSource
    scaling: Scaling
    vocabulary: Vocabulary
    top_k: int
    digest: str
    """Hash of the weights, equal to the run's."""


@dataclass(frozen=True)
class NoWeights:
    """The reason why the model is not used."""

    reason: str


def find_weights(directory: Directory, record: RunRecord, given: str | None) -> WeightSource | NoWeights:
    """The model of a run, at `given` or where the run found it; a hub id is downloaded only if it is given.

    Raises BacklensError if `given` cannot be read or is another model. Code of a model is never run here: the request
    for it would come from the run directory, which may be anyone's.
    """
    if given == NONE:
        return NoWeights("left out (--weights none)")
    config, digest = located(record.config, directory, record), record.model.get("weight_hash")
    if digest is None or (given is None and "model" not in config):
        return NoWeights("run.json does not say of which model the run is")
    name = given or config["model"] or str(demo.MODEL)
    if config.get("trust_remote_code"):
        return NoWeights(f"{name} needs its own code (trust_remote_code), which is not run here")
    try:
        source = _source(config, record.model.get("revision"), str(name), is_given=given is not None)
        source, proof = _proven(source, is_given=given is not None)
        if proof.weights != digest:
            raise BacklensError(
                f"{name} has other weights (hash {proof.weights[:16]}) than the run's model had ({digest[:16]})"
            )
    except BacklensError as error:
        if given is not None:
            raise BacklensError(f"--weights {given}: {str(error).removeprefix('model: ')}") from error
        return NoWeights(f"{str(error).removeprefix('model: ')}; name its folder or hub id with --weights")
    return WeightSource(
        pinned(source, proof),
        config.get("scaling", "raw"),
        config.get("vocabulary", "model"),  # before there was a choice
        int(config.get("top_k", 10)),
        str(digest),
    )


def _source(config: Any, commit: str | None, name: str, is_given: bool) -> ModelSource:
    anatomy = config.get("anatomy")
    revision = commit or config.get("revision")
    return ModelSource(
        name,
        revision if not is_given else None if Path(name).is_dir() else config.get("revision"),
        config.get("dtype", "auto"),
        allow_pickle=is_given and bool(config.get("allow_pickle")),
        layout=None if anatomy is None else read_layout(anatomy),
    )


def _proven(source: ModelSource, is_given: bool) -> tuple[ModelSource, Proof]:
    """The model with its proof; for a hub id, the commit in the local cache."""
    if is_given or Path(source.path).is_dir():
        return source, prove(source)
    try:
        folder = Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BacklensError(f"{source.path} is neither a folder here nor in the hub's cache") from error
    cached = replace(source, path=str(folder), revision=None)
    return replace(source, revision=folder.name), prove(cached)


class WeightLens:
    """A loaded model that gives rows of `neuron_weights`."""

    def __init__(self, source: WeightSource) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded = load_model(source.model, device)
        tokens = self._loaded.token_ids if source.vocabulary == "tokenizer" else None
        self._lens = make_lens(self._loaded.parts, source.scaling, tokens)
        self._k = min(source.top_k, self._lens.vocabulary)

    def rows(self, kept: pa.Table) -> pa.Table:
        """The rows of the neurons in `kept` (columns layer, module, expert, neuron; sorted), in the same order."""
        columns: dict[str, list[Any]] = {name: [] for name in NEURON_WEIGHTS.schema.names}
        units = kept.group_by(["layer", "module", "expert"], use_threads=False).aggregate(
            [("neuron", "list")]
        )
        for unit in units.to_pylist():
            block = self._loaded.parts.blocks[unit["layer"]]
            weights = neuron_weights(block, unit["module"], unit["expert"])
            neurons = sorted(unit["neuron_list"])
            vectors = weights[torch.tensor(neurons, device=weights.device)].float()
            for name in ("layer", "module", "expert"):
                columns[name] += [unit[name]] * len(neurons)
            columns["neuron"] += neurons
            columns["weight_norm"] += vectors.norm(dim=-1).tolist()
            for part in vectors.split(CHUNK):
                for name, lists in _lists(
                    part.to(self._lens.unembedding.device), self._lens, self._k
                ).items():
                    columns[name] += lists
        return pa.table(columns, schema=NEURON_WEIGHTS.schema)


@torch.no_grad()
def _lists(
    vectors: Float[Tensor, "neuron d_model"], lens: Lens, k: int
) -> dict[str, Sequence[list[Any] | None]]:
    """The top and bottom lists of each vector; null for a zero vector."""
    alone = Vectors.alone(vectors, lens)
    target = lens.tokens(
        torch.zeros(1, dtype=torch.long, device=vectors.device)
    )  # any token: its rank is dropped
    selection, _ = project(alone, lens, target, k)
    return {
        f"weight_{name}": _with_nulls(getattr(selection, name), alone.wanted[0])
        for name in TopK.__dataclass_fields__
        if name.startswith(("top", "bottom"))
    }


def _with_nulls(found: Tensor, wanted: Tensor) -> list[list[Any] | None]:
    lists = iter(found.tolist())
    return [next(lists) if there else None for there in wanted.tolist()]
