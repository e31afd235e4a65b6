"""Which faults of a store pass by themselves, how long to wait for that, and what to tell the user.

    fault ──is_passing──► tried again with growing, jittered pauses ──still there──► TransientStorageError
        └──otherwise────► StorageError: one line with the URL, what is wrong and the way out

Messages never quote credentials, and library tracebacks end here (`from None`): `logging` at DEBUG has them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

import aiohttp
import tenacity
from botocore import exceptions as boto

from pipelines import scopes
from pipelines.errors import DrayError, StorageDenied, StorageError, StorageFull, TransientStorageError

T = TypeVar("T")
_log = logging.getLogger(__name__)

#: Error codes of S3 servers that ask for another try, beside the HTTP statuses below.
#: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_PASSING_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "TooManyRequests",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    # two conditional writes met: S3 answers 409 to one of them, which must ask again to learn who won
    "ConditionalRequestConflict",
    "OperationAborted",
    # the body was damaged or cut on the way
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
}
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_PASSING_ERRNO = {
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
)
_CREDENTIALS_WAY = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or key and secret in storage_options"
)
#: Code (or the status of a HEAD, which has no body) → what is wrong and the way out.
_REFUSALS = {
    "NoSuchBucket": "the bucket does not exist; create it or correct the path (and the endpoint, if one is set)",
    "InvalidBucketName": "this is no valid bucket name; correct the path",
    "AccessDenied": "access denied; these credentials need permission to list, read and write there",
    "403": "access denied; check the credentials and their permission to list, read and write there",
    "AllAccessDisabled": "all access to this bucket is disabled",
    "InvalidAccessKeyId": f"the store does not know this access key; {_CREDENTIALS_WAY}",
    "SignatureDoesNotMatch": f"the secret key does not match the access key; {_CREDENTIALS_WAY}",
    "ExpiredToken": "the session token has expired; log in again and start anew",
    "InvalidToken": "the session token is not valid; log in again and start anew",
    "RequestTimeTooSkewed": "this machine's clock is off by more than the store allows; set it right",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "301": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
    "IllegalLocationConstraintException": "the bucket is in another region; set AWS_REGION",
    "EntityTooLarge": "the object is larger than the store takes in one piece",
}
#: Of these the codes that say nothing against the credentials as such.
_DENIED = {"AccessDenied", "403"}
_FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "no space left in the disk quota",
}
_LOCAL_REFUSALS = {
    errno.EACCES: "permission denied; choose another path or change its owner or mode",
    errno.EPERM: "operation not permitted; choose another path or change its owner or mode",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another path",
    errno.EISDIR: "this is a folder, not a file; correct the path",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter path",
    errno.ELOOP: "the path leads through a loop of symbolic links; correct it",
    errno.ENOLINK: "a symbolic link there points to nothing; remove or mend it",
}


def answer(error: BaseException) -> tuple[str, int]:
    """Error code and HTTP status that an S3 server gave; ("", 0) when the fault is no answer of a server."""
    found = _client_error(error)
    if found is None:
        return "", 0
    status = int(found.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return str(found.response.get("Error", {}).get("Code", "")), status


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    code, status = answer(error)
    if code or status:
        return code in _PASSING_CODES or status in _PASSING_STATUS
    if scopes.is_passing(error):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
        return True
    # aiohttp (http://), gcsfs and adlfs carry the HTTP status under one of these names
    return any(getattr(error, name, None) in _PASSING_STATUS for name in ("status", "code", "status_code"))


def is_unreachable(error: BaseException) -> bool:
    """Whether no server was found at the address: a wrong endpoint, or one that is down."""
    if isinstance(error, boto.EndpointConnectionError):
        # aiobotocore gives this name to resets of an open connection as well; the error within tells
        return isinstance(error.kwargs.get("error"), aiohttp.ClientConnectorError | socket.gaierror)
    return isinstance(error, boto.ConnectTimeoutError | boto.ProxyConnectionError)


def persist(
    call: Callable[[], T], patience_s: float, give_up: Callable[[BaseException], bool] | None = None
) -> T:
    """The result of `call`, tried again while its fault is a passing one.

    Pauses are random up to 0.2, 0.4, … 8 s ("full jitter": many workers do not come back at once:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). No try starts later than
    `patience_s` after the first; `give_up` ends the tries from the third on. Raises the last fault.
    """

    too_late = tenacity.stop_before_delay(patience_s)

    def stop(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        return too_late(state) or bool(state.attempt_number >= 3 and give_up and error and give_up(error))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_passing),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=8),
        stop=stop,
        before_sleep=lambda state: _log.debug("attempt %d failed", state.attempt_number, exc_info=True),
        reraise=True,
    )
    return retrying(call)


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns faults of the libraries below into Dray's errors about `url`; what it does not know goes through."""
    try:
        yield
    except DrayError:
        raise
    except FileNotFoundError as error:
        known = explain(error, url)  # a missing bucket is a FileNotFoundError to s3fs
        if known is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
        raise known from None
    except Exception as error:
        known = explain(error, url)
        if known is None:
            raise
        _log.debug("%s", url, exc_info=True)
        raise known from None


def explain(error: BaseException, url: str) -> DrayError | None:
    """Dray's error for a library's; None for what is unknown, and for a missing object."""
    code, status = answer(error)
    if is_passing(error):
        said = code or (str(status) if status else _first_line(error))
        return TransientStorageError(f"{url}: a storage fault did not pass: {said}")
    if code or status:
        if code in ("NoSuchKey", "NoSuchUpload", "404", "NoSuchVersion"):
            return None
        said = _REFUSALS.get(code) or _REFUSALS.get(str(status)) or "the store refused the request"
        kind = StorageDenied if code in _DENIED or (status == 403 and code not in _REFUSALS) else StorageError
        return kind(f"{url}: {said} ({code})")
    if isinstance(error, _NO_CREDENTIALS):
        return StorageError(
            f"no S3 credentials found for {url}: {_CREDENTIALS_WAY}; `anon: true` for public buckets"
        )
    if isinstance(error, boto.ProfileNotFound):
        return StorageError(
            f"{url}: the AWS profile is not in the AWS config; correct AWS_PROFILE or storage_options"
        )
    if isinstance(error, boto.SSLError):
        return StorageError(
            f"{url}: no trusted TLS connection; set AWS_CA_BUNDLE, or correct the endpoint's scheme"
        )
    if isinstance(error, boto.ParamValidationError):
        return StorageError(f"{url}: {_REFUSALS['InvalidBucketName']}")
    if scopes.scope_of(error) == "job":
        return StorageError(f"{url}: {_first_line(error)}")
    if isinstance(error, FileNotFoundError):
        return None
    if isinstance(error, OSError) and error.errno in _FULL:
        return StorageFull(f"{url}: {_FULL[error.errno]}; free some and run the same command again")
    if isinstance(error, OSError) and error.errno in _LOCAL_REFUSALS:
        kind = StorageDenied if error.errno == errno.EACCES else StorageError
        return kind(f"{url}: {_LOCAL_REFUSALS[error.errno]}")
    if isinstance(error, PermissionError) or _is_gcsfs_denial(error):
        return StorageDenied(f"{url}: {_REFUSALS['AccessDenied']}")
    # 401 is also what stores other than S3's tell whom they do not know of a listing, where anybody may read (gs://)
    if {getattr(error, name, None) for name in ("status", "code", "status_code")} & {401, 403}:
        return StorageDenied(f"{url}: {_REFUSALS['403']}")
    return None


def _is_gcsfs_denial(error: BaseException) -> bool:
    """gcsfs makes a bare OSError of status 403 (`validate_response`), without an errno or the status."""
    return isinstance(error, OSError) and error.errno is None and str(error).startswith("Forbidden")


def _first_line(error: BaseException) -> str:
    within = getattr(error, "kwargs", {}).get("error")  # botocore's name for a fault can mislead
    error = within if isinstance(within, BaseException) else error
    text = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _client_error(error: BaseException | None) -> boto.ClientError | None:
    """s3fs wraps botocore's error into an OSError and keeps it as the cause."""
    while error is not None:
        if isinstance(error, boto.ClientError):
            return error
        error = error.__cause__
    return None
