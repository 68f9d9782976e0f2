"""What an error of the client for object stores means: whose it is, and whether it may pass."""

from __future__ import annotations

from typing import Any

import pytest

from align.store.object_store import Bucket
from tests.support.refusals import Refused

obstore = pytest.importorskip("obstore")


def bucket_with(error: Exception) -> Any:
    """Call a bucket whose client raises ``error``."""
    bucket = Bucket("s3://bucket/runs")
    bucket._opened = object()

    def action(module: Any, store: Any) -> None:
        raise error

    return bucket._call("a/b", action)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("unknown storage class 'FAST'"),
        obstore.exceptions.UnknownConfigurationKeyError("unknown storage class 'FAST'"),
        obstore.exceptions.NotSupportedError("unknown storage class 'FAST'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_wrong_setting_is_the_users_error_at_once(refused: Refused, error: Exception) -> None:
    refused(bucket_with, error)


def test_a_server_that_is_away_may_come_back(refused: Refused) -> None:
    refused(lambda: bucket_with(obstore.exceptions.GenericError("connection refused")))
    refused(lambda: bucket_with(obstore.exceptions.GenericError("HTTP status code: 503")))
    refused(lambda: bucket_with(obstore.exceptions.GenericError("HTTP status code: 400")))
