"""A Dask cluster by TLS: certificates from Dask's configuration, and nothing without them."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from ramgguf.cluster.executors import connected
from ramgguf.core.errors import EngineError

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")

# Dask's connections are closed by its event loop, at times after they are collected.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@dataclass(frozen=True)
class Certificates:
    """The files of an authority's certificate, and of one that it signed with its key."""

    ca: str
    cert: str
    key: str

    @classmethod
    def make(cls, folder: Path) -> "Certificates":
        folder.mkdir()
        authority = trustme.CA()
        signed = authority.issue_cert("127.0.0.1", "localhost")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        signed.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        signed.private_key_pem.write_to_path(folder / "key.pem")
        return cls(*(str(folder / f"{name}.pem") for name in ("ca", "cert", "key")))

    @property
    def configuration(self) -> dict[str, Any]:
        """What Dask's configuration says of them for a client."""
        tls = "distributed.comm.tls"
        return {
            f"{tls}.ca-file": self.ca,
            f"{tls}.client.cert": self.cert,
            f"{tls}.client.key": self.key,
        }


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("tls") / "own")


@pytest.fixture(scope="module")
def address(certificates: Certificates) -> Iterator[str]:
    """Where a scheduler listens that speaks TLS only; it has one worker."""
    files = {
        f"tls_{role}_{kind}": getattr(certificates, kind)
        for role in ("client", "scheduler", "worker")
        for kind in ("cert", "key")
    }
    security = distributed.Security(require_encryption=True, tls_ca_file=certificates.ca, **files)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tls", security=security,
        dashboard_address=None,
    ) as cluster:  # fmt: skip
        assert cluster.scheduler_address.startswith("tls://")
        yield cluster.scheduler_address.removeprefix("tls://")


def test_work_is_done_by_tls_with_the_certificates_of_dasks_configuration(
    address: str, certificates: Certificates
) -> None:
    with (
        dask.config.set(certificates.configuration),
        connected(f"dask+tls://{address}") as executor,
    ):
        assert executor is not None
        assert executor.submit(divmod, 17, 5).result(timeout=60) == (3, 2)


def test_a_certificate_of_another_authority_is_refused_in_one_line(
    address: str, tmp_path: Path
) -> None:
    other = Certificates.make(tmp_path / "other")
    with (
        dask.config.set(other.configuration),
        pytest.raises(EngineError, match="no scheduler answers there") as caught,
        connected(f"dask+tls://{address}"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_without_certificates_the_settings_that_name_them_are_told() -> None:
    missing = "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, .*__CLIENT__CERT, .*__CLIENT__KEY"
    with pytest.raises(EngineError, match=missing), connected("dask+tls://127.0.0.1:8786"):
        pass


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_files_that_are_no_certificates_are_named(
    certificates: Certificates, tmp_path: Path, content: str | None
) -> None:
    wrong = tmp_path / "wrong.pem"
    if content is not None:
        wrong.write_text(content)
    with (
        dask.config.set(certificates.configuration | {"distributed.comm.tls.ca-file": str(wrong)}),
        pytest.raises(EngineError, match=r"wrong\.pem.* are no certificates"),
        connected("dask+tls://127.0.0.1:8786"),
    ):
        pass


def test_plain_tcp_is_refused_where_dasks_configuration_asks_for_encryption(
    certificates: Certificates,
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as there,
        dask.config.set(certificates.configuration | {"distributed.comm.require-encryption": True}),
        pytest.raises(EngineError, match="encryption required"),
        connected(f"dask://127.0.0.1:{there.getsockname()[1]}"),
    ):
        pass
