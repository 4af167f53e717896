"""What a neuron writes or reads by itself: its own weights through the lens, to stand beside what gradients say.

That takes the model, which a run names but does not hold. It is read if it is at hand with just the weights that the
run had; if not, the atlas says why, and the tables have nulls in the place of these columns.
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
from torch import Tensor

from pipeline import demo
from pipeline.config import Vocabulary
from pipeline.errors import BacklensError
from pipeline.lens import Lens, Scaling, make_lens
from pipeline.models.checkpoint import ModelSource, Proof, pinned
from pipeline.models.layout_file import read_layout
from pipeline.models.load import load_model, prove
from pipeline.models.weights import neuron_weights
from pipeline.projection import Selection, Vectors, project
from pipeline.store.files import Directory
from pipeline.store.places import located
from pipeline.store.rundir import RunRecord
from schemas.atlas import NEURON_WEIGHTS

CHUNK = 512
"""Neurons projected at a time."""
NONE = "none"
"""What `--weights` takes in the place of a model, to leave them out."""


@dataclass(frozen=True)
class WeightSource:
    """The model of a run, with just its weights; small, and sent to every worker."""

    model: ModelSource
    scaling: Scaling
    vocabulary: Vocabulary
    top_k: int
    digest: str
    """The weights' hash, which is the run's."""


@dataclass(frozen=True)
class NoWeights:
    """Why there are none."""

    reason: str


def find_weights(directory: Directory, record: RunRecord, given: str | None) -> WeightSource | NoWeights:
    """The run's model where the run found it, or at `given`; a hub id is not downloaded unless it is given.

    Raises BacklensError if `given` cannot be read or is another model. Code that a model brings is not run: what asks
    for it here would be the run directory, which may be anybody's.
    """
    if given == NONE:
        return NoWeights("left out (--weights none)")
    config, digest = located(record.config, directory, record), record.model.get("weight_hash")
    if digest is None or (given is None and "model" not in config):
        return NoWeights("run.json does not say of which model the run is")
    name = given or config["model"] or str(demo.MODEL)
    if config.get("trust_remote_code"):
        return NoWeights(f"{name} brings code of its own, which is not run here")
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
        return NoWeights(f"{str(error).removeprefix('model: ')}; name its place with --weights")
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
    """The model, of a hub id the commit that is in the cache, and what its files hold."""
    if is_given or Path(source.path).is_dir():
        return source, prove(source)
    try:
        folder = Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BacklensError(f"{source.path} is neither a folder here nor in the hub's cache") from error
    cached = replace(source, path=str(folder), revision=None)
    return replace(source, revision=folder.name), prove(cached)


class WeightLens:
    """A loaded model, to be asked for its neurons."""

    def __init__(self, source: WeightSource) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded = load_model(source.model, device)
        tokens = self._loaded.token_ids if source.vocabulary == "tokenizer" else None
        self._lens = make_lens(self._loaded.anatomy, source.scaling, tokens)
        self._k = min(source.top_k, self._lens.vocabulary)

    def rows(self, kept: pa.Table) -> pa.Table:
        """The rows of `neuron_weights` of the neurons in `kept` (layer, module, expert, neuron), in its order."""
        columns: dict[str, list[Any]] = {name: [] for name in NEURON_WEIGHTS.schema.names}
        units = kept.group_by(["layer", "module", "expert"], use_threads=False).aggregate(
            [("neuron", "list")]
        )
        for unit in units.to_pylist():
            block = self._loaded.anatomy.blocks[unit["layer"]]
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
    """Top and bottom lists of each vector; null for a zero vector."""
    wide = vectors.double()
    squared, centred = (v.square().sum(-1) for v in (wide, lens.norm.centre(wide)))
    nothing = vectors.new_zeros(1, 0, len(vectors))
    asked = Vectors(
        residual=vectors[None],
        scale=lens.scale(squared, centred)[None],
        wanted=(squared > 0)[None],
        mixes=nothing,
        mix_scale=nothing[..., 0],
        mix_wanted=nothing[..., 0].bool(),
    )
    target = lens.tokens(torch.zeros(1, dtype=torch.long, device=vectors.device))  # any: it is not kept
    selection, _ = project(asked, lens, target, k)
    return {
        f"weight_{name}": _spread(getattr(selection, name), squared > 0)
        for name in Selection.__dataclass_fields__
        if name.startswith(("top", "bottom"))
    }


def _spread(found: Tensor, wanted: Tensor) -> list[list[Any] | None]:
    lists = iter(found.tolist())
    return [next(lists) if there else None for there in wanted.tolist()]
