"""Devices of a model's parts: whole blocks, balanced, and all that the lens reads on one device."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, PreTrainedModel

from backlens.capture.batch import make_batch
from backlens.capture.hooks import Gradient, capture
from backlens.errors import BacklensError
from backlens.models.blocks import find_parts
from backlens.models.device_map import Device, DeviceMapOptions, lens_bytes, place
from backlens.models.load import LoadedModel, ModelSource, empty_model, load_model
from backlens.projection.lens import make_lens, verify_lens
from tests.families import CONFIGS
from tests.tiny import LLAMA_SHAPE, random_model, save_tiny

LAYERS = 40
FEW = {name: config for name, config in CONFIGS.items() if "," not in name}


def llama(tied: bool = False) -> PreTrainedModel:
    shape = LLAMA_SHAPE | {"num_hidden_layers": LAYERS, "tie_word_embeddings": tied}
    return empty_model(ModelSource(""), LlamaConfig(vocab_size=3000, **shape))


def size(modules: Iterator[nn.Parameter]) -> int:
    return sum(weight.numel() * 4 for weight in modules)


MODEL = llama()
WHOLE = size(MODEL.parameters())
BLOCK = size(MODEL.model.layers[0].parameters())
OUTSIDE = WHOLE - LAYERS * BLOCK
LENS = size(MODEL.lm_head.parameters())


def placed(limits: Mapping[Device, int], offload: str | None = None) -> tuple[list[Device], set[Device]]:
    """The blocks' devices in order, and those of everything else."""
    found = dict(place(MODEL, torch.float32, DeviceMapOptions(limits, offload)).devices)
    blocks = [found.pop(f"model.layers.{index}") for index in range(LAYERS)]
    assert set(found) == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    return blocks, set(found.values())


def test_blocks_are_balanced_over_devices_in_their_order() -> None:
    blocks, outside = placed(dict.fromkeys(range(4), WHOLE))
    assert blocks == sorted(blocks, key=str)
    counts = [blocks.count(gpu) for gpu in range(4)]
    assert max(counts) - min(counts) <= 4
    assert outside == {3}


def test_what_is_outside_the_blocks_has_its_room_kept_on_the_last_gpu() -> None:
    room: dict[Device, int] = {0: 15 * BLOCK, 1: 15 * BLOCK, 2: 15 * BLOCK, 3: OUTSIDE + 3 * BLOCK}
    blocks, outside = placed(room)
    assert outside == {3}
    assert blocks.count(3) <= 3


def test_gpus_with_blocks_keep_room_for_a_lens_of_their_own() -> None:
    limits: dict[Device, int] = {0: WHOLE, 1: LENS + 6 * BLOCK, 2: WHOLE, 3: WHOLE}
    found = place(MODEL, torch.float32, DeviceMapOptions(limits))
    blocks = [found.devices[f"model.layers.{index}"] for index in range(LAYERS)]
    assert found.lens_copies == (2, 1, 0)
    assert 1 <= blocks.count(1) <= 6
    assert sorted(set(blocks), key=str) == [0, 1, 2, 3]


def test_a_lens_that_would_push_out_blocks_is_left_where_the_head_is() -> None:
    tight: dict[Device, int] = {0: 20 * BLOCK, 1: OUTSIDE + 22 * BLOCK}
    found = place(MODEL, torch.float32, DeviceMapOptions(tight))
    assert found.lens_copies == ()
    assert {found.devices[f"model.layers.{index}"] for index in range(LAYERS)} == {0, 1}
    assert place(MODEL, torch.float32, DeviceMapOptions(tight | {0: 24 * BLOCK + LENS})).lens_copies == (0,)


def test_a_gpu_without_blocks_has_no_lens() -> None:
    limits: dict[Device, int] = {0: LENS, 1: WHOLE, 2: WHOLE}
    assert place(MODEL, torch.float32, DeviceMapOptions(limits)).lens_copies == (1,)


@pytest.mark.parametrize("family", ["llama", "opt, as 350m"])
def test_the_room_of_a_lens_is_what_its_unembedding_takes(family: str) -> None:
    model = random_model(CONFIGS[family]).bfloat16()
    lens = make_lens(find_parts(model), "raw")
    assert lens_bytes(model, torch.bfloat16) == lens.unembedding.nbytes


def test_blocks_that_fit_on_no_gpu_go_to_main_memory_and_then_to_disk() -> None:
    limits: dict[Device, int] = {0: 12 * BLOCK, 1: OUTSIDE + 12 * BLOCK, "cpu": 8 * BLOCK}
    blocks, outside = placed(limits, "/somewhere")
    assert outside == {1}
    assert blocks == sorted(blocks, key=[0, 1, "cpu", "disk"].index)
    assert set(blocks) == {0, 1, "cpu", "disk"}
    assert blocks.count("cpu") in (7, 8)  # main memory keeps room for a block that is brought in


def test_nothing_is_offloaded_unasked() -> None:
    limits: dict[Device, int] = {0: 12 * BLOCK, 1: OUTSIDE + 12 * BLOCK}
    with pytest.raises(BacklensError, match="fit on no device; give more --max-memory or GPUs, or a folder"):
        placed(limits)
    blocks, _ = placed(limits, "/somewhere")
    assert "cpu" not in blocks


def test_embeddings_norm_and_head_that_do_not_fit_are_told() -> None:
    with pytest.raises(BacklensError, match="lie on one device, but GPU 1 has"):
        placed({0: WHOLE, 1: OUTSIDE - 1})


def test_a_head_that_is_tied_to_the_embeddings_is_counted_once() -> None:
    model = llama(tied=True)
    table = 3000 * 32 * 4
    limits: dict[Device, int] = {0: WHOLE, 1: OUTSIDE - table + BLOCK}
    assert place(model, torch.float32, DeviceMapOptions(limits)).devices["lm_head"] == 1


def test_half_precision_takes_half_the_room() -> None:
    limits: dict[Device, int] = {0: WHOLE // 2 + 2 * BLOCK}
    assert set(place(MODEL, torch.bfloat16, DeviceMapOptions(limits)).devices.values()) == {0}
    with pytest.raises(BacklensError, match="fit on no device"):
        place(MODEL, torch.float32, DeviceMapOptions(limits))


@pytest.mark.parametrize("family", FEW)
def test_every_weight_of_every_family_has_one_place(family: str) -> None:
    model = empty_model(ModelSource(""), FEW[family])
    found = place(model, torch.float32, DeviceMapOptions({0: 10**9, 1: 10**9})).devices
    for name, _ in model.named_parameters():
        assert sum(name == path or name.startswith(f"{path}.") for path in found) == 1, name


class EmulatedGpus(TorchFunctionMode):
    """Within it `cuda:N` is main memory, so that a model can be dispatched to GPUs that are not there."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.register_hook:
            args = (args[0], self._within(args[1]))
        here = {name: self._here(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._here, args), **here)

    def _within(self, hook: Any) -> Any:
        """A backward pass is a function too, and in its hooks the mode would be off."""

        def emulated(gradient: torch.Tensor) -> Any:
            with self:
                return hook(gradient)

        return emulated

    def _here(self, value: Any) -> Any:
        if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
            self.asked.add(str(value))
            return torch.device("cpu")
        return value


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_dispatched_to_emulated_gpus_gives_the_factors_of_the_whole_one(
    family: str, tmp_path: Path
) -> None:
    source = ModelSource(str(save_tiny(tmp_path, family)))
    whole = load_model(source, torch.device("cpu"))
    expected = _gradients(whole)
    limits: dict[Device, int] = dict.fromkeys(range(3), 10**6)
    places = place(whole.model, torch.float32, DeviceMapOptions(limits)).devices
    with EmulatedGpus() as emulated:
        dispatched: Any = {path: f"cuda:{device}" for path, device in places.items()}
        dispatch_model(whole.model, dispatched, main_device=torch.device("cuda:2"), force_hooks=True)
        parts = find_parts(whole.model)
        verify_lens(whole.model, parts, make_lens(parts, "raw"))
        spread = LoadedModel(whole.model, whole.tokenizer, parts, whole.attention)
        found = _gradients(spread)
    assert emulated.asked == {f"cuda:{device}" for device in places.values()}
    assert len(emulated.asked) > 1
    assert found.keys() == expected.keys()
    for key, factors in found.items():
        for one, other in zip(factors, expected[key], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def _gradients(loaded: LoadedModel) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    found: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(gradients: Any) -> None:
        each: Gradient
        for each in gradients:
            found[each.layer, each.module] = (each.x.clone(), each.vjp.clone())

    batch = make_batch([([1, 2, 3, 4], [5]), ([6, 7], [8])], loaded.device)
    capture(loaded, batch, (0, 1, 2), loaded.parts.modules, keep)
    return found
