"""Where a checkpoint comes from, as far as it says: for the card of what is made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jaxalign.buckets import is_url
from jaxalign.models.gguf import open_gguf
from jaxalign.models.peft import base_of, is_adapter
from jaxalign.models.pretrained import ALL_FILES, find_checkpoint

FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.S)
ENTRY = re.compile(r"""^(license|base_model):[ ]*(['"]?)(\S.*?)\2[ ]*$""", re.M)


@dataclass(frozen=True)
class Origin:
    """What a card may say of the model that was trained further.

    Attributes:
      base_model: its Hub name; None where it is only a path here, which means nothing elsewhere.
      licence: its licence, as the Hub or the GGUF file writes it; None where it does not say.
    """

    base_model: str | None = None
    licence: str | None = None


def origin_of(path: str | Path) -> Origin:
    """What a checkpoint says of itself: a Hub name, `general.license` of a GGUF file, the front matter of a README.md.

    The base that is named in a README.md is taken over from our own exports alone, whose base it is too.

    Args:
      path: as `load` takes it; of a PEFT adapter its base counts.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    local = find_checkpoint(path, ALL_FILES)
    if is_adapter(local):
        return origin_of(base_of(local))
    if local.is_file():
        return Origin(licence=open_gguf(local).metadata.get("general.license"))
    card = local / "README.md"
    front = FRONT_MATTER.match(card.read_text(encoding="utf-8")) if card.is_file() else None
    said = {key: value for key, _, value in ENTRY.findall(front[1])} if front else {}
    on_hub = not is_url(path) and not Path(path).exists()
    ours = front is not None and "- jaxalign" in front[1].splitlines()
    return Origin(str(path) if on_hub else said.get("base_model") if ours else None, said.get("license"))
