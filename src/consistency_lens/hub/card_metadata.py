"""What the Hub takes in the head of a card, so that a card is refused before anything is made for it."""

import difflib
import re
from collections.abc import Sequence

# Identifiers of https://huggingface.co/docs/hub/repositories-licenses; what is not among them is `other`.
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
    """.split()
)
# ISO 639, of two or three letters, and what the Hub takes besides
LANGUAGE_PATTERN = r"[a-z]{2,3}|code|multilingual"


def check_card_metadata(license: str | None, language: Sequence[str]) -> None:
    """Checks what a user says for the head of a card.

    Raises:
        ValueError: for a licence that the Hub has no identifier for, or a language that is no ISO 639 code.
    """
    if license is not None and license not in LICENSES:
        near = difflib.get_close_matches(license.lower(), LICENSES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "pass 'other' if it has none"
        raise ValueError(f"license: the Hub knows no {license!r} (see its docs, hub/repositories-licenses); {hint}")
    wrong = [name for name in language if not re.fullmatch(LANGUAGE_PATTERN, name)]
    if wrong:
        raise ValueError(f"language: got {wrong[0]!r}; pass ISO 639 codes of two or three small letters, such as en")
