"""Patches of libraries refuse versions in which their names have changed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_utils

from align.errors import UserError
from align.patches.accelerate import use_gloo_on_cpus
from align.patches.datasets import pin_revisions
from align.patches.deepspeed import link_optimizer_states
from align.patches.llmcompressor import skip_pinning
from align.patches.nltk import without_downloads
from align.patches.optuna import trial_id
from align.patches.peft import float32_adapters, has_hooks, replace_lora_linear
from align.patches.transformers import (
    attention_name,
    keep_curve_names,
    revert_conversion,
    save_everything,
    save_only,
    tracker_module,
    wrap_templates,
)
from align.patches.trl import replace_fused_head
from align.patches.verifiers import set_state


def test_changed_template_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.utils.chat_template_utils._compile_jinja_template"
    monkeypatch.setattr(name, lambda chat_template, environment: None)
    with pytest.raises(UserError, match=r"^transformers \S+: .* has the parameters \(chat_template, environment\)"):
        wrap_templates(lambda compile_template: compile_template)


def test_changed_conversion_of_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", lambda weights: weights)
    with pytest.raises(UserError, match="revert_weight_conversion has the parameters"):
        revert_conversion(torch.nn.Linear(1, 1), {})


def test_missing_name_of_ignored_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.PreTrainedModel._keys_to_ignore_on_save")
    with pytest.raises(UserError, match="has no transformers:PreTrainedModel._keys_to_ignore_on_save"):
        save_only(torch.nn.Linear(1, 1), [], print)


def test_writer_of_files_is_replaced_only_while_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    writers = []

    class Model:
        _keys_to_ignore_on_save = None

        def save_pretrained(self) -> None:
            writers.append(transformers.modeling_utils.safe_save_file)

    original = transformers.modeling_utils.safe_save_file
    save_everything(Model(), print)
    assert writers == [print]
    assert transformers.modeling_utils.safe_save_file is original
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda tensors, file: None)
    with pytest.raises(UserError, match=r"safe_save_file has the parameters \(tensors, file\)"):
        save_everything(Model(), print)


def test_changed_lora_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.forward", lambda self, x: x)
    with pytest.raises(UserError, match=r"^peft \S+: peft\.tuners\.lora\.layer:Linear\.forward has the parameters"):
        replace_lora_linear(torch.nn.Linear(1, 1), torch.nn.Linear)


def test_changed_placement_of_adapters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer"
    monkeypatch.setattr(path, lambda self, name: None)
    message = r"_move_adapter_to_device_of_base_layer has the parameters \(self, name\)"
    with pytest.raises(UserError, match=message), float32_adapters():
        pass


def test_hooks_of_each_kind_are_seen() -> None:
    assert not has_hooks(torch.nn.Linear(1, 1))
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        module = torch.nn.Linear(1, 1)
        getattr(module, register)(lambda *_: None)
        assert has_hooks(module), register


def test_missing_names_of_formats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("datasets.packaged_modules._PACKAGED_DATASETS_MODULES")
    with pytest.raises(UserError, match="^datasets .* has no datasets.packaged_modules:_PACKAGED_DATASETS_MODULES"):
        pin_revisions({})


def test_missing_download_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nltk")
    monkeypatch.delattr("nltk.download")
    with pytest.raises(UserError, match="has no nltk:download"), without_downloads():
        pass


def test_trial_without_number_is_refused() -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match=r"^optuna \S+: trials have no _trial_id"):
        trial_id(SimpleNamespace())
    assert trial_id(SimpleNamespace(_trial_id=3)) == 3


def test_missing_attention_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.PreTrainedConfig._attn_implementation")
    with pytest.raises(UserError, match="has no transformers:PreTrainedConfig._attn_implementation"):
        attention_name(SimpleNamespace())


def test_toolset_without_state_is_refused() -> None:
    with pytest.raises(UserError, match="has no _inert_state"):
        set_state(SimpleNamespace(), {})
    toolset = SimpleNamespace(_inert_state=None)
    set_state(toolset, {"score": 1})
    assert toolset._inert_state == {"score": 1}


def test_changed_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.state.PartialState._prepare_backend", lambda self, cpu: None)
    with pytest.raises(UserError, match=r"^accelerate \S+: .*_prepare_backend has the parameters \(self, cpu\)"):
        use_gloo_on_cpus()


def test_changed_fused_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda: True)
    with pytest.raises(UserError, match=r"^trl \S+: trl\.trainer\.utils:_use_triton has the parameters \(\)"):
        replace_fused_head(None)


def test_missing_link_of_states_is_refused() -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=r"^deepspeed \S+: its optimizer has no _hp_optimizer_states_linked"):
        link_optimizer_states(SimpleNamespace())


def test_changed_names_of_curves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.rewrite_logs", lambda logs: logs)
    with pytest.raises(UserError, match=r"rewrite_logs has the parameters \(logs\)"):
        keep_curve_names()


def test_tracker_without_module_is_refused() -> None:
    with pytest.raises(UserError, match=r"^transformers \S+: SimpleNamespace has no _wandb"):
        tracker_module(SimpleNamespace(), "wandb")


def test_tensors_are_not_pinned_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", original)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    skip_pinning()
    assert torch.Tensor.pin_memory is original
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    skip_pinning()
    tensor = torch.ones(2)
    assert tensor.pin_memory() is tensor
