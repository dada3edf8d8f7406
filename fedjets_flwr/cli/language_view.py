"""What the commands for language models of one text show a person."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedjets_flwr.moe.structure import count
from fedjets_flwr.personalize.language import LanguagePersonaliser, Scores


def show_text_model(made: LanguagePersonaliser, folder: Path, console: Console) -> None:
    """Print which experts a text got, what they weigh, and how well they tell text that did not choose them."""
    card = made.card
    every = card.sizes.experts * card.sizes.switch_layers
    table = Table(title=f"{count(card.held)} of {every} experts for {card.tokens_chosen_by} tokens")
    for heading in ("layer", "tokens", "experts, by their share"):
        table.add_column(heading, justify="left" if heading.startswith("experts") else "right")
    for layer, (ids, row) in enumerate(zip(card.held, card.activation, strict=True)):
        ranked = sorted(ids, key=lambda m, row=row: (-row[m], m))  # type: ignore[misc]
        shares = " ".join(f"{m}:{row[m]:.0%}" for m in ranked)
        table.add_row(str(layer), f"{sum(row[m] for m in ids):.1%}", shares)
    console.print(table)
    bits = card.bits_per_byte
    console.print(f"weights: {card.bytes_held} bytes, {card.bytes_held / card.bytes_whole:.0%} of {card.bytes_whole}")
    console.print(
        f"bits per byte of {card.tokens_scored} tokens of other documents: {bits.chosen:.4f} with these experts,"
        f" {bits.random:.4f} with as many drawn ones, {bits.whole:.4f} with all",
        soft_wrap=True,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    console.print(f"{folder} ({size / 1e6:.2f} MB)", soft_wrap=True)


def show_scores(found: Scores, console: Console) -> None:
    """Print how well a model tells all documents together."""
    if found.bits_per_byte is not None:
        console.print(f"{found.bits_per_byte:.4f} bits per byte of {len(found.files)} documents")
