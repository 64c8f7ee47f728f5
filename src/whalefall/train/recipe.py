"""Train room: a training run as a TOML file.

In: the file. Out: a `Recipe` in which everything is checked that can be checked without the data.
Paths in it are relative to the file's folder.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from whalefall.errors import ConfigError, MissingError, WhalefallError
from whalefall.model.config import ModelConfig, load_config, parse_config
from whalefall.pipeline import make

__all__ = ["Recipe", "Source", "read_recipe"]


class _Table(BaseModel):
    """A table of the file: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Run(_Table):
    """[run].

    Attributes:
        folder: where checkpoints, history and curves go.
        steps: optimizer steps.
        seed: of initial weights and of the order of the data.
        precision: of the products of linear layers.
        threads: of each rank; 0: the cores divided among the ranks.
    """

    folder: str = "run"
    steps: int = Field(ge=1)
    seed: int = 0
    precision: Literal["fp8", "bf16", "fp32"] = "fp8"
    threads: int = Field(default=0, ge=0)


class Source(_Table):
    """[[data.source]]: `.ffr` files of token rows, and how many of them a step takes."""

    files: str
    rows: int = Field(ge=1)


class Data(_Table):
    """[data]: rows of `length` tokens from several sources, mixed in fixed numbers a step."""

    length: int = Field(ge=4)
    source: list[Source] = Field(min_length=1)


class Parallel(_Table):
    """[parallel]: pipeline × expert × data ranks; a step's rows make `chunks` for each pipeline."""

    pipeline: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)
    data: int = Field(default=1, ge=1)
    schedule: Literal["1f1b", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    chunks: int = Field(default=1, ge=1)

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.pipeline * self.expert * self.data

    @property
    def shards(self) -> int:
        """Ranks, or pipelines, that work on rows of their own."""
        return self.expert * self.data


class Optimizer(_Table):
    """[optimizer]: AdamW; the rate warms up, stays, and falls linearly to `floor` of itself.

    Attributes:
        hold: share of the steps before it falls.
        clip: largest norm of all gradients together.
        average: decay of a running average of the weights; 0: none is kept.
    """

    rate: float = Field(gt=0)
    warmup: int = Field(default=50, ge=0)
    hold: float = Field(default=0.3, ge=0, le=1)
    floor: float = Field(default=0.02, ge=0, le=1)
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)  # TOML has lists
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    average: float = Field(default=0.0, ge=0, lt=1)


class Loss(_Table):
    """[loss].

    Attributes:
        mtp, mtp_late: weight of the MTP loss before and after the share `late` of the steps.
        mtp_every: the MTP layer runs in every n-th step.
        sequence: weight of the sequence-wise balance loss.
        bias_speed: how far a gate's bias moves a step, until the share `bias_until` of the steps.
    """

    mtp: float = Field(default=0.3, ge=0)
    mtp_late: float = Field(default=0.1, ge=0)
    late: float = Field(default=0.7, ge=0, le=1)
    mtp_every: int = Field(default=1, ge=1)
    sequence: float = Field(default=1e-4, ge=0)
    bias_speed: float = Field(default=1e-3, ge=0)
    bias_until: float = Field(default=0.9, ge=0, le=1)


class Checkpoint(_Table):
    """[checkpoint]: one every so many steps, the last `keep` of them stay.

    Attributes:
        folder: where, also any fsspec URL; "": checkpoints/ in run.folder.
    """

    folder: str = ""
    every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)


class Recipe(_Table):
    """A whole recipe; `model` holds the names of a `config.json`, or `config`, a folder with one.

    Attributes:
        base: the recipe file's folder, which relative paths start at.
    """

    model: dict[str, Any]
    run: Run
    data: Data
    optimizer: Optimizer
    parallel: Parallel = Parallel()
    loss: Loss = Loss()
    checkpoint: Checkpoint = Checkpoint()
    base: str = "."

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        if set(self.model) == {"config"}:
            return load_config(self.path(str(self.model["config"])))
        return parse_config({"model_type": "deepseek_v3", **self.model}, "[model]")

    @property
    def raw_config(self) -> dict[str, Any]:
        """The model's `config.json` for an export."""
        if set(self.model) == {"config"}:
            path = Path(self.path(str(self.model["config"]))) / "config.json"
            return dict(json.loads(path.read_text("utf-8")))
        return {
            "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **self.model
        }  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows of a step, all sources together."""
        return sum(source.rows for source in self.data.source)

    @property
    def folder(self) -> str:
        """The run's folder."""
        return self.path(self.run.folder)

    @property
    def checkpoints(self) -> str:
        """The checkpoints' folder, or its URL."""
        if self.checkpoint.folder:
            return self.path(self.checkpoint.folder)
        return f"{self.folder}/checkpoints"

    def path(self, name: str) -> str:
        """A path of the file, seen from here; URLs and absolute paths stay."""
        return name if "://" in name else str(Path(self.base) / name)

    def fingerprint(self) -> str:
        """Changes where going on from a checkpoint would make another run of it.

        The layout of ranks, precision, folders and how often to save are not in it.
        """
        chosen = {
            "model": self.model,
            "data": self.data.model_dump(),
            "optimizer": self.optimizer.model_dump(),
            "loss": self.loss.model_dump(),
            "run": {"seed": self.run.seed, "steps": self.run.steps},
        }
        text = json.dumps(chosen, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_recipe(path: str | Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the TOML file.
        changes: dotted names → values that replace the file's ("run.steps": 10).
    Raises: MissingError, ConfigError, UnsupportedError: one line that names file and key.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"train: no recipe {path}; wanted a TOML file")
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"train: {path}: {error}") from None
    for name, value in (changes or {}).items():
        _put(raw, name, value)
    if "base" in raw:
        raise ConfigError(f"train: {path}: base is not a key of a recipe; remove it")
    try:
        recipe = Recipe(**raw, base=str(path.parent))
    except ValidationError as error:
        raise ConfigError(f"train: {path}: {_first(error)}") from None
    try:
        _check(recipe)
    except WhalefallError as error:
        raise type(error)(f"train: {path}: {error}") from None
    return recipe


def _put(raw: dict[str, Any], name: str, value: Any) -> None:
    *tables, key = name.split(".")
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"train: {name}: {table} is no table of the recipe")
    raw[key] = value


def _first(error: ValidationError) -> str:
    """The first problem in one line: the key, the value, what was wanted."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"unknown key {where}"
    if kind == "missing":
        return f"no {where}; it has no default"
    text = problem["msg"].replace("Input should be", "wanted")
    return f"{where} is {problem['input']!r}: {text}"


def _check(recipe: Recipe) -> None:
    """What several keys must fulfil together."""
    config, parallel = recipe.config, recipe.parallel
    make(parallel.schedule, parallel.pipeline, parallel.chunks)
    wanted = parallel.shards * parallel.chunks
    if recipe.rows % wanted:
        raise ConfigError(
            f"{recipe.rows} rows a step, wanted a multiple of {wanted} = {parallel.shards} shards "
            f"x {parallel.chunks} chunks"
        )
    if parallel.expert > 1 and (not config.num_experts or config.num_experts % parallel.expert):
        raise ConfigError(
            f"parallel.expert is {parallel.expert}, wanted a divisor of the model's "
            f"{config.num_experts} experts"
        )
    if recipe.data.length > config.max_position_embeddings:
        raise ConfigError(
            f"data.length is {recipe.data.length}, the model has {config.max_position_embeddings} "
            "positions"
        )
