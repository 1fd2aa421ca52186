"""docs/architecture.md is true to the code: files, names and import rules are there."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PATHS = sorted(set(re.findall(r"`([\w./-]+(?:\.py|\.md|\.cfg|/golden|/))`", PAGE)))


def test_the_page_names_many_files():
    assert len(PATHS) > 50


@pytest.mark.parametrize("path", PATHS)
def test_a_file_of_the_page_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "place",
    [
        "teacher_dump/engines/interface.py: EngineModule ENGINES sees_distribution",
        "teacher_dump/corpus/documents.py: read_documents read_sample",
        "teacher_dump/corpus/kinds.py: Kind _COMPRESSIONS",
        "teacher_dump/keep/selection.py: select_in_blocks",
        "teacher_dump/keep/packed.py: unpack",
        "teacher_dump/keep/packed_size.py: HEADER_WORDS",
        "student_train/objective/distillation.py: distil",
        "student_train/objective/temperatures.py: adapt",
        "student_train/setup.py: check_objective",
        "student_train/setup.py: columns_to_read",
        "student_train/data/batches.py: Batch",
        "shards/keep.py: Keep is_sampled has_tail",
        "shards/row_group.py: RowGroup _FLAT from_rows row _check_shapes",
        "shards/schema.py: FORMAT_VERSION",
    ],
)
def test_a_name_of_the_page_is_where_it_says(place):
    path, names = place.split(": ")
    code = (ROOT / path).read_text()
    for name in names.split():
        assert re.search(rf"`{name}[`=]", PAGE), name
        assert re.search(rf"^ *(def |class |)(@\w+ )?{name}\b", code, re.MULTILINE), name


def test_the_modules_that_the_trainer_may_import_are_those_of_the_rule():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    rule = config["importlinter:contract:layers"]["ignore_imports"]
    allowed = re.findall(r"-> teacher_dump\.(\w+)", rule)
    assert allowed == ["keep", "collector"]
    rules = PAGE.split("## The import rules")[1]
    assert all(f"`{name}`" in rules for name in allowed)
