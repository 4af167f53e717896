"""A model and its lens: prompts in, rows of the run's tables out, for notebooks and for workers."""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backlens.capture.batch import Side, make_batch
from backlens.capture.hooks import MatrixMissed, capture, verify_capture
from backlens.capture.loss import NLL, LossFunction
from backlens.capture.packing import (
    PROMPT_ERRORS,
    DeviceLost,
    MemoryGauge,
    Packer,
    TokenBudget,
    is_device_lost,
    is_out_of_memory,
    release_all,
    release_freed_memory,
)
from backlens.columns import BatchRows, Computed, failure_table, rejected_prompt
from backlens.config import Vocabulary
from backlens.errors import BacklensError
from backlens.gradients import Gradients
from backlens.models.checkpoint import Attention, Dtype, ModelSource
from backlens.models.device_map import DeviceMapOptions
from backlens.models.layout import read_layout
from backlens.models.load import LoadedModel, adopt, borrowed, load_model
from backlens.models.module_tree import full_shape
from backlens.models.zero3 import Zero3, whole_for_the_lens
from backlens.projection.lens import IDENTITY, Basis, Lens, Scaling, make_lens, verify_lens
from backlens.prompts.fields import records_of
from backlens.prompts.prompt import Prompt, Rejected
from backlens.prompts.source import one_line
from backlens.prompts.tokenize import Example, PrependBos, TargetMode, context_length, tokenize
from backlens.rows import Positions, RowOptions, batch_rows, sequence
from backlens.terms import parse_layers, parse_modules

FAILING = 8
"""After this many prompts that raise, with none computed, the model is at fault and not the prompts."""

OUT_OF_MEMORY = "does not fit into memory, not even alone and with its activations computed twice"


class BackwardLens:
    """A causal language model, read by its gradients (Katz et al., arXiv 2402.12865).

    >>> lens = BackwardLens("gpt2")
    >>> g = lens.gradient("The capital of France is", " Rome", subject="France")
    >>> g[5, "mlp.down"].promoted(position=-1)
    """

    def __init__(
        self,
        model: str | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        revision: str | None = None,
        dtype: Dtype = "auto",
        attention: Attention = "exact",
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        anatomy: str | None = None,
        scaling: Scaling = "raw",
        vocabulary: Vocabulary = "tokenizer",
        basis: Basis = IDENTITY,
        device: str | torch.device | None = None,
    ) -> None:
        """Load `model` from a directory or a hub id, or use a model and tokenizer that are in memory.

        A model in memory is used where it is, in its own dtype, and is left as it was: training mode, flags of
        parameters, attention implementation and hooks. `basis` maps the vectors of a layer before norm and unembedding.
        The other options have the meaning of the flags of `backlens run`; `revision`, `dtype`, `trust_remote_code`,
        `allow_pickle` and `device` are for models that are loaded here.

        Raises BacklensError when the model cannot be loaded, or its numbers cannot be proven.
        """
        if isinstance(model, tuple):
            model, tokenizer = model
        layout = read_layout(anatomy) if anatomy is not None else None
        if isinstance(model, str):
            if tokenizer is not None:
                raise BacklensError(
                    "BackwardLens: a tokenizer is given with a model in memory, not with a path"
                )
            source = ModelSource(model, revision, dtype, attention, trust_remote_code, allow_pickle, layout)
            where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            with torch.inference_mode(False):  # weights made in a caller's inference mode have no graph
                self._hold(load_model(source, where), scaling, vocabulary, basis)
            self._in_memory = False
            return
        if tokenizer is None:
            raise BacklensError(
                "BackwardLens: give the tokenizer beside the model: BackwardLens(model, tokenizer)"
            )
        with torch.inference_mode(False), borrowed(model, attention):
            self._hold(adopt(model, tokenizer, layout, attention), scaling, vocabulary, basis)
        self._in_memory = True

    @classmethod
    def load(
        cls,
        source: ModelSource,
        device: torch.device,
        scaling: Scaling = "raw",
        vocabulary: Vocabulary = "tokenizer",
        *,
        device_map: DeviceMapOptions | None = None,
        zero3: Zero3 | None = None,
    ) -> "BackwardLens":
        """Load a model as a worker holds it: on one device, on several, or partitioned over ranks."""
        made = cls.__new__(cls)
        made._hold(load_model(source, device, device_map, zero3), scaling, vocabulary)
        made._in_memory = False
        return made

    @classmethod
    def from_parts(cls, loaded: LoadedModel, lens: Lens, copies: Sequence[Lens] = ()) -> "BackwardLens":
        """Put together a loaded model, its lens, and copies of the lens on further devices; nothing is verified."""
        made = cls.__new__(cls)
        made.loaded, made.lens, made._lenses, made._in_memory = loaded, lens, (lens, *copies), False
        made._any_computed, made._raised = False, 0
        return made

    def _hold(
        self, loaded: LoadedModel, scaling: Scaling, vocabulary: Vocabulary, basis: Basis = IDENTITY
    ) -> None:
        parts = loaded.parts
        self.loaded = loaded
        whole = whole_for_the_lens(parts) if loaded.partitioned else parts
        token_ids = loaded.token_ids if vocabulary == "tokenizer" else None
        self.lens = make_lens(whole, scaling, token_ids, basis)
        verify_lens(loaded.model, parts, self.lens)
        self._lenses = (self.lens, *(self.lens.to(device) for device in loaded.lens_copies))
        self._any_computed, self._raised = False, 0

    def verify(self, options: RowOptions) -> None:
        """Capture a short batch. Raises MatrixMissed when a matrix would be missing from the tables."""
        verify_capture(
            self.loaded,
            options.layers,
            options.modules,
            activation_checkpointing=self._checkpoints(options),
        )

    def _checkpoints(self, options: RowOptions) -> bool:
        """Say whether activations are checkpointed.

        Without it, autograd would keep every offloaded block's weights on the device until the backward pass.
        """
        return options.activation_checkpointing or self.loaded.offloaded

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.loaded.parts.blocks)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the weight matrices whose gradients can be computed."""
        return self.loaded.parts.modules

    @property
    def embedded_tokens(self) -> int:
        """Number of token ids that the model has an embedding for."""
        weight = self.loaded.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return full_shape(weight)[0]

    def __repr__(self) -> str:
        config = self.loaded.model.config
        name = config.name_or_path or type(self.loaded.model).__name__
        return (
            f"BackwardLens({name!r}: {self.layers} layers, d_model {self.lens.d_model}, {self.loaded.device})"
        )

    def gradient(
        self,
        prompt: "str | Sequence[Any]",
        target: "str | int | Sequence[Any] | None" = None,
        subject: "str | Sequence[str | None] | None" = None,
        *,
        layers: "str | int | Sequence[int]" = "all",
        modules: "str | Sequence[str]" = "mlp",
        positions: Positions = "all",
        top_k: int = 10,
        neurons: int = 16,
        target_mode: TargetMode = "first",
        loss: LossFunction = NLL,
        prepend_bos: PrependBos = "auto",
        chat_template: bool = False,
        batch_tokens: "int | Any" = "auto",
        activation_checkpointing: bool = False,
        save_factors: bool | None = None,
    ) -> Gradients:
        """Compute the gradient of a loss for one prompt or for many, in factored form.

        `prompt` is a text, a list of token ids, or a list of either; `target` and `subject` are then lists of the same
        length. A list of records (`{"prompt": …, "target": …, "subject": …}`) is taken as well. The loss is
        −log p(target | prompt), in nats, unless another one is given. The other options have the meaning of the flags
        of `backlens run`, and the tables equal those of a run over the same prompts. `save_factors` keeps x and δ of
        every position; by default for a single prompt.

        Raises BacklensError for options that do not fit the model, and for a single prompt that fails; of many prompts,
        those that fail are rows of `failures`.
        """
        records = records_of(
            prompt,
            target,
            subject,
            self.loaded.tokenizer,
            self.embedded_tokens,
        )
        if save_factors is None:
            save_factors = len(records) == 1
        options = RowOptions(
            layers=parse_layers(_listed(layers), self.layers),
            modules=parse_modules(_listed(modules), self.modules),
            positions=positions,
            top_k=top_k,
            target_mode=target_mode,
            loss=loss,
            neurons=neurons,
            save_factors=save_factors,
            activation_checkpointing=activation_checkpointing,
        )
        if not 1 <= top_k <= self.lens.vocabulary:
            raise BacklensError(
                f"top_k {top_k}: give 1 to {self.lens.vocabulary}, the size of the vocabulary"
            )
        examples, rejected = self.examples(
            records, prepend_bos=prepend_bos, target_mode=target_mode, chat_template=chat_template
        )
        # A caller's inference mode would leave no graph.
        with torch.inference_mode(False), self._borrowed():
            self.verify(options)
            computed = self.compute(examples, options, TokenBudget(batch_tokens, self.loaded.device))
        failures = [*rejected, *computed.failed]
        if failures and len(records) == 1:
            raise BacklensError(failures[0].message)
        tables = computed.tables(save_factors) | {"failures": failure_table(failures)}
        return Gradients(tables, self.loaded.tokenizer, self.lens)

    def _borrowed(self) -> Any:
        return borrowed(self.loaded.model, self.loaded.attention) if self._in_memory else nullcontext()

    def examples(
        self,
        records: "Sequence[Prompt | Example | Rejected]",
        *,
        prepend_bos: PrependBos,
        target_mode: TargetMode,
        chat_template: bool = False,
    ) -> tuple[list[Example], list[Rejected]]:
        """Tokenize prompts for the model; records that are token ids already stay as they are."""
        context = context_length(self.loaded.model.config)
        texts = [record for record in records if isinstance(record, Prompt)]
        found = iter(
            tokenize(
                texts,
                self.loaded.tokenizer,
                prepend_bos=prepend_bos,
                target_mode=target_mode,
                context=context,
                rows=self.loaded.parts.rows,
                chat_template=chat_template,
            )
        )
        results = [next(found) if isinstance(record, Prompt) else record for record in records]
        return (
            [result for result in results if isinstance(result, Example)],
            [result for result in results if isinstance(result, Rejected)],
        )

    def rows(
        self,
        examples: Sequence[Example],
        options: RowOptions,
        *,
        side: Side = "right",
        threads: bool | None = None,
    ) -> BatchRows:
        """Compute all rows of one batch, padded on `side`.

        Errors of torch and of the model pass through; `compute` finds the prompt at fault.
        """
        sequences = [sequence(example, options.target_mode) for example in examples]
        batch = make_batch(sequences, self.loaded.device, side)
        options = replace(options, activation_checkpointing=self._checkpoints(options))
        return batch_rows(self.loaded, self._lenses, examples, batch, options, threads=threads)

    def dummy_pass(self, options: RowOptions) -> None:
        """Run a one-token batch without rows: under ZeRO-3 every rank has to take part in every pass."""
        capture(
            self.loaded,
            make_batch([([1], [1])], self.loaded.device),
            (),
            (),
            lambda _: None,
            activation_checkpointing=self._checkpoints(options),
        )

    def compute(
        self,
        examples: Sequence[Example],
        options: RowOptions,
        budget: TokenBudget,
        *,
        alone: Collection[int] = (),
        announce: Callable[[Sequence[Example]], None] | None = None,
    ) -> "Computed":
        """Compute prompts in batches of similar length; halve a batch that fails until the prompt at fault is alone.

        The examples in `alone` (indices) are computed first, in batches of their own; `announce` is called with each
        batch before it is computed.
        """
        lengths = lengths_of(examples, options.target_mode)
        packer = Packer(lengths, alone)
        computed = Computed()
        while packer:
            indices = packer.take(budget.at)
            batch = [examples[index] for index in indices]
            if announce is not None:
                announce(batch)
            gauge = MemoryGauge()
            error = self.try_batch(batch, options, computed)
            tokens = len(batch) * lengths[indices[-1]]
            if error is None:
                budget.learn(gauge, len(batch), lengths[indices[-1]])
                computed.padded += tokens
            elif len(batch) == 1:
                computed.failed.append(self._failure(batch[0], error))
            elif is_out_of_memory(error):
                budget.halve(tokens)
                computed.out_of_memory += 1
                packer.put_back(indices)
            else:
                packer.halve(indices)
        computed.batch_tokens = budget.most
        return computed

    def try_batch(
        self, batch: Sequence[Example], options: RowOptions, computed: "Computed"
    ) -> Exception | None:
        """Compute a batch; return the error that its prompts or its size may have caused."""
        error = self.add_rows(batch, options, computed)
        if error is not None and is_out_of_memory(error):
            release_all()
            if len(batch) == 1 and not self._checkpoints(options):
                error = self.add_rows(batch, replace(options, activation_checkpointing=True), computed)
        release_freed_memory()
        return error

    def add_rows(
        self, batch: Sequence[Example], options: RowOptions, computed: "Computed"
    ) -> Exception | None:
        """Compute a batch once. Raises DeviceLost when this process can no longer use the device."""
        try:
            rows = self.rows(batch, options)
        except PROMPT_ERRORS as error:
            if is_device_lost(error):
                raise DeviceLost(f"the device failed ({one_line(str(error))})") from error
            # The traceback holds on to the batch's tensors.
            return error.with_traceback(None) if is_out_of_memory(error) else error
        computed.add(batch, rows)
        self._any_computed = True
        return None

    def _failure(self, example: Example, error: Exception) -> Rejected:
        """Make the row of a prompt that failed alone; raise its error if the model fails at every prompt."""
        if is_out_of_memory(error):
            return rejected_prompt(example.prompt, "out-of-memory", OUT_OF_MEMORY)
        self._raised += 1
        if self._raised == FAILING and not self._any_computed:
            raise error
        if isinstance(error, MatrixMissed):
            return rejected_prompt(example.prompt, "matrix-missed", str(error))
        return rejected_prompt(example.prompt, "raised", f"{type(error).__name__}: {error}")


def _listed(chosen: "str | int | Sequence[Any]") -> str:
    """Write layers or modules as on the command line."""
    return str(chosen) if isinstance(chosen, str | int) else ",".join(map(str, chosen))


def lengths_of(examples: Sequence[Example], target_mode: TargetMode) -> list[int]:
    """Count the positions that the model computes for each prompt, teacher-forced target tokens included."""
    return [sum(map(len, sequence(example, target_mode))) - 1 for example in examples]
