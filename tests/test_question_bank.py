"""The bank of questions that the reading of meaning is fitted on: complete, and every wording about one subject."""

from collections import Counter
from dataclasses import replace

from lemoe.data.question_bank import (
    ENGLISH_FORMS,
    KEY_FORMS,
    LANGUAGE_FORMS,
    REMARK,
    digest_bank,
    read_question_bank,
)

BANK = read_question_bank()


def test_every_relation_has_wordings_of_every_form() -> None:
    counts = Counter((wording.relation, wording.form) for wording in BANK)
    relations = {wording.relation for wording in BANK} - {REMARK}
    assert len(relations) >= 150
    for relation in relations:
        assert sum(counts[relation, form] for form in ENGLISH_FORMS) >= 12, relation
        assert all(counts[relation, form] >= 3 for form in (*ENGLISH_FORMS, *LANGUAGE_FORMS)), relation
    assert set(KEY_FORMS) < set(ENGLISH_FORMS)


def test_a_wording_has_one_place_for_its_subject_and_stands_in_one_relation() -> None:
    homes: dict[tuple[str, str], set[str]] = {}
    for wording in BANK:
        assert wording.template.count("{}") == 1, wording
        assert "{" not in wording.template.replace("{}", ""), wording
        assert len(wording.names) > 1, wording
        assert not any("{" in name for name in wording.names), wording
        homes.setdefault((wording.kind, wording.template), set()).add(wording.relation)
    assert not {template: names for template, names in homes.items() if len(names) > 1}


def test_remarks_stand_last_and_are_made_about_subjects_of_every_kind() -> None:
    remarks = [wording for wording in BANK if wording.relation == REMARK]
    assert len(remarks) >= 20
    assert list(BANK[-len(remarks) :]) == remarks
    assert {wording.kind for wording in remarks} == {""}
    english = {name for wording in BANK if wording.form == "questions" for name in wording.names}
    assert set(remarks[0].names) == english


def test_one_other_letter_or_name_makes_another_bank() -> None:
    digest = digest_bank(BANK)
    changed = [replace(BANK[0], template=BANK[0].template + "!"), replace(BANK[0], names=BANK[0].names[1:])]
    assert len({digest, *(digest_bank([each, *BANK[1:]]) for each in changed), digest_bank(BANK[1:])}) == 4
    assert digest_bank(list(BANK)) == digest
