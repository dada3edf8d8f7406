import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedjets_flwr.cli.app import cli
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.moe.controls import CONTROLS, best_control
from fedjets_flwr.report import charts
from fedjets_flwr.report import formatting as page_text
from fedjets_flwr.report.page import write_report
from fedjets_flwr.report.plots import draw_plots
from fedjets_flwr.runs.run_folder import read_recorded
from tests.support.in_process import run_in_process
from tests.support.tasks import task_folder, task_run, task_settings
from tests.support.text import TextRun, text_folder, text_run, text_settings

__all__ = ["task_folder", "task_run", "task_settings", "text_folder", "text_run", "text_settings"]

VOID = {"meta", "img", "br", "path", "rect"}
BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")
TINY = {
    "run__rounds": 2,
    "run__evaluate_every": 1,
    "cohort__anchors": 3,
    "partition__clients": 8,
    "partition__unseen_clients": 2,
    "cohort__normals": 2,
    "partition__samples_per_client": 20,
    "partition__unseen_samples": 40,
    "model__width": 4,
    "common_expert__target_accuracy": 0.1,
    "common_expert__max_epochs": 2,
    "run__name": "tiny",
}


class Page(HTMLParser):
    """A page whose every element must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def has(self, name: str) -> bool:
        return any(attributes.get("aria-labelledby") == name for _, attributes in self.tags)

    def images(self) -> list[str]:
        return [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]


def page(folder: Path) -> Page:
    text = write_report(folder).read_text()
    assert text.startswith("<!doctype html>")
    assert not re.search(r"https?:|<script|url\(|@import|srcset|<link|<iframe|javascript:", text)
    return Page(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(folder, patch, **TINY)
    return folder / "runs" / "tiny"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(finished, tmp_path / "tiny"))


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_page_shows_the_run(folder: Path) -> None:
    shown, summary = page(folder), json.loads((folder / "summary.json").read_text())
    assert "completed" in shown.text
    controls = summary["controls"]
    levels = [controls[key] for key in ("common_expert", best_control(controls), "common_expert_masked")]
    for value in (summary["accuracy"], *levels, *summary["per_client_accuracy"].values()):
        assert page_text.percent(value) in shown.text
    for key in ("bytes_down", "bytes_up", "bytes_served", "bytes_setup"):
        assert page_text.size(summary[key]) in shown.text
    assert summary["weights_hash"] in shown.text
    assert "moe.experts" in shown.text and "limits.max-samples" in shown.text
    for section in ("h-result", "h-curves", "h-experts", "h-clients", "h-samples", "h-cost", "h-settings"):
        assert shown.has(section)
    assert not shown.has("h-failures") and not shown.has("h-privacy")


def test_images_are_answered_as_in_the_run(folder: Path) -> None:
    shown = page(folder)
    assert len(shown.images()) == 16
    assert all(source.startswith("data:image/png;base64,") for source in shown.images())
    assert "Drawn at random" in shown.text


def test_what_a_run_says_is_only_text(folder: Path) -> None:
    hostile = '</td><script>alert("x")</script><img src=x onerror=alert(1)>'
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records[0]["failures"] = {"3": hostile}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    change(folder / "summary.json", classes=[hostile] * 10, dataset=hostile, versions={hostile: hostile})
    change(folder / "config.json", **{"run.name": hostile, "data.name": "image-folder", "data.classes": hostile})
    shown = page(folder)
    assert hostile in shown.text
    assert shown.has("h-failures") and "1 answer of 1 client could" in shown.text
    assert not shown.images() and "never leave the sites" in shown.text


def test_a_failed_run_tells_why(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "error.json").write_text(json.dumps({"reason": "Traceback\n<b>no</b> such thing", "expected": False}))
    shown = page(folder)
    assert "This run failed" in shown.text and "<b>no</b> such thing" in shown.text
    assert shown.has("h-curves") and shown.has("h-clients") and not shown.images()


def test_an_unfinished_run_shows_its_rounds(folder: Path) -> None:
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    shown = page(folder)
    assert "1 of 2 rounds" in shown.text and "unfinished" in shown.text
    assert page_text.percent(json.loads(lines[0])["evaluation"]["accuracy"]) in shown.text


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "prepared.json"])
def test_a_run_before_its_first_round(folder: Path, name: str) -> None:
    for stale in ("summary.json", "metrics.jsonl", "prepared.json"):
        (folder / stale).unlink()
        if stale == name:
            break
    shown = page(folder)
    assert shown.has("h-settings") and "unfinished" in shown.text


def test_a_run_without_labels_shows_whom_it_served(folder: Path) -> None:
    nothing = dict.fromkeys(CONTROLS)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("evaluation")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = json.loads((folder / "summary.json").read_text())
    for gone in ("best_round", "reading", "readings", "routing", "gate_entropy", "gate_collapsed"):
        del summary[gone]
    del summary["expert_class_accuracy"]
    summary |= {"accuracy": None, "best_accuracy": None, "per_client_accuracy": {}, "common_expert_per_client": {}}
    summary |= {"common_expert_accuracy": None, "controls": nothing}
    (folder / "summary.json").write_text(json.dumps(summary))
    shown = page(folder)
    assert "No accuracy was measured" in shown.text
    assert shown.has("h-clients") and shown.has("h-cost") and not shown.has("h-experts")


def test_one_model_has_no_experts_to_tell_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_process(tmp_path, monkeypatch, **TINY, strategy__name="fedavg")
    shown = page(tmp_path / "runs" / "tiny")
    assert "The model" in shown.text and "Who answers" not in shown.text
    assert len(shown.images()) > 8 and "Images and their answers" in shown.text


@pytest.mark.parametrize("name", ["local", "finetune", "specialist"])
def test_clients_that_train_are_shown_with_their_own_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = {"partition__val_share": 0.25, "partition__test_share": 0.25, "adapt__max_epochs": 1, "strategy__name": name}
    run_in_process(tmp_path, monkeypatch, **TINY | own | {"partition__samples_per_client": 40})
    recorded = tmp_path / "runs" / "tiny"
    page = Page(write_report(recorded).read_text())
    told = json.loads((recorded / "summary.json").read_text())["participants"]
    assert "Clients that train" in page.text
    assert f"{100 * told['local']:.1f}" in page.text
    assert len(told["clients"]) == 8
    assert "Accuracy on clients' own tests" in page.text
    assert ("one that never trained gets none" in page.text) == (name == "local")
    wanted = {"participants.png", "score.png"} | (
        {"accuracy.png", "clients.png", "experts.png", "load.png"} if name != "local" else set()
    )
    assert {path.name for path in draw_plots(recorded)} == wanted


def test_who_kept_the_common_expert_is_told(folder: Path) -> None:
    clients = sorted(map(int, json.loads((folder / "summary.json").read_text())["per_client_accuracy"]))
    assert "kept the common expert" not in page(folder).text
    change(folder / "summary.json", kept_common=clients[:1])
    assert page(folder).text.count("kept the common expert") == 1


def test_privacy_is_told_if_on(folder: Path) -> None:
    spent = {"epsilon_normal": 12.345, "epsilon_normal_secret_cohorts": 3.21, "epsilon_anchor": 20.0}
    change(folder / "summary.json", privacy=spent | {"releases": 7, "delta": 0.001, "route_epsilon": 0.0})
    shown = page(folder)
    assert shown.has("h-privacy") and "12.3" in shown.text and "3.21" in shown.text


def test_the_command_writes_where_it_is_told(folder: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "page.html"
    told = CliRunner().invoke(cli, ["report", str(folder), "--output", str(wanted)])
    assert told.exit_code == 0 and str(wanted) in told.output.replace("\n", "")
    assert Page(wanted.read_text()) and not (folder / "report.html").exists()


def test_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FedjetsError, match=r"no config.json there"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FedjetsError, match=r"config.json: not JSON"):
        write_report(tmp_path)


def test_an_output_that_cannot_be_written_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(FedjetsError, match=r"--output .*cannot be written"):
        write_report(folder, folder / "config.json" / "page.html")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_draws_it_and_asks_nobody(folder: Path, tmp_path: Path) -> None:
    path, log = write_report(folder), tmp_path / "net.json"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--log-net-log={log}"]
    told = subprocess.run(
        [*command, "--window-size=390,844", f"--screenshot={tmp_path / 'page.png'}", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert "Content Security Policy" not in told.stderr


def test_ticks_are_round_and_hold_the_values() -> None:
    assert charts.nice_ticks(0.62, 0.97) == [0.6, 0.7, 0.8, 0.9, 1.0]
    assert charts.nice_ticks(0.0, 0.0)[0] < 0.0 < charts.nice_ticks(0.0, 0.0)[-1]
    for low, high in ((0.0, 1e9), (-3.0, 0.2), (0.5, 0.5), (0.7801, 0.7802)):
        ticks = charts.nice_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1] and 2 <= len(ticks) <= 8


def test_many_rounds_become_few_columns() -> None:
    chart = charts.column_chart(range(1, 1001), [("down", "c0", [2.0] * 1000)], str, str)
    assert len(chart.boxes) <= charts.MOST_COLUMNS and len(chart.hits) == len(chart.boxes)
    assert chart.hits[0].facts == (("down", "c0", "2.0"),)
    assert all(0 <= box.x <= 100 and 0 <= box.y <= 100 for box in chart.boxes)


def test_a_missing_loss_is_a_gap() -> None:
    chart = charts.line_chart([1, 2, 3], ("loss", [2.0, None, 1.0]), [], str, str)
    assert chart.lines[0].path.count("M") == 2
    assert charts.line_chart([5], ("loss", [2.0]), [], str, str).lines[0].dots.startswith("M50")


def test_numbers_as_a_reader_wants_them() -> None:
    space = "\N{NARROW NO-BREAK SPACE}"
    assert page_text.percent(0.9676) == f"96.8{space}%" and page_text.percent(None) == "–"
    assert page_text.points(-0.012) == "\N{MINUS SIGN}1.2" and page_text.points(0.183) == "+18.3"
    assert [page_text.size(b) for b in (0, 999, 24_343_200, 999_960)] == [
        f"{text}{space}{unit}" for text, unit in (("0", "B"), ("999", "B"), ("24.3", "MB"), ("1000", "kB"))
    ]
    assert page_text.span(125) == f"2{space}min 5{space}s" and page_text.span(0.031) == f"0.03{space}s"
    assert page_text.setting(True) == "true" and page_text.setting("") == '""'


def test_a_run_on_text_is_told_in_bits_per_byte_by_domain(tmp_path: Path, text_run: TextRun) -> None:
    done = text_run("fedavg", run__rounds=2)
    write_report(done.config.run_dir, tmp_path / "report.html")
    page, own = (tmp_path / "report.html").read_text(), read_recorded(done.config.run_dir).results["participants"]
    assert "Bits per byte on clients' own test texts" in page
    assert f'<p class="big">{own["bits_per_byte"]:.3f}</p>' in page
    for domain, told in own["domains"].items():
        assert f'<tr><th scope="row">{domain}</th><td><b>{told["bits_per_byte"]:.3f}</b></td>' in page
    assert "No accuracy was measured" not in page
    assert '<th scope="col">what is written</th>' not in page


def test_scores_of_what_is_written_are_told_by_task(tmp_path: Path, task_run: TextRun) -> None:
    done = task_run("fedavg", run__rounds=1)
    write_report(done.config.run_dir, tmp_path / "report.html")
    page, own = (tmp_path / "report.html").read_text(), read_recorded(done.config.run_dir).results["participants"]
    f1, exact = (100 * own["domains"]["names"]["scores"][name] for name in ("f1", "exact-match"))
    assert '<th scope="col">what is written</th>' in page
    assert f"<td>f1 <b>{f1:.1f}" in page
    assert f"exact-match <b>{exact:.1f}" in page


def test_what_texts_activate_is_drawn_and_told(tmp_path: Path, text_run: TextRun) -> None:
    done = text_run("fedmoe", run__rounds=1, participants__tuned=True)
    told = json.loads((done.config.run_dir / "summary.json").read_text())
    assert set(told["activation"]) == set(told["experts_held"]) == set(told["domain_of"]) == {"0", "1", "2"}
    assert {path.name for path in draw_plots(done.config.run_dir)} == {
        "activation.png", "participants.png", "score.png",
    }  # fmt: skip
    shown = page(done.config.run_dir)
    assert shown.has("h-activation")
    assert "Switch layer 1: percent of a domain’s tokens by expert" in shown.text
    assert f"{told['participants']['tuned_bits_per_byte']:.3f}" in shown.text
    (first,) = [told["activation"][client] for client, place in told["domain_of"].items() if place == 0]
    for share in first[0]:
        assert f"{round(100 * share)}" in shown.text


@pytest.mark.parametrize("activation", [{"0": [[2.0]]}, {"0": [[None]]}, {"0": [[1.0], [0.5, 0.5]]}, {"x": [[1.0]]}])
def test_an_activation_that_is_none_is_one_clear_line(folder: Path, activation: object) -> None:
    change(folder / "summary.json", activation=activation)
    with pytest.raises(FedjetsError, match="summary.json: damaged"):
        write_report(folder)


def test_a_run_whose_experts_are_drawn_tells_no_activation(tmp_path: Path, text_run: TextRun) -> None:
    done = text_run("randommoe", run__rounds=1)
    assert "activation.png" not in {path.name for path in draw_plots(done.config.run_dir)}
    assert not page(done.config.run_dir).has("h-activation")
