"""Worker extension of a vLLM server that loads weights and reports what it holds. Runs in the server's process.

vLLM loads it with ``--worker-extension-cls align.inference.server_worker.WeightsKeeper``; ``/collective_rpc`` calls it.
Each load goes through the worker's own methods, whoever calls them. They are counted, so a load that the run did not
order shows. The count is needed next to the digest: on a CPU vLLM keeps matrices in packed copies (oneDNN's) that
cannot be read, and only embeddings, norms and biases are left to digest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.inference.transformers import pick_tokens
from align.inference.weights import AdaptedWeights, HeldBase, checkpoint_weights, combine, digest_all
from align.patches.vllm import count_calls, draw_once_per_row, flatten_rotary, reload_on_cpu, use_cpu_norms

WORKER = f"{__name__}.WeightsKeeper"
LOAD = "align_load_weights"
REPORT = "align_report_weights"
NAME = "align_name_weights"
"""Methods of ``WeightsKeeper`` for ``/collective_rpc``."""
WEIGHT_METHODS = (
    *("load_model", "reload_weights", "start_weight_update", "start_draft_weight_update", "update_weights"),
    *("finish_weight_update", "update_config", "add_lora", "remove_lora", "sleep", "wake_up"),
)
"""Methods of vLLM's worker (0.31) that change what it computes with."""


class WeightsKeeper:
    """Methods that vLLM adds to its worker. Their results are plain JSON."""

    device: Any
    model_runner: Any

    def align_load_weights(
        self, path: str, version: str, digest: str, base: str = "", base_digest: str = ""
    ) -> dict[str, Any]:
        """Load the safetensors of a folder under the name ``version``, and report what is held then.

        With ``base``, another folder, they are an adapter of its weights (``align.inference.weights.AdaptedWeights``).
        Raises ``ValueError``, and loads no tensor, if the tensors do not have the digest that was announced.
        """
        # 1. Hash what this process reads: a folder on another machine may show old or half-copied files.
        _refuse_other(path, digest)
        self._align_count_loads()
        # 2. Load through vLLM's own method, which the counter sees.
        with reload_on_cpu(self.model_runner.get_model()):
            if base:
                self._align_load_adapter(path, base, base_digest)
            else:
                self.reload_weights(weights_path=path)  # type: ignore[attr-defined]
        return self.align_name_weights(version, digest)

    def _align_load_adapter(self, path: str, base: str, base_digest: str) -> None:
        if self._align_held.key != base_digest:
            _refuse_other(base, base_digest)
        # The base stays on disk, and in the system's cache of files: merged weights are all that this process holds.
        adapter = {name: tensor.to(self.device) for name, tensor in checkpoint_weights(Path(path))}
        weights = AdaptedWeights(base_digest, lambda: checkpoint_weights(Path(base)), adapter)
        with self._align_held.loading(weights) as needed:
            self.reload_weights(weights_iterator=iter(needed))  # type: ignore[attr-defined]

    def align_name_weights(self, version: str, digest: str | None = None) -> dict[str, Any]:
        """Give the weights that are held a name and the digest under which they came, and report what is held."""
        self._align_count_loads()
        self._align_name = (version, digest)
        return self.align_report_weights(True)

    def align_report_weights(self, content: bool = False) -> dict[str, Any]:
        """Report the name and digest that the weights came under, and how often any were loaded.

        ``content`` adds a digest of the parameters and buffers that the model holds now.
        """
        self._align_count_loads()
        version, digest = getattr(self, "_align_name", (None, None))
        report = {"version": version, "digest": digest, "loads": self._align_loads}
        if content:
            report["content"] = self._align_content()
        return report

    def _align_content(self) -> str:
        model = self.model_runner.get_model()
        # On a CPU packed matrices are empty here; what is left still tells two checkpoints apart.
        pairs = [*model.named_parameters(), *model.named_buffers()]
        return combine(digest_all((name, tensor) for name, tensor in pairs if tensor.numel()))

    def _align_count_loads(self) -> None:
        """Wrap the worker's methods that change weights so calls are counted, from the first call of this on."""
        # vLLM makes the worker; this class has no __init__ to count from.
        if hasattr(self, "_align_loads"):
            return
        self._align_loads = 0
        self._align_held = HeldBase()
        # The run asks for a report before it samples; in a server that runs already, before it loads weights.
        self._align_speed_up()
        count_calls(self, WEIGHT_METHODS, self._align_count)

    def _align_speed_up(self) -> None:
        """On a CPU, use the norms and the sampler of the in-process engine: a seed draws the same tokens in both."""
        if self.device.type == "cpu":
            use_cpu_norms()
            flatten_rotary(self.model_runner.get_model())
            draw_once_per_row(self.model_runner, pick_tokens)

    def _align_count(self) -> None:
        self._align_loads += 1
        self._align_held.key = None


def _refuse_other(path: str, digest: str) -> None:
    """Raise ``ValueError`` if the tensors in the folder ``path`` have another digest."""
    received = combine(digest_all(checkpoint_weights(Path(path))))
    if received != digest:
        raise ValueError(f"the weights in {path} have the digest {received}, and {digest} was announced")
