"""A plain model with the compressed tables that a checkpoint has, so that it can be loaded."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from cce_torchrec.checkpoint.info import checkpoint_info
from cce_torchrec.checkpoint.manifest import CCETableRecord
from cce_torchrec.checkpoint.rebuilt import compressed_fields
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.joint import has_default_init
from cce_torchrec.modules.compress import refuse_itself, replace_modules, replacement
from cce_torchrec.modules.compressible import Found, collections_of


def compress_like(model: nn.Module, folder: str | Path) -> list[str]:
    """Replaces, in place, the collections of `model` whose tables a checkpoint has compressed.

    For a checkpoint of `cce-torchrec compress`, which `load_checkpoint` then loads into the model,
    sharded or not. Features, pooling and bounds of initial values stay those of the model. Call it
    before optimizers are applied and the model is sharded; the model may be on the meta device.

    Args:
        model: with TorchRec's collections, under the paths that they had in the job.
        folder: see `checkpoint_info`. Reads one small file.

    Returns:
        Full names of the tables that are compressed now.

    Raises:
        ValueError: no table of the model is compressed in the checkpoint, one has another shape,
            or its module cannot be replaced.
    """
    saved = {
        name: record
        for name, record in checkpoint_info(folder).tables.items()
        if isinstance(record, CCETableRecord)
    }
    done: list[str] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for at in collections_of(model):
        own = [_full_name(at, config) for config in at.configs]
        chosen = [n for n, c in zip(own, at.configs, strict=True) if n in saved and not is_cce(c)]
        # What has no compressed table stays TorchRec's own, with its keys.
        if not chosen:
            continue
        if at.reason:
            raise ValueError(f"tables {chosen} cannot be compressed: {at.reason}")
        refuse_itself(model, {(at.path, config.name): config for config in at.configs})
        tables = [
            _like(config, saved[name]) if name in chosen else config
            for name, config in zip(own, at.configs, strict=True)
        ]
        replacements[at.module] = replacement(at, tables)
        done += chosen
    if not done:
        raise ValueError(
            f"{folder}: compressed tables are {sorted(saved)}, and none is a plain table of the "
            "model, whose paths have to be those of the job that was saved"
        )
    replace_modules(model, replacements)
    return done


def _full_name(at: Found, config: BaseEmbeddingConfig) -> str:
    return f"{at.path}.{config.name}" if at.path else config.name


def _like(config: BaseEmbeddingConfig, saved: CCETableRecord) -> CCEEmbeddingBagConfig:
    """The table of the model in the form that it was saved in."""
    # Rows that are more could grow, but which ids they are is not for this to say.
    here, there = ([one.num_embeddings, one.embedding_dim] for one in (config, saved))
    if here != there:
        raise ValueError(
            f"table {saved.full_name!r} is {here} in the model and {there} in the checkpoint"
        )
    names = {field.name for field in fields(EmbeddingBagConfig)}
    kept: dict[str, Any] = {
        f.name: getattr(config, f.name) for f in fields(config) if f.name in names
    }
    if has_default_init(config):  # which would be taken for one of the user's own
        kept["init_fn"] = None
    return CCEEmbeddingBagConfig(**kept, **compressed_fields(saved))
