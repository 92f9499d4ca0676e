"""A verdict that goes by how an answer is read is made anew when that changes."""

import ast

import pytest

from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import find_judge
from vcot.pipeline.parser_version import PARSER, PARSER_FILES, digest_parser
from vcot.pipeline.records import content_key
from vcot.pipeline.sections import JudgeSection

TABLES = {"records.py"}  # what an option is, not how an answer is read


@pytest.mark.parametrize("changed", range(len(PARSER_FILES)))
def test_it_changes_with_each_file_of_the_parser(tmp_path, changed):
    files = [tmp_path / path.name for path in PARSER_FILES]
    for file, path in zip(files, PARSER_FILES, strict=True):
        file.write_bytes(path.read_bytes())
    assert digest_parser(files) == PARSER
    files[changed].write_bytes(files[changed].read_bytes() + b"\n")
    assert digest_parser(files) != PARSER


def test_it_holds_every_file_that_the_parser_reads_with():
    modules = [node.module or "" for path in PARSER_FILES for node in ast.walk(ast.parse(path.read_text("utf-8")))
               if isinstance(node, ast.ImportFrom)]  # fmt: skip
    own = {f"{module.rpartition('.')[2]}.py" for module in modules if module.startswith("vcot.")}
    assert own - TABLES <= {path.name for path in PARSER_FILES}


def test_judges_that_go_by_it_have_it_in_their_keys(tmp_path):
    verifier = find_judge(JudgeSection(kind="verifier"), ImageStore(tmp_path))
    assert verifier.fingerprint == content_key(weights=[0.5, 0.5], parser=PARSER)
    gated = JudgeSection(kind="gated", members=(JudgeSection(kind="verifier"),))
    members = content_key(members=[[verifier.fingerprint, {}]])
    assert find_judge(gated, ImageStore(tmp_path)).fingerprint == content_key(members=members, parser=PARSER)
