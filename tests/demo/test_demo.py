"""The bundled demo: a small model that knows its facts, and the script that trains it."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from docs.demo_model.corpus import RELATIONS, build_world, counterfact_records
from docs.demo_model.curriculum import Curriculum
from docs.demo_model.recipe import Recipe
from docs.demo_model.tokenizer import train_tokenizer
from docs.demo_model.train import main, make
from transformers import AutoModelForCausalLM, AutoTokenizer

from backlens.demo import FACTS, MODEL
from backlens.errors import BacklensError

Record = dict[str, Any]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return json.loads(FACTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()


def requested(record: Record) -> str:
    rewrite = record["requested_rewrite"]
    return rewrite["prompt"].format(rewrite["subject"])


def true_object(record: Record) -> str:
    return record["requested_rewrite"]["target_true"]["str"]


@torch.inference_mode()
def likeliest_next(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The most probable next token of each prompt, in batches padded on the right."""
    found = []
    for start in range(0, len(prompts), 128):
        batch = tokenizer(list(prompts[start : start + 128]), padding=True, return_tensors="pt")
        logits = model(**batch).logits
        last = batch["attention_mask"].sum(1) - 1
        found += [tokenizer.decode(row[i].argmax()) for row, i in zip(logits, last, strict=True)]
    return found


def share(hits: Iterable[bool]) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)


def test_the_model_recalls_its_facts_in_training_wordings(model: Any, tokenizer: Any, records: list[Record]):
    found = likeliest_next(model, tokenizer, [requested(record) for record in records])
    assert share(f == f" {true_object(r)}" for f, r in zip(found, records, strict=True)) >= 0.95


def test_the_model_recalls_its_facts_in_held_out_wordings(model: Any, tokenizer: Any, records: list[Record]):
    asked = [(prompt, true_object(r)) for r in records for prompt in r["paraphrase_prompts"]]
    found = likeliest_next(model, tokenizer, [prompt for prompt, _ in asked])
    assert share(f == f" {answer}" for f, (_, answer) in zip(found, asked, strict=True)) >= 0.85


def test_the_model_recalls_the_neighbours_too(model: Any, tokenizer: Any, records: list[Record]):
    asked = [(prompt, true_object(r)) for r in records[:100] for prompt in r["neighborhood_prompts"]]
    found = likeliest_next(model, tokenizer, [prompt for prompt, _ in asked])
    assert share(f == f" {answer}" for f, (_, answer) in zip(found, asked, strict=True)) >= 0.95


def test_the_model_loads_in_float32_without_dropout_and_takes_long_prompts(model: Any):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(value for key, value in model.config.to_dict().items() if re.search("pdrop|dropout", key))
    assert model(torch.zeros(1, 256, dtype=torch.long)).logits.isfinite().all()


def test_the_files_are_small_and_the_card_is_there():
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 10e6
    assert FACTS.stat().st_size <= 1.5e6
    assert "license: apache-2.0" in (MODEL / "README.md").read_text(encoding="utf-8")


def test_there_are_enough_records_and_each_relation_has_its_share(records: list[Record]):
    by_relation = Counter(record["requested_rewrite"]["relation_id"] for record in records)
    assert len(records) >= 300
    assert [record["case_id"] for record in records] == list(range(len(records)))
    assert by_relation.keys() == {relation.id for relation in RELATIONS}
    assert max(by_relation.values()) - min(by_relation.values()) <= 1


def test_records_have_counterfacts_keys_and_their_prompts_end_before_the_object(records: list[Record]):
    for record in records:
        rewrite = record["requested_rewrite"]
        assert rewrite["prompt"].count("{}") == 1
        assert rewrite["target_true"]["str"] != rewrite["target_new"]["str"]
        assert len(record["paraphrase_prompts"]) == 2
        assert len(record["neighborhood_prompts"]) == 10
        assert all(rewrite["subject"] in prompt for prompt in record["paraphrase_prompts"])
        assert not any(rewrite["subject"] in prompt for prompt in record["neighborhood_prompts"])
        prompts = [requested(record), *record["paraphrase_prompts"], *record["neighborhood_prompts"]]
        assert all(prompt == prompt.strip() and not prompt.endswith(".") for prompt in prompts)


def test_targets_are_one_token_and_names_are_several(tokenizer: Any, records: list[Record]):
    for record in records:
        rewrite = record["requested_rewrite"]
        for target in (rewrite["target_true"]["str"], rewrite["target_new"]["str"]):
            assert target == target.strip()
            assert len(tokenizer(f" {target}").input_ids) == 1
        assert len(tokenizer(rewrite["subject"]).input_ids) >= 3


def test_the_tokenizer_gives_any_text_back(tokenizer: Any):
    for text in ("Zoë's naïve 東京\n\ttab", " two  spaces ", "<|endoftext|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_world_follows_from_its_seed():
    world = build_world(7)
    assert world == build_world(7)
    assert world != build_world(8)
    assert counterfact_records(world.facts, world, 7) == counterfact_records(world.facts, world, 7)


def test_everyone_has_one_name_and_one_object_for_each_relation():
    world = build_world(3)
    assert len(set(world.people)) == len(world.people) == 300
    assert len({(fact.subject, fact.relation.id) for fact in world.facts}) == len(world.facts) == 1800
    for relation in RELATIONS:
        dealt = Counter(fact.object for fact in world.facts if fact.relation is relation)
        assert dealt.keys() == set(relation.objects)
        assert max(dealt.values()) - min(dealt.values()) <= 1


def test_held_out_wordings_are_never_in_the_training_text():
    world = build_world(1, people=20)
    tokenizer = train_tokenizer(world, seed=1)
    curriculum = Curriculum(Recipe(people=20, first_pool=20), world, tokenizer)
    text = "".join(tokenizer.batch_decode(curriculum.batch().token_ids))
    held_out = [f.relation.held_out[i].format(f.subject) for f in world.facts for i in range(2)]
    assert not any(prompt in text for prompt in held_out)
    assert any(name in text for name in world.people)


def test_the_marked_labels_are_the_objects():
    world = build_world(1, people=20)
    tokenizer = train_tokenizer(world, seed=1)
    batch = Curriculum(Recipe(people=20, first_pool=20), world, tokenizer).batch()
    marked = batch.facts >= 0
    assert marked.any()
    for token_id, fact in zip(batch.token_ids[marked].tolist(), batch.facts[marked].tolist(), strict=True):
        assert tokenizer.decode(token_id) == f" {world.facts[fact].object}"


def test_the_trainer_refuses_to_write_a_model_that_does_not_know_its_facts(tmp_path: Path):
    out = tmp_path / "demo"
    arguments = ["--people", "12", "--steps", "2", "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-m", "docs.demo_model.train", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert re.fullmatch(r"error: after 2 steps .* nothing written; .*\n", ended.stderr)
    assert not out.exists()


def test_the_trainer_writes_what_the_package_bundles_when_the_model_is_good_enough(tmp_path: Path):
    anything_goes = Recipe(people=12, steps=2, train_recall=0.0, held_out_recall=0.0)
    make(anything_goes, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.json", "model"]
    assert {path.name for path in (tmp_path / "model").iterdir()} == {path.name for path in MODEL.iterdir()}
    assert isinstance(json.loads((tmp_path / "facts.json").read_text()), list)


def test_training_a_llama_shape_needs_a_folder_of_its_own(capsys: pytest.CaptureFixture[str]):
    assert main(["--architecture", "llama"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BacklensError, match="--out"):
        make(Recipe(), tmp_path / "file" / "demo")


@pytest.mark.parametrize("wrong", [{"people": 0}, {"people": 10_000}, {"steps": 0}])
def test_a_recipe_that_cannot_work_is_refused(wrong: dict[str, Any]):
    with pytest.raises(BacklensError, match=f"--{next(iter(wrong))}"):
        Recipe(**wrong)


def test_importing_the_paths_loads_nothing_heavy():
    code = "import sys, backlens.demo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_small_llama_is_written_with_its_own_head(tmp_path: Path):
    make(Recipe(architecture="llama", people=12, steps=2, train_recall=0.0, held_out_recall=0.0), tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "llama"
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
