"""Storage servers that the local tests share: started once for all of them, on first use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from jobs.connection import connected
from jobs.spec import ClusterSettings
from tests.local.s3_server import S3Server, moto, rclone


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    with moto() as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server() -> Iterator[S3Server]:
    with rclone() as server:
        yield server


@pytest.fixture
def s3(moto_server: S3Server) -> S3Server:
    """moto, with a fresh bucket: `s3.url`, `s3.bucket`, `s3.storage_options`, `s3.env`, `s3.endpoint_url`."""
    return dataclasses.replace(moto_server, bucket=moto_server.new_bucket())


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray of our own for all tests that run jobs in this process."""
    with connected(ClusterSettings(num_cpus=4)):
        yield
