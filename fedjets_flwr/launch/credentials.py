"""Keys and certificates of a deployment: an authority, the SuperLink's certificate, and a key pair for each site."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import written
from fedjets_flwr.names import ROLES
from fedjets_flwr.wire.binding import roster_line

LOOPBACK = ("127.0.0.1", "localhost")
"""Names that every server certificate has: the SuperLink's own processes reach it there."""

ROSTER = "roster"
"""The file that ``nodes.roster`` names."""

_PEM, _OPENSSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH
_PLAIN = serialization.NoEncryption()


def make_server_credentials(folder: Path, hosts: Sequence[str], days: int = 825) -> list[Path]:
    """Write ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key`` and return their paths.

    Args:
        folder: made if it is missing.
        hosts: names and addresses by which sites reach the SuperLink; the loopback ones are always added.
        days: how long the certificates are valid.

    Raises:
        FedjetsError: one of the files is there already, or a host is neither a name nor an address.
    """
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *LOOPBACK])]
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedjets authority")])
    ca = (
        _certificate(ca_name, ca_name, ca_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    server = (
        _certificate(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedjets superlink")]),
            ca_name, server_key.public_key(), days,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )  # fmt: skip
    traditional = serialization.PrivateFormat.PKCS8
    return _write(
        folder,
        {
            "ca.key": (ca_key.private_bytes(_PEM, traditional, _PLAIN), 0o600),
            "ca.crt": (ca.public_bytes(_PEM), 0o644),
            "server.key": (server_key.private_bytes(_PEM, traditional, _PLAIN), 0o600),
            "server.crt": (server.public_bytes(_PEM), 0o644),
        },
    )


def make_site_keys(folder: Path, clients: Sequence[int], unseen: int = 0, validation: int = 0) -> list[Path]:
    """Write ``site-<client>`` (private) and ``site-<client>.pub`` for each client and return their paths.

    What ``nodes.roster`` needs is added to ``roster``: client id, role and public key, a line each.

    Args:
        folder: made if it is missing.
        clients: their ids.
        unseen: how many of them never train.
        validation: how many of them, the last ones, never train and are there to choose settings; before them come the
            unseen ones.

    Raises:
        FedjetsError: one of the files is there already.
    """
    files: dict[str, tuple[bytes, int]] = {}
    lines = []
    counts = (len(clients) - unseen - validation, unseen, validation)
    roles = [role for role, count in zip(ROLES, counts, strict=True) for _ in range(count)]
    for position, client in enumerate(clients):
        key = ec.generate_private_key(ec.SECP384R1())
        files[f"site-{client}"] = (key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, _PLAIN), 0o600)
        public = key.public_key().public_bytes(_OPENSSH, serialization.PublicFormat.OpenSSH)
        files[f"site-{client}.pub"] = (public + f" site-{client}\n".encode(), 0o644)
        role = roles[position]
        lines.append(roster_line(client, role, f"{public.decode()} site-{client}"))
    made, roster = _write(folder, files), folder / ROSTER
    known = roster.read_text() if roster.is_file() else ""
    with written(roster) as file:
        file.write_text(known + "".join(lines))
    return [*made, roster]


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of sites differ a little
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=key_cert_sign, crl_sign=crl_sign, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or any(c in host for c in ":/ @"):
        raise FedjetsError(f"--host {host}: give a name or an address, without scheme and port")
    return x509.DNSName(host)


def _write(folder: Path, files: dict[str, tuple[bytes, int]]) -> list[Path]:
    """Write files with their modes, none if one of them exists."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in files:
        if (folder / name).exists():
            raise FedjetsError(f"{folder / name} is there already and is not overwritten; give another --output")
    for name, (data, mode) in files.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
    return [folder / name for name in files]
