"""What can be wrong with a caption beside what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from polyclinic.client.check.identifiers import in_text, masked
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.checkpoint import large_files
from polyclinic.common.generators.families import FAMILIES
from polyclinic.common.generators.public import resolve

# The replacement character; control characters; UTF-8 read as Windows-1252 and written again.
_DAMAGED = re.compile(
    "�|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|Ã[\x80-¿ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€|[\ud800-\udfff]"
)
Said = list[tuple[str, str]]


def examine(caption: str) -> Said:
    """Find damaged characters and identifiers in one caption.

    Returns:
        (code, detail) of each; a matched span is masked.
    """
    found: Said = []
    spans = in_text(caption)
    if spans:
        found.append(("caption-identifier", masked(caption, spans)))
    damage = _DAMAGED.search(caption)
    if damage:
        near = masked(caption, spans)[max(0, damage.start() - 20) : damage.end() + 20] if spans else caption
        found.append(("caption-encoding", ascii(near)[1:-1][:80]))
    return found


class Limit:
    """A study's text encoder, as far as it says how long a caption may be."""

    def __init__(self, settings: GeneratorSettings) -> None:
        from transformers import AutoTokenizer

        if settings.large:
            files, facts = large_files(settings, weights=False), FAMILIES[settings.family]
            folder = files.prior or files.pipeline
            assert folder is not None
            text, self.most = folder / facts.tokenizer, facts.tokens or settings.max_tokens
        else:
            text = resolve(settings.text_encoder, settings.text_encoder_revision, "generator.text_encoder")
            self.most = settings.max_tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(text, trust_remote_code=False)

    def lengths(self, captions: Sequence[str]) -> Iterator[int]:
        """Count each caption's tokens, start and end included."""
        for some in _portions(captions, 1024):
            tokens = self._tokenizer(list(some), truncation=False, return_attention_mask=False, verbose=False)
            yield from (len(ids) for ids in tokens["input_ids"])


def _portions(items: Sequence[str], size: int) -> Any:
    return (items[start : start + size] for start in range(0, len(items), size))
