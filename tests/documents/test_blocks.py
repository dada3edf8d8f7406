"""What the documents must keep to, and that a block which does not work fails."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from sybil import Document
from sybil.example import SybilFailure

from tests.documents.blocks import DOCUMENTS, Block
from tests.documents.shell import ROOT, Shell, commands, copy_checkout, tracked
from tests.support.processes import runs, wait_until_gone

OUTPUT = {"text", "csv", "json", "yaml"}
"""Languages of blocks that show something and are not tried."""
PATHS = [ROOT / name for name in tracked(ROOT) if DOCUMENTS.should_parse(ROOT / name)]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))


@by_path
def test_every_block_of_code_is_tried_or_is_output(path: Path) -> None:
    code = [token for token in MarkdownIt().parse(path.read_text()) if token.type in ("fence", "code_block")]
    tried = {example.line for example in DOCUMENTS.parse(path).examples()}
    assert {token.map[0] + 1 for token in code if token.info not in OUTPUT} == tried  # type: ignore[index]


@by_path
def test_a_block_that_needs_data_says_so(path: Path) -> None:
    for example in DOCUMENTS.parse(path).examples():
        block: Block = example.parsed
        assert "cifar" not in block.source or {"needs", "not run"} & set(block.notes), f"line {example.line}"


def test_every_document_is_collected(pytestconfig: pytest.Config) -> None:
    collected = [ROOT / name for name in pytestconfig.getini("testpaths")]
    assert PATHS
    assert [path for path in PATHS if not any(path.is_relative_to(each) for each in collected)] == []


def test_the_code_that_the_documents_name_is_there() -> None:
    named = re.findall(r"`([\w/]+)\.py:([\w.]+)`", "".join(path.read_text() for path in PATHS))
    assert named
    for file, name in named:
        attrgetter(name)(importlib.import_module(file.replace("/", ".")))


@by_path
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.close()


def parse(folder: Path, text: str) -> Document:
    path = folder / "document.md"
    path.write_text(text)
    return DOCUMENTS.parse(path)


def run_all(folder: Path, shell: Shell, text: str) -> None:
    document = parse(folder, text)
    document.namespace["shell"] = shell
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize(
    "text",
    [
        "```bash\ntrue\necho the reason; false\ntrue\n```",
        "```bash\nfalse | cat; echo the reason\n```",
        "```bash\ntrue\nif echo the reason\n```",
        "```python\nraise SystemExit('the reason')\n```",
    ],
)
def test_a_block_that_fails_fails_with_what_it_said(tmp_path: Path, shell: Shell, text: str) -> None:
    with pytest.raises(SybilFailure, match="the reason"):
        run_all(tmp_path, shell, text)


def test_settings_that_do_not_exist_fail(tmp_path: Path, shell: Shell) -> None:
    run_all(tmp_path, shell, "```toml\n[run]\nrounds = 3\n```")
    with pytest.raises(SybilFailure, match="run.round"):
        run_all(tmp_path, shell, "```toml\n[run]\nround = 3\n```")


def test_environment_and_folder_stay_and_nothing_else(tmp_path: Path, shell: Shell) -> None:
    first = "```bash\nexport ONE='a b'\nsecret=1\nmkdir -p x && cd x\n```\n"
    then = '```bash\ntest "$ONE" = "a b"\ntest -z "$secret"\ntest "$(basename "$PWD")" = x\n```\n'
    python = "```python\nimport os\nassert os.environ['ONE'] == 'a b'\nleft = 1\n```\n"
    run_all(tmp_path, shell, first + then + python + "```python\nassert 'left' not in dir()\n```\n")


def test_commands_end_where_bash_says_so() -> None:
    parts = ["one \\\n  --two", "cat <<'END'\nx\n\nEND", "for i in 1 2; do\n  echo $i\ndone", "three 'a\nb'  # why"]
    assert commands("# first\n\n" + "\n".join(parts) + "\n") == parts


def test_only_what_git_tracks_is_there(tmp_path: Path) -> None:
    root, copy = tmp_path / "root", tmp_path / "copy"
    (root / "docs").mkdir(parents=True)
    for name in ("docs/kept", "gone", "forgotten"):
        (root / name).write_text(name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "docs/kept", "gone"], cwd=root, check=True)
    (root / "docs" / "kept").write_text("changed")
    (root / "gone").unlink()
    copy_checkout(root, copy)
    copied = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert copied == {"docs/kept", ".venv/bin/activate"}
    assert (copy / "docs" / "kept").read_text() == "changed"


def test_commands_and_examples_meet_the_copy_and_a_home_without_files(shell: Shell) -> None:
    shell.run("source .venv/bin/activate")
    shell.run('test "$(dirname "$(command -v python)")" = ' + f"{sys.prefix}/bin")
    shell.run('python -c "import fedjets_flwr as f; print(f.__file__)" | grep -q "^$PWD/fedjets_flwr"')
    shell.run('test -z "$(ls -A "$HOME")"')


def test_a_slow_block_finds_what_quick_ones_above_it_leave(tmp_path: Path, shell: Shell) -> None:
    slow, never = "<!-- slow: a minute -->\n", "<!-- not run: no -->\n"
    blocks = ["touch one", slow, "touch two", never, "exit 1", "test -e one\ntest ! -e two\necho x >> three", "exit 1"]
    text = "".join(part if part.startswith("<!--") else f"```bash\n{part}\n```\n" for part in blocks)
    document = parse(tmp_path, text)
    document.namespace["shell"] = shell
    fourth = list(document.examples())[3]
    fourth.evaluate()
    fourth.evaluate()
    assert (shell.checkout / "three").read_text() == "x\n"


def test_comments_decide_when_a_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comments = ("", "<!-- slow: hours -->\n", "<!-- not run: no network -->\n", "<!-- needs: cifar10 -->\n")
    document = parse(tmp_path, "".join(f"{comment}```bash\ntrue\n```\n" for comment in comments))

    def told() -> list[list[str]]:
        return [[mark.name for mark in example.parsed.marks] for example in document.examples()]

    monkeypatch.delenv("FEDJETS_DATA", raising=False)
    assert told() == [[], ["slow", "timeout"], ["skip"], ["skip"]]
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setenv("FEDJETS_DATA", str(tmp_path))
    assert told() == [[], ["slow", "timeout"], ["skip"], []]


@pytest.mark.parametrize("comment", ["not run", "slow:", "sloww: hours", "needs: imagenet", "not run: "])
def test_a_comment_without_a_meaning_or_a_reason_is_refused(tmp_path: Path, comment: str) -> None:
    with pytest.raises(ValueError, match=r"line 2, column 1: what does <!-- "):
        parse(tmp_path, f"<!-- {comment} -->\n```bash\ntrue\n```\n")


def test_what_a_document_leaves_running_ends_with_it() -> None:
    shell = Shell()
    shell.run("sleep 1000 & echo $! > pid")
    pid = int((shell.checkout / "pid").read_text())
    assert runs(pid)
    shell.close()
    wait_until_gone([pid], seconds=10)
    assert not shell.checkout.exists()
