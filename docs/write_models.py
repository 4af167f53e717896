"""Measure a tiny model of every family and write docs/models.md.

python -m docs.write_models

`tests/test_families.py` compares the same measurements with their limits.
"""

from pathlib import Path

import torch
from tests.agreement import measure
from tests.families import CONFIGS
from tests.tiny import random_model

from backlens.models.blocks import find_parts
from backlens.terms import MODULES

PAGE = Path(__file__).with_name("models.md")

HEAD = """\
# Models

`backlens doctor --model M` makes these checks on your own model. This page has them for a tiny model of every known
family, with random weights, in float32; `python -m docs.write_models` measures them and writes the page.

* **XᵀΔ**: relative error (Frobenius) of the factors' product against autograd's gradient of the weight, the largest
  over 4 prompts, 2 layers and all experts. Limit 1e-5. Where a gradient vanishes, the error is relative to 3 % of the
  prompt's largest gradient.
* **batch**, **left**: relative difference of x and δ between a prompt alone and the same prompt in a batch with longer
  and shorter ones, padded on the right and on the left. Limit 1e-4.
* **lens**: relative error of the lens of the last block's output against the model's own logits. Limit 1e-5.

## What δ and the lens mean, by kind of block

The lens reads any vector of the residual stream's width as if it were the last block's output.

* **Pre-norm** (GPT-2, Llama and most others): a block's matrices write to the residual stream as they are, so δ of
  `mlp.down` and `attn.o` *is* the gradient of the residual stream there, and the top and bottom tokens of δ are what
  an update adds to and takes from that stream.
* **Post-norm** (Gemma 2 and 3, GLM-4: norms on both sides; OLMo 2: behind only): a norm stands between the matrix and
  the residual stream. δ is taken at the matrix's own output, before that norm, so XᵀΔ is still exactly the
  gradient of the weight. It is the stream's gradient seen through the norm: multiplied by the norm's weight, and
  without the part along the output itself (a norm ignores its input's length). Its tokens are those of the update to
  the matrix; the stream gets the norm of that.
  In OLMo 2 the inputs x of `up`, `gate`, `q`, `k` and `v` are the residual stream itself, not its norm.
* **Parallel** (GPT-J, GPT-NeoX, Falcon, Phi, Cohere): attention and MLP read the same vector; their
  projections of x are computed once.
* **Experts**: an expert's gradient has the positions that were routed to it, and no others; `expert` says which. A
  shared expert sees every token, and its rows have no `expert`. The router's own gradient is not in the tables.

## Not covered

No module name stands for these matrices. Their gradients are not in the tables; `run.json` lists those of its model.

{not_covered}

## Measured

torch {torch}, CPU.

| family | module | XᵀΔ | batch | left | lens |
|---|---|--:|--:|--:|--:|
{rows}
"""


def main() -> None:
    rows: list[str] = []
    left_out: dict[str, str] = {}
    for case in sorted(CONFIGS):
        model = random_model(CONFIGS[case]).requires_grad_(False)
        for block in find_parts(model).blocks:
            left_out |= {
                f"* {case.partition(',')[0]}: `{path}`, {what}": ""
                for path, what in block.not_covered.items()
            }
        found = measure(model, case)
        for module in (name for name in MODULES if name in found.gradient):
            errors = found.gradient[module], found.batch[module], found.padding[module], found.lens
            rows.append(f"| {case} | `{module}` | " + " | ".join(f"{error:.0e}" for error in errors) + " |")
    page = HEAD.format(
        not_covered="\n".join(left_out), torch=torch.__version__.partition("+")[0], rows="\n".join(rows)
    )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
