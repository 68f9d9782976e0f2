"""The class of a trainer's options refuses at the start of the stage what ``plan`` could not check."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.options import field_dumps
from align.errors import UserError
from tests.support.training.sft_setup import make_sft_trainer


@pytest.mark.parametrize(
    ("option", "message"),
    [({"patience": 3}, "unexpected keyword argument 'patience'"), ({"optim": "adamw_never"}, "adamw_never is not a")],
)
def test_class_refuses_options_of_untested_versions(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(field_dumps, "_installed_version", lambda package: "99.0")
    field_dumps.class_options.cache_clear()
    with pytest.raises(UserError, match=rf"stage: trainer: .*{message}"):
        make_sft_trainer(tmp_path, tiny_model, trainer=option)
    field_dumps.class_options.cache_clear()
