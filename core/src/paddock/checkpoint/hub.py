"""Models on the Hugging Face hub: fetched into its cache, every file from one commit. Free of torch."""

from __future__ import annotations

import re
from pathlib import Path

from paddock.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_SMALL = ("*.json", "*.jinja", "*.model", "merges.txt")
_WEIGHTS = "*.safetensors"


def is_hub_id(name: str) -> bool:
    """Return whether a name has the shape of a hub id, `owner/name`."""
    return _ID.fullmatch(name) is not None


def fetch(hub_id: str, revision: str | None, *, weights: bool) -> Path:
    """Return the folder in the hub's cache that holds one commit of a model, fetching what is not there.

    `revision` is a commit, tag or branch, the default branch when None; `weights` False fetches the small files alone.
    Raises CheckpointError when the hub does not have it, wants a licence accepted, or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*_SMALL, _WEIGHTS] if weights else list(_SMALL)
    at = f"{hub_id} at {revision}" if revision else hub_id
    try:
        found = huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"the hub asks for a licence before it gives {at}",
            fix=f"accept it at https://huggingface.co/{hub_id}, then run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"the hub has no revision {revision!r} of {hub_id}", fix="name a commit, tag or branch") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {hub_id}, or it is private", fix="check the name; for a private one run: hf auth login"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0][:200]
        raise CheckpointError(
            f"{at} could not be fetched from the Hugging Face hub: {reason}",
            fix="check the network and whether HF_HUB_OFFLINE is set, or give the path of a folder that holds the model",
        ) from error
    return Path(found)
