import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.credentials import make_server_credentials, make_site_keys
from fedjets_flwr.launch.deployment import Deployment
from fedjets_flwr.launch.local_deployment import _as_image_sites
from fedjets_flwr.wire.binding import fingerprint, read_roster


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def connect(folder: Path, authority: Path, name: str) -> None:
    """A TLS handshake between a server with these credentials and a client that trusts an authority."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.settimeout(10)

    def answer() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["superlink.example.org", "10.1.2.3", "127.0.0.1", "localhost"])
def test_a_server_is_believed_under_its_names_and_on_loopback(tmp_path: Path, name: str) -> None:
    make_server_credentials(tmp_path, ["superlink.example.org", "10.1.2.3"])
    connect(tmp_path, tmp_path / "ca.crt", name)


def test_another_name_and_another_authority_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_server_credentials(tmp_path / folder, ["superlink.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(tmp_path / "a", tmp_path / "a" / "ca.crt", "other.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(tmp_path / "a", tmp_path / "b" / "ca.crt", "superlink.example.org")


def test_site_keys_are_p384_in_openssh_format(tmp_path: Path) -> None:
    make_site_keys(tmp_path, range(3, 5))
    assert {path.name for path in tmp_path.iterdir()} == {"site-3", "site-3.pub", "site-4", "site-4.pub", "roster"}
    private = load_ssh_private_key((tmp_path / "site-3").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "site-3.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public
    assert public != load_ssh_public_key((tmp_path / "site-4.pub").read_bytes())


def test_the_roster_has_a_line_for_every_site_and_is_read_back(tmp_path: Path) -> None:
    make_site_keys(tmp_path, range(2))
    make_site_keys(tmp_path, range(2, 5), unseen=2)
    lines = (tmp_path / "roster").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["0", "train"], ["1", "train"], ["2", "train"], ["3", "unseen"], ["4", "unseen"]
    ]  # fmt: skip
    three = {"partition.clients": 3, "partition.unseen-clients": 2, "partition.name": "quantity", "moe.experts": 2}
    few = {"moe.top-k": 1, "cohort.anchors": 2, "cohort.normals": 1, "nodes.roster": str(tmp_path / "roster")}
    found = read_roster(Config.from_flat(three | few))
    assert found is not None
    keys = {fingerprint((tmp_path / f"site-{client}.pub").read_bytes()): client for client in range(5)}
    assert found == keys


def test_private_keys_are_their_owners_alone(tmp_path: Path) -> None:
    make_server_credentials(tmp_path / "new", ["host"])
    make_site_keys(tmp_path / "new", [0])
    assert mode(tmp_path / "new") == 0o700
    modes = {path.name: mode(path) for path in (tmp_path / "new").iterdir()}
    assert {name for name, bits in modes.items() if bits == 0o600} == {"ca.key", "server.key", "site-0"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_server_credentials(tmp_path, ["host"])
    make_site_keys(tmp_path, [1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FedjetsError, match="ca.key is there already"):
        make_server_credentials(tmp_path, ["other"])
    with pytest.raises(FedjetsError, match="site-1 is there already"):
        make_site_keys(tmp_path, [0, 1])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("host", ["https://host", "host:8000", ""])
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str) -> None:
    with pytest.raises(FedjetsError, match="--host"):
        make_server_credentials(tmp_path, [host])
    assert not list(tmp_path.iterdir())


def test_a_rehearsals_sites_have_the_roles_that_they_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = ["train", "train", "unseen", "validation"]
    for name in ("start_superlink", "register", "start_site"):
        monkeypatch.setattr(Deployment, name, lambda *_: None)
    with Deployment(
        tmp_path, {client: {"client-id": client, "role": role} for client, role in enumerate(roles)}
    ) as made:
        lines = made.roster.read_text().splitlines()
    found = [line.split()[:2] for line in lines if line and not line.startswith("#")]
    assert found == [[str(client), role] for client, role in enumerate(roles)]


def test_the_images_of_a_rehearsal_lie_at_its_sites_alone(tmp_path: Path) -> None:
    config = Config.from_flat(
        {"data.dir": "/somewhere", "partition.clients": 6, "partition.unseen-clients": 2, "cohort.normals": 1}
    )
    changes, sites = _as_image_sites(config, tmp_path)
    assert changes["data.dir"] == ""
    assert len(sites) == 8
