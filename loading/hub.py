"""Fetching a checkpoint's files from the Hugging Face hub. Needs the optional package huggingface_hub."""

import re
from pathlib import Path

from errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Patterns of the hub's own kind: a star also matches the slash of a subfolder, as in original/tokenizer.model.
WANTED = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.jinja", "LICENSE*"]
LEFT_OUT = ["*/*.json", "*/*.safetensors", "*/*.bin"]  # the same weights in other formats


def download(source: str) -> Path:
    """Fetch the files of a hub id "org/name", or find them in the cache; returns their folder.

    Weights in .bin files are fetched only if there are none in safetensors. Raises UserError in one line, with the way
    out, for an id that is unknown, gated or out of reach.
    """
    if not HUB_ID.fullmatch(source):
        raise UserError(f"{source} is neither an existing file or folder nor a hub id of the form org/name")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        for patterns in (WANTED, [*WANTED, "pytorch_model*.bin"]):
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns, ignore_patterns=LEFT_OUT))
            if any(folder.glob("*.safetensors")):
                break
        return folder
    except Exception as error:  # a network fails in many ways, each of which means that the files did not come
        first_line = str(error).strip().split("\n")[0]
        reason = f"it cannot be downloaded ({type(error).__name__}: {first_line})"
        if isinstance(error, RepositoryNotFoundError):
            reason = "there is no such public repository on the hub (if it is private: `hf auth login`)"
        if isinstance(error, GatedRepoError):  # it is a RepositoryNotFoundError, too
            reason = f"it is gated: open https://huggingface.co/{source}, accept the licence, then run `hf auth login`"
        raise UserError(f"{source} is not a local file or folder, and {reason}") from error
