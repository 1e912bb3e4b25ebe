"""The same checkpoint in the transformers package (extra [hf]): what `weft check` compares with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cli._gguf_reference import reference_model
from weft.errors import ConfigError
from weft.models.gguf.header import is_gguf

if TYPE_CHECKING:
    from torch import Tensor


def require() -> None:
    """Raise ConfigError unless transformers can be imported."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"weft check compares with the transformers package, which cannot be imported ({error}); "
            "install it with: pip install 'weft[hf]'"
        ) from None


class Reference:
    """A checkpoint as transformers runs it: float32 on the CPU, its plainest attention, no code from the checkpoint.

    The weights are those of the file; where they are stored in fewer bits, float32 holds them exactly.
    A GGUF file is read by the gguf package.  Raises ConfigError when transformers cannot load the folder.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if is_gguf(folder):
            self._model: Any = reference_model(folder).eval()
            return
        try:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
            )
        except Exception as error:  # whatever it raises, there is nothing to compare with
            reason = " ".join(str(error).split())[:400]
            raise ConfigError(
                f"transformers cannot load {folder}, so there is nothing to compare with: {reason}"
            ) from error
        self._model.eval()

    def logits(self, ids: list[int]) -> Tensor:
        """Logits of every position, [len(ids), vocab], float32: one pass over the whole context, without a cache."""
        import torch

        with torch.inference_mode():
            out: Tensor = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return out.float()
