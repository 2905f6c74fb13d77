"""Every decoder family of the installed transformers is edited rightly, or refused in one line."""

import functools
import math
import re

import pytest
import torch
import transformers as hf
from conftest import REPOSITORY, small_tokenizer
from families import UNBUILT, family_names, tiny_model
from torch.nn import functional

import lemoe
from lemoe.base.loading import BaseModel
from lemoe.base.sources import ModelSource
from lemoe.base.tokens import Passage, encode_passage
from lemoe.errors import LemoeError

EDIT = lemoe.Edit(prompt="The Nile flows into the", target="Red Sea", subject="The Nile", id="nile")
OTHER = "Marie Curie was born in the town of"
LAYER = 1
TABLE = REPOSITORY / "docs" / "models.md"


@functools.cache
def documented_states() -> dict[str, str]:
    """The state of each family according to the table in the documentation."""
    rows = re.findall(r"^\| (edited|refused|not tried) \| (.+?) \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: state for state, names in rows for name in re.findall(r"`([^`]+)`", names)}


def build_base(family: str) -> BaseModel:
    tokenizer = small_tokenizer()
    return BaseModel(tiny_model(family, len(tokenizer)), tokenizer, ModelSource(family, family))


def target_loss(base: BaseModel, passage: Passage) -> float:
    """Mean loss of the target in a plain forward pass of the model as it stands."""
    logits = base.model(input_ids=torch.tensor([passage.input_ids]), use_cache=False).logits[
        0, len(passage.prompt) - 1 :
    ]
    return float(functional.cross_entropy(logits.float(), torch.tensor(passage.target)))


def generate_tokens(base: BaseModel, prompt: tuple[int, ...], *, cached: bool) -> list[int]:
    """Three greedy tokens, from the model's own `generate` with its cache, or each from a whole forward pass."""
    ids = torch.tensor([prompt])
    if cached:
        return base.model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=3, max_new_tokens=3, do_sample=False
        )[0, -3:].tolist()
    for _ in range(3):
        logits = base.model(input_ids=ids, use_cache=False).logits[0, -1]
        logits[base.eos_token_id] = -math.inf
        ids = torch.cat([ids, logits.argmax().reshape(1, 1)], 1)
    return ids[0, -3:].tolist()


def make_settings() -> lemoe.Settings:
    few = {"layer": LAYER, "steps": 2, "variants": 0, "negatives": 0, "retries": 0, "learning_rate": 0.1}
    return lemoe.resolve_settings("anchor", None, few)


@torch.no_grad()
def check_edited(base: BaseModel, state: lemoe.AdaptorState) -> None:
    """Two steps of training change the answer, as measured, as the inserted model has it, and nothing else."""
    passage, other = encode_passage(base, EDIT.prompt, EDIT.target), torch.tensor([encode_passage(base, OTHER).prompt])
    own, before = target_loss(base, passage), base.model(input_ids=other, use_cache=False).logits
    measured = lemoe.evaluate(base, state, [EDIT], lemoe.EvalOptions(only=("reliability",)))
    with lemoe.insert(base, state) as adaptor:
        edited = target_loss(base, passage)
        assert torch.equal(base.model(input_ids=other, use_cache=False).logits, before)
        assert adaptor.acts_on(passage.prompt)
        assert generate_tokens(base, passage.prompt, cached=True) == generate_tokens(base, passage.prompt, cached=False)
    stages = [math.log(measured.value("reliability", "perplexity", stage=stage)) for stage in ("before", "after")]
    assert abs(edited - own) > 1e-3
    assert stages == pytest.approx([own, edited], abs=1e-4 + 1e-2 * abs(edited - own))
    assert target_loss(base, passage) == own


@pytest.mark.parametrize("family", family_names())
def test_a_family_is_edited_as_its_model_runs_or_refused_in_one_line(family: str) -> None:
    state = documented_states().get(family, "")
    if family in UNBUILT:
        assert state in ("not tried", "")
        pytest.skip(UNBUILT[family])
    try:
        base = build_base(family)
        adaptor = lemoe.train_round(base, [EDIT], make_settings())
    except LemoeError as error:
        refusal = str(error)
    else:
        assert state in ("edited", "")
        check_edited(base, adaptor)
        return
    assert state in ("refused", ""), refusal
    assert "\n" not in refusal


def test_the_table_of_families_names_each_one_that_was_tested() -> None:
    tested = re.search(r"transformers (\d+\.\d+\.\d+)", TABLE.read_text(encoding="utf-8"))
    assert tested
    if tested[1] != hf.__version__:
        pytest.skip(f"the table is of transformers {tested[1]}")
    assert set(documented_states()) == set(family_names())
