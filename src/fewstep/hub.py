"""Files from the Hugging Face Hub: the cache, `HF_HUB_OFFLINE`, `HF_TOKEN` and `HF_ENDPOINT` are honoured.

Layer 0: no torch; `huggingface_hub` is imported when something is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


class NotAtHand(Exception):
    """What was asked for is neither cached nor to be had; the text is the reason, in a few words."""


def looks_like_id(text: str) -> bool:
    """Whether `text` has the form OWNER/NAME of a Hub repository, which a path to a file never has by accident."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def cache_folder() -> Path:
    """Where the Hub's files are cached on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot(repo_id: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """Fetch the files of a repository that match `patterns`, from the cache where they are there.

    Without a network, or with `HF_HUB_OFFLINE=1`, this is what the cache has of the revision, which may lack files:
    callers look at what they got.

    Args:
        repo_id: OWNER/NAME.
        patterns: shell patterns of the wanted paths.
        revision: branch, tag or commit; the default branch if None.

    Returns:
        The folder of the revision in the cache.

    Raises:
        NotAtHand: there is no such revision here, and it could not be fetched.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_OFFLINE:
        disable_progress_bars()  # nothing is downloaded: the bar would count files that were there already
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise NotAtHand("its owner asks for consent: accept the terms on its page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise NotAtHand(f"it has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise NotAtHand("the Hub has no such repository, or it is private and HF_TOKEN is not set") from None
    except errors.IncompleteSnapshotError as error:  # of any file that matches, whether a caller reads it or not
        return Path(error.snapshot_path)
    except errors.LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub was not reached"
        raise NotAtHand(offline) from None
    except UnicodeError:
        raise NotAtHand("HF_TOKEN holds characters that no token has") from None
    except (
        errors.HTTPError,  # type: ignore[attr-defined]  # any of the client's, such as a proxy's refusal
        errors.HFValidationError,
        OSError,
    ) as error:
        raise NotAtHand(" ".join(str(error).split())[:200]) from None
