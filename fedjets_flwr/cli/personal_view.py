"""What the commands for personalised models show a person."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedjets_flwr.moe.mixture import COMMON
from fedjets_flwr.personalize.bundle import Card
from fedjets_flwr.personalize.inference import Predictions
from fedjets_flwr.personalize.personaliser import Personaliser

_CLASSES = 10


def show_personalised(made: Personaliser, folder: Path, console: Console) -> None:
    """Print which experts a site got, the classes that it seems to have, and where its bundle is."""
    card, found = made.card, made.predictions
    assert found is not None
    if card.mixture is not None:
        trained = card.images - len(found)
        console.print(
            f"a specialist beside the run's model: trained on {trained} images, stopped by {len(found)} others"
        )
        show_accuracy(found, console)
        _show_folder(card, folder, console)
        return
    table = Table(title=f"{len(card.experts)} of {len(card.gate_scores)} experts for {card.images} images")
    for heading in ("expert", "mean gate score", "images"):
        table.add_column(heading, justify="right")
    for m in card.experts:
        score = f"{card.gate_scores[m]:.3f}" if card.gated else "no gate"
        table.add_row(str(m), score, str(int((found.experts == m).sum())))
    console.print(table)
    if card.read_out == COMMON:
        console.print("the common expert answers: the images are more familiar to it than to the gate's choice")
    shares = sorted(zip(card.label_prior, card.classes, strict=True), reverse=True)[:_CLASSES]
    shown = ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005)
    console.print(f"class shares, an estimate: {shown}")
    show_accuracy(found, console)
    _show_folder(card, folder, console)


def _show_folder(card: Card, folder: Path, console: Console) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    console.print(f"{folder} ({size / 1e6:.2f} MB, read by {card.read_out}/{card.prior})", soft_wrap=True)


def show_accuracy(found: Predictions, console: Console) -> None:
    """Print the share of right answers if class folders tell the labels."""
    if found.accuracy is not None:
        console.print(f"accuracy {found.accuracy:.4f} on {len(found)} images, by their class folders")
