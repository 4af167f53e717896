"""Everything a run is told. One frozen dataclass is the command line, the YAML file and the replay file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Group, Parameter, Token

from pipeline.errors import BacklensError, nearest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PromptFormat = Literal["auto", "jsonl", "json", "csv", "parquet", "counterfact", "zsre", "dataset"]
Vocabulary = Literal["tokenizer", "model"]


@dataclass(frozen=True, slots=True)
class PromptFields:
    """Which columns of the input hold what. None means the format's own default name."""

    prompt: str | None = None
    target: str | None = None
    subject: str | None = None
    id: str | None = None


MODEL = Parameter(group=Group("Model", sort_key=1))
PROMPTS = Parameter(group=Group("Prompts", sort_key=2))
WHAT = Parameter(group=Group("What is computed", sort_key=3))
LENS = Parameter(group=Group("Lens", sort_key=4))
BATCH = Parameter(group=Group("Batches and shards", sort_key=5))
ENGINE = Parameter(group=Group("Engine", sort_key=6))


def _whole_number(_type: type, tokens: Sequence[Token]) -> int:
    return int(tokens[0].value)


WHOLE = Parameter(converter=_whole_number)
"""A number as it is written: cyclopts would round 1.5 to 2."""


def _whole_number_or_auto(_type: type, tokens: Sequence[Token]) -> int | str:
    return "auto" if tokens[0].value == "auto" else int(tokens[0].value)


WHOLE_OR_AUTO = Parameter(converter=_whole_number_or_auto)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run's options; the same words are flags and YAML keys."""

    model: Annotated[str | None, MODEL] = None
    """A model directory or hub id. Default: the bundled demo model."""
    revision: Annotated[str | None, MODEL] = None
    """A branch, tag or commit of a hub model."""
    dtype: Annotated[Dtype, MODEL] = "auto"
    """The weights' type; auto is the checkpoint's own. Norms, lens and ranks are float32 in any case."""
    attention: Annotated[Literal["exact", "fast"], MODEL] = "exact"
    """exact: rows do not depend on batch or padding. fast: the model's own fused kernels."""
    trust_remote_code: Annotated[bool, MODEL] = False
    """Run the Python code that a model brings with it."""
    allow_pickle: Annotated[bool, MODEL] = False
    """Read pickle weights (pytorch_model.bin) where there are no safetensors; pickles can run code."""

    anatomy: Annotated[str | None, MODEL] = None
    """A YAML description of the model's blocks, for an architecture that is not known here (see doctor)."""

    prompts: Annotated[str | None, PROMPTS] = None
    """A file or URL, a saved dataset's folder, or a hub dataset id. Default: the demo's facts."""
    format: Annotated[PromptFormat, PROMPTS] = "auto"
    """How to read it; auto goes by the file's name and content."""
    limit: Annotated[int | None, PROMPTS, WHOLE] = None
    """Only the first N prompts."""
    prompt_field: Annotated[str | None, PROMPTS] = None
    """The column of the prompt."""
    target_field: Annotated[str | None, PROMPTS] = None
    """The column of the target (CounterFact: target_new or target_true)."""
    subject_field: Annotated[str | None, PROMPTS] = None
    """The column of the subject."""
    id_field: Annotated[str | None, PROMPTS] = None
    """The column of the prompt's own id."""
    prepend_bos: Annotated[Literal["auto", "true", "false"], PROMPTS] = "auto"
    """Begin with the tokenizer's beginning-of-sequence token; auto does as the tokenizer or template does."""
    chat_template: Annotated[bool, PROMPTS] = False
    """Put the prompt as a user's message in the tokenizer's chat template; the target begins the answer."""
    target_mode: Annotated[Literal["first", "all"], PROMPTS] = "first"
    """The loss is over the target's first token, or teacher-forced over all of them."""
    on_error: Annotated[Literal["record", "fail"], PROMPTS] = "record"
    """What a bad prompt does: go to the `failures` table, or stop the run."""

    out: Annotated[str | None, WHAT] = None
    """The run directory, a path or URL. Default for the demo: ./demo-run."""
    layers: Annotated[str, WHAT] = "all"
    """all, or block indices such as "0-5,11"."""
    modules: Annotated[str, WHAT] = "mlp"
    """mlp, attn, all, or names such as "mlp.down,attn.o"."""
    positions: Annotated[Literal["all", "last", "subject+last"], WHAT] = "all"
    """Which positions get a row in `tokens`."""
    top_k: Annotated[int, WHAT, WHOLE] = 10
    """Tokens in each top and bottom list."""
    neurons: Annotated[int, WHAT, WHOLE] = 16
    """Neurons kept per prompt, layer and module, strongest first; 0 none, -1 all."""
    save_factors: Annotated[bool, WHAT] = False
    """Also write x and δ of every position (large)."""

    scaling: Annotated[Literal["raw", "unit"], LENS] = "raw"
    """raw: the final norm as it is. unit: vectors are divided by their length first."""
    vocabulary: Annotated[Vocabulary, LENS] = "tokenizer"
    """Which rows of the unembedding are in lists and ranks. tokenizer: those that are tokens. model: every row."""
    screening: Annotated[Literal["float32", "bfloat16"], LENS] = "float32"
    """The products that pick tokens to be scored exactly; lists and ranks are the same. bfloat16 is for GPUs."""

    batch_tokens: Annotated[int | Literal["auto"], BATCH, WHOLE_OR_AUTO] = "auto"
    """Tokens in a batch, padding included. auto: what keeps the device busy, if the first batches show that it fits."""
    activation_checkpointing: Annotated[bool, BATCH] = False
    """Keep one block's activations at a time and compute them twice: for long prompts and large models."""
    shard_prompts: Annotated[int | None, BATCH, WHOLE] = None
    """Prompts in a shard, the unit of commit. Default: by the rows they make, at most 256."""

    executor: Annotated[Literal["local", "ray"], ENGINE] = "ray"
    """local: this process. ray: one actor per replica."""
    replicas: Annotated[int | Literal["auto"], ENGINE, WHOLE_OR_AUTO] = 1
    """Copies of the model that work side by side (ray). auto: as many as fit on the nodes, as these come and go."""
    sharding: Annotated[Literal["none", "accelerate", "zero3"], ENGINE] = "none"
    """How one copy is spread over devices. accelerate: whole blocks over its GPUs, and over what offloading adds.
    zero3: a part of every weight on each of several actors (DeepSpeed), which compute side by side."""
    max_memory: Annotated[str | None, ENGINE] = None
    """With accelerate, the devices and how much of each, e.g. "0:20GiB,1:20GiB,cpu:50GiB". Default: its GPUs."""
    offload: Annotated[str | None, ENGINE] = None
    """With accelerate, a local folder from which blocks are read that fit on no device."""
    ranks: Annotated[int | None, ENGINE, WHOLE] = None
    """With zero3, the actors that share one copy, a GPU each if the cluster has any. Default: gpus-per-replica."""
    offload_to_cpu: Annotated[bool, ENGINE] = False
    """With zero3, keep each actor's part of the weights in main memory."""
    gpus_per_replica: Annotated[int | None, ENGINE, WHOLE] = None
    """GPUs that one copy asks for (ray). Default: 1 if the cluster has any."""
    address: Annotated[str | None, ENGINE] = None
    """A running Ray cluster. Default: $RAY_ADDRESS, else one on this machine for the length of the run."""
    placement_timeout: Annotated[int, ENGINE, WHOLE] = 300
    """Seconds to wait while the cluster has no place for any copy: nodes may have to be started first (ray)."""

    def __post_init__(self) -> None:
        """Raises BacklensError naming the flag and the values it takes."""
        _require(self.top_k >= 1, f"--top-k {self.top_k}: keep at least one token")
        _require(
            self.neurons >= -1, f"--neurons {self.neurons}: give a number of neurons, 0 for none, -1 for all"
        )
        _require(self.limit is None or self.limit >= 1, f"--limit {self.limit}: give 1 or more")
        tokens = self.batch_tokens
        _require(tokens == "auto" or tokens >= 1, f"--batch-tokens {tokens}: give 1 or more, or auto")
        shard = self.shard_prompts
        _require(shard is None or shard >= 1, f"--shard-prompts {shard}: give 1 or more")
        copies = self.replicas
        _require(copies == "auto" or copies >= 1, f"--replicas {copies}: give 1 or more, or auto")
        patience = self.placement_timeout
        _require(patience >= 0, f"--placement-timeout {patience}: give 0 or more seconds")
        gpus = self.gpus_per_replica
        _require(gpus is None or gpus >= 0, f"--gpus-per-replica {gpus}: give 0 or more")
        spread = self.sharding == "accelerate"
        for name, value in (("max-memory", self.max_memory), ("offload", self.offload)):
            _require(value is None or spread, f"--{name} {value}: is for --sharding accelerate")
        parse_max_memory(self.max_memory)
        self._require_ranks()
        _require(
            self.executor == "ray" or (self.replicas == 1 and self.address is None),
            "--executor local runs one copy in this process; use --executor ray with --replicas or --address",
        )

    def _require_ranks(self) -> None:
        if self.sharding != "zero3":
            _require(self.ranks is None, f"--ranks {self.ranks}: is for --sharding zero3")
            _require(not self.offload_to_cpu, "--offload-to-cpu: is for --sharding zero3")
            return
        ranks, gpus = self.ranks_per_replica, self.gpus_per_replica
        _require(self.executor == "ray", "--sharding zero3 takes several processes; use --executor ray")
        _require(
            bool(self.ranks is not None or gpus),
            "--sharding zero3: over how many actors? Give --ranks, e.g. --ranks 4",
        )
        _require(ranks >= 2, f"--ranks {ranks}: sharding takes 2 or more (--sharding none for one)")
        _require(
            gpus in (None, 0, ranks),
            f"--gpus-per-replica {gpus}: each of the {ranks} --ranks has one GPU; leave it out, or 0 for none",
        )

    @property
    def ranks_per_replica(self) -> int:
        """Processes that share one copy of the model; 0 where it is not said."""
        if self.sharding != "zero3":
            return 1
        return self.ranks if self.ranks is not None else self.gpus_per_replica or 0

    @property
    def prompt_fields(self) -> PromptFields:
        return PromptFields(self.prompt_field, self.target_field, self.subject_field, self.id_field)

    def with_demo_defaults(self) -> "RunConfig":
        """The same, with the bundled model, its facts and ./demo-run where nothing else is named."""
        from pipeline.demo import FACTS, MODEL

        is_demo = self.model is None and self.prompts is None
        out = self.out or ("./demo-run" if is_demo else None)
        if out is None:
            raise BacklensError("--out: name the directory for the results, e.g. --out ./run")
        return replace(self, model=self.model or str(MODEL), prompts=self.prompts or str(FACTS), out=out)

    def to_yaml(self) -> str:
        """The options as `backlens run` reads them back, defaults included."""
        values = {flag(field.name): getattr(self, field.name) for field in fields(self)}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_max_memory(text: str | None) -> dict[int | str, int]:
    """Bytes by device (a GPU's index among the copy's own, or "cpu"), in the order of the devices.

    Raises BacklensError for anything that is not written like `0:20GiB,cpu:50GiB`.
    """
    limits: dict[int | str, int] = {}
    for part in text.split(",") if text is not None else ():
        match = re.fullmatch(r"\s*(\d+|cpu)\s*:\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*", part, re.IGNORECASE)
        device = match and (int(match[1]) if match[1].isdecimal() else "cpu")
        if match is None or device is None or device in limits:
            raise BacklensError(
                f'--max-memory "{text}": \'{part.strip()}\' should be a device, once, and a size: "0:20GiB,cpu:50GiB"'
            )
        limits[device] = int(float(match[2]) * _UNITS[match[3].upper()])
    return dict(sorted(limits.items(), key=lambda each: (each[0] == "cpu", each[0])))


def flag(name: str) -> str:
    """A field's word on the command line and in YAML, without dashes in front."""
    return name.replace("_", "-")


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML file, by field name; options set to null are left to their defaults.

    Raises BacklensError for a file that is not a mapping, and for an unknown key, naming the nearest known one.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BacklensError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BacklensError(f"{path}: a configuration is a mapping of options, e.g. `top-k: 10`")
    known = [field.name for field in fields(RunConfig)]
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            hint = nearest(flag(name), [flag(each) for each in known]) or "; see `backlens run --help`"
            raise BacklensError(f"{path}: unknown option '{key}'{hint}")
        if value is not None:
            options[name] = value
    return options


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BacklensError(message)
