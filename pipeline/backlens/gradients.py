"""The gradients of a few prompts: as the tables of a run with texts beside ids, and as factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from backlens.display import Answer, with_texts_beside
from backlens.errors import BacklensError
from backlens.heatmap import Heatmap, default_module, make_heatmap
from backlens.models.vocabulary import vocabulary
from backlens.projection.lens import Lens
from backlens.projection.project import Vectors, project
from backlens.store.parquet import sort_rows
from backlens.store.tables import TABLES
from backlens.terms import READS


class Token(str):
    """A token's text, with its id and its lens score in logits."""

    id: int
    score: float

    @classmethod
    def of(cls, text: str, token_id: int, score: float) -> "Token":
        token = cls(text)
        token.id, token.score = token_id, score
        return token


class Gradients:
    """The gradients of one or several prompts.

    `prompt`, `tokens`, `neurons`, `layers` and `failures` are the tables that a run over the same prompts writes, with
    the texts of token ids beside them. `g[layer, module]` is the gradient of one weight matrix in factored form; for
    several prompts write `g[prompt, layer, module]`. In a notebook the gradients of a single prompt show a heatmap.
    """

    def __init__(self, tables: dict[str, pa.Table], tokenizer: PreTrainedTokenizerBase, lens: Lens) -> None:
        self._tables = {name: sort_rows(rows, TABLES[name]) for name, rows in tables.items()}
        self._tokenizer, self._lens = tokenizer, lens

    @property
    def prompt(self) -> Answer:
        """One row per prompt: its text, tokens, loss, and the target's probability and rank."""
        return self._with_texts("prompts")

    @property
    def tokens(self) -> Answer:
        """One row per prompt × layer × module × position: norms of x and δ, top and bottom tokens."""
        return self._with_texts("tokens")

    @property
    def neurons(self) -> Answer:
        """One row per kept neuron of a prompt × layer × module."""
        return self._with_texts("neurons")

    @property
    def layers(self) -> Answer:
        """One row per prompt × layer × module: norm, rank and singular values of the gradient."""
        return self._with_texts("layers")

    @property
    def failures(self) -> Answer:
        """One row per prompt that could not be processed, with the reason."""
        return self._with_texts("failures")

    def __getitem__(self, key: tuple[Any, ...]) -> "MatrixGradient":
        """The gradient of one matrix: `g[layer, module]`, `g[layer, module, expert]` or `g[prompt, layer, module]`.

        Raises BacklensError if the factors were not kept, or if there is no such matrix.
        """
        prompt, layer, module, expert = self._place(key)
        factors = self._tables.get("factors")
        if factors is None:
            raise BacklensError("gradient: x and δ were not kept; ask for them with save_factors=True")
        is_here = (
            (pc.field("prompt_id") == prompt) & (pc.field("layer") == layer) & (pc.field("module") == module)
        )
        rows = factors.filter(is_here)
        if expert is not None:
            rows = rows.filter(pc.field("expert") == expert)
        elif rows["expert"].null_count < rows.num_rows:
            there = ", ".join(map(str, sorted(set(rows["expert"].to_pylist()))))
            raise BacklensError(f"gradient: {module} of layer {layer} has experts ({there}): name one")
        if not rows.num_rows:
            raise BacklensError(
                f"gradient: there is no gradient of {_name(layer, module, expert)}{self._known()}"
            )
        return MatrixGradient(
            layer,
            module,
            expert,
            x=_matrix(rows["x"]),
            delta=_matrix(rows["delta"]),
            positions=tuple(rows["position"].to_pylist()),
            tokens=self._texts,
            lens=self._lens,
        )

    def _place(self, key: tuple[Any, ...]) -> tuple[int, int, str, int | None]:
        prompts = self._tables["prompts"]["prompt_id"].to_pylist()
        match key:
            case (int(prompt), int(layer), str(module)):
                return prompt, layer, module, None
            case (int(prompt), int(layer), str(module), int(expert)):
                return prompt, layer, module, expert
            case (int(layer), str(module), *expert) if len(expert) < 2:
                if len(prompts) != 1:
                    raise BacklensError(
                        f"gradient: there are {len(prompts)} prompts: write g[prompt, layer, module]"
                    )
                return prompts[0], layer, module, expert[0] if expert else None
        raise BacklensError(
            f"gradient: {key!r} is no place; write g[layer, module], such as g[5, 'mlp.down']"
        )

    def _known(self) -> str:
        rows = self._tables["layers"]
        layers, modules = (rows[name].unique().to_pylist() for name in ("layer", "module"))
        return f"; there are layers {min(layers)} to {max(layers)} of {', '.join(modules)}" if layers else ""

    def heatmap(self, module: str = "mlp.down", prompt: int | None = None) -> Heatmap:
        """The heatmap of one prompt and module: layers by positions, lens tokens on the norm of δ.

        Raises BacklensError if there are several prompts and none is named, or if the module has no rows.
        """
        prompts = self.prompt.table.to_pylist()
        if prompt is None and len(prompts) != 1:
            raise BacklensError(
                f"heatmap: there are {len(prompts)} prompts; name one: heatmap(module, prompt=0)"
            )
        chosen = [row for row in prompts if prompt is None or row["prompt_id"] == prompt]
        if not chosen:
            raise BacklensError(f"heatmap: there is no prompt {prompt}")
        is_here = (pc.field("prompt_id") == chosen[0]["prompt_id"]) & (pc.field("module") == module)
        rows = self.tokens.table.filter(is_here).to_pylist()
        if not rows:
            raise BacklensError(f"heatmap: there are no rows of {module}{self._known()}")
        tokens, target = chosen[0]["tokens"], chosen[0]["target_tokens"][0]
        return make_heatmap(chosen[0], module, rows, tokens, target, self._lens.vocabulary)

    @cached_property
    def _texts(self) -> Sequence[str]:
        size = self._lens.vocabulary if self._lens.ids is None else int(self._lens.ids[-1]) + 1
        return vocabulary(self._tokenizer, size)[0]

    def _with_texts(self, name: str) -> Answer:
        return Answer(with_texts_beside(self._tables[name], pa.array(self._texts, pa.string())))

    def __repr__(self) -> str:
        prompts, failed = self._tables["prompts"].num_rows, self._tables["failures"].num_rows
        rows = ", ".join(
            f"{self._tables[name].num_rows:,} {name}" for name in ("tokens", "neurons", "layers")
        )
        return f"Gradients of {prompts} prompt{'s' * (prompts != 1)}{f', {failed} failed' * bool(failed)}: {rows}"

    def _repr_html_(self) -> str:
        modules = self._tables["tokens"]["module"].unique().to_pylist()
        if self._tables["prompts"].num_rows != 1 or not modules:
            return self.prompt._repr_html_()
        return self.heatmap(default_module(modules))._repr_html_()


@dataclass(frozen=True, eq=False)
class MatrixGradient:
    """The gradient of one weight matrix in factored form: G = Xᵀ Δ, for y = x W (paper, §3)."""

    layer: int
    module: str
    expert: int | None
    x: Float[Tensor, "position d_in"]
    """The inputs of the matrix, float32."""
    delta: Float[Tensor, "position d_out"]
    """The VJPs ∂L/∂(output), float32, with their raw sign."""
    positions: tuple[int, ...]
    """The position in the prompt of each row."""
    tokens: Sequence[str]
    """The text of each token id."""
    lens: Lens

    @property
    def matrix(self) -> Float[Tensor, "d_in d_out"]:
        """The full gradient G = Xᵀ Δ, formed on request."""
        return self.x.mT @ self.delta

    def promoted(self, position: int = -1, k: int = 10) -> list[Token]:
        """The k tokens that a step of gradient descent raises most at a position: the lowest lens scores of δ first.

        Raises BacklensError for a module that reads the residual stream: its x has no promoted side.
        """
        return self._side(position, k, "bottom", "promoted")

    def suppressed(self, position: int = -1, k: int = 10) -> list[Token]:
        """The k tokens that a step of gradient descent lowers most at a position: the highest lens scores of δ first.

        Raises BacklensError for a module that reads the residual stream.
        """
        return self._side(position, k, "top", "suppressed")

    def top(self, position: int = -1, k: int = 10) -> list[Token]:
        """The k tokens with the highest lens scores of the residual side (x or δ) at a position, highest first."""
        return self._listed(position, k, "top")

    def bottom(self, position: int = -1, k: int = 10) -> list[Token]:
        """The k tokens with the lowest lens scores of the residual side (x or δ) at a position, lowest first."""
        return self._listed(position, k, "bottom")

    def _side(self, position: int, k: int, side: str, word: str) -> list[Token]:
        if self.module in READS:
            raise BacklensError(
                f"{word}: {self.module} reads the residual stream: its x has no promoted or suppressed side; "
                "use .top() and .bottom()"
            )
        return self._listed(position, k, side)

    @torch.no_grad()
    def _listed(self, position: int, k: int, side: str) -> list[Token]:
        if not 1 <= k <= self.lens.vocabulary:
            raise BacklensError(f"k {k}: give 1 to {self.lens.vocabulary}, the size of the vocabulary")
        residual = self.x if self.module in READS else self.delta
        vector = self.lens.basis(residual[self._row(position)], self.layer)
        if not vector.any():
            return []
        device = self.lens.unembedding.device
        vectors = Vectors.alone(vector[None].to(device), self.lens)
        target = self.lens.tokens(
            torch.zeros(1, dtype=torch.long, device=device)
        )  # any token: its rank is dropped
        found, _ = project(vectors, self.lens, target, k)
        ids: list[int] = getattr(found, f"{side}_ids")[0].tolist()
        scores: list[float] = getattr(found, f"{side}_scores")[0].tolist()
        return [Token.of(self.tokens[token], token, score) for token, score in zip(ids, scores, strict=True)]

    def _row(self, position: int) -> int:
        """The row of a position of the prompt; −1 is the last position that has a row."""
        if -len(self.positions) <= position < 0:
            return len(self.positions) + position
        if position in self.positions:
            return self.positions.index(position)
        raise BacklensError(f"position {position}: there are rows of {', '.join(map(str, self.positions))}")

    def __repr__(self) -> str:
        place = _name(self.layer, self.module, self.expert)
        return f"MatrixGradient of {place}: x {tuple(self.x.shape)}, delta {tuple(self.delta.shape)}"


def _name(layer: int, module: str, expert: int | None) -> str:
    return f"{module} of layer {layer}" + ("" if expert is None else f", expert {expert}")


def _matrix(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(np.stack(column.to_numpy()).astype(np.float32))
