"""The cluster key: a self-signed certificate and its private key, which every server and every client must have.

AgentScope unpickles the messages that it receives, so any client that can connect to a server can run code there.
Mutual TLS permits connections only between processes that have the cluster key. It cannot be turned off.
"""

import datetime
import errno
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from simulation.errors import SettingsError, reason
from simulation.files import is_there, real

CLUSTER_NAME = "simulation-cluster"
FILES = CERTIFICATE, PRIVATE_KEY = "cluster.crt", "cluster.key"
VALID_FOR = datetime.timedelta(days=3650)
CLOCK_SKEW = datetime.timedelta(days=1)  # accepted difference between the clocks of the cluster's hosts


@dataclass(frozen=True, repr=False)
class ClusterKey:
    """A certificate and its private key, both in PEM format."""

    certificate: bytes
    private_key: bytes

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return server credentials that accept only clients with this certificate."""
        pairs = [(self.private_key, self.certificate)]
        return grpc.ssl_server_credentials(pairs, root_certificates=self.certificate, require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return client credentials that present this certificate and accept only servers with the same certificate."""
        return grpc.ssl_channel_credentials(self.certificate, self.private_key, self.certificate)


def load_or_make(folder: Path) -> ClusterKey:
    """Return the cluster key in a folder. Create the key if the folder has none. Raises SettingsError like `load`."""
    if not any(is_there(folder / name, "--cluster-key-dir") for name in FILES):
        try:
            _make(folder)
        except OSError as error:
            raise SettingsError(f"cannot make the cluster key in {folder}: {reason(error)}") from None
    return load(folder)


def load(folder: Path) -> ClusterKey:
    """Return the cluster key in a folder. Raises SettingsError if the key is missing, invalid or readable by others."""
    try:
        for path, kind, mode in ((folder, "folder", 700), *((folder / name, "file", 600) for name in FILES)):
            status = path.stat()
            if status.st_uid not in (os.geteuid(), 0):
                raise SettingsError(f"the cluster key {kind} {path} belongs to another user: make it your own")
            if stat.S_IMODE(status.st_mode) & 0o077:
                raise SettingsError(f"the cluster key {kind} {path} can be read by others: chmod {mode} '{path}'")
        key = ClusterKey(*((folder / name).read_bytes() for name in FILES))
    except (FileNotFoundError, NotADirectoryError) as error:
        advice = "copy the folder from another host, or give another --cluster-key-dir"
        raise SettingsError(f"the cluster key is incomplete, {error.filename} is missing: {advice}") from None
    except OSError as error:
        raise SettingsError(f"cannot read the cluster key {error.filename or folder}: {reason(error)}") from None
    if problem := _problem_of(key):
        raise SettingsError(f"the cluster key in {folder} {problem}")
    return key


def _problem_of(key: ClusterKey) -> str:
    """Return why a key cannot be used now and what to do, or an empty text if the key is usable."""
    try:
        certificate = x509.load_pem_x509_certificate(key.certificate)
        private = serialization.load_pem_private_key(key.private_key, password=None)
        if private.public_key() != certificate.public_key():
            raise ValueError("the files are of two keys")
    except ValueError:
        return "is damaged: remove the folder, or copy it again from another host"
    now, begins = datetime.datetime.now(datetime.UTC), certificate.not_valid_before_utc
    if now < begins:
        clock = f"the clock of this host shows {now:%Y-%m-%d %H:%M} UTC: set the clock"
        return f"is valid from {begins:%Y-%m-%d %H:%M} UTC on, and {clock}"
    expired = certificate.not_valid_after_utc < now
    return "has expired: remove the folder on all hosts to make a new one" if expired else ""


def _make(folder: Path) -> None:
    """Write a new key to a temporary folder. Rename that folder to `folder` unless another process was faster."""
    folder = real(folder)  # resolve links: rename replaces a folder, not a link to one
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CLUSTER_NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(CLUSTER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = {
        CERTIFICATE: certificate.public_bytes(pem),
        PRIVATE_KEY: private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        ".gitignore": b"*\n",  # keeps git from adding the key if the folder is in a checkout
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as draft:
        if stat.S_IMODE(Path(draft).stat().st_mode) & 0o077:  # mode 0700, if the file system has modes
            raise OSError(errno.EPERM, "its file system lets everybody read every file; give another --cluster-key-dir")
        for file_name, content in files.items():
            (Path(draft) / file_name).touch(0o600)
            (Path(draft) / file_name).write_bytes(content)
        try:
            Path(draft).rename(folder)
        except OSError:
            if not is_there(folder / CERTIFICATE):  # otherwise another process was faster, and its key is used
                raise
