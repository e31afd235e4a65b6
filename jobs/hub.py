"""A dataset folder onto the Hugging Face hub, as one commit: a reader meets the old dataset or the new one, whole."""

from __future__ import annotations

from pipelines.errors import OutputError


def push(folder: str, repo: str, *, private: bool, message: str) -> str:
    """Make `repo` (`owner/name`) hold the folder's dataset instead of its earlier one; the commit's URL.

    A repository that is not there yet is created, `private` or not; one that is keeps its visibility. The token is
    huggingface_hub's: HF_TOKEN, or what `hf auth login` has stored. Raises OutputError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            commit_message=message,
            delete_patterns=["data/*"],
        )
    except HFValidationError as error:
        raise OutputError(f"{repo} is no name of a dataset: write OWNER/NAME ({error})") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise OutputError(
                f"{repo}: the hub does not let this token write there ({error.response.status_code}): set HF_TOKEN to one that may"
            ) from None
        raise OutputError(f"{repo}: the hub refuses it: {error}") from None
    except Exception as error:  # noqa: BLE001 - whichever HTTP client huggingface_hub has, with errors of its own
        raise OutputError(f"{repo}: the hub at {api.endpoint} cannot be reached: {error}") from None
    return str(done.commit_url)
