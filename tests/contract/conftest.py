"""Fixtures of the contract tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for loopback addresses and its key, made afresh."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    where = tmp_path_factory.mktemp("tls")
    certificate, key = where / "cert.pem", where / "key.pem"
    names = "subjectAltName=IP:127.0.0.1,IP:127.0.0.2,DNS:localhost"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command = [openssl, "req", "-x509", *curve, "-keyout", str(key), "-out", str(certificate), "-days", "2"]
    subprocess.run([*command, "-subj", "/CN=loopback", "-addext", names], check=True, capture_output=True)
    return certificate, key
