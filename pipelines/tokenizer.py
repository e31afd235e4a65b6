"""The model's tokenizer, loaded as vLLM loads it, without importing vLLM."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pipelines.errors import ModelError
from pipelines.model_folder import local_model
from pipelines.settings import ModelSettings

#: vLLM's own tokenizer classes (DeepSeek V3.2, Kimi audio …) live inside vLLM; these modes are transformers'.
_TRANSFORMERS_MODES = ("auto", "hf", "slow")


def do_without_torch(model: ModelSettings) -> None:
    """Keep torch out of this process, which will load a tokenizer and never a model.

    transformers imports torch where it finds it: 3.5 s of CPU and 404 MB instead of 1.1 s and 73 MB, for nothing that a
    tokenizer needs. A None in `sys.modules` is how Python is told that a module is not there.
    """
    if not model.engine.get("trust_remote_code"):
        sys.modules.setdefault("torch", cast("ModuleType", None))


def load_tokenizer(model: ModelSettings) -> Any:
    """The transformers tokenizer of `model`, one per process.

    Takes the name from `model.tokenizer` or `model.source`; revision, trust_remote_code, tokenizer_mode and
    download_dir as vLLM would (`vllm/tokenizers/registry.py`). Raises ModelError when there is none to load.
    """
    engine = model.engine
    mode = str(engine.get("tokenizer_mode", "auto"))
    if mode not in _TRANSFORMERS_MODES:
        raise ModelError(
            f"model.engine.tokenizer_mode: Dray reads prompts with transformers' tokenizers and cannot use {mode!r}; "
            f"allowed: {', '.join(_TRANSFORMERS_MODES)}"
        )
    model = local_model(model, weights=False)
    return _load(
        model.tokenizer or model.source,
        engine.get("tokenizer_revision") or model.revision,
        bool(engine.get("trust_remote_code", False)),
        engine.get("download_dir"),
        mode != "slow",
        _token(engine.get("hf_token")),
    )


def _token(hf_token: Any) -> str | bool | None:
    return hf_token if isinstance(hf_token, (str, bool)) else None


@lru_cache(maxsize=4)
def _load(
    source: str,
    revision: str | None,
    trust_remote_code: bool,
    cache_dir: str | None,
    use_fast: bool,
    token: str | bool | None,
) -> Any:
    if _is_path(source) and not Path(source).is_dir():
        raise ModelError(f"model {source!r}: there is no such folder")
    # The prepare and commit stages run many processes side by side: one thread each, and no fork warnings.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=trust_remote_code,
            cache_dir=cache_dir,
            use_fast=use_fast,
            truncation_side="left",
            token=token,
        )
    except Exception as error:  # tokenizers raises bare Exception, transformers all sorts
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = (
                "its tokenizer is code of its own, which takes `model.engine.trust_remote_code: true` and the "
                "platform's permission (docs/models.md)"
            )
        elif _is_path(source) and not _has_tokenizer(Path(source)):
            reason = (
                "the folder has no tokenizer files (tokenizer.json, tokenizer_config.json or tokenizer.model)"
            )
        raise ModelError(f"model {source!r}: the tokenizer does not load: {reason[:400]}") from error


def _is_path(source: str) -> bool:
    return source.startswith(("/", "./", "../", "~")) or Path(source).is_dir()


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*"))
